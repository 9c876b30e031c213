"""What travels with a donor, a transplant or an export: the tokenizer, the processor, generation, and nothing else."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoTokenizer

from tests.faults.looping import pt_file
from tests.helpers import DONOR_LAYERS, Shelf, copied, edit_json, loaded, write_tokenizer
from tests.hub_server import ALICE
from transplant_hf import AutoModelWithTransplant, Donor, DonorSpec
from transplant_hf.donor.companions import companions_in, is_companion
from transplant_hf.exporting import export

load = AutoModelWithTransplant.from_pretrained
Save = Callable[[Path, Path], Any]


def save_donor(family: Path, target: Path) -> None:
    donor = Donor.from_pretrained(family / "donor")
    donor.save_pretrained(target, recipient=str(family / "recipient"))


def save_thin(family: Path, target: Path) -> None:
    loaded(family).save_pretrained(target, thin=True)


def save_in_full(family: Path, target: Path) -> None:
    loaded(family).save_pretrained(target)


def save_in_our_format(family: Path, target: Path) -> None:
    loaded(family, strength=0.5).save_pretrained(target)


def save_export(family: Path, target: Path) -> None:
    spec = DonorSpec(str(family / "donor"), 1)
    export(family / "recipient", target, [spec], verify=False, overwrite=True)


SAVES = [save_donor, save_thin, save_in_full, save_in_our_format, save_export]

TRAVELS = (
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
    "bpe.codes",
    "chat_template.jinja",
    "custom_generate/generate.py",
    "custom_generate/parts/beam.py",
    "custom_generate/requirements.txt",
    "dict.txt",
    "ice_text.model",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "source.spm",
    "special_tokens_map.json",
    "tekken.json",
    "video_preprocessor_config.json",
)
STAYS = (
    ".env",
    ".env.model",
    ".vocab.json",
    "LICENSE.key",
    "NOTICE.env",
    "additional_chat_templates/.env",
    "additional_chat_templates/notes.txt",
    "all_results.json",
    "configuration_own.py",
    "custom_generate/.env",
    "custom_generate/.git/hook.py",
    "custom_generate/.hidden.py",
    "custom_generate/__pycache__/generate.cpython-311.pyc",
    "custom_generate/sub/id_rsa",
    "custom_generate/weights.bin",
    "customer_vocabulary.json",
    "customers.codes",
    "customers.model",
    "dict_of_customers.txt",
    "hf_token.json",
    "modeling_own.py",
    "notes.txt",
    "optimizer.pt",
    "original/tokenizer.model",
    "secret.env",
    "tokenizer-e351c8d8.safetensors",
    "tokenizer.py",
    "tokenizer_secret.json",
    "trainer_state.json",
    "training_args.bin",
)


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else name)


def own_tokenizer(folder: Path, template: Any = "MINE {{ messages[0]['content'] }}") -> Any:
    """The recipient's tokenizer with one more token and a template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = template
    return tokenizer


def with_code(recipient: Path) -> None:
    """Give a recipient a tokenizer with code of its own, which imports another file."""
    (recipient / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nfrom .shared_parts import SEVEN\n\n\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    seven = SEVEN\n"
    )
    (recipient / "shared_parts.py").write_text("SEVEN = 7\n")
    (recipient / "processing_stray.py").write_text("raise RuntimeError\n")
    edit_json(
        recipient / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    )


# -- Which files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", SAVES)
def test_all_that_belongs_to_the_model_travels_and_nothing_else(family: Path, tmp_path: Path, save: Save) -> None:
    put(family / "recipient", *TRAVELS, *STAYS)
    save(family, tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert not {*TRAVELS, "tokenizer.json", "tokenizer_config.json", "generation_config.json"} - found
    assert not set(STAYS) & found
    assert companions_in(tmp_path / "out") == companions_in(family / "recipient")


def test_every_file_that_transformers_knows_of_a_tokenizer_travels() -> None:
    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "VOCAB_FILES_NAMES":
                assert isinstance(node.value, ast.Dict)
                names |= {value.value for value in node.value.values if isinstance(value, ast.Constant)}
    assert len(names) > 20
    assert not [name for name in names if not is_companion(str(name))]


@pytest.mark.parametrize("save", SAVES)
def test_a_tokenizer_with_code_of_its_own(family: Path, tmp_path: Path, save: Save) -> None:
    with_code(family / "recipient")
    save(family, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer.seven == 7
    assert not (tmp_path / "out" / "processing_stray.py").exists()


@pytest.mark.parametrize(
    "named", ["../outside.Code", "alice/other--tokenization.Code", "modeling_transplant.Code", "absent.Code", 7, None]
)
def test_code_that_is_no_file_beside_the_tokenizer(family: Path, tmp_path: Path, named: Any) -> None:
    """Least of all in place of the code by which a donor is loaded."""
    put(family, "outside.py")
    put(family / "recipient", "modeling_transplant.py")
    edit_json(family / "recipient" / "tokenizer_config.json", auto_map={"AutoTokenizer": [named, None]})
    save_donor(family, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*.py")] == ["modeling_transplant.py"]
    ours = [(folder / "modeling_transplant.py").read_text() for folder in (family / "donor", tmp_path / "out")]
    assert ours[0] == ours[1]


@pytest.mark.hub
def test_of_a_repository_only_what_travels_is_downloaded(shelf: Shelf, tmp_path: Path) -> None:
    put(shelf.family / "recipient", "tekken.json", "additional_chat_templates/tool_use.jinja", "modeling_own.py")
    put(shelf.family / "recipient", "notes.txt", "secret.env", "optimizer.pt")
    with_code(shelf.family / "recipient")
    shelf.put_base()
    donor = Donor.from_pt(pt_file(shelf.family), shelf.base, layers=list(DONOR_LAYERS))
    donor.save_pretrained(tmp_path / "out", position=1)
    assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True).seven == 7
    asked = {record.path.rpartition("/")[2] for record in shelf.hub.requests.downloads()}
    assert asked == {
        "config.json",
        "generation_config.json",
        "shared_parts.py",
        "tekken.json",
        "tokenization_own.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "tool_use.jinja",
    }
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").exists()


# -- What lies in the folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("saved_before", [False, True])
def test_a_tokenizer_in_the_folder_is_kept(family: Path, tmp_path: Path, save: Save, saved_before: bool) -> None:
    """Fine-tuning scripts save the tokenizer first as often as last."""
    put(family / "recipient", "preprocessor_config.json", "chat_template.jinja")
    mine = own_tokenizer(family / "recipient")
    if saved_before:
        save(family, tmp_path / "out")
    mine.save_pretrained(tmp_path / "out")
    save(family, tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (len(found), found.eos_token, found.chat_template) == (len(mine), mine.eos_token, mine.chat_template)
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


def test_a_tokenizer_in_the_folder_gets_no_part_of_the_recipients(family: Path, tmp_path: Path) -> None:
    put(family / "recipient", "chat_template.jinja", "added_tokens.json")
    write_tokenizer(tmp_path / "out")
    save_thin(family, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None
    assert not (tmp_path / "out" / "added_tokens.json").exists()


@pytest.mark.parametrize("save", [save_donor, save_thin])
def test_the_tokenizer_of_an_earlier_recipient_goes(tiny_llama: Path, tmp_path: Path, save: Save) -> None:
    """It was copied there with the old donor, and is nobody's own."""
    one, other = copied(tiny_llama, tmp_path / "one"), copied(tiny_llama, tmp_path / "other")
    own_tokenizer(other / "recipient").save_pretrained(other / "recipient")
    save(one, tmp_path / "out")
    save(other, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"


def test_a_template_of_ones_own_is_not_mixed_with_the_recipients_others(family: Path, tmp_path: Path) -> None:
    """`tokenizer.save_pretrained` leaves in the folder what a save before it put there."""
    several = {"default": "D", "tool_use": "T"}
    own_tokenizer(family / "recipient", several).save_pretrained(family / "recipient")
    save_thin(family, tmp_path / "thin")
    assert AutoTokenizer.from_pretrained(tmp_path / "thin").chat_template == several
    own_tokenizer(tmp_path / "thin", "MINE").save_pretrained(tmp_path / "thin")
    model = load(tmp_path / "thin")
    for target in ("other", "thin"):
        model.save_pretrained(tmp_path / target, thin=True)
        assert AutoTokenizer.from_pretrained(tmp_path / target).chat_template == "MINE"
    (tmp_path / "thin" / "additional_chat_templates").mkdir()
    put(tmp_path / "thin", "additional_chat_templates/own.jinja")
    model.save_pretrained(tmp_path / "thin", thin=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "thin").chat_template.keys() == {"default", "own"}


def test_the_rest_of_the_folder_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    put(tmp_path / "out", "notes.txt", "custom_generate/generate.py", "preprocessor_config.json", "mine/x.json")
    (tmp_path / "out" / "notes.txt").chmod(0o600)
    before = {path: path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    save_donor(tiny_llama, tmp_path / "out")
    assert {path: path.read_text() for path in before} == before
    assert (tmp_path / "out" / "notes.txt").stat().st_mode & 0o777 == 0o600


def test_a_model_and_its_tokenizer_move_together(tiny_llama: Path, tmp_path: Path) -> None:
    """A full save needs one name too."""
    save_in_full(tiny_llama, tmp_path / "full")
    shutil.move(tmp_path / "full", tmp_path / "moved")
    assert AutoTokenizer.from_pretrained(tmp_path / "moved")("hm").input_ids
    assert "transplant" not in json.dumps(json.loads((tmp_path / "moved" / "config.json").read_text()))


# -- On the Hub -------------------------------------------------------------------------------------------------------


def push_thin(shelf: Shelf, target: str) -> None:
    load(shelf.law).push_to_hub(target, thin=True)


def push_in_full(shelf: Shelf, target: str) -> None:
    load(shelf.law).push_to_hub(target)


def push_donor(shelf: Shelf, target: str) -> None:
    Donor.from_pretrained(shelf.law).push_to_hub(target, recipient=shelf.base)


@pytest.mark.hub
@pytest.mark.parametrize("push", [push_thin, push_in_full, push_donor])
def test_a_tokenizer_in_the_repository_is_kept(
    both: Shelf, as_user: Any, tmp_path: Path, warned: list[str], push: Callable[[Shelf, str], None]
) -> None:
    as_user(ALICE)
    AutoTokenizer.from_pretrained(both.base)  # so that it is at hand, and would be sent
    mine, target = own_tokenizer(both.family / "recipient"), f"{both.law}-mine"
    mine.save_pretrained(tmp_path / "mine")
    both.hub.add_repo(target, tmp_path / "mine")
    push(both, target)
    found = AutoTokenizer.from_pretrained(target)
    assert (len(found), found.chat_template) == (len(mine), mine.chat_template)
    assert [text for text in warned if f"{target} has a tokenizer or processor of its own" in text]
    warned.clear()
    push(both, f"{target}-new")
    push(both, f"{target}-new")
    assert AutoTokenizer.from_pretrained(f"{target}-new").eos_token == "<|endoftext|>"
    assert not [text for text in warned if "of its own" in text]


@pytest.mark.hub
def test_the_tokenizer_of_an_earlier_push_goes(both: Shelf, as_user: Any) -> None:
    as_user(ALICE)
    AutoTokenizer.from_pretrained(both.base)
    target = f"{both.law}-mine"
    push_thin(both, target)
    own_tokenizer(both.family / "recipient").save_pretrained(both.family / "recipient")
    other = f"{both.base}-other"
    both.hub.add_repo(other, both.family / "recipient")
    AutoTokenizer.from_pretrained(other)
    load(other, donors={both.law: 1}).push_to_hub(target, thin=True)
    assert AutoTokenizer.from_pretrained(target).eos_token == "<|im_end|>"

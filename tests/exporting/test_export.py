"""Exports: the transplant's logits from plain Transformers, and the recipient's names and types in the files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2ForSequenceClassification, MixtralConfig

from tests.helpers import (
    DONOR_LAYERS,
    TOKENS,
    Graft,
    cast_weights,
    loaded,
    logits_of,
    make_family,
    plain,
    randomised,
    reference_logits,
    refused,
    run_python,
    tiny_llama_model,
    write_tokenizer,
)
from transplant_hf import AutoModelWithTransplant, ConfigurationError, Donor, DonorSpec
from transplant_hf.exporting import export

load = AutoModelWithTransplant.from_pretrained


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def number_after(name: str, word: str) -> int | None:
    """The layer's number in a checkpoint name."""
    parts = name.split(".")
    return int(parts[parts.index(word) + 1]) if word in parts else None


# -- What is written ------------------------------------------------------------------------------------------------


def test_it_needs_nothing_of_ours(tiny_gpt2: Path, tiny_llama: Path, tiny_gpt_oss: Path, tmp_path: Path) -> None:
    """A process without this package loads exports and full saves, and computes what the layers compute by hand."""
    cases: dict[str, torch.Tensor] = {}
    for family, position, mode in ((tiny_gpt2, 1, "insert"), (tiny_llama, 1, "replace"), (tiny_gpt_oss, 4, "insert")):
        recipient, source = plain(family / "recipient"), plain(family / "source")
        spec = DonorSpec(str(family / "donor"), position, mode=mode)
        assert export(family / "recipient", tmp_path / "out" / family.name, [spec]).verified
        graft = Graft(source, DONOR_LAYERS, position, replace=mode == "replace")
        model = loaded(family, position, mode)
        model.save_pretrained(tmp_path / "out" / f"saved-{family.name}")
        write_tokenizer(tmp_path / "out" / f"saved-{family.name}")
        cases[family.name] = cases[f"saved-{family.name}"] = reference_logits(recipient, [graft])
        for name in (family.name, f"saved-{family.name}"):
            assert torch.equal(logits_of(plain(tmp_path / "out" / name)), logits_of(model))
    code = """
import sys, torch
sys.modules["transplant_hf"] = None
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
torch.set_num_threads(1)
cases = torch.load(sys.argv[1])
for folder in Path(sys.argv[2]).iterdir():
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    assert type(model).__module__.startswith("transformers.models."), type(model)
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids, use_cache=False).logits, cases.pop(folder.name), rtol=1e-5, atol=1e-5)
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **greedy), model.generate(ids, use_cache=False, **greedy))
    assert AutoTokenizer.from_pretrained(folder)("hm").input_ids
    assert GenerationConfig.from_pretrained(folder).max_new_tokens == 11
assert not cases
try:
    import transplant_hf
except ImportError:
    print("alone")
"""
    torch.save(cases, tmp_path / "cases")
    assert run_python(code, tmp_path / "cases", tmp_path / "out").split() == ["alone"]


def test_names_types_and_bits_are_the_recipients(tiny: Path, tmp_path: Path) -> None:
    done = export(tiny / "donor", tmp_path / "full")
    own, theirs = load_file(tiny / "recipient" / "model.safetensors"), load_file(tiny / "donor" / "donor.safetensors")
    found = weights_in(tmp_path / "full")
    word = "h" if any(".h." in name for name in own) else "layers"
    at = {0: 0, 1: 3, 2: 4, 3: 5}
    expected = {}
    for name, tensor in own.items():
        number = number_after(name, word)
        moved = name if number is None else name.replace(f".{word}.{number}.", f".{word}.{at[number]}.")
        expected[moved] = tensor
    prefix = "transformer.h" if word == "h" else "model.layers"
    for name, tensor in theirs.items():
        _, number, rest = name.split(".", 2)
        expected[f"{prefix}.{int(number) + 1}.{rest}"] = tensor
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    data = (tmp_path / "full" / "model.safetensors").read_bytes()
    assert done.files["model.safetensors"].sha256 == hashlib.sha256(data).hexdigest()
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config["architectures"] == [type(plain(tiny / "recipient")).__name__] and "auto_map" not in config


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_cast(tiny: Path, tmp_path: Path, dtype: str) -> None:
    done = export(tiny / "donor", tmp_path / "full", dtype=dtype)
    assert done.dtype == dtype and done.verified
    kind = getattr(torch, dtype)
    fixed = ("norm",) if tiny.name.startswith("gpt_oss") and dtype == "float16" else ()
    for name, tensor in weights_in(tmp_path / "full").items():
        assert tensor.dtype == (torch.float32 if any(word in name for word in fixed) else kind), name
    assert json.loads((tmp_path / "full" / "config.json").read_text())["dtype"] == dtype
    assert torch.equal(logits_of(plain(tmp_path / "full", dtype=kind)), logits_of(load(tiny / "donor", dtype=kind)))


@pytest.mark.parametrize(("ours", "theirs"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_donors_take_the_recipients_type(
    tiny_llama: Path, family: Path, tmp_path: Path, ours: str, theirs: str
) -> None:
    cast_weights(family / "recipient", getattr(torch, ours))
    source = plain(family / "source", dtype=getattr(torch, theirs))
    Donor.from_model(source, DONOR_LAYERS, name="donor").save_pretrained(
        family / "donor", position=1, recipient=str(family / "recipient")
    )
    assert export(family / "donor", tmp_path / "full").dtype == ours
    assert {tensor.dtype for tensor in weights_in(tmp_path / "full").values()} == {getattr(torch, ours)}


def test_shards(tiny_llama: Path, family: Path, tmp_path: Path) -> None:
    """Bounded in size, with an index; from a sharded recipient."""
    model = plain(family / "recipient")
    (family / "recipient" / "model.safetensors").unlink()
    model.save_pretrained(family / "recipient", max_shard_size="30KB")
    done = export(family / "donor", tmp_path / "full", max_shard_size="40KB")
    assert len(done.files) > 3
    assert all(stamp.size <= 40_000 + 4_000 for stamp in done.files.values())
    index = json.loads((tmp_path / "full" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(done.files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights_in(tmp_path / "full").values())
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(load(tiny_llama / "donor")))


def test_an_earlier_export_is_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    export(tiny_llama / "donor", tmp_path / "full", max_shard_size="40KB")
    (tmp_path / "full" / "notes.txt").write_text("mine")
    done = export(tiny_llama / "donor", tmp_path / "full", overwrite=True)
    names = {path.name for path in (tmp_path / "full").iterdir()}
    assert {name for name in names if "safetensors" in name} == set(done.files) == {"model.safetensors"}
    assert "notes.txt" in names
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_kinds_of_layers_that_no_longer_repeat_are_reported(tiny_gpt_oss: Path, tmp_path: Path) -> None:
    """Sliding, full, sliding, full; the donor is full, sliding."""
    donor = str(tiny_gpt_oss / "donor")
    regular = export(tiny_gpt_oss / "recipient", tmp_path / "1", {donor: 1}, verify=False)
    assert not regular.irregular and "layer_types" not in str(regular)
    broken = export(tiny_gpt_oss / "recipient", tmp_path / "2", {donor: 2}, verify=False)
    assert broken.irregular and "layer_types do not repeat" in str(broken)


def test_the_card(tiny_llama: Path, tmp_path: Path) -> None:
    export(tiny_llama / "donor", tmp_path / "full", license="apache-2.0")
    card = (tmp_path / "full" / "README.md").read_text()
    assert "loads with Transformers alone" in card and 'from_pretrained("full")' in card
    assert "license: apache-2.0" in card and "6 layers run: 4 recipient, 2 donor" in card
    (tmp_path / "full" / "README.md").write_text("mine")
    with refused(ConfigurationError, "no record of writing"):
        export(tiny_llama / "donor", tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "README.md").read_text() == "mine"


# -- What is read ---------------------------------------------------------------------------------------------------


def test_several_donors(tiny_gpt2: Path, tmp_path: Path) -> None:
    recipient, source = plain(tiny_gpt2 / "recipient"), plain(tiny_gpt2 / "source")
    donor = str(tiny_gpt2 / "donor")
    specs = [DonorSpec(donor, 0, name="a", layers=[1]), DonorSpec(donor, 2, "replace", name="b")]
    done = export(tiny_gpt2 / "recipient", tmp_path / "full", specs)
    assert list(done.layer_map) == [
        ("a", 2),
        ("recipient", 0),
        ("recipient", 1),
        ("b", 1),
        ("b", 2),
    ]
    expected = reference_logits(recipient, [Graft(source, [2], 0), Graft(source, DONOR_LAYERS, 2, replace=True)])
    torch.testing.assert_close(logits_of(plain(tmp_path / "full")), expected, rtol=1e-5, atol=1e-5)


def test_a_thin_repo_with_several_donors(tiny_llama: Path, tmp_path: Path) -> None:
    donor = str(tiny_llama / "donor")
    specs = [DonorSpec(donor, 1, name="a", layers=[0]), DonorSpec(donor, 4, name="b")]
    model = load(tiny_llama / "recipient", donors=specs)
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(tmp_path / "thin", thin=True)
    export(tmp_path / "thin", tmp_path / "full")
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(model))
    assert json.loads((tmp_path / "full" / "generation_config.json").read_text())["max_new_tokens"] == 5


def test_a_recommended_position(tiny_llama: Path, tmp_path: Path) -> None:
    donor = str(tiny_llama / "donor")
    export(tiny_llama / "recipient", tmp_path / "own", {donor: None})
    export(tiny_llama / "recipient", tmp_path / "other", {donor: 3})
    assert torch.equal(logits_of(plain(tmp_path / "own")), logits_of(load(donor)))
    assert torch.equal(logits_of(plain(tmp_path / "other")), logits_of(loaded(tiny_llama, 3)))


def test_experts_that_are_separate_in_the_files(tmp_path: Path) -> None:
    def build(seed: int) -> Any:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2, "num_local_experts": 3}
        return randomised(AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **TOKENS)), seed)

    make_family(tmp_path, build)
    export(tmp_path / "donor", tmp_path / "full", dtype="bfloat16")
    names = [name for name in weights_in(tmp_path / "full") if ".experts." in name]
    assert {number_after(name, "layers") for name in names} == set(range(6))
    assert all(".experts.0." in name or ".experts.1." in name or ".experts.2." in name for name in names)
    found = logits_of(plain(tmp_path / "full", dtype=torch.float32))
    for folder in ("recipient", "source"):
        cast_weights(tmp_path / folder, torch.bfloat16)
    models = [plain(tmp_path / folder, dtype=torch.float32) for folder in ("recipient", "source")]
    expected = reference_logits(models[0], [Graft(models[1], DONOR_LAYERS, 1)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    make_family(tmp_path, tiny_llama_model, tie_word_embeddings=True)
    export(tmp_path / "donor", tmp_path / "full")
    assert "lm_head.weight" not in weights_in(tmp_path / "full")
    model = plain(tmp_path / "full")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_classification_head(tiny_gpt2: Path, tmp_path: Path) -> None:
    body = plain(tiny_gpt2 / "recipient")
    model = randomised(GPT2ForSequenceClassification(body.config), 5)
    model.save_pretrained(tmp_path / "recipient")
    done = export(tmp_path / "recipient", tmp_path / "full", {str(tiny_gpt2 / "donor"): 2})
    assert done.model_class == "GPT2ForSequenceClassification" and done.verified
    assert torch.equal(load_file(tmp_path / "full" / "model.safetensors")["score.weight"], model.score.weight)

"""`export` and `push` from the command line: folders, thin repos and Hub ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.cli.conftest import Run
from tests.helpers import Shelf, copied, edit_json, edit_weights, logits_of, plain
from tests.hub_server import ALICE, BOB
from transplant_hf import AutoModelWithTransplant, Donor, DonorSpec

load = AutoModelWithTransplant.from_pretrained


# -- export ---------------------------------------------------------------------------------------------------------


def test_export(family: Path, tmp_path: Path, run: Run) -> None:
    status, out, err = run("export", family / "donor", tmp_path / "full")
    assert status == 0 and "LlamaForCausalLM with 6 layers" in out and "bit for bit" in out
    assert "Traceback" not in err
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(load(family / "donor")))


def test_export_of_named_donors(family: Path, tmp_path: Path, run: Run) -> None:
    edit_json(family / "donor" / "donor_config.json", name="law")
    words = ("export", family / "recipient", tmp_path / "full", "--json", "--donor")
    options = ("--mode", "replace", "--dtype", "bfloat16", "--max-shard-size", "40KB", "--no-verify")
    status, out, _ = run(*words, f"{family / 'donor'}@2", *options)
    found = json.loads(out)
    assert status == 0 and not found["verified"] and found["dtype"] == "bfloat16"
    assert [source for source, _ in found["layer_map"]] == ["recipient", "recipient", "donor", "donor"]
    assert len(found["files"]) > 1 and found["size"] == sum(stamp["size"] for stamp in found["files"].values())
    status, out, _ = run(*words, family / "donor", "--overwrite")  # where the donor recommends
    assert status == 0 and [source for source, _ in json.loads(out)["layer_map"]].index("donor") == 1
    status, again, _ = run(*words, f"{family / 'donor'}@1", "--no-verify", "--overwrite")
    assert status == 0 and json.loads(again)["layer_map"] == json.loads(out)["layer_map"]


def test_export_of_a_spread_donor_at_strength_1(family: Path, tmp_path: Path, run: Run) -> None:
    """At exactly its own positions too, where it otherwise runs with the strength that it recommends."""
    place = {"position": (1, 3), "strength": 0.5, "recipient": str(family / "recipient")}
    Donor.from_pretrained(family / "donor").save_pretrained(tmp_path / "apart", **place)
    status, _, err = run("export", tmp_path / "apart", tmp_path / "full")
    assert status == 1 and "strength 0.5" in err
    status, out, _ = run("export", family / "recipient", tmp_path / "full", "--donor", f"{tmp_path / 'apart'}@1,3")
    assert status == 0 and "bit for bit" in out
    expected = load(family / "recipient", donors=[DonorSpec(str(tmp_path / "apart"), (1, 3), strength=1.0)])
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(expected))


def test_wrong_usage(family: Path, tmp_path: Path, run: Run) -> None:
    words = ("export", family / "recipient", tmp_path / "full", "--donor", family / "donor")
    status, _, err = run(*words, "--position", 1, "--position", 2)
    assert status == 2 and "2 --position for 1 --donor" in err
    status, _, err = run(*words, "--mode", "replace")
    assert status == 2 and "--mode goes with --donor DONOR@POSITION" in err


def test_what_is_refused_is_one_sentence(family: Path, tmp_path: Path, run: Run) -> None:
    edit_json(family / "donor" / "config.json", donors=[{"donor": ".", "position": 1, "strength": 0.75}])
    for words, told in (
        (("export", family / "donor", tmp_path / "full"), "strength 0.75"),
        (("export", family / "recipient", tmp_path / "full"), "not a transplant"),
        (("push", family, "alice/x"), "not a saved donor, transplant or model"),
        (("push", tmp_path / "nowhere", "alice/x"), "is not a folder"),
    ):
        status, out, err = run(*words, "--json")
        assert status == 1 and told in err and told in json.loads(out)["message"]
        assert "Traceback" not in err
    assert not (tmp_path / "full").exists()


@pytest.mark.hub
def test_export_from_the_hub(both: Shelf, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """With every revision pinned, the card naming them; the recipient's tokenizer is fetched, once."""
    status, out, _ = run("export", both.law, tmp_path / "full", "--json")
    found = json.loads(out)
    assert status == 0 and found["recipient"] == f"{both.base}@{both.base_commit}" and found["verified"]
    assert "No files matched" not in caplog.text  # the client's, for an adapter that is not there
    card = (tmp_path / "full" / "README.md").read_text()
    assert both.base_commit in card and both.law_commit in card and "base_model_relation: merge" in card
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in (tmp_path / "full").iterdir()}
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(load(both.law)))
    assert both.weights(both.base) == both.weights(both.law) == 1
    status, _, _ = run("export", both.base, tmp_path / "again", "--donor", both.law, "--position", 1)
    assert status == 0
    assert torch.equal(logits_of(plain(tmp_path / "again")), logits_of(plain(tmp_path / "full")))


# -- push -----------------------------------------------------------------------------------------------------------


@pytest.mark.hub
def test_push_a_donor(both: Shelf, as_user: Any, run: Run) -> None:
    as_user(ALICE)
    target, folder = f"{both.law}-pushed", both.family / "donor"
    status, out, _ = run("push", folder, target, "--private", "--message", "First", "--json")
    found = json.loads(out)
    assert status == 0 and found["kind"] == "donor" and found["commit"] == both.hub.head(target)
    assert found["url"].endswith(f"{target}/commit/{found['commit']}")
    assert len(both.hub.requests.commits()) == 1
    assert set(both.hub.paths(target)) - {".gitattributes"} == {path.name for path in folder.iterdir()}
    assert f'model="{target}"' in both.hub.read(target, "README.md").decode()
    assert torch.equal(logits_of(load(target)), logits_of(load(both.law)))
    status, out, _ = run("push", folder, target)
    assert status == 0 and both.hub.head(target) in out and len(both.hub.requests.commits()) == 1


@pytest.mark.hub
def test_push_an_export(both: Shelf, as_user: Any, tmp_path: Path, run: Run) -> None:
    """It is loaded from the Hub as an ordinary model; a pull request and a branch work too."""
    as_user(ALICE)
    target = f"{both.law}-full"
    assert run("export", both.law, tmp_path / "full")[0] == 0
    (tmp_path / "full" / ".cache").mkdir()
    (tmp_path / "full" / ".cache" / "secret").write_text("mine")
    status, out, _ = run("push", tmp_path / "full", target)
    assert status == 0 and "a model," in out
    card = both.hub.read(target, "README.md").decode()
    assert f'AutoModelForCausalLM.from_pretrained("{target}")' in card
    assert f'AutoTokenizer.from_pretrained("{both.base}"' in card
    assert not [path for path in both.hub.paths(target) if "secret" in path]
    model = plain(target)
    assert type(model) is LlamaForCausalLM and model.config.num_hidden_layers == 6
    (tmp_path / "full" / "LICENSE").write_text("more")
    assert run("push", tmp_path / "full", target, "--to-revision", "next")[0] == 0
    assert "LICENSE" not in both.hub.paths(target)
    status, out, _ = run("push", tmp_path / "full", target, "--create-pr")
    assert status == 0 and "/discussions/" in out


@pytest.mark.hub
def test_push_a_thin_transplant(both: Shelf, as_user: Any, tmp_path: Path, run: Run) -> None:
    as_user(ALICE)
    specs = [DonorSpec(both.law, 1, name="a"), DonorSpec(both.law, 3, name="b", layers=[0])]
    model = load(both.base, donors=specs)
    model.save_pretrained(tmp_path / "thin", thin=True)
    target = f"{both.law}-thin"
    status, out, _ = run("push", tmp_path / "thin", target)
    assert status == 0 and "a transplant," in out
    assert torch.equal(logits_of(load(target)), logits_of(model))


@pytest.mark.hub
def test_push_what_needs_this_package(shelf: Shelf, as_user: Any, inverse_gpt2: Path, tmp_path: Path, run: Run) -> None:
    """A full save in the transplant format carries its recipient."""
    as_user(ALICE)
    model = load(inverse_gpt2 / "donor")
    model.save_pretrained(tmp_path / "full")
    target = f"{shelf.law}-format"
    status, out, _ = run("push", tmp_path / "full", target)
    assert status == 0 and "a transplant," in out
    assert torch.equal(logits_of(load(target)), logits_of(model))


@pytest.mark.hub
def test_a_persons_card_is_pushed_as_it_is(both: Shelf, as_user: Any, run: Run) -> None:
    as_user(ALICE)
    text = 'mine: model="x"\n'
    (both.family / "donor" / "README.md").write_text(text)
    assert run("push", both.family / "donor", f"{both.law}-mine")[0] == 0
    assert both.hub.read(f"{both.law}-mine", "README.md").decode() == text


@pytest.mark.hub
def test_what_is_not_pushed(both: Shelf, as_user: Any, tmp_path: Path, run: Run) -> None:
    as_user(ALICE)
    target, donor = f"{both.law}-bad", both.family / "donor"
    before = (donor / "README.md").read_bytes()

    def refusal(folder: Path) -> str:
        status, _, err = run("push", folder, target)
        assert status == 1 and "Traceback" not in err
        return err

    path = donor / "donor.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4] + b"\0\0\0\0")
    assert "sha256" in refusal(donor)
    path.write_bytes(whole[:-4])
    assert "bytes" in refusal(donor)
    path.write_bytes(whole)
    edit_weights(donor, lambda tensors: tensors["layers.0.mlp.up_proj.weight"][0, 0].fill_(float("nan")))
    assert "layers.0.mlp.up_proj.weight" in refusal(donor)
    path.write_bytes(whole)
    edit_weights(donor, lambda tensors: None)
    edit_json(donor / "config.json", recipient="../recipient")
    assert "a folder on this machine that nobody else has" in refusal(donor)
    edit_json(donor / "config.json", recipient=both.base)
    weights = load_file(both.family / "recipient" / "model.safetensors")
    weights["lm_head.weight"][3, 3] = float("inf")
    save_file(weights, both.family / "recipient" / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" in refusal(both.family / "recipient")
    tokenizer = (donor / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (donor / "tokenizer.json").symlink_to(tokenizer)
    assert "is a link" in refusal(donor)
    assert not both.hub.requests.commits()
    assert (donor / "README.md").read_bytes() != before  # named anew only once everything else was found right
    (donor / "tokenizer.json").unlink()
    as_user(BOB)
    assert "alice" in refusal(donor)


@pytest.mark.hub
@pytest.mark.parametrize("kind", ["donor", "thin", "full", "format"])
def test_files_of_the_user_are_not_pushed(
    kind: str,
    both: Shelf,
    as_user: Any,
    inverse_gpt2: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    """The list of what is sent is told before, and so is what stays."""
    as_user(ALICE)
    folder, target = tmp_path / "saved", f"{both.law}-{kind}"
    specs = [DonorSpec(both.law, 1, name="a"), DonorSpec(both.law, 3, name="b", layers=[0])]
    if kind == "donor":
        copied(both.family / "donor", folder)
    elif kind == "thin":
        load(both.base, donors=specs).save_pretrained(folder, thin=True)
    elif kind == "full":
        assert run("export", both.law, folder, "--max-shard-size", "40KB", "--no-verify")[0] == 0
    else:
        load(inverse_gpt2 / "donor").save_pretrained(folder)
    (folder / "LICENSE.txt").write_text("terms")
    saved = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    mine = ["mine.txt", "secret.env", "model.backup.safetensors", "old/model.safetensors", "old/config.json", ".env"]
    mine += [".env.model", "LICENSE.key", "customers.codes", "custom_generate/.env", "custom_generate/weights.bin"]
    mine += ["a/diary.txt"] if kind == "thin" else []
    for name in mine:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    (folder / "linked").symlink_to("/etc")
    status, out, err = run("push", folder, target, "--json")
    assert status == 0, err
    assert set(both.hub.paths(target)) - {".gitattributes"} == saved
    found = json.loads(out)
    stays = {"mine.txt", "secret.env", "model.backup.safetensors", "old/", ".env", "linked"}
    stays |= {".env.model", "LICENSE.key", "customers.codes", "custom_generate/"}
    assert set(found["left_out"]) == stays | ({"a/diary.txt"} if kind == "thin" else set())
    assert {file["name"]: file["size"] for file in found["files"]} == {
        name: (folder / name).stat().st_size for name in saved
    }
    for name in saved:
        assert f"{(folder / name).stat().st_size:>15,}  {name}\n" in err
    assert "not uploaded" in err and all(name in err for name in stays)

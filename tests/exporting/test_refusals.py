"""Exports that are refused: one sentence that says what to do, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.helpers import (
    edit_json,
    edit_weights,
    logits_of,
    plain,
    refused,
    tiny_gpt2_model,
)
from transplant_hf import AutoModelWithTransplant, Donor, DonorSpec, IntegrityError
from transplant_hf.errors import CheckpointError, CompatibilityError, ConfigurationError
from transplant_hf.exporting import checkpoint, export

load = AutoModelWithTransplant.from_pretrained


def assert_nothing_left(folder: Path) -> None:
    assert not [path.name for path in folder.iterdir() if path.name.startswith((".full", "full"))]


def test_what_no_plain_checkpoint_can_say(tiny_gpt2: Path, inverse_gpt2: Path, tmp_path: Path) -> None:
    donor = str(tiny_gpt2 / "donor")
    recipient, out = tiny_gpt2 / "recipient", tmp_path / "full"
    with refused(ConfigurationError, "strength 0.5", "save_pretrained", "at strength 1"):
        export(recipient, out, [DonorSpec(donor, 1, strength=0.5)])
    with refused(ConfigurationError, "strength 0", "leave it out"):
        export(recipient, out, [DonorSpec(donor, 1, strength=0.0)])
    crowd = [DonorSpec(donor, 1, name="a"), DonorSpec(donor, 1, name="b")]
    with refused(ConfigurationError, "a, b run side by side", "stacked"):
        export(recipient, out, crowd, composition="side_by_side")
    with refused(ConfigurationError, "no configuration of gpt2 describes", "as another model", "transplant format"):
        export(inverse_gpt2 / "donor", out)
    with refused(ConfigurationError, "not a transplant"):
        export(recipient, out)
    with refused(CompatibilityError, "n_embd: donor 16, recipient 32"):
        export(recipient, out, {str(wide_donor(tmp_path)): 1})
    with refused(ConfigurationError, "bfloat16, float16, float32", "int8"):
        export(tiny_gpt2 / "donor", out, dtype="int8")
    with refused(ConfigurationError, "--max-shard-size", "got '1XB'"):
        export(tiny_gpt2 / "donor", out, max_shard_size="1XB")
    with refused(ConfigurationError, "full.gguf would be a folder", "--gguf"):
        export(tiny_gpt2 / "donor", tmp_path / "full.gguf")
    assert_nothing_left(tmp_path)


def wide_donor(folder: Path) -> Path:
    donor = Donor.from_model(tiny_gpt2_model(3, n_embd=16), [0], name="wide")
    donor.save_pretrained(folder / "wide", position=1, recipient="user/wide")
    return folder / "wide"


def test_alone_side_by_side_is_as_stacked(tiny_gpt2: Path, tmp_path: Path) -> None:
    export(tiny_gpt2 / "donor", tmp_path / "full", composition="side_by_side")
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(load(tiny_gpt2 / "donor")))


def test_where_it_may_not_be_written(family: Path, tmp_path: Path) -> None:
    for taken, fact in (("donor", "is what is being exported"), ("recipient", "no record of writing")):
        with refused(ConfigurationError, fact):
            export(family / "donor", family / taken, overwrite=True)
    (tmp_path / "full").mkdir()
    export(family / "donor", tmp_path / "full", verify=False)  # an empty folder will do
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with refused(ConfigurationError, "is not empty", "chapter.tex"):
        export(family / "donor", tmp_path / "thesis")
    with refused(ConfigurationError, "is a file"):
        export(family / "donor", tmp_path / "thesis" / "chapter.tex")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["recipient", "donor"])
def test_what_is_not_finite(family: Path, tmp_path: Path, where: str, value: float) -> None:
    if where == "donor":
        name = "layers.1.mlp.up_proj.weight"
        edit_weights(family / "donor", lambda tensors: tensors[name][5, 7].fill_(value))
    else:
        name = "mlp.up_proj.weight"
        path = family / "recipient" / "model.safetensors"
        tensors = load_file(path)
        tensors[f"model.layers.2.{name}"][5, 7] = value
        save_file(tensors, path, metadata={"format": "pt"})
    with refused(CheckpointError, name, "NaN or infinity", where):
        export(family / "donor", tmp_path / "full", verify=False)
    assert_nothing_left(tmp_path)


def test_what_is_too_large_for_a_type(family: Path, tmp_path: Path) -> None:
    path = family / "recipient" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    with refused(CheckpointError, "model.norm.weight", "too large for torch.float16", "bfloat16"):
        export(family / "donor", tmp_path / "full", dtype="float16", verify=False)
    export(family / "donor", tmp_path / "full", dtype="bfloat16")


def test_changed_bytes_of_a_donor(family: Path, tmp_path: Path) -> None:
    path = family / "donor" / "donor.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with refused(IntegrityError, "donor.safetensors", "sha256"):
        export(family / "donor", tmp_path / "full", verify=False)
    assert_nothing_left(tmp_path)


def test_a_recipient_that_is_not_whole(family: Path, tmp_path: Path) -> None:
    recipient = family / "recipient"
    path = recipient / "model.safetensors"
    whole = load_file(path)
    save_file({name: t for name, t in whole.items() if ".layers.2." not in name}, path)
    with refused(CheckpointError, "lacks model.layers.4.", "(layer 2 of recipient)", "more weights"):
        export(family / "donor", tmp_path / "full")
    save_file({name: t for name, t in whole.items() if name != "model.norm.weight"}, path)
    with refused(CheckpointError, "lacks model.norm.weight of the recipient"):
        export(family / "donor", tmp_path / "full")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with refused(CheckpointError, "model.safetensors", "not a whole safetensors file"):
        export(family / "donor", tmp_path / "full")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"), [(1e-3, "logits of the export differ"), (0.0, "up_proj.weight of the export")]
)
def test_other_logits(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: float, told: str
) -> None:
    """One bit of one weight is enough, also where the logits differ no more than by rounding."""
    real = checkpoint._write_model

    def flipped(model: PreTrainedModel, folder: Path, size: int | str) -> None:
        real(model, folder, size)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        weight = tensors["model.layers.0.mlp.up_proj.weight"]
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(10.0)) + change
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(checkpoint, "_write_model", flipped)
    with refused(CheckpointError, told):
        export(tiny_llama / "donor", tmp_path / "full")
    assert_nothing_left(tmp_path)


def test_the_config_is_the_plain_models(tiny_llama: Path, family: Path, tmp_path: Path) -> None:
    """What a configuration says of other files does not go along."""
    (family / "recipient" / "model.safetensors").rename(family / "recipient" / "other.safetensors")
    edit_json(family / "recipient" / "config.json", transformers_weights="other.safetensors", dtype=None)
    export(family / "donor", tmp_path / "full")
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert "transformers_weights" not in config and config["dtype"] == "float32"
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(load(tiny_llama / "donor")))

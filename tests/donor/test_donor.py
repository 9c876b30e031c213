"""`Donor`: opened by headers, taken apart, written and read again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.helpers import (
    copied,
    digest_of,
    edit_json,
    edit_weights,
    loaded,
    logits_of,
    plain,
    refused,
    tiny_gpt2_model,
    tiny_llama_model,
)
from transplant_hf import (
    AutoModelWithTransplant,
    CheckpointError,
    ConfigurationError,
    Donor,
    IntegrityError,
)
from transplant_hf.donor import DonorRecord
from transplant_hf.donor.tensors import MemoryTensors


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_donor_repo_round_trips(tiny: Path) -> None:
    made = Donor.from_model(plain(tiny / "source"), [1, 2], name="donor")
    read = Donor.from_pretrained(tiny / "donor")
    assert (read.num_layers, read.layer_indices, read.name, read.position) == (2, [1, 2], "donor", 1)
    assert read.model_type == made.model_type
    assert equal(read.tensors(), made.tensors())
    assert read.infos().keys() == made.infos().keys()
    for name, tensor in made.tensors().items():
        assert read.infos()[name].shape == tuple(tensor.shape)


def test_a_donor_repo_says_what_the_contract_says(tiny_gpt2: Path) -> None:
    donor = tiny_gpt2 / "donor"
    config = json.loads((donor / "config.json").read_text())
    assert config["model_type"] == "transplant"
    assert config["recipient"] == "../recipient"
    assert config["donors"] == [{"donor": ".", "position": 1, "mode": "insert", "name": "donor"}]
    record = json.loads((donor / "donor_config.json").read_text())
    data = (donor / "donor.safetensors").read_bytes()
    assert record["files"] == {"donor.safetensors": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}}
    source = json.loads((tiny_gpt2 / "source" / "config.json").read_text())
    assert {name: record["source_config"].get(name) for name in source} == source
    names = set(load_file(donor / "donor.safetensors"))
    assert {name.split(".")[1] for name in names} == {"0", "1"}
    assert "layers.1.attn.c_attn.weight" in names


def test_opening_reads_headers_only(tiny_gpt2: Path, tmp_path: Path) -> None:
    """Every byte behind the header may be anything until tensors are asked for."""
    donor = copied(tiny_gpt2 / "donor", tmp_path / "donor")
    path = donor / "donor.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = os.urandom(len(data) - start)
    path.write_bytes(data)
    opened = Donor.from_pretrained(donor)
    assert opened.num_layers == 2
    assert opened.infos()["layers.0.ln_1.weight"].shape == (32,)
    with refused(IntegrityError, str(path), "sha256"):
        opened.verify()


def test_subfolder_and_path_objects(tiny_gpt2: Path) -> None:
    assert Donor.from_pretrained(tiny_gpt2, subfolder="donor").name == "donor"
    assert Donor.from_pretrained(str(tiny_gpt2 / "donor")).name == "donor"


def test_part(tiny_gpt2: Path) -> None:
    whole = Donor.from_pretrained(tiny_gpt2 / "donor")
    part = whole.part([1])
    assert (part.num_layers, part.layer_indices) == (1, [2])
    wanted = {
        name.replace("layers.1.", "layers.0."): tensor
        for name, tensor in whole.tensors().items()
        if name.startswith("layers.1.")
    }
    assert equal(part.tensors(), wanted)
    assert part.infos().keys() == wanted.keys()
    with refused(ConfigurationError, "0..1", "[1, 2]"):
        whole.part([1, 2])


def test_saving_in_shards(tiny_gpt2: Path, tmp_path: Path) -> None:
    donor = Donor.from_pretrained(tiny_gpt2 / "donor")
    donor.save_pretrained(tmp_path / "d", recipient=str(tiny_gpt2 / "recipient"), max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "d").glob("donor-*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"donor-00001-of-{len(shards):05d}.safetensors"
    assert not (tmp_path / "d" / "donor.safetensors").exists()
    record = json.loads((tmp_path / "d" / "donor_config.json").read_text())
    assert sorted(record["files"]) == shards
    again = Donor.from_pretrained(tmp_path / "d")
    again.verify()
    assert equal(again.tensors(), donor.tensors())
    model = AutoModelWithTransplant.from_pretrained(tmp_path / "d")
    assert torch.equal(logits_of(model), logits_of(loaded(tiny_gpt2)))


def test_saving_over_an_old_donor(tiny_gpt2: Path, tmp_path: Path) -> None:
    """No old shard is left to be taken for a part of the new donor; what is not ours stays."""
    donor, target = Donor.from_pretrained(tiny_gpt2 / "donor"), tmp_path / "d"
    recipient = str(tiny_gpt2 / "recipient")
    donor.save_pretrained(target, recipient=recipient, max_shard_size="20KB")
    (target / "notes.txt").write_text("mine")
    donor.part([1]).save_pretrained(target, position=2, recipient=recipient)
    assert [path.name for path in target.glob("*.safetensors*")] == ["donor.safetensors"]
    again = Donor.from_pretrained(target)
    assert (again.layer_indices, again.position) == ([2], 2)
    assert (target / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_saving_over_itself(tiny_gpt2: Path, tmp_path: Path) -> None:
    """Its own tensors are read from the files that are replaced."""
    donor = Donor.from_pretrained(copied(tiny_gpt2 / "donor", tmp_path / "d"))
    donor.save_pretrained(tmp_path / "d", position=3, recipient=str(tiny_gpt2 / "recipient"))
    again = Donor.from_pretrained(tmp_path / "d")
    assert again.position == 3
    assert equal(again.tensors(), Donor.from_pretrained(tiny_gpt2 / "donor").tensors())


def test_metadata_is_kept_unchanged(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {"perplexity": 52.5, "train_time": 3, "method": {"lr": [1e-2, None]}, "ü": True}
    made = Donor.from_model(tiny_gpt2_model(0), [0], name="law")
    record = DonorRecord("gpt2", made.record.source_config, (0,), name="law", metadata=metadata)
    Donor(record, made.store).save_pretrained(tmp_path / "d", position=0, recipient="user/base")
    assert Donor.from_pretrained(tmp_path / "d").metadata == metadata


def test_dtypes_are_kept(tiny_llama: Path, tmp_path: Path) -> None:
    model = plain(tiny_llama / "source", dtype=torch.bfloat16)
    Donor.from_model(model, [0]).save_pretrained(tmp_path / "d", position=0, recipient=str(tiny_llama / "recipient"))
    assert {t.dtype for t in load_file(tmp_path / "d" / "donor.safetensors").values()} == {torch.bfloat16}


def test_tied_and_strided_tensors_are_written(tmp_path: Path) -> None:
    """safetensors refuses both."""
    store = MemoryTensors({
        "layers.0.a": (tied := torch.arange(6.0).reshape(2, 3)),
        "layers.0.b": tied,
        "layers.0.c": tied.T,
        "layers.0.d": torch.ones(1).expand(4),
    })  # fmt: skip
    Donor(DonorRecord("gpt2", {}, (0,)), store).save_pretrained(tmp_path / "d", position=0, recipient="user/base")
    again = load_file(tmp_path / "d" / "donor.safetensors")
    for name, tensor in store.slices().items():
        assert torch.equal(again[name], tensor)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_not_saved(tmp_path: Path, value: float) -> None:
    model = tiny_gpt2_model(0)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4] = value
    donor = Donor.from_model(model, [1])
    with refused(CheckpointError, "'layers.0.mlp.c_fc.weight'", "NaN or infinity", "not saved"):
        donor.save_pretrained(tmp_path / "d", position=0, recipient="user/base")
    assert list(tmp_path.iterdir()) == []


def test_what_a_donor_must_know_to_be_saved(tmp_path: Path) -> None:
    donor = Donor.from_model(tiny_gpt2_model(0), [1], name="law")
    with refused(ConfigurationError, "law", "position=p"):
        donor.save_pretrained(tmp_path / "d", recipient="user/base")
    with refused(ConfigurationError, "law", "recipient="):
        donor.save_pretrained(tmp_path / "d", position=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("position", [-1, 1.5, "2"])
def test_a_position_that_cannot_be(tmp_path: Path, position: Any) -> None:
    donor = Donor.from_model(tiny_gpt2_model(0), [1], name="law")
    with refused(ConfigurationError, "position", str(position)):
        donor.save_pretrained(tmp_path / "d", position=position, recipient="user/base")
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_the_recipient_by_default(tiny_gpt2: Path, tmp_path: Path) -> None:
    donor = Donor.from_model(plain(tiny_gpt2 / "recipient"), [0], name="first")
    donor.save_pretrained(tmp_path / "d", position=4)
    model = AutoModelWithTransplant.from_pretrained(tmp_path / "d")
    assert model.layer_map[4] == ("first", 0)


def test_tokenizer_and_generation_config_travel_along(tiny_gpt2: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tiny_gpt2 / "donor" / name).read_bytes() == (tiny_gpt2 / "recipient" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tiny_gpt2 / "donor").decode([72, 105]) != ""


def test_the_card_tells_how_to_load(tmp_path: Path) -> None:
    donor = Donor.from_model(tiny_llama_model(0), [1, 2], name="law")
    donor.save_pretrained(tmp_path / "law-donor", position=1, recipient="user/base", recipient_revision="c" * 40)
    card = ModelCard.load(tmp_path / "law-donor" / "README.md")
    assert card.data.base_model == "user/base"
    assert card.data.library_name == "transplant-hf"
    for fact in ("import transplant_hf", "law-donor", "`user/base` at `" + "c" * 40, "layers 1, 2", "position 1"):
        assert fact in card.text


def test_a_folder_of_ones_own_is_not_named_as_base_model(tiny_gpt2: Path) -> None:
    card = ModelCard.load(tiny_gpt2 / "donor" / "README.md")
    assert card.data.base_model is None
    assert str(tiny_gpt2) not in (tiny_gpt2 / "donor" / "config.json").read_text()


def test_a_failed_save_leaves_the_old_donor(tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = copied(tiny_gpt2 / "donor", tmp_path / "d")
    before = digest_of(tmp_path)
    donor = Donor.from_pretrained(tiny_gpt2 / "donor").part([1])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transplant_hf.donor.save.save_file", full)
    with refused(CheckpointError, str(target), "disk is full", "unchanged"):
        donor.save_pretrained(target, recipient=str(tiny_gpt2 / "recipient"))
    assert digest_of(tmp_path) == before


def test_a_record_and_weights_that_disagree(tiny_gpt2: Path, tmp_path: Path) -> None:
    donor = copied(tiny_gpt2 / "donor", tmp_path / "donor")
    edit_json(donor / "donor_config.json", layer_indices=[1, 2, 3])
    with refused(CheckpointError, "3 layers", "[1, 2, 3]", "[0, 1]", "Missing: [2]"):
        Donor.from_pretrained(donor)


def test_a_tensor_of_an_odd_name(tiny_gpt2: Path, tmp_path: Path) -> None:
    donor = copied(tiny_gpt2 / "donor", tmp_path / "donor")
    edit_weights(donor, lambda tensors: tensors.update({"lm_head.weight": torch.ones(2)}))
    with refused(CheckpointError, "'lm_head.weight'", "layers.<number>"):
        Donor.from_pretrained(donor)


def test_a_file_of_another_size(tiny_gpt2: Path, tmp_path: Path) -> None:
    donor = copied(tiny_gpt2 / "donor", tmp_path / "donor")
    edit_weights(donor, lambda tensors: tensors.update({"layers.0.extra": torch.ones(2)}), stamp=False)
    size = (donor / "donor.safetensors").stat().st_size
    with refused(IntegrityError, "donor.safetensors", str(size), "donor_config.json records"):
        Donor.from_pretrained(donor)


def test_printing_reads_nothing(tiny_gpt2: Path) -> None:
    donor = Donor.from_pretrained(tiny_gpt2 / "donor")
    assert repr(donor) == f"Donor('donor', gpt2, layers [1, 2], insert at position 1, from {tiny_gpt2 / 'donor'})"
    loose = Donor.from_model(plain(tiny_gpt2 / "source"), [1], name="loose")
    assert repr(loose) == "Donor('loose', gpt2, layers [1], no recommended position)"
    assert str(Donor.from_model(tiny_gpt2_model(0), [1], name="law")) == "law"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"foo": 1}, ("has no foo", "position")),
        ({"position": "two"}, ("position", "'two'")),
        ({"position": -1}, ("position", "is -1")),
        ({"mode": "append"}, ("mode", "'append'")),
        ({"strength": float("nan")}, ("strength", "nan")),
        ({"mode": "replace", "strength": 0.5}, ("strength 0.5", "insert")),
        ({"record": {}}, ("record", "{}")),
        ({"source": "user/law"}, ("source", "'user/law'")),
        ({"companions": 3}, ("companions", "3")),
    ],
    ids=str,
)
def test_a_change_that_makes_no_donor_is_refused_at_once(
    tiny_gpt2: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    with refused(ConfigurationError, *words):
        Donor.from_pretrained(tiny_gpt2 / "donor").replaced(**change)

"""What an inspection of a `.pt` file finds: everything but what running it would do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import plain, refused
from tests.inspection.helpers import same_as_json, some_layers
from transplant_hf import CheckpointError, Donor, HubError
from transplant_hf.cli import main
from transplant_hf.inspection import PtInspection, inspect


def of_pt(*args: Any, **kwargs: Any) -> PtInspection:
    found = inspect(*args, **kwargs)
    assert isinstance(found, PtInspection)
    return found


@pytest.fixture
def layers(tiny_llama: Path, tmp_path: Path) -> Path:
    """Layers 1 and 2 of the source model as a list of state dicts, with what the author recorded."""
    stack = plain(tiny_llama / "source").model.layers
    torch.save([stack[number].state_dict() for number in (1, 2)], tmp_path / "layers.pt")
    (tmp_path / "donor_metadata.json").write_text(json.dumps({"layer_indices": [1, 2], "position": 3}))
    return tmp_path / "layers.pt"


def test_a_list_of_layers(layers: Path) -> None:
    found = of_pt(layers)
    tensors = [tensor for state in torch.load(layers, weights_only=True) for tensor in state.values()]
    assert len(found.tensors) == len(tensors)
    assert found.parameters == sum(map(torch.Tensor.numel, tensors))
    assert found.size == layers.stat().st_size
    assert found.dtypes == {"float32": found.parameters}
    assert [(group.prefix, group.numbers) for group in found.numbering] == [("", (0, 1))]
    assert found.tensors["0.self_attn.q_proj.weight"].shape == (32, 32)
    assert found.metadata == {"layer_indices": [1, 2], "position": 3}
    assert same_as_json(found)["tensors"]["1.input_layernorm.weight"] == {"shape": [32], "dtype": "float32"}
    text = str(found)
    assert "0.self_attn.q_proj.weight: shape: 32, 32; dtype: float32" in text
    assert "... and 6 more" in text
    assert "numbers: 0, 1; tensors: 18" in text


def test_as_donor_from_pt_sees_it(layers: Path, tiny_llama: Path) -> None:
    recipient = tiny_llama / "recipient"
    found = of_pt(layers, recipient=recipient)
    donor = Donor.from_pt(layers, recipient)
    assert found
    assert found.layer_indices == tuple(donor.layer_indices) == (1, 2)
    assert found.placed_at == donor.position == 3
    assert found.layer_map[3] == ("layers", 1)
    assert len(found.layer_map) == 6
    assert of_pt(layers, recipient=recipient, position=0).layer_map[0] == ("layers", 1)
    assert "layer_indices: 1, 2" in str(found)


def test_one_that_the_recipient_does_not_have(
    layers: Path, tiny_gpt2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = of_pt(layers, recipient=tiny_gpt2 / "recipient")
    with pytest.raises(CheckpointError) as caught:
        Donor.from_pt(layers, tiny_gpt2 / "recipient")
    assert found.problems == (str(caught.value),)
    assert "holds no layers of a gpt2 model" in str(found)
    assert main(["inspect", str(layers), "--recipient", str(tiny_gpt2 / "recipient"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == list(found.problems)


def test_layers_that_nothing_numbers(layers: Path, tiny_llama: Path) -> None:
    (layers.parent / "donor_metadata.json").unlink()
    found = of_pt(layers, recipient=tiny_llama / "recipient")
    assert not found
    assert "pass layers=" in found.problems[0]


@pytest.mark.hub
def test_a_recipient_out_of_reach(layers: Path, hub: Any) -> None:
    with refused(HubError, "alice/nowhere"):
        inspect(layers, recipient="alice/nowhere")


class _Payload:
    """An object that would run a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_pickled_classes_are_named_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"layers": torch.nn.ModuleList([torch.nn.Linear(2, 3)]), "x": _Payload()}, tmp_path / "module.pt")
    found = of_pt(tmp_path / "module.pt")
    assert not (tmp_path / "ran").exists()
    assert "torch.nn.modules.linear.Linear" in found.classes
    assert "layers.0.weight" in found.tensors
    assert [group.prefix for group in found.numbering] == ["layers"]
    assert "classes: " in str(found)


def test_plain_values(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "epoch": 3,
        "loss": float("nan"),
        "name": "a\x1b[31mred",
        "many": list(range(1000)),
        "bytes": b"xyz",
        "config": {"deep": {"er": True}},
    }
    torch.save({"state": some_layers(2), **values}, tmp_path / "x.pt")
    found = of_pt(tmp_path / "x.pt")
    assert found.values["config.deep.er"] is True
    fields = same_as_json(found)
    assert (fields["values"]["epoch"], fields["values"]["loss"]) == (3, "nan")
    text = str(found)
    assert "epoch: 3" in text
    assert "\x1b" not in text
    assert len(max(text.splitlines(), key=len)) < 160


def test_tensors_that_share_bytes_count_once(tmp_path: Path) -> None:
    weight = torch.ones(4, 4)
    torch.save({"h.0.a": weight, "h.1.a": weight}, tmp_path / "tied.pt")
    found = of_pt(tmp_path / "tied.pt")
    assert found.parameters == 16
    assert [(g.prefix, g.numbers, g.tensors) for g in found.numbering] == [("h", (0, 1), 2)]


def test_a_tensor_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(1 << 40), "b": torch.ones(2)}, tmp_path / "large.pt")
    found = of_pt(tmp_path / "large.pt")
    assert not found
    assert "'a'" in found.problems[0]
    assert "4398046511104 bytes" in found.problems[0]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"<html>", b"version https://git-lfs", b"\x80\x04K\x01."])
def test_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with refused(CheckpointError, str(tmp_path / "x.pt")):
        inspect(tmp_path / "x.pt")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with refused(CheckpointError, "there is no file", "gone.pt"):
        inspect(tmp_path / "gone.pt")


@pytest.mark.shared
def test_the_shared_donors(shared_folder: Path) -> None:
    for file in sorted((shared_folder / "models" / "donors").glob("*/donor_layers.pt")):
        found = of_pt(file, recipient=shared_folder / "models" / "recipient-llama-5m")
        assert found
        assert found.layer_indices == (3, 4, 5)

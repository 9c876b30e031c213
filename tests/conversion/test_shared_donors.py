"""Real donors as their author wrote them: converted, they run as in memory, and what was recorded stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import layers_of, logits_of, plain
from tests.pt_files.crafted import bits, everything, tree_tensors
from transplant_hf import AutoModelWithTransplant, Donor, transplant
from transplant_hf.conversion import convert

pytestmark = pytest.mark.shared
LAYERS = [3, 4, 5]


@pytest.mark.parametrize(("name", "position"), [("shakespeare-in-place", 8), ("shakespeare-standalone", 2)])
def test_a_real_donor_runs_as_in_memory(name: str, position: int, shared_folder: Path, tmp_path: Path) -> None:
    recipient = shared_folder / "models" / "recipient-llama-5m"
    place = shared_folder / "models" / "donors" / name
    recorded = json.loads((place / "donor_metadata.json").read_text())
    done = convert(place / "donor_layers.pt", recipient, tmp_path / name, verify=True)
    assert recorded.get("position", 9 // 4) == position
    assert list(done.layer_indices) == LAYERS
    assert done.position == position
    assert json.loads((tmp_path / name / "donor_config.json").read_text())["metadata"] == recorded
    assert Donor.from_pretrained(tmp_path / name).metadata == recorded

    layers = torch.load(place / "donor_layers.pt", weights_only=True)
    source = plain(recipient)
    for number, state in zip(LAYERS, layers, strict=True):
        layers_of(source)[number].load_state_dict(state)
    in_memory = transplant(plain(recipient), Donor.from_model(source, LAYERS), position)
    found = logits_of(AutoModelWithTransplant.from_pretrained(tmp_path / name))
    assert torch.equal(found, logits_of(in_memory))
    assert not torch.allclose(found, logits_of(plain(recipient)), atol=1e-2)


@pytest.mark.parametrize("name", ["shakespeare-in-place", "shakespeare-standalone"])
def test_a_real_file_is_read_as_torch_reads_it(name: str, shared_folder: Path) -> None:
    path = shared_folder / "models" / "donors" / name / "donor_layers.pt"
    wanted = tree_tensors(torch.load(path, weights_only=True))
    assert {n: bits(tensor) for n, tensor in everything(path).items()} == {n: bits(tensor) for n, tensor in wanted}

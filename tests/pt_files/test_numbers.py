"""Numbers that are too long to print end in an error of ours, wherever they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import DONOR_LAYERS, layers_of, plain, refused
from tests.pt_files.crafted import saved
from transplant_hf import CheckpointError, ConfigurationError, Donor, DonorSpec, TransplantError
from transplant_hf.donor.tensors import layer_of
from transplant_hf.pt_files import PtFile

HUGE = 10**5000


@pytest.mark.parametrize("value", [HUGE, [1, HUGE], -HUGE], ids=["alone", "listed", "negative"])
def test_in_a_file(value: object, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"layer_indices": value, "w": torch.ones(2)})
    with refused(CheckpointError, str(path), "a number of 166", "layer_indices"):
        PtFile(path)


def test_in_metadata(family: Path) -> None:
    layers = layers_of(plain(family / "source"))
    path = saved(family / "a.pt", [layers[number].state_dict() for number in DONOR_LAYERS])
    recipient, known = family / "recipient", {"layer_indices": list(DONOR_LAYERS)}
    for wrong in ({"layer_indices": [HUGE]}, {**known, "best_position": HUGE}):
        with pytest.raises(TransplantError, match="too long to print"):
            Donor.from_pt(path, recipient, metadata=wrong)
    (family / "donor_metadata.json").write_text(f'{{"layer_indices": [1{"0" * 5000}]}}')
    with refused(CheckpointError, "donor_metadata.json", "cannot be read as JSON"):
        Donor.from_pt(path, recipient)
    with refused(CheckpointError, "too long to print"):
        Donor.from_pt(path, recipient, metadata={**known, "perplexity": HUGE})


def test_in_names_and_places() -> None:
    with refused(CheckpointError, "is not named"):
        layer_of(f"layers.1{'0' * 5000}.mlp")
    with refused(ConfigurationError, "finite number"):
        DonorSpec("d", 1, strength=10**400)
    with refused(ConfigurationError, "too long to print"):
        DonorSpec("d", HUGE)

"""A real recipient and real donors: the numbers their maker measured come out again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tests.helpers import generated, plain
from transplant_hf import AutoModelWithTransplant, Donor, check_compatibility
from transplant_hf.donor import DonorRecord
from transplant_hf.donor.tensors import MemoryTensors

pytestmark = pytest.mark.shared

# The numbers were measured on the first 192 blocks; every sixth of them will do here.
BLOCK, BLOCKS, EVERY = 128, 192, 6


@pytest.fixture(scope="module")
def recipient(shared_folder: Path) -> Path:
    """A Llama of nine layers."""
    return shared_folder / "models" / "recipient-llama-5m"


@pytest.fixture(scope="module")
def shakespeare(shared_folder: Path, recipient: Path) -> torch.Tensor:
    """Blocks of the last tenth of the text, `[blocks, tokens]`."""
    text = (shared_folder / "data" / "shakespeare.txt").read_text(encoding="utf-8")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(recipient)
    held_out = text[len(text) - len(text) // 10 :]
    ids = tokenizer(held_out, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: BLOCK * BLOCKS]).reshape(BLOCKS, BLOCK)[::EVERY]


def donor_repo(shared: Path, recipient: Path, name: str, folder: Path, position: int) -> Path:
    """Write the author's list of state dicts as a donor repo."""
    place = shared / "models" / "donors" / name
    layers = torch.load(place / "donor_layers.pt", weights_only=True)
    metadata: dict[str, Any] = json.loads((place / "donor_metadata.json").read_text())
    record = DonorRecord(
        model_type="llama",
        source_config=json.loads((recipient / "config.json").read_text()),
        layer_indices=tuple(metadata["layer_indices"]),
        name=name,
        metadata=metadata,
    )
    tensors = {f"layers.{n}.{key}": tensor for n, layer in enumerate(layers) for key, tensor in layer.items()}
    Donor(record, MemoryTensors(tensors)).save_pretrained(folder / name, position=position, recipient=str(recipient))
    return folder / name


@torch.no_grad()
def perplexity(model: Any, blocks: torch.Tensor) -> float:
    """Token-weighted, over blocks that do not see each other."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(blocks, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), blocks[:, 1:].flatten())
    return math.exp(float(loss))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "position", "expected"),
    [
        ("shakespeare-in-place", 8, 52.5),
        ("shakespeare-standalone", 1, 238.0),
        ("shakespeare-standalone", 8, 219.0),
    ],
)
def test_perplexity(
    shared_folder: Path,
    recipient: Path,
    shakespeare: torch.Tensor,
    tmp_path: Path,
    name: str,
    position: int,
    expected: float,
) -> None:
    repo = donor_repo(shared_folder, recipient, name, tmp_path, position)
    assert check_compatibility(recipient, repo, position).native
    model = AutoModelForCausalLM.from_pretrained(repo)
    assert model.layer_map[position : position + 3] == ((name, 3), (name, 4), (name, 5))
    assert perplexity(model, shakespeare) == pytest.approx(expected, rel=0.03)
    untouched = perplexity(plain(recipient), shakespeare)
    assert untouched == pytest.approx(286, rel=0.03)
    with model.disable_transplants():
        assert perplexity(model, shakespeare) == untouched
    ids = shakespeare[:2, :16]
    assert torch.equal(generated(model, ids, use_cache=True), generated(model, ids, use_cache=False))


def test_metadata_is_the_authors(shared_folder: Path, recipient: Path, tmp_path: Path) -> None:
    repo = donor_repo(shared_folder, recipient, "shakespeare-in-place", tmp_path, 8)
    AutoModelWithTransplant.from_pretrained(repo).save_pretrained(tmp_path / "thin", thin=True)
    metadata = Donor.from_pretrained(tmp_path / "thin").metadata
    assert metadata == json.loads(
        (shared_folder / "models" / "donors" / "shakespeare-in-place" / "donor_metadata.json").read_text()
    )

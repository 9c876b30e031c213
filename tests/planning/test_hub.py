"""Plans of repositories: headers are fetched, weights are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.helpers import BUILDERS, Shelf, edit_json, loaded, make_family
from transplant_hf.planning import plan

pytestmark = pytest.mark.hub


def test_only_headers_are_fetched(shelf: Shelf, tmp_path: Path) -> None:
    family = make_family(tmp_path / "large", BUILDERS["llama"], hidden_size=256, intermediate_size=1024)
    edit_json(family / "donor" / "config.json", recipient=shelf.base)
    base = shelf.hub.add_repo(shelf.base, family / "recipient")
    shelf.hub.add_repo(shelf.law, family / "donor")
    shelf.hub.requests.clear()
    by_donor, by_recipient = plan(shelf.law), plan(shelf.base, {shelf.law: 1})
    for found in (by_donor, by_recipient):
        assert found.after.weight_bytes + found.after.buffers == loaded(family).get_memory_footprint()
        assert (found.recipient, found.revision) == (shelf.base, base)
    weights = shelf.hub.requests.downloads("*.safetensors")
    assert weights
    assert all(record.range and record.status == 206 and record.bytes_sent <= 1 << 15 for record in weights)
    cache = Path(constants.HF_HUB_CACHE)
    for repo in (shelf.base, shelf.law):
        assert not list((cache / f"models--{repo.replace('/', '--')}").rglob("*.safetensors"))

"""Donors that are trained in a recipient on the Hub and published there."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, pipeline

from tests.helpers import Shelf
from tests.hub_server import ALICE
from tests.training.helpers import noise, trainer
from transplant_hf import Donor

pytestmark = pytest.mark.hub


def test_a_published_donor_pins_its_recipient_and_brings_its_tokenizer(shelf: Shelf, as_user, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    as_user(ALICE)
    shelf.put_base()
    made = trainer(tmp_path / "run", shelf.base, replay_dataset=noise(seed=2, name="general"))
    made.train()
    # As a partial look at the recipient leaves the cache: with a list of files that are not all there.
    snapshot_download(shelf.base, allow_patterns=["config.json", "tokenizer*"])
    made.push_donor(f"{shelf.law}-new")
    donor = Donor.from_pretrained(f"{shelf.law}-new")
    assert donor.record.source_id == shelf.base
    assert donor.record.source_revision is not None and len(donor.record.source_revision) == 40
    model = AutoModelForCausalLM.from_pretrained(f"{shelf.law}-new")
    assert model.transplant_config.recipient_revision == donor.record.source_revision
    generate = pipeline("text-generation", model=f"{shelf.law}-new")
    assert generate("law", max_new_tokens=2)[0]["generated_text"]

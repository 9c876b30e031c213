"""Who may load a transplant from the Hub, what is said to the others, and what works without the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForCausalLM

from tests.helpers import (
    Shelf,
    logits_of,
    refused,
    refused_by_hub,
)
from tests.hub_server import ALICE
from transplant_hf import (
    AutoModelWithTransplant,
    ConfigurationError,
    DonorSpec,
    HubError,
    TransplantConfig,
)

pytestmark = pytest.mark.hub

load = AutoModelWithTransplant.from_pretrained


# -- Who may ---------------------------------------------------------------------------------------------------------


def test_a_gated_asked_for_repo_through_an_auto_class(shelf: Shelf, as_user: Any) -> None:
    """Transformers reads its configuration first, and says so in its own words; the cause is the client's."""
    shelf.put_base().put_law(gated=True)
    with pytest.raises((OSError, HubError), match="gated"):
        AutoModelForCausalLM.from_pretrained(shelf.law)


def test_no_token_is_sent_when_told_so(shelf: Shelf, as_user: Any) -> None:
    shelf.put_base(private=True).put_law()
    as_user(ALICE)
    with refused_by_hub(shelf.base, cause=RepositoryNotFoundError):
        load(shelf.law, token=False)


def test_a_repository_that_is_not_there(shelf: Shelf, as_user: Any) -> None:
    shelf.put_base()
    with refused_by_hub("alice/no-donor", "not found", cause=RepositoryNotFoundError):
        load(shelf.base, donors={"alice/no-donor": 1})


def test_a_revision_that_is_not_there(both: Shelf) -> None:
    with refused_by_hub(both.law, "'v9'", cause=RevisionNotFoundError):
        load(both.law, revision="v9")
    with refused_by_hub(both.law, "'v9'", cause=RevisionNotFoundError):
        load(both.base, donors=[DonorSpec(both.law, 1, revision="v9")])
    config = TransplantConfig(recipient=both.base, recipient_revision="v9", donors={both.law: 1})
    with refused_by_hub(both.base, "'v9'", cause=RevisionNotFoundError):
        load(both.law, config=config)


def test_a_repository_that_is_neither(shelf: Shelf) -> None:
    shelf.hub.add_repo(shelf.law, {"notes.txt": b"hello"})
    with refused(ConfigurationError, shelf.law, "neither a model nor a transplant"):
        load(shelf.law)


def test_a_server_that_fails(both: Shelf) -> None:
    both.hub.fail("*", f"*{both.base}*", status=400, message="broken", times=None)
    with refused_by_hub(both.base, cause=HfHubHTTPError):
        load(both.law)


# -- Without the Hub -------------------------------------------------------------------------------------------------


def test_local_files_only(both: Shelf) -> None:
    for class_ in (AutoModelWithTransplant, AutoModelForCausalLM):
        with pytest.raises((HubError, OSError), match="cache"):
            class_.from_pretrained(both.law, local_files_only=True)
    with refused_by_hub(both.law, "local_files_only", "offline", cause=LocalEntryNotFoundError):
        load(both.law, local_files_only=True)
    model = load(both.law)
    both.hub.requests.clear()
    for class_ in (AutoModelWithTransplant, AutoModelForCausalLM):
        again = class_.from_pretrained(both.law, local_files_only=True)
        assert torch.equal(logits_of(again), logits_of(model))
        assert again.transplant_config.recipient_revision == both.base_commit
        assert again.transplant_config.donors[0].revision == both.law_commit
    assert len(both.hub.requests) == 0


def test_local_files_only_without_the_recipient(both: Shelf) -> None:
    both.hub.fail("*", f"*{both.base}*", status=400, times=None)
    with refused(HubError, both.base):
        load(both.law)
    with refused_by_hub(both.base, "local cache", "local_files_only", cause=LocalEntryNotFoundError):
        load(both.law, local_files_only=True)


def test_a_thin_save_without_the_hub(both: Shelf, tmp_path: Path) -> None:
    load(both.law)
    model = load(both.law, local_files_only=True)
    both.hub.requests.clear()
    model.save_pretrained(tmp_path / "thin", thin=True)
    assert len(both.hub.requests) == 0
    assert json.loads((tmp_path / "thin" / "config.json").read_text())["recipient_revision"] == both.base_commit

"""Every call that reaches the Hub, in every state the Hub can be in: it works, or one sentence says why not."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM

from tests.faults.looping import pt_file
from tests.helpers import DONOR_LAYERS, NUM_LAYERS, Shelf, edit_json, refused, refused_by_hub
from tests.hub_server import ALICE, BOB, EXPIRED, HubServer, json_result, run_with_hub
from transplant_hf import AutoModelWithTransplant, Donor, HubError, TransplantError, check, inspect
from transplant_hf.conversion import convert

pytestmark = pytest.mark.hub

Call = Callable[..., Any]


def call_donor(shelf: Shelf, **kwargs: Any) -> Any:
    return Donor.from_pretrained(shelf.law, **kwargs)


def call_load(shelf: Shelf, **kwargs: Any) -> Any:
    return AutoModelWithTransplant.from_pretrained(shelf.law, **kwargs)


def call_auto_class(shelf: Shelf, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(shelf.law, **kwargs)


def call_insert(shelf: Shelf, **kwargs: Any) -> Any:
    return AutoModelWithTransplant.from_pretrained(shelf.base, donors={shelf.law: 1}, **kwargs)


def call_check(shelf: Shelf, **kwargs: Any) -> Any:
    return check(shelf.base, shelf.law, **kwargs)


def call_from_pt(shelf: Shelf, **kwargs: Any) -> Any:
    return Donor.from_pt(pt_file(shelf.family), shelf.base, layers=list(DONOR_LAYERS), **kwargs)


def call_convert(shelf: Shelf, **kwargs: Any) -> Any:
    layers = list(DONOR_LAYERS)
    return convert(pt_file(shelf.family), shelf.base, layers=layers, push_to=f"{shelf.law}-converted", **kwargs)


def call_push(shelf: Shelf, **kwargs: Any) -> Any:
    donor = Donor.from_pretrained(shelf.family / "donor")
    return donor.push_to_hub(f"{shelf.law}-mine", position=1, recipient=shelf.base, **kwargs)


def call_inspect(shelf: Shelf, **kwargs: Any) -> Any:
    return inspect(shelf.law, **kwargs)


READS_LAW = [call_donor, call_load, call_insert, call_check]
READS_BASE = [call_load, call_auto_class, call_from_pt, call_convert]
ALL = [call_donor, call_load, call_from_pt, call_convert, call_push]


@pytest.mark.parametrize("call", READS_LAW)
@pytest.mark.parametrize(("how", "cause"), [("gated", GatedRepoError), ("private", RepositoryNotFoundError)])
def test_a_donor_that_is_not_open(shelf: Shelf, as_user: Any, call: Call, how: str, cause: Any) -> None:
    shelf.put_base().put_law(**{how: True})
    for token in (None, BOB):
        with refused_by_hub(shelf.law, how, cause=cause):
            call(shelf, token=token)
    assert shelf.weights(shelf.base) == 0
    shelf.hub.grant(shelf.law, "bob")
    assert call(shelf, token=BOB)


@pytest.mark.parametrize("call", READS_BASE)
@pytest.mark.parametrize(("how", "cause"), [("gated", GatedRepoError), ("private", RepositoryNotFoundError)])
def test_a_recipient_that_is_not_open(shelf: Shelf, as_user: Any, call: Call, how: str, cause: Any) -> None:
    shelf.put_base(**{how: True}).put_law()
    for token in (None, BOB):
        with refused_by_hub(shelf.base, how, cause=cause):
            call(shelf, token=token)
    assert not shelf.hub.exists(f"{shelf.law}-converted")
    assert call(shelf, token=ALICE)


@pytest.mark.parametrize("call", READS_BASE)
def test_a_recipient_that_is_missing(shelf: Shelf, as_user: Any, call: Call) -> None:
    edit_json(shelf.family / "donor" / "config.json", recipient=shelf.base)
    shelf.put_law()
    with refused_by_hub(shelf.base, "not found", "private", "Check the name", cause=RepositoryNotFoundError):
        call(shelf)


@pytest.mark.parametrize("call", ALL)
def test_an_expired_token(both: Shelf, as_user: Any, call: Call) -> None:
    with refused_by_hub("401", "hf auth login", cause=HfHubHTTPError):
        call(both, token=EXPIRED)
    as_user(EXPIRED)
    with refused_by_hub("401", "hf auth login", cause=HfHubHTTPError):
        call(both)
    assert not both.hub.exists(f"{both.law}-mine")


@pytest.mark.parametrize("call", [call_convert, call_push])
def test_a_place_that_is_someone_elses(both: Shelf, as_user: Any, call: Call) -> None:
    with refused_by_hub(both.law, "403", "alice", cause=HfHubHTTPError):
        call(both, token=BOB)


@pytest.mark.parametrize("call", ALL)
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub(both: Shelf, as_user: Any, call: Call, status: int) -> None:
    """Where the client asks again it works, where it does not the waiting time is named; later it works."""
    as_user(ALICE)
    both.hub.fail("GET", "/api/models/*", status=status, headers={"Retry-After": "23"}, times=None)
    facts = ("429", "23 seconds") if status == 429 else ("503", "Try again later")
    with refused_by_hub(*facts, cause=HfHubHTTPError):
        call(both)
    both.hub.clear_faults()
    both.hub.fail("*", "*/resolve/*", status=status, headers={"Retry-After": "0"}, times=1)
    assert call(both)


def test_a_busy_commit(both: Shelf, as_user: Any) -> None:
    as_user(ALICE)
    for status, fact in ((429, "3 seconds"), (503, "Try again later")):
        both.hub.fail("POST", "*/commit/*", status=status, headers={"Retry-After": "3"}, times=None)
        with refused_by_hub(f"{both.law}-mine", fact, cause=HfHubHTTPError):
            call_push(both)
        both.hub.clear_faults()
        assert both.hub.paths(f"{both.law}-mine") == [".gitattributes"]
    assert call_push(both).oid == both.hub.head(f"{both.law}-mine")


# -- Nobody there ----------------------------------------------------------------------------------------------------


def every_call(shelves: Mapping[str, Shelf]) -> dict[str, tuple[str, float]]:
    """What each call says, and the seconds that it took."""
    said: dict[str, tuple[str, float]] = {}
    for state, shelf in shelves.items():
        for call in [*ALL, call_inspect]:
            began = time.monotonic()
            try:
                made = call(shelf)
                text = made.transplant_config.recipient_revision if call is call_load else "done"
            except TransplantError as error:
                assert error.__cause__ is not None
                text = f"{type(error).__name__}: {error}"
            said[f"{state} {call.__name__}"] = text, time.monotonic() - began
    return said


ELSEWHERE = """
    import json
    from pathlib import Path
    from tests.helpers import Shelf
    from tests.test_hub_every_call import every_call
    family = Path({family!r})
    shelves = {{"warm": Shelf(None, family, {base!r}, {law!r}), "cold": Shelf(None, family, "alice/base", "alice/law")}}
    print(json.dumps(every_call(shelves)))
"""
READS = ["call_donor", "call_load", "call_from_pt", "call_inspect"]
WRITES = ["call_convert", "call_push"]


@pytest.mark.parametrize("state", ["offline", "down"])
def test_without_the_hub(shelf: Shelf, as_user: Any, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was used before works, fast; what was not says so; nothing can be pushed."""
    as_user(ALICE)
    used = shelf.put_base().put_law()
    assert all(call(used) for call in [*ALL, call_inspect])
    used.hub.requests.clear()
    if state == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as the variable does in a new process
        cold = dataclasses.replace(used, base="alice/base", law="alice/law")
        said = every_call({"warm": used, "cold": cold})
        assert len(used.hub.requests) == 0
    else:
        with HubServer() as gone:
            pass
        code = ELSEWHERE.format(family=str(used.family), base=used.base, law=used.law)
        said = json_result(run_with_hub(gone, code, token=ALICE, cache=Path(constants.HF_HOME)))
    for name in READS if state == "offline" else READS[:-1]:  # `inspect` asks the Hub where it may
        text, seconds = said[f"warm {name}"]
        assert text == (used.base_commit if name == "call_load" else "done"), name
        assert seconds < 60, name
    for name in [*READS, *WRITES]:
        text, seconds = said[f"cold {name}"]
        assert text.startswith("HubError: "), (name, text)
        assert "alice/" in text
        assert "connection" in text
        assert "offline" in text or "cannot be reached" in text
        assert seconds < 60, (name, seconds)
    for name in WRITES:
        text, _ = said[f"warm {name}"]
        assert text.startswith("HubError: "), (name, text)


def test_a_token_that_is_not_sent(shelf: Shelf, as_user: Any) -> None:
    as_user(ALICE)
    shelf.put_base(private=True).put_law()
    with refused(HubError, shelf.base, "private"):
        call_from_pt(shelf, token=False)
    assert call_from_pt(shelf).num_layers == len(DONOR_LAYERS)
    assert len(call_load(shelf).layer_map) == NUM_LAYERS + len(DONOR_LAYERS)

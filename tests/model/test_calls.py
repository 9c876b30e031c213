"""A change of the donors waits for calls of other threads, and calls wait for the change: no call is half of each."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from tests.helpers import generated, layers_of, loaded, logits_of, plain, refused, some_ids, two_donors
from transplant_hf import ConfigurationError, TransplantError, remove_transplants, transplant
from transplant_hf.model import calls


def beside(calling: Callable[[], Any], changing: Callable[[], None], calls: int = 15, threads: int = 2) -> list[Any]:
    """What calls give, and the errors of ours they end in, while changes are made as fast as they can be."""
    done = threading.Event()

    def call(_: int) -> list[Any]:
        found = []
        for _ in range(calls):
            try:
                found.append(calling())
            except TransplantError as error:
                found.append(error)
        return found

    def change() -> int:
        number = 0
        while not done.is_set():
            changing()
            number += 1
        return number

    with ThreadPoolExecutor(threads + 1) as pool:
        changes = pool.submit(change)
        try:
            answers = [one for found in pool.map(call, range(threads)) for one in found]
        finally:
            done.set()
        assert changes.result() > 0
    return answers


def toggle(model: Any) -> Callable[[], None]:
    def off_and_on() -> None:
        with model.disable_transplants():
            pass

    return off_and_on


@pytest.mark.slow
@pytest.mark.parametrize("call", ["forward", "generate", "generate without a cache"])
def test_donors_switched_beside_calls(tiny: Path, call: str) -> None:
    model, ids = loaded(tiny, 1), some_ids(1, 4)
    calling: dict[str, Callable[[Any], torch.Tensor]] = {
        "forward": lambda one: logits_of(one, ids),
        "generate": lambda one: generated(one, ids, new=3),
        "generate without a cache": lambda one: generated(one, ids, new=3, use_cache=False),
    }
    sides = [calling[call](model), calling[call](plain(tiny / "recipient"))]
    for found in beside(lambda: calling[call](model), toggle(model)):
        assert any(torch.equal(found, side) for side in sides)
    assert torch.equal(calling[call](model), sides[0])


def test_donors_changed_beside_calls(tiny_llama: Path) -> None:
    model, ids = two_donors(tiny_llama), some_ids(1, 4)
    before = model.transplant_config.donors[0].position

    def change() -> None:
        model.move_donor("a", 4)
        model.set_strength("b", 0.5)
        model.set_strength("b", 1.0)
        model.move_donor("a", before)

    sides = [logits_of(model, ids)]
    for turn in (lambda: model.move_donor("a", 4), lambda: model.set_strength("b", 0.5)):
        turn()
        sides.append(logits_of(model, ids))
    model.set_strength("b", 1.0)
    model.move_donor("a", before)
    for found in beside(lambda: logits_of(model, ids), change):
        assert any(torch.equal(found, side) for side in sides)


def test_the_first_choice_beside_calls(tiny_llama: Path) -> None:
    """It puts hooks on the layers, which calls of other threads may be going through."""
    wanted = logits_of(two_donors(tiny_llama))
    for _ in range(5):
        model = two_donors(tiny_llama)

        def choose(model: Any = model) -> None:
            with model.using("a"):
                pass

        assert all(torch.equal(found, wanted) for found in beside(functools.partial(logits_of, model), choose, calls=2))


def test_two_threads_that_switch(tiny_llama: Path) -> None:
    model = two_donors(tiny_llama)
    wanted = {}
    for name in ("a", "b"):
        with model.disable_transplants(name):
            wanted[name] = logits_of(model)
    with model.disable_transplants():
        neither = logits_of(model)

    def switched(name: str) -> bool:
        with model.disable_transplants(name):
            found = logits_of(model)
        return torch.equal(found, wanted[name]) or torch.equal(found, neither)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(switched, ["a", "b"] * 20))
    assert torch.equal(logits_of(model), logits_of(two_donors(tiny_llama)))


# -- Layers changed by hand, and what stays after a removal ----------------------------------------------------------


def delete_layer(model: Any) -> None:
    del layers_of(model)[1]


def insert_layer(model: Any) -> None:
    layers_of(model).insert(1, copy.deepcopy(layers_of(model)[1]))


def exchange_layers(model: Any) -> None:
    stack = layers_of(model)
    stack[0], stack[1] = stack[1], stack[0]


@pytest.mark.parametrize("edit", [delete_layer, insert_layer, exchange_layers])
def test_layers_changed_by_hand(tiny: Path, tmp_path: Path, edit: Callable[[Any], None]) -> None:
    model = loaded(tiny, 1)
    edit(model)
    ways: list[Callable[[], Any]] = [
        toggle(model),
        lambda: model.move_donor("donor", 2),
        lambda: model.remove_donor("donor"),
        lambda: model.using("donor").__enter__(),
        lambda: model.save_pretrained(tmp_path / "full"),
        lambda: model.save_pretrained(tmp_path / "thin", thin=True),
        lambda: remove_transplants(model),
    ]
    for way in ways:
        with refused(ConfigurationError, "changed by hand", "put 6 there", f"are {len(layers_of(model))} now"):
            way()
    assert not list(tmp_path.iterdir())


def test_layers_changed_by_hand_before(tiny_gpt_oss: Path) -> None:
    """A recipient whose configuration did not follow."""
    donor = str(tiny_gpt_oss / "donor")
    for in_place in (True, False):
        pruned = plain(tiny_gpt_oss / "recipient")
        delete_layer(pruned)
        with refused(ConfigurationError, "it holds 3 layers", "describes 4"):
            transplant(pruned, donor, 1, in_place=in_place)
        pruned.config.num_hidden_layers = 3
        with refused(ConfigurationError, "config.layer_types has 4 entries for 3 layers"):
            transplant(pruned, donor, 1, in_place=in_place)
        twice = plain(tiny_gpt_oss / "recipient")
        layers_of(twice)[3] = layers_of(twice)[1]
        with refused(ConfigurationError, "layers 1, 3 are one and the same module"):
            transplant(twice, donor, 1, in_place=in_place)
        assert not twice.model._forward_hooks


@pytest.mark.parametrize("watched", [True, False])
def test_a_cache_from_before_a_removal(tiny: Path, watched: bool) -> None:
    model, ids = loaded(tiny, 1), some_ids(1, 4)
    if watched:
        toggle(model)()
        model.set_strength("donor", 0.5)
    old = model(ids, use_cache=True).past_key_values
    recipient = remove_transplants(model)
    with refused(ConfigurationError, "donors were added, removed or moved", "new cache"):
        recipient(ids, past_key_values=old)
    new = recipient(ids, use_cache=True).past_key_values
    recipient(ids, past_key_values=new)
    again = transplant(recipient, str(tiny / "donor"), 1, in_place=True)
    with refused(ConfigurationError, "donors were added, removed or moved", "new cache"):
        again(ids, past_key_values=new)
    assert torch.equal(generated(again), generated(loaded(tiny, 1)))


# -- Within a call of the same thread --------------------------------------------------------------------------------


def test_switched_in_a_hook(tiny: Path) -> None:
    model = loaded(tiny, 1)
    wanted, recipient, inside = logits_of(model), logits_of(plain(tiny / "recipient")), []

    def hook(*_: Any) -> None:
        if not inside:
            inside.append(None)
            with model.disable_transplants():
                inside.append(logits_of(model))

    handle = layers_of(model)[2].register_forward_hook(hook)
    assert torch.equal(logits_of(model), wanted)
    assert torch.equal(inside[1], recipient)
    handle.remove()


def test_left_switched_in_a_hook(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 1)
    off = model.disable_transplants()
    handle = layers_of(model)[0].register_forward_hook(lambda *_: off.__enter__() and None)
    with refused(ConfigurationError, "changed within this call", "switch between calls"):
        logits_of(model)
    handle.remove()
    off.__exit__(None, None, None)
    assert torch.equal(logits_of(model), logits_of(loaded(tiny_llama, 1)))


def test_switched_while_generating(tiny_llama: Path) -> None:
    """As in contrastive decoding: the recipient is asked before every token."""
    model = loaded(tiny_llama, 1)

    def ask(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with model.disable_transplants():
            return scores - model(ids).logits[:, -1]

    first = generated(model, logits_processor=LogitsProcessorList([ask]))
    assert torch.equal(first, generated(model, logits_processor=LogitsProcessorList([ask])))


@pytest.mark.parametrize("change", ["add", "move", "remove"])
def test_changed_in_a_hook(tiny_llama: Path, change: str) -> None:
    model = two_donors(tiny_llama)
    ways: dict[str, Callable[[], None]] = {
        "add": lambda: model.add_donor(str(tiny_llama / "donor"), 4, name="new"),
        "move": lambda: model.move_donor("a", 4),
        "remove": lambda: model.remove_donor("a"),
    }
    handle = layers_of(model)[-1].register_forward_hook(lambda *_: ways[change]())
    with refused(ConfigurationError, "changed within this call, by a hook"):
        logits_of(model)
    handle.remove()
    logits_of(model)


# -- Calls that do not end ---------------------------------------------------------------------------------------------


def test_a_call_that_does_not_end(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(calls, "_POLL_SECONDS", 0.05)
    model = loaded(tiny_llama, 1)
    wanted = logits_of(model)
    inside, go_on = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        if not inside.is_set():
            inside.set()
            go_on.wait()

    layers_of(model)[0].register_forward_hook(stop)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(logits_of, model)
        inside.wait()
        for change in (toggle(model), lambda: model.move_donor("donor", 2), lambda: model.set_strength("donor", 2.0)):
            with refused(ConfigurationError, "calls of 1 other threads", "0.1 seconds", "using(...)"):
                change()
        go_on.set()
        assert torch.equal(call.result(), wanted)
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain(tiny_llama / "recipient")))


def test_calls_that_wait_for_each_other(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls, each of which switches donors in a hook: one is refused, so that the other can go on."""
    monkeypatch.setattr(calls, "_POLL_SECONDS", 0.05)
    model, together = loaded(tiny_llama, 1), threading.Barrier(2)

    def hook(*_: Any) -> None:
        together.wait()
        with model.disable_transplants():
            pass

    handle = layers_of(model)[0].register_forward_hook(hook)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(logits_of, model) for _ in range(2)]
        errors = [future.exception() for future in futures]
    handle.remove()
    assert [type(error) for error in errors].count(ConfigurationError) == 1
    assert "waits for this very call" in str(next(error for error in errors if error))
    assert torch.equal(logits_of(model), logits_of(loaded(tiny_llama, 1)))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_call_is_over(tiny_llama: Path, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_POLL_SECONDS", 0.05)
    model = loaded(tiny_llama, 1)

    def stop(*_: Any) -> None:
        raise error

    handle = layers_of(model)[0].register_forward_hook(stop)
    with pytest.raises(error):
        logits_of(model)
    handle.remove()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(toggle(model)).result()


def test_what_tools_look_at(tiny_llama: Path) -> None:
    model, recipient = loaded(tiny_llama, 1), plain(tiny_llama / "recipient")
    assert inspect.signature(model.forward) == inspect.signature(recipient.forward)
    assert inspect.signature(model.generate) == inspect.signature(recipient.generate)
    assert torch.equal(generated(remove_transplants(model)), generated(recipient))


# -- Blocks that cannot begin or end -----------------------------------------------------------------------------------


@contextmanager
def call_under_way(model: Any) -> Iterator[None]:
    """A call of another thread that ends with the block."""
    inside, go_on = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        inside.set()
        go_on.wait()

    handle = layers_of(model)[0].register_forward_hook(stop)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(logits_of, model)
        inside.wait()
        handle.remove()
        try:
            yield
        finally:
            go_on.set()


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_interrupted_where_a_block_begins(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_donors(tiny_llama)
    with model.disable_transplants("b"):
        wanted = logits_of(model)
    with monkeypatch.context() as patched:
        patched.setattr(calls.Calls, "_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            toggle(model)()
    with model.disable_transplants("b"):
        assert torch.equal(logits_of(model), wanted)
    assert torch.equal(logits_of(model), logits_of(two_donors(tiny_llama)))


@pytest.mark.parametrize("then", ["call", "save", "copy", "using", "add", "switch"])
def test_a_block_that_could_not_end(
    tiny_llama: Path, tmp_path: Path, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next call or change ends it."""
    monkeypatch.setattr(calls, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(calls, "_POLL_SECONDS", 0.05)
    model = loaded(tiny_llama, 1)
    wanted, off = logits_of(model), model.disable_transplants()
    off.__enter__()
    with (
        call_under_way(model),
        refused(ConfigurationError, "the end of disable_transplants()", "are switched back by the next call or change"),
    ):
        off.__exit__(None, None, None)
    if then == "save":
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits_of(plain(tmp_path / "saved")), wanted)
    elif then == "copy":
        assert torch.equal(logits_of(copy.deepcopy(model)), wanted)
    elif then == "using":
        with model.using("donor"):
            assert torch.equal(logits_of(model), wanted)
    elif then == "add":
        model.add_donor(str(tiny_llama / "donor"), 3, name="new")
        model.remove_donor("new")
    elif then == "switch":
        with model.disable_transplants():
            assert torch.equal(logits_of(model), logits_of(plain(tiny_llama / "recipient")))
    assert torch.equal(logits_of(model), wanted)


def test_an_error_in_a_block_that_could_not_end(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(calls, "_POLL_SECONDS", 0.05)
    model, off = loaded(tiny_llama, 1), contextlib.ExitStack()
    with pytest.raises(ValueError, match="of the user"), model.disable_transplants():
        off.enter_context(call_under_way(model))
        raise ValueError("of the user")
    off.close()
    assert not model._transplant._blocks
    assert torch.equal(logits_of(model), logits_of(loaded(tiny_llama, 1)))


def test_interrupted_where_a_block_ends(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(tiny_llama, 1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt), model.disable_transplants():
        patched.setattr(calls.Calls, "_wait", interrupt)
    assert torch.equal(logits_of(model), logits_of(loaded(tiny_llama, 1)))

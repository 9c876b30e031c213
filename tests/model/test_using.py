"""`model.using`: each call, or each row of a batch, chooses its donors, and nothing that calls share is changed."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import itertools
import pickle
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import DynamicCache

from tests.helpers import generated, loaded, logits_of, plain, refused, some_ids, two_donors
from transplant_hf import ConfigurationError, transplant
from transplant_hf.model.strength import attach_gate, detach_gate


def alone(family: Path, name: str, **kwargs: Any) -> Any:
    """One of the two donors of `two_donors` in the recipient."""
    if name == "a":
        return loaded(family, 0, name="a", layers=[1], **kwargs)
    return loaded(family, 2, name="b", **kwargs)


# -- Whole calls ---------------------------------------------------------------------------------------------------


def test_by_name(tiny: Path) -> None:
    model, both = two_donors(tiny), two_donors(tiny)
    for name in ("a", "b"):
        with model.using(name):
            assert torch.equal(logits_of(model), logits_of(alone(tiny, name)))
            assert torch.equal(generated(model), generated(alone(tiny, name)))
    with model.using(["b", "a"]):
        assert torch.equal(logits_of(model), logits_of(both))
    with model.using(()):
        assert torch.equal(logits_of(model), logits_of(plain(tiny / "recipient")))
        assert torch.equal(generated(model), generated(plain(tiny / "recipient")))
    assert torch.equal(logits_of(model), logits_of(both))
    assert torch.equal(generated(model), generated(both))


def test_by_strength(tiny: Path) -> None:
    model = two_donors(tiny, strength=0.25)
    with model.using({"b": 0.5}):
        torch.testing.assert_close(logits_of(model), logits_of(alone(tiny, "b", strength=0.5)))
    with model.using("a"):  # at the strength that is set
        torch.testing.assert_close(logits_of(model), logits_of(alone(tiny, "a", strength=0.25)))
    assert model.strengths == {"a": 0.25, "b": 1.0}


def test_nested_and_left_by_an_exception(tiny_llama: Path) -> None:
    model = two_donors(tiny_llama)
    with model.using("a"):
        with pytest.raises(KeyError), model.using("b"):
            raise KeyError
        assert torch.equal(logits_of(model), logits_of(alone(tiny_llama, "a")))
    assert torch.equal(logits_of(model), logits_of(two_donors(tiny_llama)))


def test_side_by_side(tiny: Path) -> None:
    model = transplant(loaded(tiny, 2, name="a"), str(tiny / "donor"), 2, name="b", composition="side_by_side")
    with model.using("b"):
        torch.testing.assert_close(logits_of(model), logits_of(alone(tiny, "b")))
    with model.using({"a": 0.5, "b": 0.5}):
        torch.testing.assert_close(logits_of(model), logits_of(loaded(tiny, 2)))
    with model.using(rows=[{"a": 0.5, "b": 0.5}, None]):
        found = logits_of(model)
    torch.testing.assert_close(found[0], logits_of(loaded(tiny, 2))[0])
    torch.testing.assert_close(found[1], logits_of(plain(tiny / "recipient"))[1])


def test_beside_a_replacing_donor(tiny_llama: Path) -> None:
    model = two_donors(tiny_llama, second="replace")
    with model.using("b"):
        assert torch.equal(logits_of(model), logits_of(loaded(tiny_llama, 2, "replace", name="b")))
    for without in ((), "a", {"b": 0.5}):
        with (
            refused(ConfigurationError, "'b' replaces recipient layers", "disable_transplants('b')"),
            model.using(without),
        ):
            pass


def test_positions_and_padding(tiny: Path) -> None:
    """Position 0 with padding and a static cache: layers that are left out still fill their part of the cache."""
    ids, mask = some_ids(), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    model, recipient = loaded(tiny, 0), plain(tiny / "recipient")
    with model.using(()):
        for kind in (None, "static"):
            found = generated(model, ids, attention_mask=mask, cache_implementation=kind)
            assert torch.equal(found, generated(recipient, ids, attention_mask=mask, cache_implementation=kind))


# -- Rows ----------------------------------------------------------------------------------------------------------


def test_rows(tiny: Path) -> None:
    model, ids = two_donors(tiny), some_ids(batch=4)
    whole = {
        None: plain(tiny / "recipient"), "a": alone(tiny, "a"), "b": alone(tiny, "b"), ("a", "b"): two_donors(tiny)
    }  # fmt: skip
    with model.using(rows=list(whole)):
        logits, tokens = logits_of(model, ids), generated(model, ids)
    for number, one in enumerate(whole.values()):
        # Experts take the tokens of all rows together, in another order than in a whole batch of one kind.
        torch.testing.assert_close(logits[number], logits_of(one, ids)[number])
        assert torch.equal(tokens[number], generated(one, ids)[number])


def test_strength_by_row(tiny: Path) -> None:
    model = loaded(tiny, 1)
    with model.using({"donor": [0.5, 0]}):
        found = logits_of(model)
    torch.testing.assert_close(found[0], logits_of(loaded(tiny, 1, strength=0.5))[0])
    assert torch.equal(found[1], logits_of(plain(tiny / "recipient"))[1])


@pytest.mark.parametrize("several", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_several_sequences_of_a_row(tiny: Path, several: dict[str, int]) -> None:
    model, each = two_donors(tiny), several.get("num_return_sequences", 1)
    with model.using(rows=["a", None]):
        found = generated(model, **several).split(each)
    for number, one in enumerate((alone(tiny, "a"), plain(tiny / "recipient"))):
        assert torch.equal(found[number], generated(one, **several).split(each)[number])


@pytest.mark.parametrize("choice", [["a", None], ["a", "a"], {"b": [0.5, 0.0]}, {"b": [0.5, 0.5]}])
def test_as_many_entries_as_rows(tiny_llama: Path, choice: Any) -> None:
    """Also where the number of entries divides that of the rows, and where all entries are equal."""
    model = two_donors(tiny_llama)
    arguments = {"rows": choice} if isinstance(choice, list) else {"donors": choice}
    with model.using(**arguments):
        logits_of(model, some_ids(batch=2))
        for batch in (1, 3, 4):
            facts = ("2 entries", f"{batch} rows", "one entry for each row", "for each text")
            with refused(ConfigurationError, *facts):
                logits_of(model, some_ids(batch=batch))
            for several in ({}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}):
                with refused(ConfigurationError, *facts):
                    generated(model, some_ids(batch=batch), **several)
        with refused(ConfigurationError, "2 entries", "4 rows"):
            model.generate(inputs_embeds=torch.ones(4, 3, model.config.hidden_size), max_new_tokens=2)
        with refused(ConfigurationError, "2 entries", "1 rows"):
            model.generate(bos_token_id=1, max_new_tokens=2)
        assert generated(model, num_beams=2).shape[0] == 2
        with refused(ConfigurationError, "2 entries", "4 rows"):  # after generate() a plain call again
            logits_of(model, some_ids(batch=4))


def test_a_row_whose_donor_overflows_does_not_spoil_others(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 1)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    with model.using(rows=["donor", None]):
        found = logits_of(model)
    assert torch.equal(found[1], logits_of(plain(tiny_llama / "recipient"))[1])
    assert not found[0].isfinite().all()


def test_half_precision(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 1, dtype=torch.bfloat16)
    with model.using({"donor": [1, 0]}):
        found = logits_of(model)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[0], logits_of(loaded(tiny_llama, 1, dtype=torch.bfloat16))[0])


# -- Threads -------------------------------------------------------------------------------------------------------


def test_threads_choose_for_themselves(tiny: Path) -> None:
    model, ids = two_donors(tiny), some_ids()
    wanted = {
        (): generated(plain(tiny / "recipient"), ids), ("a",): generated(alone(tiny, "a"), ids),
        ("b",): generated(alone(tiny, "b"), ids), ("a", "b"): generated(two_donors(tiny), ids),
    }  # fmt: skip
    together = threading.Barrier(4)

    def serve(names: tuple[str, ...]) -> list[bool]:
        together.wait()
        right = []
        for _ in range(5):
            with model.using(names):
                right.append(torch.equal(generated(model, ids), wanted[names]))
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(all(right) for right in pool.map(serve, wanted))


def test_a_thread_without_a_choice(tiny_llama: Path) -> None:
    """A choice does not follow into threads that are started inside the block."""
    model = two_donors(tiny_llama)
    with model.using(()), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits_of, model).result(), logits_of(two_donors(tiny_llama)))


# -- Tasks and generators ------------------------------------------------------------------------------------------


@pytest.fixture
def answers(tiny_llama: Path) -> dict[Any, torch.Tensor]:
    """What `two_donors` gives for each choice; `None` is no choice."""
    model = two_donors(tiny_llama)
    found = {None: logits_of(model)}
    for choice in ("a", "b", ()):
        with model.using(choice):
            found[choice] = logits_of(model)
    assert not any(torch.equal(found[one], found[other]) for one, other in itertools.combinations(found, 2))
    return found


def stream(model: Any, choice: Any) -> Iterator[torch.Tensor]:
    with model.using(choice):
        while True:
            yield logits_of(model)


def test_tasks_choose_for_themselves(tiny_llama: Path, answers: dict[Any, torch.Tensor]) -> None:
    model = two_donors(tiny_llama)

    async def request(choice: Any, turns: int) -> list[bool]:
        right = []
        with model.using(choice):
            for _ in range(turns):
                await asyncio.sleep(0)
                right.append(torch.equal(logits_of(model), answers[choice]))
        await asyncio.sleep(0)
        return [*right, torch.equal(logits_of(model), answers[None])]

    async def serve() -> list[list[bool]]:
        return await asyncio.gather(request("a", 3), request("b", 1), request((), 2), request("b", 4))

    assert all(all(right) for right in asyncio.run(serve()))
    assert torch.equal(logits_of(model), answers[None])


def test_what_is_started_in_a_block(tiny_llama: Path, answers: dict[Any, torch.Tensor]) -> None:
    """Tasks and `asyncio.to_thread` take the choice along, and a task keeps it when the block has ended."""
    model = two_donors(tiny_llama)

    async def later() -> torch.Tensor:
        await asyncio.sleep(0)
        return logits_of(model)

    async def serve() -> tuple[torch.Tensor, torch.Tensor]:
        with model.using("a"):
            task = asyncio.create_task(later())
            there = await asyncio.to_thread(logits_of, model)
        return there, await task

    assert all(torch.equal(found, answers["a"]) for found in asyncio.run(serve()))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_generators_choose_for_themselves(
    tiny_llama: Path, answers: dict[Any, torch.Tensor], order: tuple[int, ...]
) -> None:
    model, choices = two_donors(tiny_llama), ("a", "b", ())
    streams: list[Any] = [stream(model, choice) for choice in choices]
    for _ in range(2):
        for choice, one in zip(choices, streams, strict=True):
            assert torch.equal(next(one), answers[choice])
    assert torch.equal(logits_of(model), answers[None])
    with model.using("b"):
        assert torch.equal(next(streams[0]), answers["a"])
        assert torch.equal(logits_of(model), answers["b"])
    for number in order:
        streams[number].close()
        assert torch.equal(logits_of(model), answers[None])


def test_a_generator_that_threads_run_by_turns(tiny_llama: Path, answers: dict[Any, torch.Tensor]) -> None:
    """As web servers do, each step in a copy of the context."""
    one = stream(two_donors(tiny_llama), "a")
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            found = pool.submit(contextvars.copy_context().run, next, one).result()
            assert torch.equal(found, answers["a"])


def test_a_context_manager_around_it(tiny_llama: Path, answers: dict[Any, torch.Tensor]) -> None:
    """A generator that makes a context manager is no stream: the block is its caller's."""
    model = two_donors(tiny_llama)

    @contextlib.contextmanager
    def chosen(choice: Any) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(model.using(choice))
            yield

    def answer() -> Iterator[torch.Tensor]:
        with chosen("b"):
            yield logits_of(model)
            yield logits_of(model)

    with chosen("a"):
        one = answer()
        assert torch.equal(next(one), answers["b"])
        assert torch.equal(logits_of(model), answers["a"])
        assert torch.equal(next(one), answers["b"])
    model.using("a")(lambda: torch.testing.assert_close(logits_of(model), answers["a"], rtol=0, atol=0))()
    assert torch.equal(logits_of(model), answers[None])


def test_blocks_that_end_out_of_order(tiny_llama: Path, answers: dict[Any, torch.Tensor]) -> None:
    model = two_donors(tiny_llama)
    first, second = model.using("a"), model.using("b")
    first.__enter__()
    with refused(ConfigurationError, "open already"):
        first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(logits_of(model), answers["b"])
    second.__exit__(None, None, None)
    assert torch.equal(logits_of(model), answers[None])


@pytest.mark.parametrize("how", ["callback", "thread", "context"])
def test_a_block_that_ends_in_a_copied_context(tiny_llama: Path, answers: dict[Any, torch.Tensor], how: str) -> None:
    model = two_donors(tiny_llama)

    async def serve() -> torch.Tensor:
        stack = contextlib.ExitStack()
        stack.enter_context(model.using("a"))
        if how == "callback":
            task = asyncio.create_task(asyncio.sleep(0))
            task.add_done_callback(lambda _: stack.close())
            await task
            await asyncio.sleep(0)
        elif how == "thread":
            await asyncio.to_thread(stack.close)
        else:
            contextvars.copy_context().run(stack.close)
        return logits_of(model)

    assert torch.equal(asyncio.run(serve()), answers[None])
    assert torch.equal(logits_of(model), answers[None])


@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("choice", ["a", None])
def test_a_generator_that_ends_within_another_call(
    tiny_llama: Path, answers: dict[Any, torch.Tensor], elsewhere: bool, choice: str | None
) -> None:
    """Closed by another thread, or by this one as by the garbage collector: the call goes on as it began."""
    model = two_donors(tiny_llama)
    streams = [stream(model, "b"), stream(model, ())]

    def leave(*_: Any) -> None:
        if elsewhere:
            thread = threading.Thread(target=streams[0].close)  # type: ignore[attr-defined]
            thread.start()
            thread.join()
        else:
            streams[0].close()  # type: ignore[attr-defined]

    async def request() -> torch.Tensor:
        with model.using(choice) if choice else contextlib.nullcontext():
            hook = model.model.layers[0].register_forward_hook(leave)
            try:
                return logits_of(model)
            finally:
                hook.remove()

    for one in streams:
        contextvars.copy_context().run(next, one)
    assert torch.equal(asyncio.run(request()), answers[choice])
    assert torch.equal(next(streams[1]), answers[()])


class Stop(BaseException):
    pass


def test_an_interrupted_call_chooses_nothing_later(tiny_llama: Path, answers: dict[Any, torch.Tensor]) -> None:
    """In the thread of a pool, whose context has the block only for that call; and within another call."""
    model = two_donors(tiny_llama)

    def stop(*_: Any) -> None:
        raise Stop

    def interrupted() -> None:
        hook = model.model.layers[3].register_forward_hook(stop)
        with pytest.raises(Stop):
            logits_of(model)
        hook.remove()

    def inner(*_: Any) -> None:
        hook.remove()
        with model.using("b"):
            interrupted()

    with ThreadPoolExecutor(1) as pool:
        with model.using("a"):
            pool.submit(contextvars.copy_context().run, interrupted).result()
        assert torch.equal(pool.submit(logits_of, model).result(), answers[None])
        pool.submit(model.move_donor, "a", 0).result()
    hook = model.model.layers[0].register_forward_hook(inner)
    with model.using("a"):
        assert torch.equal(logits_of(model), answers["a"])
    assert torch.equal(logits_of(model), answers[None])


def test_a_call_passed_on_by_a_generator(tiny_llama: Path, answers: dict[Any, torch.Tensor]) -> None:
    """In another thread nobody can tell whether the generator asked, or the code that it is suspended in."""
    model = two_donors(tiny_llama)

    def there() -> torch.Tensor:
        with model.using("a"):
            return logits_of(model)

    async def answer() -> AsyncIterator[torch.Tensor]:
        with model.using("b"):
            yield logits_of(model)
            yield await asyncio.to_thread(there)
            yield await asyncio.to_thread(logits_of, model)

    async def serve() -> None:
        streamed = answer()
        assert torch.equal(await anext(streamed), answers["b"])
        assert torch.equal(logits_of(model), answers[None])
        assert torch.equal(await anext(streamed), answers["a"])
        with refused(ConfigurationError, "another thread or task", "in the function that runs there"):
            await anext(streamed)

    asyncio.run(serve())


def test_an_abandoned_generator_keeps_nothing(tiny_llama: Path) -> None:
    model = two_donors(tiny_llama)
    one, gone = stream(model, "a"), weakref.ref(model)
    next(one)
    gc.disable()
    try:
        del one, model
        assert gone() is None
    finally:
        gc.enable()


# -- With other things -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="torch 2.10 cannot trace a thread's choice")
def test_compiled(tiny_gpt2: Path) -> None:
    torch.compiler.reset()
    model = two_donors(tiny_gpt2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits_of(compiled), logits_of(two_donors(tiny_gpt2)))
    for names in ("a", ()):
        with model.using(names):
            wanted = logits_of(model)
            torch.testing.assert_close(logits_of(compiled), wanted)
    with model.using(rows=["a", None]):
        torch.testing.assert_close(logits_of(compiled), logits_of(model))
    torch.testing.assert_close(logits_of(compiled), logits_of(two_donors(tiny_gpt2)))
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="torch 2.10 cannot trace a thread's choice")
def test_compiled_where_other_code_may_interleave(tiny_llama: Path, answers: dict[Any, torch.Tensor]) -> None:
    """A compiled call cannot tell tasks and generators apart, and refuses while one of them has a block open."""
    model = two_donors(tiny_llama)
    compiled = torch.compile(model, backend="eager")

    def there() -> torch.Tensor:
        with model.using("a"):
            return logits_of(compiled)

    async def serve() -> None:
        torch.testing.assert_close(await asyncio.to_thread(there), answers["a"])
        with model.using("b"), refused(ConfigurationError, "compiled call cannot tell", "asyncio.to_thread"):
            logits_of(compiled)

    asyncio.run(serve())
    torch.testing.assert_close(there(), answers["a"])
    torch.testing.assert_close(logits_of(compiled), answers[None])


def test_copied_and_pickled(tiny_llama: Path) -> None:
    """Outside: a block applies to one model, and a copy that is made inside would run with all donors there."""
    model = two_donors(tiny_llama)
    with model.using("a"):
        for copied in (copy.deepcopy, pickle.dumps):
            with refused(ConfigurationError, "copied inside using(...)", "outside"):
                copied(model)
        assert torch.equal(logits_of(model), logits_of(alone(tiny_llama, "a")))
    again = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301 - our own bytes
    for one in again:
        assert torch.equal(logits_of(one), logits_of(two_donors(tiny_llama)))
        with one.using("b"):
            assert torch.equal(logits_of(one), logits_of(alone(tiny_llama, "b")))
            assert torch.equal(logits_of(model), logits_of(two_donors(tiny_llama)))


def test_gradients_flow_where_it_is_wanted(tiny_llama: Path) -> None:
    model, ids = two_donors(tiny_llama), some_ids()
    with model.using("a"):
        model(ids, labels=ids).loss.backward()
    first, last = model.model.layers[0], model.model.layers[3]
    assert first.mlp.up_proj.weight.grad.abs().sum() > 0
    assert last.mlp.up_proj.weight.grad is None or not last.mlp.up_proj.weight.grad.any()


def test_hidden_states_are_the_recipients(tiny_llama: Path) -> None:
    model, ids = loaded(tiny_llama, 2), some_ids()
    with model.using(()), torch.no_grad():
        found = model(ids, output_hidden_states=True).hidden_states
    wanted = plain(tiny_llama / "recipient")(ids, output_hidden_states=True).hidden_states
    assert torch.equal(found[-1], wanted[-1]) and torch.equal(found[2], wanted[2])


def test_donors_that_come_and_go(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 2, name="b")
    with model.using(()):
        logits_of(model)
    model.add_donor(str(tiny_llama / "donor"), 0, name="a")
    with model.using("b"):
        assert torch.equal(logits_of(model), logits_of(alone(tiny_llama, "b")))
    with model.disable_transplants("a"):
        assert torch.equal(logits_of(model), logits_of(alone(tiny_llama, "b")))
        with refused(ConfigurationError, "'a' is switched off by disable_transplants()"), model.using("a"):
            pass
        with model.using(()):
            assert torch.equal(logits_of(model), logits_of(plain(tiny_llama / "recipient")))


def in_another_thread(change: Any, *args: Any, **kwargs: Any) -> None:
    """As another thread may do while this one has a block open."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(change, *args, **kwargs).result()


def test_donors_that_come_within_a_block(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 2, name="b")
    with model.using("b"):
        in_another_thread(model.add_donor, str(tiny_llama / "donor"), 0, name="a")
        assert torch.equal(logits_of(model), logits_of(alone(tiny_llama, "b")))
    model = loaded(tiny_llama, 2, name="b")
    with model.using("b"):
        in_another_thread(model.add_donor, str(tiny_llama / "donor"), 0, "replace", name="a")
        with refused(ConfigurationError, "'a'", "in place of", "Begin another block"):
            logits_of(model)


@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_donors_that_go_within_a_block(tiny_llama: Path, mode: str) -> None:
    facts = ("'b'", "removed, switched off", "Begin another block")
    model = two_donors(tiny_llama, second=mode, keep_replaced=True)
    with model.using("b"):
        with model.disable_transplants("b"), refused(ConfigurationError, *facts):
            logits_of(model)
        wanted = logits_of(model)
        in_another_thread(model.remove_donor, "a")
        assert torch.equal(logits_of(model), wanted)
        in_another_thread(model.remove_donor, "b")
        with refused(ConfigurationError, *facts):
            logits_of(model)
    assert torch.equal(logits_of(model), logits_of(plain(tiny_llama / "recipient")))


def test_decorators(tiny_llama: Path, answers: dict[Any, torch.Tensor]) -> None:
    """Each call of a function has its own block; what runs after the call is refused."""
    model = two_donors(tiny_llama)

    def function(depth: int) -> list[torch.Tensor]:
        return [logits_of(model), *(chosen(depth - 1) if depth else [])]

    async def coroutine() -> None: ...
    async def generator_of_tasks() -> AsyncIterator[None]:
        yield

    def generator() -> Iterator[None]:
        yield

    for block, answer in ((model.using("a"), answers["a"]), (model.disable_transplants(), answers[()])):
        for later in (coroutine, generator_of_tasks, generator):
            with refused(ConfigurationError, "cannot decorate", later.__name__, "inside the function"):
                block(later)
        chosen = block(function)
        assert all(torch.equal(found, answer) for found in chosen(1) + chosen(0))
        assert torch.equal(logits_of(model), answers[None])


# -- Refusals ---------------------------------------------------------------------------------------------------------


def test_a_cache_of_another_choice(tiny: Path) -> None:
    model, ids = two_donors(tiny), some_ids()
    with model.using("a"):
        cache = model(ids, use_cache=True).past_key_values
        model(ids, past_key_values=cache)
    with refused(ConfigurationError, "other donors", "new cache"):
        model(ids, past_key_values=cache)
    with model.using("b"), refused(ConfigurationError, "other donors", "new cache"):
        model(ids, past_key_values=cache)
    with model.using("a"):
        model(ids, past_key_values=cache)
        model(ids, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ((), ("say which donors", "rows=")),
        (("x",), ("no donor is named 'x'", "a, b")),
        (({"a": float("nan")},), ("'a'", "finite number", "nan")),
        (({"a": "1"},), ("'a'", "finite number", "'1'")),
        (({"a": []},), ("'a'", "one for each row")),
        (({"a": [1, 0], "b": [1, 0, 0]},), ("same batch", "'a': 2", "'b': 3")),
        ((3,), ("donors must be a name", "3")),
    ],
)
def test_refused_choices(tiny_llama: Path, arguments: tuple[Any, ...], facts: tuple[str, ...]) -> None:
    with refused(ConfigurationError, *facts), two_donors(tiny_llama).using(*arguments):
        pass


def test_refused_rows(tiny_llama: Path) -> None:
    model = two_donors(tiny_llama)
    for rows in ("a", [], 3):
        with refused(ConfigurationError, "an entry for each row", repr(rows)), model.using(rows=rows):
            pass
    with model.using(rows=["a", "b", None]), refused(ConfigurationError, "3 entries", "2 rows"):
        logits_of(model)
    with refused(ConfigurationError, "say which donors"), model.using("a", rows=["a"]):
        pass


def test_refused_while_it_is_trained(tiny_llama: Path) -> None:
    model, ids = two_donors(tiny_llama), some_ids()
    attach_gate(model, "a")
    with refused(ConfigurationError, "is being trained", "detach_gate"), model.using("a"):
        pass
    detach_gate(model, "a")
    model.train().gradient_checkpointing_enable()
    with model.using("a"), refused(ConfigurationError, "gradient checkpointing", "set_strength"):
        model(ids, labels=ids)


def test_no_transplant(tiny_llama: Path) -> None:
    model = type(loaded(tiny_llama))(plain(tiny_llama / "recipient").config)
    with refused(ConfigurationError, "holds no transplant"), model.using("a"):
        pass

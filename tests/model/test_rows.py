"""In `model.using`, the layers of a donor run on the rows that use it and on no others, and so do their caches."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch.nn.utils.parametrize import register_parametrization
from transformers import DynamicCache, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.helpers import CACHE, generated, loaded, logits_of, plain, refused, some_ids, two_donors
from transplant_hf import ConfigurationError, remove_transplants
from transplant_hf.model.rows import hold_rows

# Where the layers of `two_donors` run: a, and the two of b.
A, B = 0, (3, 4)


@contextmanager
def batches(model: Any) -> Iterator[dict[int, list[int]]]:
    """How many rows each layer runs on, by running number, for each time that it runs."""
    seen: dict[int, list[int]] = {}
    stack = model.model.layers if hasattr(model, "model") else model.transformer.h
    hooks = [
        layer.mlp.register_forward_hook(lambda _, args, output, n=n: seen.setdefault(n, []).append(args[0].shape[0]))
        for n, layer in enumerate(stack)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def warm(model: Any) -> Any:
    """Run a call that chooses donors: how layers return their hidden state is known then."""
    with model.using(()):
        logits_of(model)
    return model


def rows_held(cache: Any, number: int) -> int:
    return int(cache.layers[number].keys.shape[0])


# -- What runs -----------------------------------------------------------------------------------------------------


def test_a_donor_that_is_not_chosen_does_not_run(tiny: Path) -> None:
    model = warm(two_donors(tiny))
    for chosen, left_out in (("a", B), ("b", (A,)), ((), (A, *B))):
        with model.using(chosen), batches(model) as seen:
            logits_of(model)
            generated(model)
        assert not seen.keys() & {*left_out} and len(seen) == 7 - len(left_out)


def test_a_layer_with_several_parts_of_the_cache_runs_on_all_rows(tiny_llama: Path) -> None:
    """As in longcat_flash, where each layer has two attentions."""
    model, ids = warm(two_donors(tiny_llama)), some_ids(batch=4)
    for number in (A, *B):
        model.model.layers[number].mlp.layer_idx = 7 + number
    rows = ["a", None, ("a", "b"), "a"]
    with model.using(rows=rows), batches(model) as seen:
        cache = model(ids, use_cache=True).past_key_values
    assert [rows_held(cache, n) for n in range(7)] == [4] * 7 and set(map(tuple, seen.values())) == {(4,)}


def test_the_first_call_of_a_model(tiny: Path) -> None:
    """At most one layer has to run to know how layers return their hidden state."""
    model = two_donors(tiny)
    with model.using(()), batches(model) as seen:
        logits_of(model)
        tokens = generated(model)
    assert A in seen and len(seen[A]) == 1 and not seen.keys() & {*B}
    assert torch.equal(tokens, generated(plain(tiny / "recipient")))


def test_rows_that_do_not_use_a_donor_do_not_run_it(tiny: Path) -> None:
    model, ids = warm(two_donors(tiny)), some_ids(batch=4)
    with model.using(rows=["a", None, ("a", "b"), "a"]), batches(model) as seen:
        logits_of(model, ids)
    expected = {A: [3], B[0]: [1], B[1]: [1]}
    assert seen == {n: expected.get(n, [4]) for n in range(7)}


def test_each_row_is_what_it_is_alone(tiny_llama: Path) -> None:
    """To the bit: the donor's layers run on one row, as they do in a batch of one."""
    model, ids = warm(two_donors(tiny_llama)), some_ids(batch=3)
    with model.using(rows=["a", "b", None]):
        found = logits_of(model, ids)
    for number, name in enumerate(("a", "b", ())):
        with model.using(name):
            torch.testing.assert_close(found[number], logits_of(model, ids[number : number + 1])[0])
            torch.testing.assert_close(found[number], logits_of(model, ids)[number])


@pytest.mark.parametrize(("batch", "length"), [(3, 3), (4, 4), (2, 2), (4, 1)])
def test_sizes_that_can_be_confused(tiny: Path, batch: int, length: int) -> None:
    """As many rows as tokens or heads."""
    model, ids = warm(two_donors(tiny)), some_ids(batch, length)
    with model.using(rows=["a", *[None] * (batch - 1)]):
        found, tokens = logits_of(model, ids), generated(model, ids)
    with model.using("a"):
        torch.testing.assert_close(found[0], logits_of(model, ids)[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(tokens[0], generated(model, ids)[0])
    recipient = plain(tiny / "recipient")
    torch.testing.assert_close(found[1:], logits_of(recipient, ids)[1:], rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens[1:], generated(recipient, ids)[1:])


# -- Caches --------------------------------------------------------------------------------------------------------


def test_caches_hold_the_rows_that_run(tiny: Path) -> None:
    model, ids = warm(two_donors(tiny)), some_ids(batch=4)
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        with model.using(rows=["a", None, None, "a"]):
            for start in (0, 6, 11):
                model(ids[:, start : start + 6 if not start else start + 5], past_key_values=cache)
            assert [rows_held(cache, number) for number in range(7)] == [2, 4, 4, 0, 0, 4, 4]
            assert {cache.get_seq_length(number) for number in range(7)} == {cache.get_seq_length()}


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding(tiny: Path, padding: str) -> None:
    model, ids, mask = warm(two_donors(tiny)), some_ids(batch=3), torch.ones(3, 12, dtype=torch.long)
    for row, pads in ((0, 5), (1, 3)):
        mask[row, slice(0, pads) if padding == "left" else slice(12 - pads, 12)] = 0
    with model.using(rows=["b", "a", None]):
        logits, tokens = logits_of(model, ids, attention_mask=mask), generated(model, ids, attention_mask=mask)
    for row, name in enumerate(("b", "a", ())):
        with model.using(name):
            seen = mask[row].bool()
            torch.testing.assert_close(
                logits[row][seen], logits_of(model, ids, attention_mask=mask)[row][seen], rtol=1e-4, atol=1e-5
            )
            assert torch.equal(tokens[row], generated(model, ids, attention_mask=mask)[row])


def test_beams(tiny: Path) -> None:
    """A donor at position 0, where Transformers asks for the length of a cache, and one in between."""
    model = warm(two_donors(tiny))
    alone = []
    for name in ("b", ()):
        with model.using(name):
            alone.append(generated(model, num_beams=3))
    with model.using(rows=["b", None]), batches(model) as seen:
        found = generated(model, num_beams=3)
    assert torch.equal(found, torch.stack([alone[0][0], alone[1][1]]))
    assert A not in seen and max(seen[B[0]]) == 3


@torch.no_grad()
def test_operations_on_a_cache(tiny: Path) -> None:
    model, ids = warm(two_donors(tiny)), some_ids(batch=3)
    order, more = torch.tensor([2, 1, 1, 0]), some_ids(batch=4, length=5, seed=1)
    choice = {"a": [1.0, 0.0, 0.5]}
    with model.using(choice):
        cache = model(ids, use_cache=True).past_key_values
        for rows in (order, torch.tensor([True, False, True, True])):
            cache.batch_select_indices(rows)
            assert rows_held(cache, A) == 2 and rows_held(cache, B[0]) == 0
        assert rows_held(cache, 1) == 3
        cache.batch_repeat_interleave(2)
        assert [rows_held(cache, n) for n in (A, 1, B[1])] == [4, 6, 0]
        cache.reorder_cache(torch.tensor([4, 5, 2, 3, 0, 1]))  # as the batch was in the beginning
        again = torch.cat([ids, more[:1].expand(3, -1)], dim=1)
        found = generated(model, again, num_beams=2, **{CACHE: copy.deepcopy(cache)})
        assert torch.equal(found, generated(model, again, num_beams=2))


def test_a_cache_that_is_cropped(tiny_llama: Path) -> None:
    model, ids = warm(two_donors(tiny_llama)), some_ids()
    with model.using(rows=["a", None]):
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-4)
        assert {cache.get_seq_length(number) for number in range(7)} == {8}
        found = model(ids[:, 8:], past_key_values=cache).logits
        torch.testing.assert_close(found, logits_of(model, ids)[:, 8:], rtol=1e-4, atol=1e-5)
        cache.reset()
        if not cache.get_seq_length():  # Transformers 5.17 keeps its length, and zeros
            torch.testing.assert_close(model(ids, past_key_values=cache).logits, logits_of(model, ids))


def test_a_cache_from_before_the_form_was_known(tiny: Path) -> None:
    """All rows ran in the first pass; the cache then keeps those that are wanted."""
    model, ids = two_donors(tiny), some_ids()
    with model.using(rows=[None, "a"]):
        cache = model(ids[:, :8], use_cache=True).past_key_values
        assert rows_held(cache, A) == 2
        found = model(ids[:, 8:], past_key_values=cache).logits
        assert rows_held(cache, A) == 1
        torch.testing.assert_close(found, logits_of(model, ids)[:, 8:], rtol=1e-4, atol=1e-5)


def test_prompt_lookup(tiny_llama: Path) -> None:
    """Which crops the cache."""
    model, ids = warm(two_donors(tiny_llama)), some_ids(batch=1).repeat(1, 2)
    with model.using("b"):
        assert torch.equal(generated(model, ids, prompt_lookup_num_tokens=3), generated(model, ids))


# -- Where all rows run --------------------------------------------------------------------------------------------


def test_calls_that_need_all_rows(tiny_llama: Path) -> None:
    model, ids = warm(two_donors(tiny_llama, attn_implementation="eager")), some_ids()
    with model.using(rows=["a", None]):
        wanted = logits_of(model)
        static = StaticCache(config=model.config, max_cache_len=12)
        for arguments in ({"past_key_values": static}, {"output_attentions": True}, {"unknown": torch.ones(2)}):
            with batches(model) as seen:
                found = model(ids, **arguments)
            torch.testing.assert_close(found.logits, wanted)
            assert seen[A] == [2]
            assert found.attentions is None or len(found.attentions) == 7
        model.config.output_attentions = True
        assert len(model(ids).attentions) == 7
        model.config.output_attentions = False
        with batches(model) as seen:
            model.train()(ids)
            model.eval()
        assert seen[A] == [2] and seen[B[0]] == [2]
        hook = model.model.layers[A].mlp.register_forward_pre_hook(lambda *_: None)  # as PEFT's adapters by row have
        with batches(model) as seen:
            torch.testing.assert_close(logits_of(model), wanted)
        hook.remove()
        assert seen[A] == [2] and B[0] not in seen


def test_a_layer_that_accelerate_moves(tiny_llama: Path) -> None:
    """Its own forward method comes first."""
    model = two_donors(tiny_llama)
    add_hook_to_module(model.model.layers[A], AlignDevicesHook(execution_device="cpu"))
    with model.using(rows=["b", None]):
        wanted = logits_of(model)
        with batches(model) as seen:
            assert torch.equal(logits_of(model), wanted)
        assert seen[A] == [2] and seen[B[0]] == [1]
        remove_hook_from_module(model.model.layers[A])
        torch.testing.assert_close(logits_of(model), wanted)


def test_a_cache_that_is_used_in_another_way(tiny_llama: Path) -> None:
    model, ids = warm(two_donors(tiny_llama)), some_ids()
    facts = ("rows [0] of 2 for a donor", "on 2 rows", "in the same way")
    with model.using(rows=["a", None]):
        cache = model(ids, use_cache=True).past_key_values
        with refused(ConfigurationError, *facts):
            model(ids, past_key_values=cache, output_attentions=True)
    cache = DynamicCache(config=model.config)
    layer = hold_rows(cache, 0, torch.tensor([True, False]))
    assert layer is not None
    layer.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    with refused(ConfigurationError, "rows [0] of 2", "rows [1] of 2", "new cache"):
        hold_rows(cache, 0, torch.tensor([False, True]))


# -- What becomes of the layers -----------------------------------------------------------------------------------


def test_layers_and_their_copies(tiny_llama: Path) -> None:
    model = warm(two_donors(tiny_llama))
    with model.using("a"):
        wanted = logits_of(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own bytes
        with again.using("a"), batches(again) as seen:
            assert torch.equal(logits_of(again), wanted)
        assert not seen.keys() & {*B}
        with torch.no_grad():
            again.model.layers[A].mlp.up_proj.weight.zero_()
    with model.using("a"):
        assert torch.equal(logits_of(model), wanted)
    assert {type(layer).__name__ for layer in model.model.layers} == {"LlamaDecoderLayer"}
    assert all(isinstance(layer, LlamaDecoderLayer) for layer in model.model.layers)
    first = model.model.layers[A]
    assert type(remove_transplants(model)) is LlamaForCausalLM
    assert type(first) is LlamaDecoderLayer


class Doubled(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.parametrize("again", [False, True])
def test_a_class_that_others_made_of_a_layer_stays(tiny_llama: Path, again: bool) -> None:
    """That of a parametrization, which torch makes when donors run by row already."""
    model, recipient = warm(two_donors(tiny_llama)), plain(tiny_llama / "recipient")
    layer = model.model.layers[A]
    layer.scale = torch.nn.Parameter(torch.ones(3))
    register_parametrization(layer, "scale", Doubled())
    if again:
        model.move_donor("a", 1)
    for rows in (["a", None], ["b", "a"]):
        with model.using(rows=rows):
            assert logits_of(model).isfinite().all()
    model.remove_donor("a")
    assert torch.equal(layer.scale, 2 * torch.ones(3)) and isinstance(layer, LlamaDecoderLayer)
    inputs = {"hidden_states": torch.ones(1, 1, 32), "position_embeddings": (torch.ones(1, 1, 8),) * 2}
    assert layer(**inputs).isfinite().all()
    assert torch.equal(logits_of(remove_transplants(model)), logits_of(recipient))


def test_a_class_that_others_made_of_a_model_stays(tiny_llama: Path) -> None:
    model = two_donors(tiny_llama)
    model.scale = torch.nn.Parameter(torch.ones(3))
    register_parametrization(model, "scale", Doubled())
    assert remove_transplants(model) is model
    assert torch.equal(model.scale, 2 * torch.ones(3)) and isinstance(model, LlamaForCausalLM)
    assert torch.equal(logits_of(model), logits_of(plain(tiny_llama / "recipient")))


def test_replicas(tiny_llama: Path) -> None:
    """As data parallelism makes them: a copy of the attributes with weights of its own."""
    model = warm(two_donors(tiny_llama))
    layer = model.model.layers[A]
    replica = layer._replicate_for_data_parallel()
    with torch.no_grad():
        replica.mlp = copy.deepcopy(layer.mlp)
        replica.mlp.down_proj.weight.zero_()
        inputs = {"hidden_states": torch.ones(1, 1, 32), "position_embeddings": (torch.ones(1, 1, 8),) * 2}
        assert not torch.equal(replica(**inputs), layer(**inputs))


def test_side_by_side(tiny: Path) -> None:
    model = loaded(tiny, 2, name="a", composition="side_by_side")
    model.add_donor(str(tiny / "donor"), 2, name="b")
    warm(model)
    with model.using(rows=["b", None]), batches(model) as seen:
        found, tokens = logits_of(model), generated(model)
    assert not seen.keys() & {2, 3} and set(seen[4]) == {1}
    for row, names in enumerate(("b", ())):
        with model.using(names):
            torch.testing.assert_close(found[row], logits_of(model)[row])
            assert torch.equal(tokens[row], generated(model)[row])

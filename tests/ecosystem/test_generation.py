"""Rows of `generate`: the tokens are those of the reference."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, QuantizedCache

from tests.ecosystem.cases import ALSO_PLAIN, Case, same
from tests.helpers import CACHE, generated, logits_of, some_ids

SECTION = "Generation"
CACHES = "https://huggingface.co/docs/transformers/kv_cache"


def with_full_attention(case: Case) -> bool:
    """Whether every layer sees all tokens."""
    return set(getattr(case.recipient_model().config, "layer_types", None) or ["full_attention"]) == {"full_attention"}


def calls_of(model: Any) -> Counter[str]:
    """Counts the forward passes of a model from now on."""
    count: Counter[str] = Counter()
    model.register_forward_pre_hook(lambda *_: count.update(["forward"]))
    return count


def sampled(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A seeded random continuation."""
    torch.manual_seed(3)
    return model.generate(ids, max_new_tokens=8, do_sample=True, temperature=1.3, top_p=0.95, top_k=40, **kwargs)


@pytest.mark.ecosystem(section=SECTION, feature="greedy, with and without a cache")
def test_greedy(case: Case) -> None:
    model, reference = case.load(), case.independent()
    same(logits_of(model, case.ids), logits_of(reference, case.ids))
    tokens = generated(reference, case.ids)
    assert not torch.equal(tokens, generated(case.recipient_model(), case.ids))
    assert torch.equal(generated(model, case.ids), tokens)
    assert torch.equal(generated(model, case.ids, use_cache=False), tokens)


@pytest.mark.ecosystem(section=SECTION, feature="sampling with a seed")
def test_sampling(case: Case) -> None:
    model, reference = case.load(), case.independent()
    tokens = sampled(reference, case.ids, num_return_sequences=2)
    assert not torch.equal(tokens[0], tokens[1])
    assert torch.equal(sampled(model, case.ids, num_return_sequences=2), tokens)


@pytest.mark.ecosystem(section=SECTION, feature="beam search")
def test_beams(case: Case) -> None:
    model, reference = case.load(), case.independent()
    ask = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    expected = generated(reference, case.ids, **ask)
    found = generated(model, case.ids, **ask)
    assert torch.equal(found.sequences, expected.sequences)
    same(found.sequences_scores, expected.sequences_scores)


@pytest.mark.ecosystem(section=SECTION, feature="assisted: the recipient drafts for the transplant")
def test_assisted_by_the_recipient(case: Case) -> None:
    model, draft = case.load(), case.recipient_model()
    drafted = calls_of(draft)
    tokens = generated(model, case.ids[:1], assistant_model=draft)
    assert drafted["forward"]
    assert torch.equal(tokens, generated(case.independent(), case.ids[:1]))


@pytest.mark.ecosystem(section=SECTION, feature="assisted: the transplant drafts for the recipient")
def test_assisting_the_recipient(case: Case) -> None:
    model, recipient = case.load(), case.recipient_model()
    drafted = calls_of(model)
    tokens = generated(recipient, case.ids[:1], assistant_model=model)
    assert drafted["forward"]
    assert torch.equal(tokens, generated(case.recipient_model(), case.ids[:1]))


@pytest.mark.ecosystem(section=SECTION, feature="prompt lookup")
def test_prompt_lookup(case: Case) -> None:
    ids = some_ids(1, 4).repeat(1, 4)
    model, lengths = case.load(), []
    model.register_forward_pre_hook(lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True)
    tokens = generated(model, ids, new=16, prompt_lookup_num_tokens=3)
    assert lengths[0] == 16 + 3, "the prompt repeats itself, so there is something to look up"
    assert torch.equal(tokens, generated(case.independent(), ids, new=16))


@pytest.mark.ecosystem(section=SECTION, feature="prefill in chunks")
def test_chunked_prefill(case: Case) -> None:
    tokens = generated(case.load(), case.ids, prefill_chunk_size=3)
    assert torch.equal(tokens, generated(case.independent(), case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="static cache")
def test_static_cache(case: Case) -> None:
    model = case.load()
    ask = {"cache_implementation": "static", "disable_compile": True, "return_dict_in_generate": True}
    found = generated(model, case.ids, **ask)
    assert len(found.past_key_values.layers) == 6
    assert all("Static" in type(layer).__name__ for layer in found.past_key_values.layers)
    assert torch.equal(found.sequences, generated(case.independent(), case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="sliding-window cache, dynamic and static")
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_sliding_cache(case: Case, kind: str) -> None:
    if with_full_attention(case):
        pytest.skip("not applicable: every layer sees all tokens")
    model = case.load()
    ask = {"cache_implementation": kind, "disable_compile": True, "return_dict_in_generate": True}
    found = generated(model, case.ids, new=12, **ask)
    kinds = {False: "full_attention", True: "sliding_attention"}
    layers = found.past_key_values.layers
    assert [kinds["Sliding" in type(layer).__name__] for layer in layers] == case.independent().config.layer_types
    assert torch.equal(found.sequences, generated(case.independent(), case.ids, new=12, use_cache=False))


@pytest.mark.ecosystem(section=SECTION, feature="quantized cache (quanto and hqq, 4 bits)")
@pytest.mark.parametrize(("backend", "package"), [("quanto", "optimum.quanto"), ("hqq", "hqq")])
def test_quantized_cache(case: Case, backend: str, package: str) -> None:
    pytest.importorskip(package)

    def run(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cache = QuantizedCache(backend, model.config, nbits=4, q_group_size=16, residual_length=2)
        tokens = generated(model, case.ids, **{CACHE: cache})
        assert len(cache.layers) == model.config.num_hidden_layers
        return tokens, cache.layers[-1]._dequantize(cache.layers[-1]._quantized_keys)

    if not with_full_attention(case):
        with pytest.raises(ValueError, match="only supported for models with only full attention"):
            run(case.recipient_model())
        with pytest.raises(ValueError, match="only supported for models with only full attention"):
            run(case.load())
        pytest.xfail(f"Transformers' QuantizedCache takes models with full attention only, {ALSO_PLAIN}: {CACHES}")
    tokens, keys = run(case.load())
    expected_tokens, expected_keys = run(case.independent())
    assert torch.equal(tokens, expected_tokens)
    same(keys, expected_keys)


@pytest.mark.ecosystem(section=SECTION, feature="offloaded cache")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_cache(case: Case, kind: str) -> None:
    ask = {"cache_implementation": kind, "disable_compile": True}
    if not torch.accelerator.is_available():
        with pytest.raises(AssertionError, match="not compiled with CUDA"):
            generated(case.recipient_model(), case.ids, **ask)
        pytest.skip(f"this cache moves between a GPU and the CPU, and there is no GPU here; {ALSO_PLAIN}: {CACHES}")
    tokens = generated(case.load(), case.ids, **ask)
    assert torch.equal(tokens, generated(case.independent(), case.ids))


@pytest.mark.slow
@pytest.mark.ecosystem(section=SECTION, feature="continuous batching (`generate_batch`)")
def test_continuous_batching(case: Case) -> None:
    prompts = [case.ids[0].tolist(), case.ids[1, :4].tolist()]

    def run(model: Any) -> list[list[int]]:
        small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
        found = model.generate_batch(prompts, continuous_batching_config=small, max_new_tokens=6, do_sample=False)
        return [found[name].generated_tokens for name in sorted(found)]

    expected = [generated(case.independent(), torch.tensor([ids]), new=6)[0, len(ids) :].tolist() for ids in prompts]
    assert run(case.load()) == expected


@pytest.mark.ecosystem(section=SECTION, feature="scores and hidden states of every step")
def test_outputs(case: Case) -> None:
    ask = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    found, expected = (generated(model, case.ids, **ask) for model in (case.load(), case.independent()))
    same(torch.stack(found.scores), torch.stack(expected.scores))
    for step, expected_step in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert len(step) == 7
        same(torch.stack(step), torch.stack(expected_step))


@pytest.mark.ecosystem(section=SECTION, feature="`disable_transplants()` around it: the recipient")
def test_disabled(case: Case) -> None:
    model, recipient = case.load(), case.recipient_model()
    with model.disable_transplants():
        for ask in ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
            assert torch.equal(generated(model, case.ids, **ask), generated(recipient, case.ids, **ask))
        assert torch.equal(sampled(model, case.ids), sampled(recipient, case.ids))
    assert torch.equal(generated(model, case.ids), generated(case.independent(), case.ids))

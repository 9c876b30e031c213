"""Perplexity against a computation by hand."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from transplant_hf.demo.evaluate import perplexity
from transplant_hf.errors import TransplantError


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("length", [2, 8, 9, 10, 30])
def test_every_token_but_the_first_counts_once(model: LlamaForCausalLM, length: int) -> None:
    stream = torch.randint(0, 32, (length,), generator=torch.Generator().manual_seed(length))
    losses = []
    for start in range(0, length - 1, 8):
        block = stream[start : start + 8][: length - 1 - start]
        with torch.no_grad():
            logits = model(input_ids=block[None]).logits[0]
        for place in range(len(block)):
            losses.append(-torch.log_softmax(logits[place], -1)[stream[start + place + 1]].item())
    assert len(losses) == length - 1
    by_hand = math.exp(sum(losses) / len(losses))
    for batch_size in (1, 2, 16):
        assert perplexity(model, stream, context=8, batch_size=batch_size) == pytest.approx(by_hand, rel=1e-5)


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    torch.nn.init.zeros_(model.lm_head.weight)
    model.train()
    assert perplexity(model, torch.arange(20), context=8) == pytest.approx(32.0)
    assert model.training


def test_one_token_is_an_error(model: LlamaForCausalLM) -> None:
    with pytest.raises(TransplantError, match="2 tokens"):
        perplexity(model, torch.zeros(1, dtype=torch.long), context=8)

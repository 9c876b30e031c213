"""The benchmark of chats, on a toy model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def chat(script: Callable[[str], Any]) -> Any:
    return script("chat")


def test_divergence_is_that_of_the_tokens_of_answers(chat: Any) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    torch.manual_seed(0)
    recipient, model = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 32, (3, 9))
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0  # padding on the left
    answers = torch.zeros_like(tokens, dtype=torch.bool)
    answers[:, 5:8] = True
    chats = chat.Chats(tokens, mask * (torch.arange(9) < 8), answers)
    assert chat.compare_answers(recipient, recipient, chats, batch=2) == (0.0, 1.0)
    found, same = chat.compare_answers(recipient, model, chats, batch=2)

    expected, equal = [], []
    for row, known in zip(tokens, mask, strict=True):
        ids = row[known.bool()][None, :]
        with torch.no_grad():
            wanted, other = (one(ids).logits.log_softmax(-1)[0, -5:-2] for one in (recipient, model))
        expected += (wanted.exp() * (wanted - other)).sum(-1).tolist()
        equal += (wanted.argmax(-1) == other.argmax(-1)).tolist()
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert same == sum(equal) / len(equal)

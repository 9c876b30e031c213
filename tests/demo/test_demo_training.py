"""The demo's training loop and the choice of threads."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from transplant_hf.demo.threads import quickest_threads
from transplant_hf.demo.training import draw_blocks, train
from transplant_hf.errors import TransplantError


def test_blocks_lie_inside_the_stream() -> None:
    stream = torch.arange(20)
    blocks = draw_blocks(stream, 200, 8, torch.Generator().manual_seed(0))
    assert blocks.shape == (200, 9)
    assert torch.equal(blocks, blocks[:, :1] + torch.arange(9))
    assert (blocks.min(), blocks.max()) == (0, 19)


def test_too_short_a_stream_is_an_error() -> None:
    with pytest.raises(TransplantError, match="too few"):
        draw_blocks(torch.arange(8), 1, 8, torch.Generator())


def test_training_lowers_the_loss_and_is_seeded() -> None:
    stream = torch.arange(300) % 7
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
        model = LlamaForCausalLM(config)
        loss = train(
            model,
            lambda generator: draw_blocks(stream, 4, 8, generator),
            steps=60,
            lr=1e-2,
            seed=0,
            title="",
            quiet=True,
        )
        losses.append(loss)
        assert not model.training
    assert losses[0] < 1.5
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_quickest_threads_are_used_and_reset() -> None:
    before = torch.get_num_threads()

    def slow_with_many() -> None:
        time.sleep(0.01 * torch.get_num_threads())

    with pytest.raises(KeyError), quickest_threads(slow_with_many) as count:
        assert count == torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before

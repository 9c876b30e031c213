"""What the stack of decoder layers is, and how many tokens it reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, BloomConfig, GPT2Config, LlamaConfig, LlavaConfig, PreTrainedConfig, XLNetConfig

from tests.helpers import refused, write_tokenizer
from transplant_hf import ConfigurationError
from transplant_hf.architecture import choose_block_length, max_context_length
from transplant_hf.training.data import as_blocks


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (GPT2Config(n_positions=256), 256),
        (LlavaConfig(text_config=LlamaConfig(max_position_embeddings=512)), 512),
        (XLNetConfig(), None),  # says -1
        (BloomConfig(), None),  # says nothing
    ],
)
def test_a_model_says_how_many_tokens_it_reads(config: PreTrainedConfig, limit: int | None) -> None:
    assert max_context_length(config) == limit
    assert choose_block_length(config, None) == (limit or 1024)


def test_blocks_are_as_long_as_the_model_reads(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer, documents = AutoTokenizer.from_pretrained(tmp_path), ["To be, or not to be. " * 100]
    unlimited = SimpleNamespace(config=XLNetConfig())
    assert as_blocks(documents, unlimited, tokenizer, None, "text").block_length == 1024
    assert as_blocks(documents, unlimited, tokenizer, 1500, "text").block_length == 1500
    limited = SimpleNamespace(config=GPT2Config(n_positions=64))
    assert as_blocks(documents, limited, tokenizer, None, "text").block_length == 64
    with refused(ConfigurationError, "block_length is 65", "at most 64 tokens"):
        as_blocks(documents, limited, tokenizer, 65, "text")

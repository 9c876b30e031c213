"""The demo's recipient: a small Llama trained from nothing on English text."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .budget import DemoBudget
from .texts import DemoTexts
from .tokenizer import encode_stream, train_tokenizer
from .training import draw_blocks, train

__all__ = ["build_recipient"]

# The vocabulary sees some source code, so that indentation and operators do not fall apart into bytes; the
# recipient's weights see none.
_SOURCE_SHARE_OF_VOCABULARY = 0.3


def build_recipient(texts: DemoTexts, budget: DemoBudget, target: Path, quiet: bool = False) -> None:
    """Train tokenizer and recipient and save both.

    Args:
        texts: Both domains; only the English one trains the model.
        budget: Sizes and steps.
        target: The folder to write.
        quiet: Show no progress bar.
    """
    english = texts.english.train_texts()
    source = "\n".join(texts.source.train_texts())
    source = source[: int(_SOURCE_SHARE_OF_VOCABULARY * sum(map(len, english)))]
    tokenizer = train_tokenizer([*english, source], budget.vocabulary_size, budget.context)
    stream = encode_stream(tokenizer, english)
    # fork_rng: the caller's random state is none of the demo's business.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(budget.seed)
        model = LlamaForCausalLM(recipient_config(budget, tokenizer.eos_token_id, tokenizer.pad_token_id))
    train(
        model,
        lambda generator: draw_blocks(stream, budget.batch_size, budget.context, generator),
        steps=budget.recipient_steps,
        lr=budget.recipient_learning_rate,
        seed=budget.seed,
        title="Training recipient",
        quiet=quiet,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def recipient_config(budget: DemoBudget, end_of_text: int, padding: int) -> LlamaConfig:
    """Configuration of the recipient.

    Args:
        budget: Sizes.
        end_of_text: Number of the end-of-text token, which also starts a text.
        padding: Number of the padding token.

    Returns:
        The configuration.
    """
    return LlamaConfig(
        vocab_size=budget.vocabulary_size,
        hidden_size=budget.hidden_size,
        intermediate_size=budget.intermediate_size,
        num_hidden_layers=budget.recipient_layers,
        num_attention_heads=budget.attention_heads,
        num_key_value_heads=budget.attention_heads,
        max_position_embeddings=budget.context,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=padding,
    )

"""A recipient and three donors with random weights, made in a second: to try the page, not to read its texts."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transplant_hf import Donor

__all__ = ["make_tiny"]

NUM_LAYERS = 6
SOURCES = {"law": 1, "code": 2, "too-wide": 3}  # donors' names, and the seed of the model each comes from
WIDTHS = {"too-wide": 48}
DONOR_LAYERS = [2, 3]
RECOMMENDED = {"law": 3, "code": 5, "too-wide": 2}
# What its tokenizer learns words from; every token is printable.
TEXT = (
    "once upon a time there was a court that heard a case. the judge asked the clerk for the record, and the clerk "
    "said that the record was in the other room. def answer(question): return the record if the court asked for it, "
    "else None."
)


def make_tiny(folder: Path) -> tuple[str, list[str]]:
    """Write a recipient of six layers, two donors that fit it and one that does not.

    Returns:
        The recipient's folder, and the donors'.
    """
    tokenizer = _tokenizer()
    recipient = folder / "recipient"
    _model(tokenizer, seed=0).save_pretrained(recipient)
    tokenizer.save_pretrained(recipient)
    for name, seed in SOURCES.items():
        source = _model(tokenizer, seed, WIDTHS.get(name, 32))
        donor = Donor.from_model(source, DONOR_LAYERS, name=name)
        donor.save_pretrained(folder / name, position=RECOMMENDED[name], recipient=str(recipient))
    return str(recipient), [str(folder / name) for name in SOURCES]


def _model(tokenizer: PreTrainedTokenizerFast, seed: int, width: int = 32) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=NUM_LAYERS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,  # far from zero, so that every layer changes the text
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=160, special_tokens=["<|endoftext|>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")

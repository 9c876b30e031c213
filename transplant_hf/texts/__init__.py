"""Text as documents, and as blocks of tokens to train and to measure on."""

from .blocks import Blocks, check_tokenizer, encode, pack, starting_token
from .documents import TextSource, documents

__all__ = ["Blocks", "TextSource", "check_tokenizer", "documents", "encode", "pack", "starting_token"]

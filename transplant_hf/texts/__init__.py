"""Text as documents, and as blocks of tokens to train and to measure on."""

from .blocks import Blocks, check_tokenizer, encode, pack, read_stream, starting_token
from .documents import TextSource, as_source, check_texts, documents

__all__ = [
    "Blocks",
    "TextSource",
    "as_source",
    "check_texts",
    "check_tokenizer",
    "documents",
    "encode",
    "pack",
    "read_stream",
    "starting_token",
]

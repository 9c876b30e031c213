"""Text from anywhere, as blocks of tokens to train and to measure on."""

from .blocks import Blocks, pack
from .encoding import check_tokenizer, encode, starting_token
from .source import TextSource, documents

__all__ = ["Blocks", "TextSource", "check_tokenizer", "documents", "encode", "pack", "starting_token"]

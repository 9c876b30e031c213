"""Turn `.pt` files of decoder layers into donor repos."""

from .convert import Conversion, convert
from .seeds import CHECKPOINTS, SEEDS, Seed, convert_seeds

__all__ = ["CHECKPOINTS", "SEEDS", "Conversion", "Seed", "convert", "convert_seeds"]

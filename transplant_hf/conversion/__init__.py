"""Turn `.pt` files of decoder layers into donor repos."""

from .convert import Conversion, convert
from .seeds import SEEDS, Seed, convert_seeds

__all__ = ["SEEDS", "Conversion", "Seed", "convert", "convert_seeds"]

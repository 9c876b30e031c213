"""Run a part of a model: some of its layers, from a hidden state that was computed before."""

from .cache import PrefixCache, fill_cache
from .running import PREFIX_STATES, PartialRun, hidden_states, stack_of

running_only = PartialRun  # the old name, for one release

__all__ = ["PREFIX_STATES", "PartialRun", "PrefixCache", "fill_cache", "hidden_states", "running_only", "stack_of"]

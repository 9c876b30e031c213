"""A class that comes before a transplanted model's class, as FSDP2 puts one there."""

from __future__ import annotations

from transformers import LlamaForCausalLM

from transplant_hf.model.native_methods import recipient_class
from transplant_hf.model.surface import transplant_class


class Before:
    """Like `FSDPModule`: not a model class, and first in the order of bases."""


def test_the_native_class_is_found_behind_it() -> None:
    transplanted = transplant_class(LlamaForCausalLM)
    wrapped = type(f"FSDP{transplanted.__name__}", (Before, transplanted), {})
    assert recipient_class(wrapped) is recipient_class(transplanted) is LlamaForCausalLM

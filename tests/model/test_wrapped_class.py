"""A class that stands before a transplanted model's class, as FSDP2 puts one there."""

from __future__ import annotations

from transformers import LlamaForCausalLM

from transplant_hf.model.mixin import native_class, transplant_class


class Before:
    """Like `FSDPModule`: no model class, and first in the order of bases."""


def test_the_native_class_is_found_behind_it() -> None:
    transplanted = transplant_class(LlamaForCausalLM)
    wrapped = type(f"FSDP{transplanted.__name__}", (Before, transplanted), {})
    assert native_class(wrapped) is native_class(transplanted) is LlamaForCausalLM

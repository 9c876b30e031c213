"""The names of Transformers that nobody promises and the package uses, each with its reason and its test.

What is imported from anywhere but `transformers` itself, and what begins with an underscore.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tests.release.names_used import private_names_of

__all__ = ["NOT_THEIRS", "SIGNED", "WATCHED", "Watched"]


class Watched(NamedTuple):
    """Why a name is used, and the test in `tests/test_private_names.py` that fails when it changes."""

    reason: str
    test: str


SIGNED = "test_signature"
_MODEL = "test_models_have_the_attributes_that_are_read"
_STATIC = "test_hooks_into_loading_are_static"
WATCHED: dict[str, Watched] = {
    # Loading.
    "_load_pretrained_model": Watched("weights of recipient and donors in one pass", _STATIC),
    "_finalize_model_loading": Watched("refuses donors that came incomplete", _STATIC),
    "_from_config": Watched("builds the class that is asked for", SIGNED),
    "load_state_dict": Watched("opens weight files as from_pretrained does", SIGNED),
    "_is_hf_initialized": Watched("what has its values is not initialized again", "test_loaded_tensors_are_marked"),
    "get_model_conversion_mapping": Watched("names in checkpoints, as from_pretrained renames them", SIGNED),
    "rename_source_key": Watched("the same", "test_rules_of_renaming"),
    "revert_weight_conversion": Watched("names in checkpoints, of a model in memory", SIGNED),
    "_weight_conversions": Watched("reverted when a loaded model is saved", "test_a_loaded_model_keeps_its_rules"),
    "_keys_to_ignore_on_load_unexpected": Watched("tensors in files that no model has", _MODEL),
    "convert_moe_packed_tensors": Watched("experts in MXFP4, of .pt files and of recipients", SIGNED),
    "get_class_from_dynamic_module": Watched("recipients with code of their own, when asked for", SIGNED),
    # Models.
    "maybe_install_capturing_hooks": Watched("hidden states of layers that come later are recorded", SIGNED),
    "_output_capturing_hooks_installed": Watched("the same", "test_the_capturing_hooks_leave_their_mark"),
    "_active_collector": Watched("donors run on all rows where a call records layers", "test_what_a_call_records"),
    "_adapter_model_path": Watched("an adapter that an Auto class was asked for", "test_adapters_that_are_found"),
    "_hf_peft_config_loaded": Watched("an adapter is not saved into a full model", _MODEL),
    # Serving.
    **{
        name: Watched("the server of `transformers serve`", "test_parts_of_the_server")
        for name in (
            "ModelManager",
            "ChatCompletionHandler",
            "CompletionHandler",
            "ResponseHandler",
            "GenerateManager",
            "GenerationState",
            "build_server",
        )
    },
    # Training.
    "_load_from_checkpoint": Watched("checkpoints have only what is trained", SIGNED),
    "_load_best_model": Watched("the same", SIGNED),
    "_save_optimizer_and_scheduler": Watched("under FSDP Trainer writes the whole model there", SIGNED),
    "_load_optimizer_and_scheduler": Watched("the same", SIGNED),
}  # fmt: skip
# With an underscore, and not of Transformers.
NOT_THEIRS = {
    "_Unpickler": "pickle",
    "_checkpoint_wrapped_module": "torch, in the names of a wrapped module's tensors",
    "_fsdp_wrapped_module": "the same",
    "_orig_mod": "the same",
    "_hf_hook": "accelerate",
    "_base": "torch, the tensor that a view is of",
    "_proj": "the end of a tensor's name",
    "_sysconfigdata": "the standard library",
    "_getframe": "the same, of sys",
    "_exit": "the same, of os",
    "_current_frames": "the same, of sys",
    **dict.fromkeys(private_names_of([torch.nn.Module()]), "torch"),
}

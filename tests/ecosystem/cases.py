"""The five architectures of the table: tiny models on disk, and the same transplant put together by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.helpers import (
    DONOR_LAYERS,
    DONOR_POSITION,
    NUM_LAYERS,
    TOKENS,
    layers_of,
    randomised,
    some_ids,
    tiny_gpt2_model,
    tiny_gpt_oss_model,
    tiny_llama_model,
    write_tokenizer,
)
from transplant_hf import AutoModelWithTransplant, Donor

__all__ = ["ALSO_PLAIN", "ARCHITECTURES", "CHAT_TEMPLATE", "Case", "make_case", "padded", "same"]

# How a reason ends that is not of this package's making.
ALSO_PLAIN = "also for the plain recipient"

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Two key-value heads for two processes, sixteen numbers a head for flex attention, multiples of 32 for quantizers.
_SHAPE = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


def _gpt2(seed: int) -> PreTrainedModel:
    return tiny_gpt2_model(seed, n_head=2, n_positions=128)


def _llama(seed: int) -> PreTrainedModel:
    return tiny_llama_model(seed, **_SHAPE)


def _gpt_oss(seed: int) -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    return tiny_gpt_oss_model(seed, layer_types=kinds, **_SHAPE)


def _qwen3(seed: int) -> PreTrainedModel:
    fields = {**TOKENS, **_SHAPE, "num_hidden_layers": NUM_LAYERS, "hidden_size": 32}
    return randomised(Qwen3ForCausalLM(Qwen3Config(**fields)), seed)


def _gemma3(seed: int) -> PreTrainedModel:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    fields = {**TOKENS, **_SHAPE, "num_hidden_layers": NUM_LAYERS, "hidden_size": 32, "layer_types": kinds}
    config = Gemma3TextConfig(sliding_window=4, query_pre_attn_scalar=16, **fields)
    return randomised(Gemma3ForCausalLM(config), seed)


# The columns, in their order.
ARCHITECTURES: dict[str, Callable[[int], PreTrainedModel]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "gpt_oss": _gpt_oss,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One architecture: folders that no test may change, and what is loaded from them.

    Args:
        architecture: The name of its column.
        folder: Holds `recipient/`, `source/`, `donor/`, `thin/` and `native/`, each with a tokenizer but `source/`.
    """

    architecture: str
    folder: Path
    position: int = DONOR_POSITION

    @property
    def recipient(self) -> Path:
        """An ordinary model of four layers, with a tokenizer and a chat template."""
        return self.folder / "recipient"

    @property
    def source(self) -> Path:
        """The ordinary model that the donor's layers 1 and 2 are from."""
        return self.folder / "source"

    @property
    def donor(self) -> Path:
        """A donor repo of two layers, recommended for position 1."""
        return self.folder / "donor"

    @property
    def thin(self) -> Path:
        """The transplant, saved thin."""
        return self.folder / "thin"

    @property
    def native(self) -> Path:
        """The same transplant as an ordinary model of six layers, put together without transplant_hf."""
        return self.folder / "native"

    @property
    def tokenizer(self) -> Any:
        """The recipient's: bytes and two special tokens, padding on the left."""
        return AutoTokenizer.from_pretrained(self.recipient, padding_side="left")

    @property
    def ids(self) -> torch.Tensor:
        """Tokens, `[2, 7]`: more than the sliding windows of 4."""
        return some_ids(2, 7)

    def load(self, **kwargs: Any) -> Any:
        """Load the recipient with its donor, in evaluation mode."""
        return AutoModelWithTransplant.from_pretrained(
            self.recipient, donors={str(self.donor): self.position}, **kwargs
        ).eval()

    def recipient_model(self, **kwargs: Any) -> Any:
        """Load the ordinary recipient."""
        return AutoModelForCausalLM.from_pretrained(self.recipient, **kwargs).eval()

    def independent(self, **kwargs: Any) -> Any:
        """Load the reference, an ordinary model in the same place of the same weights."""
        return AutoModelForCausalLM.from_pretrained(self.native, **kwargs).eval()


def padded(case: Case, side: str) -> dict[str, torch.Tensor]:
    """The case's tokens, of which the second row has three fewer, padded on one side."""
    mask = torch.ones_like(case.ids)
    short = slice(None, 3) if side == "left" else slice(-3, None)
    mask[1, short] = 0
    return {"input_ids": case.ids.where(mask.bool(), case.tokenizer.pad_token_id), "attention_mask": mask}


def make_case(architecture: str, folder: Path) -> Case:
    """Write a case's folders."""
    case, build = Case(architecture, folder), ARCHITECTURES[architecture]
    recipient, source = build(1), build(2)
    recipient.generation_config.max_new_tokens = 11
    together = _by_hand(recipient, source)
    for model, place in ((recipient, case.recipient), (source, case.source), (together, case.native)):
        model.save_pretrained(place)
    for place in (case.recipient, case.native):
        write_tokenizer(place)
        tokenizer = AutoTokenizer.from_pretrained(place)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(place)
    donor = Donor.from_model(source, list(DONOR_LAYERS), name="donor")
    donor.save_pretrained(case.donor, position=case.position, recipient=str(case.recipient))
    case.load().save_pretrained(case.thin, thin=True)
    return case


def _by_hand(recipient: Any, source: Any) -> Any:
    """Build the transplant as an ordinary model: a longer configuration, and each layer's weights copied into it."""
    order = [(recipient, number) for number in range(NUM_LAYERS)]
    order[DONOR_POSITION:DONOR_POSITION] = [(source, number) for number in DONOR_LAYERS]
    fields = recipient.config.to_dict()
    fields[recipient.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(order)
    if fields.get("layer_types"):
        fields["layer_types"] = [model.config.layer_types[number] for model, number in order]
    model = type(recipient)(type(recipient.config).from_dict(fields))
    rest = {name: tensor for name, tensor in recipient.state_dict().items() if not name.startswith(_layers_path(model))}
    missing, unexpected = model.load_state_dict(rest, strict=False)
    assert not unexpected and all(name.startswith(_layers_path(model)) for name in missing)
    for layer, (origin, number) in zip(layers_of(model), order, strict=True):
        layer.load_state_dict(layers_of(origin)[number].state_dict())
    model.generation_config = recipient.generation_config
    return model.eval()


def _layers_path(model: Any) -> str:
    return next(name for name, module in model.named_modules() if module is layers_of(model)) + "."


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare numbers: where weights begin in memory differs between files, and some kernels' last bits with it."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

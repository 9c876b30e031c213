"""What several test files share: tiny models, an independent reference for logits, and how errors are read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.hub_server import HubServer
from transplant_hf import AutoModelWithTransplant, Donor, DonorSpec, HubError, TransplantError

__all__ = [
    "BUILDERS",
    "CACHE",
    "DONOR_LAYERS",
    "DONOR_POSITION",
    "NUM_LAYERS",
    "Graft",
    "Shelf",
    "cast_weights",
    "copied",
    "digest_of",
    "edit_json",
    "edit_weights",
    "generated",
    "layers_of",
    "loaded",
    "logits_of",
    "make_family",
    "pack_experts",
    "plain",
    "randomised",
    "reference_logits",
    "refused",
    "refused_by_hub",
    "run_python",
    "some_ids",
    "tiny_gpt2_model",
    "tiny_gpt_oss_model",
    "tiny_llama_model",
    "two_donors",
    "write_tokenizer",
]

NUM_LAYERS = 4
DONOR_LAYERS = (1, 2)
DONOR_POSITION = 1
END_OF_TEXT, PADDING, VOCABULARY = 256, 257, 260
TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": END_OF_TEXT,
    "pad_token_id": PADDING,
}


# -- Models ------------------------------------------------------------------------------------------------------


def randomised(model: Any, seed: int) -> Any:
    """Give every parameter seeded values under which each layer, norm and bias changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()


def tiny_gpt2_model(seed: int, **fields: Any) -> GPT2LMHeadModel:
    """Four layers of width 32."""
    known = {"n_layer": NUM_LAYERS, "n_embd": 32, "n_head": 4, "n_positions": 64, **TOKENS}
    return randomised(GPT2LMHeadModel(GPT2Config(**{**known, **fields})), seed)


def tiny_llama_model(seed: int, **fields: Any) -> LlamaForCausalLM:
    """Four layers of width 32, with two key-value heads."""
    known = {
        "num_hidden_layers": NUM_LAYERS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **TOKENS,
    }
    return randomised(LlamaForCausalLM(LlamaConfig(**{**known, **fields})), seed)


def tiny_gpt_oss_model(seed: int, **fields: Any) -> GptOssForCausalLM:
    """Four layers: sliding over 4 tokens, full, sliding, full; four experts."""
    known = {
        "num_hidden_layers": NUM_LAYERS,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "max_position_embeddings": 128,
        **TOKENS,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # its sinks are drawn, and stay as they are drawn but for some noise
        model = GptOssForCausalLM(GptOssConfig(**{**known, **fields}))
    return randomised(model, seed)


BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {
    "gpt2": tiny_gpt2_model,
    "llama": tiny_llama_model,
    "gpt_oss": tiny_gpt_oss_model,
}


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the 256 bytes and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|pad|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|pad|>"
    ).save_pretrained(folder)


def make_family(folder: Path, build: Callable[..., PreTrainedModel], **fields: Any) -> Path:
    """Save a recipient, the donor's source model, and a donor of its layers 1 and 2 for position 1.

    Returns:
        The folder, with `recipient/`, `source/` and `donor/` in it.
    """
    recipient, source = build(seed=1, **fields), build(seed=2, **fields)
    recipient.generation_config.max_new_tokens = 11
    recipient.save_pretrained(folder / "recipient")
    write_tokenizer(folder / "recipient")
    source.save_pretrained(folder / "source")
    donor = Donor.from_model(source, list(DONOR_LAYERS), name="donor")
    donor.save_pretrained(folder / "donor", position=DONOR_POSITION, recipient=str(folder / "recipient"))
    return folder


def plain(folder: Path, **kwargs: Any) -> Any:
    """Load an ordinary model."""
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def loaded(family: Path, position: int = DONOR_POSITION, mode: str = "insert", **kwargs: Any) -> Any:
    """Load a family's recipient with its donor at a position; fields of `DonorSpec` and of the call may be given."""
    fields = {name: kwargs.pop(name) for name in ("layers", "strength", "name") if name in kwargs}
    spec = DonorSpec(str(family / "donor"), position, mode=mode, **fields)
    return AutoModelWithTransplant.from_pretrained(family / "recipient", donors=[spec], **kwargs)


def two_donors(family: Path, second: str = "insert", **kwargs: Any) -> Any:
    """Load a family's recipient with `a`, a donor layer at 0, and `b`, the whole donor at 2."""
    donor = str(family / "donor")
    specs = [
        DonorSpec(donor, 0, name="a", layers=[1], strength=kwargs.pop("strength", 1.0)),
        DonorSpec(donor, 2, second, name="b"),
    ]
    return AutoModelWithTransplant.from_pretrained(family / "recipient", donors=specs, **kwargs)


# -- Running -----------------------------------------------------------------------------------------------------


# The argument of `forward` and `generate` that takes a cache: another one from Transformers 5.24 on.
CACHE = next(name for name in ("cache", "past_key_values") if name in signature(LlamaForCausalLM.forward).parameters)


def some_ids(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random tokens, `[batch, length]`, no special ones."""
    return torch.randint(0, END_OF_TEXT, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
    """Logits without a cache, `[batch, length, vocabulary]`."""
    return model(some_ids() if ids is None else ids, use_cache=False, **inputs).logits


def generated(model: Any, ids: torch.Tensor | None = None, new: int = 8, **kwargs: Any) -> torch.Tensor:
    """Greedy continuation of a fixed length, the prompt included."""
    ids = some_ids() if ids is None else ids
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **kwargs)


# -- The reference -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Graft:
    """Layers of a model, and where they run in another."""

    source: PreTrainedModel
    layers: Sequence[int]
    position: int
    replace: bool = False
    strength: float = 1.0


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder layers, by the names that the three tiny architectures have."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def hooks_at_work(model: Any) -> list[int]:
    """The numbers of the layers of donors whose hooks do something: those of other donors pass their input through."""
    roles = [getattr(layer, "_transplant_role", None) for layer in layers_of(model)]
    return [number for number, role in enumerate(roles) if role is not None and role.active]


@torch.no_grad()
def reference_logits(
    recipient: Any,
    grafts: Sequence[Graft],
    ids: torch.Tensor | None = None,
    side_by_side: bool = False,
    **inputs: Any,
) -> torch.Tensor:
    """Run the plain recipient, and call layers of other plain models inside its forward pass.

    Each donor layer gets the masks and positions that its own source model gives it for the same tokens. Grafts at one
    position run one after another, or side by side.
    """
    ids = some_ids() if ids is None else ids
    own = layers_of(recipient)
    calls = [_arguments_of_layers(graft.source, ids, inputs) for graft in grafts]
    replaced = {g.position + number for g in grafts if g.replace for number in range(len(g.layers))}

    def through_grafts(position: int, hidden: torch.Tensor) -> torch.Tensor:
        arrived = hidden
        for graft, arguments in zip(grafts, calls, strict=True):
            if graft.position == position:
                entered = left = arrived if side_by_side else hidden
                for number in graft.layers:
                    args, kwargs = arguments[number]
                    left = layers_of(graft.source)[number](left, *args, **kwargs)
                hidden = hidden + graft.strength * (left - entered)
        return hidden

    def changed(number: int, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            hidden = through_grafts(number, hidden)
            if number not in replaced:
                hidden = run(hidden, *args, **kwargs)
            return through_grafts(number + 1, hidden) if number + 1 == len(own) else hidden

        return forward

    with ExitStack() as patches:
        for number, layer in enumerate(own):
            patches.enter_context(_forward(layer, changed(number, layer.forward)))
        return recipient(ids, use_cache=False, **inputs).logits


def _arguments_of_layers(model: Any, ids: torch.Tensor, inputs: dict[str, Any]) -> dict[int, tuple[Any, Any]]:
    """What a model calls each of its layers with, the hidden state apart."""
    calls: dict[int, tuple[Any, Any]] = {}

    def recorded(number: int, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            calls[number] = (args, kwargs)
            return run(hidden, *args, **kwargs)

        return forward

    with ExitStack() as patches:
        for number, layer in enumerate(layers_of(model)):
            patches.enter_context(_forward(layer, recorded(number, layer.forward)))
        model(ids, use_cache=False, **inputs)
    return calls


@contextmanager
def _forward(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


# -- Files -------------------------------------------------------------------------------------------------------


def copied(folder: Path, target: Path) -> Path:
    """Copy a folder, to change the copy."""
    return Path(shutil.copytree(folder, target))


def edit_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; `None` as a value takes the field out."""
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def edit_weights(donor: Path, change: Callable[[dict[str, torch.Tensor]], Any], stamp: bool = True) -> None:
    """Change the tensors of a donor's single file; `stamp` records the new sha256 and size."""
    path = donor / "donor.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    if stamp:
        record = json.loads((donor / "donor_config.json").read_text())
        data = path.read_bytes()
        record["files"] = {path.name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}}
        (donor / "donor_config.json").write_text(json.dumps(record))


def cast_weights(folder: Path, dtype: torch.dtype) -> None:
    """Cast a saved model: its single weight file, and what its configuration says of it."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    edit_json(folder / "config.json", dtype=str(dtype).removeprefix("torch."))


def pack_experts(folder: Path) -> None:
    """Give a saved GPT-OSS random experts in the published format, MXFP4: blocks of 32 four-bit values, and scales."""
    path, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
    packed = {}
    for name, tensor in load_file(path).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inner, outer = tensor.shape
            shape = (experts, outer, inner // 32)
            packed[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            packed[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)
        else:
            packed[name] = tensor.bfloat16()
    save_file(packed, path, metadata={"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    edit_json(folder / "config.json", dtype="bfloat16", quantization_config=quantization)


def digest_of(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# -- The Hub ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Shelf:
    """A recipient and a donor on the Hub, under names no other test uses: the client's cache outlives a test."""

    hub: HubServer
    family: Path
    base: str
    law: str
    base_commit: str = ""
    law_commit: str = ""

    def put_base(self, **options: Any) -> Shelf:
        """Publish the recipient."""
        self.base_commit = self.hub.add_repo(self.base, self.family / "recipient", **options)
        return self

    def put_law(self, recipient: str | None = None, **options: Any) -> Shelf:
        """Publish the donor, referring to the recipient by its Hub id."""
        edit_json(self.family / "donor" / "config.json", recipient=recipient or self.base)
        self.law_commit = self.hub.add_repo(self.law, self.family / "donor", **options)
        return self

    def weights(self, repo: str) -> int:
        """How many weight files of a repository were sent."""
        names = ("model*.safetensors", "donor*.safetensors", "*.bin")
        return sum(len(self.hub.requests.downloads(f"*{repo}*/{name}")) for name in names)


# -- Errors and processes ----------------------------------------------------------------------------------------


@contextmanager
def refused(kind: type[TransplantError], *facts: str) -> Iterator[pytest.ExceptionInfo[TransplantError]]:
    """Expect an error of exactly this kind whose text holds every given fact."""
    with pytest.raises(TransplantError) as caught:
        yield caught
    text = str(caught.value)
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {text}"
    missing = [fact for fact in facts if fact not in text]
    assert not missing, f"{missing} not in: {text}"


@contextmanager
def refused_by_hub(*facts: str, cause: type[BaseException]) -> Iterator[None]:
    """Expect a `HubError` with these facts, the client's own exception among its causes."""
    with refused(HubError, *facts) as caught:
        yield
    chain: list[BaseException] = [caught.value]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    assert any(isinstance(error, cause) for error in chain), chain


def run_python(code: str, *arguments: str | Path, timeout: float = 300) -> str:
    """Run code in a process of its own, this repository importable; return what it printed."""
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout}\n{run.stderr}"
    return run.stdout

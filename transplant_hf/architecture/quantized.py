"""Quantized models: what is quantized, their weights in full precision, and whether gradients pass through them."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..errors import CheckpointError, CompatibilityError, ConfigurationError

_TOLERANCE = 0.05  # of a gradient, relative; int8 kernels round activations to fp16
_MARK = "transplant_was_gguf"


def check_gguf_reader(gguf_file: str | None) -> None:
    """Refuse a GGUF file if the package that reads it is missing."""
    if gguf_file and importlib.util.find_spec("gguf") is None:
        raise ConfigurationError(f"reading {gguf_file} needs the package gguf: pip install gguf")


def is_quantized(model: Any) -> bool:
    """Whether a model stores weights in fewer bits than it computes with."""
    return getattr(model, "hf_quantizer", None) is not None and not _is_unpacked(model)


def was_gguf(model: Any) -> bool:
    """Whether a model's weights were read from a GGUF file."""
    return getattr(model, _MARK, False) or quantization_method(model) == "gguf"


def config_of_weights(model: Any) -> PreTrainedConfig:
    """Return a model's configuration, without the quantization of a GGUF file if its weights are unpacked."""
    config: PreTrainedConfig = model.config
    if _is_unpacked(model):
        config = copy.deepcopy(config)
        del config.quantization_config
    return config


def forget_gguf(model: Any) -> None:
    """Make a model whose weights were unpacked a model in full precision, which can be saved."""
    if was_gguf(model):
        setattr(model, _MARK, True)
    if _is_unpacked(model):
        model.hf_quantizer.remove_quantization_config(model)


def _is_unpacked(model: Any) -> bool:
    """Whether Transformers unpacked every weight of a GGUF file; it calls the model quantized all the same."""
    # A quantizer that leaves weights packed lists the modules that hold them.
    return quantization_method(model) == "gguf" and not getattr(model.hf_quantizer, "packed_modules", None)


def quantization_method(model: Any) -> str | None:
    """Return the name of a model's quantization, such as "bitsandbytes"."""
    method = getattr(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), "quant_method", None)
    return getattr(method, "value", method)


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether a parameter of a quantized model holds something else than the numbers of a plain weight."""
    return type(tensor.data) is not torch.Tensor or not tensor.is_floating_point()


def quantization_fields(model: Any) -> dict[str, Any] | None:
    """Return how the weights of a model are quantized, as JSON; `None` for one in full precision."""
    if is_quantized(model):
        found: dict[str, Any] = json.loads(json.dumps(model.hf_quantizer.quantization_config.to_dict(), default=str))
        return {name: value for name, value in found.items() if not name.startswith("_")}
    return {"quant_method": "gguf"} if was_gguf(model) else None


def dequantized_layer(layer: nn.Module, plain: nn.Module, what: str, method: str) -> dict[str, torch.Tensor]:
    """Return the state dict that a layer would have in full precision; `plain` is the same layer on the meta device."""
    found = {}
    for name, wanted in plain.state_dict().items():
        path, _, last = name.rpartition(".")
        try:
            module = layer.get_submodule(path)
            tensor = getattr(module, last)
        except AttributeError:
            raise _not_dequantized(f"{what}.{name}", method, "the layer holds other tensors in its place") from None
        if tensor.is_meta:
            raise CheckpointError(f"{what}.{name} is offloaded; load the model without offload first.")
        if is_packed(tensor):
            tensor = _dequantized(module, tensor, f"{what}.{name}", method)
            if type(plain.get_submodule(path)).__name__ == "Conv1D":
                tensor = tensor.T.contiguous()  # bitsandbytes makes linear layers of them
        if tensor.shape != wanted.shape:
            reason = f"it has shape {list(tensor.shape)} instead of {list(wanted.shape)}"
            raise _not_dequantized(f"{what}.{name}", method, reason)
        found[name] = tensor.detach()
    return found


def _dequantized(module: Any, tensor: Any, what: str, method: str) -> torch.Tensor:
    kind = type(tensor).__name__
    if kind in ("Params4bit", "Int8Params"):
        from bitsandbytes import functional

        _unpack(module)
        if kind == "Params4bit":
            made: torch.Tensor = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            made = functional.int8_vectorwise_dequant(
                tensor.data, tensor.SCB if module.state.SCB is None else module.state.SCB
            )
        return made
    # Subclasses of torch.Tensor that look like the weight, as those of torchao and optimum-quanto.
    if not tensor.is_floating_point() or type(tensor.data).dequantize is torch.Tensor.dequantize:
        raise _not_dequantized(what, method, f"it is a {type(tensor.data).__name__} of {tensor.dtype}")
    return tensor.data.dequantize()


def _not_dequantized(what: str, method: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{what} is quantized with {method} and cannot be dequantized ({reason}). Use a recipient in full precision, "
        "quantized while it is loaded (quantization_config=, --load-in-4bit), or one of bitsandbytes, torchao or "
        "optimum-quanto."
    )


def _unpack(module: Any) -> None:
    """Let a linear layer of bitsandbytes keep its weights as they are saved, also on a CPU.

    Without gradients it arranges them for a kernel of the CPU that computes no gradients, and a later backward pass
    silently leaves the layer out.
    """
    if getattr(module, "support_avx512bf16_for_cpu", False):
        module.support_avx512bf16_for_cpu = False
        state = getattr(module.weight, "quant_state", None)
        if not getattr(state, "packing_format_for_cpu", False):
            return
        module.state_dict()  # which arranges them back, but leaves the scales transposed
        state = module.weight.quant_state
        if not state.nested and state.absmax.dim() == 2:
            state.absmax = state.absmax.T.contiguous().reshape(-1).float()


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let gradients pass through a quantized model inside a `with` block; refuse one that computes wrong ones."""
    if not is_quantized(model):
        yield
        return
    packing: list[Any] = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    try:
        for module in packing:
            _unpack(module)
        _check_gradients(model)
        yield
    finally:
        for module in packing:
            module.support_avx512bf16_for_cpu = True


def _check_gradients(model: nn.Module) -> None:
    """Compare the gradient of one linear layer of each kind with that of its dequantized weight."""
    method, seen = str(quantization_method(model)), set()
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.is_meta or not is_packed(weight) or isinstance(module, nn.Embedding):
            continue
        kind = (type(module), type(weight.data), weight.dtype)
        if kind in seen:
            continue
        seen.add(kind)
        plain = _dequantized(module, weight, f"{path}.weight", method).float()
        generator = torch.Generator().manual_seed(0)
        dtype = weight.dtype if weight.is_floating_point() else getattr(model, "dtype", torch.float32)
        inputs, outputs = (torch.randn(4, plain.shape[dim], generator=generator) for dim in (1, 0))
        given = inputs.to(weight.device, dtype).requires_grad_()
        with torch.enable_grad():
            made = module(given)
        wanted = outputs.to(plain.device) @ plain
        found = torch.zeros_like(given)
        if made.requires_grad:
            (found,) = torch.autograd.grad(made, given, outputs.to(made))
        error = float((found.float() - wanted).norm() / wanted.norm().clamp_min(1e-12))
        if not error <= _TOLERANCE:
            raise CompatibilityError(
                f"{path} ({type(module).__name__}, {type(weight.data).__name__}, quantized with {method}) passes on no "
                f"usable gradient: it is {error:.0%} away from that of its weights. Nothing before it can be trained. "
                "Quantize weights only, for instance with bitsandbytes in 4 or 8 bits, or torchao's "
                "Int8WeightOnlyConfig."
            )

"""What a training run of a donor holds: memory and disk, from configurations alone."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..architecture import decoder_stack
from ..errors import BUILD_ERRORS, ConfigurationError
from ..layer_map import RECIPIENT
from ..partial.cache import MOST_IN_MEMORY
from ..splice import Blueprint
from ..training import DonorTrainingArguments
from ..training.chunked_loss import ChunkedLoss, tokens_per_chunk
from ..training.part_trainer import COMPARED_TOKENS
from .cache import prepare_to_run
from .models import loaded_model
from .results import TrainingCost

__all__ = ["LiveBytes", "OrdinaryText", "check_training", "training_cost"]

# Numbers that an optimizer keeps for each parameter, and the bytes of each; 0 is the dtype of the parameter.
_STATES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), (2, 0)),
    **dict.fromkeys(("adamw_torch_8bit", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), (2, 1)),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), (2, 4)),
    **dict.fromkeys(("lion", "lion_32bit", "paged_lion_32bit"), (1, 4)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), (1, 1)),
    **dict.fromkeys(("adagrad", "rmsprop"), (1, 0)),
    "sgd": (0, 0),
    "adafactor": (0, 4),
}
_FUSED = "adamw_torch_fused"  # computes without copies
_IN_8_BITS_FROM, _NUMBERS_PER_SCALE = 4096, 256


def check_training(args: DonorTrainingArguments) -> None:
    """Refuse arguments whose memory is not known."""
    if args.optim not in _STATES:
        known = ", ".join(_STATES)
        raise ConfigurationError(
            f"the memory of optim={_optimizer_name(args)!r} (--optim) is not known. Known are {known}."
        )
    refused = {
        "method": args.method != "in_place",
        "distillation": bool(args.distillation),
        "bf16, fp16": args.bf16 or args.fp16,
        "use_liger_kernel": args.use_liger_kernel,
        "torch_compile": args.torch_compile,
    }
    names = [name for name, is_set in refused.items() if is_set]
    if names:
        raise ConfigurationError(f"a training run with {', '.join(names)} cannot be planned; leave them out.")


def training_cost(
    blueprint: Blueprint, quantized: bool, args: DonorTrainingArguments, block_length: int, blocks: int | None
) -> TrainingCost:
    """Return what `DonorTrainer` holds while it trains the only donor of a transplant, copies of recipient layers.

    Weights, gradients and optimizer state are sums over parameters. A step is run on the meta device, from the hidden
    states before the donor to the gradients, and the largest sum of the bytes of all its tensors is found. For a layer
    of width H and MLP width I, a batch of B blocks of T tokens and numbers of s bytes that is about B T s (6 H + 3 I)
    for a frozen layer and B T s (10 H + 4 I) for one of the donor, and 12 to 16 bytes for each of the `loss_chunk` x
    vocabulary logits. Assumptions: fused attention (with dropout: the matrix of scores, as on a CPU), no memory inside
    of kernels, one process, no evaluation during training. Experts are counted as in `batched_mm`.

    Gradient checkpointing keeps the input of each layer instead.
    """
    stack_path = blueprint.recipient.stack_path
    model, copied = (loaded_model(blueprint.recipient, packed) for packed in (quantized, False))
    prepare_to_run(copied)
    prepare_to_run(model)
    layers, copies = (decoder_stack(one, stack_path) for one in (model, copied))
    slots = blueprint.layer_map()
    first = slots.layers_of(blueprint.parts[0].name)[0]
    before = list(layers[:first])
    numbers = [index for _, index in slots[first:]]
    part = [layers[index] if source == RECIPIENT else copies[index] for source, index in slots[first:]]
    donor, after = ([layer for layer in part if (layer in set(copies)) is own] for own in (True, False))
    itemsize = model.dtype.itemsize
    width = model.config.get_text_config(decoder=True).hidden_size
    trained = [parameter for layer in donor for parameter in layer.parameters()]
    gradients = sum(parameter.nbytes for parameter in trained)
    state, temporary = _optimizer(_optimizer_name(args), trained)
    batch = args.per_device_train_batch_size
    sizes = {name: _bytes(some) for name, some in (("before", before), ("donor", donor), ("after", after))}
    rest = _bytes([model]) - _bytes(layers)
    filling = step = None
    notes: list[str] = []
    try:
        filling = 0
        if before:
            ids = torch.zeros(2 * batch, block_length, dtype=torch.long, device="meta")
            last = _running_only(model, stack_path, before[-1:], [len(before) - 1])
            with last, torch.no_grad(), LiveBytes(_tensors(model)) as memory, OrdinaryText():
                model.base_model(input_ids=ids, use_cache=False)
            filling = memory.peak
        with _running_only(model, stack_path, part, numbers):
            step = _step(model, donor, (batch, block_length), args)
    except BUILD_ERRORS as error:
        sentence = str(error).strip().partition("\n")[0]
        notes.append(f"activations are not known: {type(model).__name__} does not train on the meta device: {sentence}")
    size = None if blocks is None else blocks * block_length * width * itemsize
    if not before or args.cache_prefix == "off":
        size = 0
    in_memory = args.cache_prefix == "memory" or (args.cache_prefix == "auto" and (size or 0) <= MOST_IN_MEMORY)
    # The part is compared with the whole model on a few tokens: logits of both, and their difference, in float32.
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    compared = 3 * 4 * min(block_length, COMPARED_TOKENS) * vocab_size if before else 0
    return TrainingCost(
        optimizer=_optimizer_name(args),
        batch_size=batch,
        block_length=block_length,
        gradient_checkpointing=bool(args.gradient_checkpointing),
        blocks=blocks,
        rest=rest,
        **sizes,
        largest_layer=max(map(_bytes, ([layer] for layer in before)), default=0),
        gradients=gradients,
        optimizer_state=state,
        activations=None if step is None else max(step - gradients, temporary),
        filling=filling,
        compared=compared,
        states=size,
        states_on_disk=not in_memory,
        notes=tuple(notes),
    )


def _optimizer_name(args: Any) -> str:
    return str(args.optim.value)


def _bytes(layers: Iterable[nn.Module]) -> int:
    return sum(tensor.nbytes for layer in layers for tensor in _tensors(layer))


def _optimizer(name: str, trained: Sequence[nn.Parameter]) -> tuple[int, int]:
    """Return the bytes that an optimizer keeps, and those of its copies of the largest parameter in a step."""
    largest = max(trained, key=lambda parameter: parameter.numel())
    if name == "adafactor":  # one number for each row and each column, in float32
        kept = sum(
            math.prod(p.shape[:-1]) + math.prod((*p.shape[:-2], p.shape[-1])) if p.dim() > 1 else p.numel()
            for p in trained
        )
        return 4 * kept, 4 * 4 * largest.numel()
    numbers, itemsize = _STATES[name]
    kept = 0
    for parameter in trained:
        small = itemsize == 1 and parameter.numel() < _IN_8_BITS_FROM
        size = (4 if small else itemsize or parameter.dtype.itemsize) * parameter.numel()
        scales = 4 * -(-parameter.numel() // _NUMBERS_PER_SCALE) if itemsize == 1 and not small else 0
        kept += numbers * (size + scales)
    return kept, 0 if name == _FUSED else 2 * largest.nbytes


@contextmanager
def _running_only(
    model: PreTrainedModel, stack_path: str, layers: Sequence[nn.Module], numbers: Sequence[int]
) -> Iterator[None]:
    """Let a model run only these layers, which have these numbers in the recipient."""
    parent, _, name = stack_path.rpartition(".")
    config: Any = model.base_model.config
    before = {field: getattr(config, field) for field in ("num_hidden_layers", "layer_types") if hasattr(config, field)}
    stack = decoder_stack(model, stack_path)
    setattr(model.get_submodule(parent), name, nn.ModuleList(layers))
    config.num_hidden_layers = len(layers)
    if before.get("layer_types"):
        config.layer_types = [before["layer_types"][number] for number in numbers]
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), name, stack)
        for field, value in before.items():
            setattr(config, field, value)


def _step(
    model: PreTrainedModel, donor: Sequence[nn.Module], shape: tuple[int, int], args: DonorTrainingArguments
) -> int:
    """Return the bytes of activations and gradients of a step."""
    model.requires_grad_(False)
    for layer in donor:
        layer.requires_grad_(True).train()
    if args.gradient_checkpointing:
        # The backward pass leaves the mode, so it is entered again for what is computed again.
        old = model.gradient_checkpointing_enable  # deprecated where there is the other
        enable = getattr(model, "activation_checkpointing_enable", old)
        enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), OrdinaryText())})
        for module in model.modules():
            module.training = module.training or bool(getattr(module, "gradient_checkpointing", False))
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    chunk = tokens_per_chunk(vocab_size, args.loss_chunk)
    of_chosen_tokens = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    in_chunks = args.loss_chunk != 0 and of_chosen_tokens and model.base_model is not model and ids.numel() > chunk
    call: Any = ChunkedLoss(model, chunk, nullcontext) if in_chunks else None
    with LiveBytes(_tensors(model)) as memory, OrdinaryText():
        for _ in range(min(args.gradient_accumulation_steps, 2)):
            inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
            (call(model, **inputs) if call else model(**inputs))["loss"].backward()
    return memory.peak


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


# -- The largest memory of a computation, from running it on the meta device ------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were allocated inside a `with` block and are still in use.

    What kernels allocate for themselves is not counted.
    """

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held = [tensor.untyped_storage() for tensor in known]
        self._sizes = dict.fromkeys(map(id, self._held), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its outputs."""
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class OrdinaryText(TorchFunctionMode):
    """Runs a model on the meta device as it runs on text without padding.

    Conditions on values hold, such as that all tokens are of one text. Attention keeps what a fused kernel keeps, not
    the whole matrix of scores; with dropout it keeps that, as on a CPU.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace conditions and attention."""
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        if func is F.scaled_dot_product_attention and not kwargs.get("dropout_p", 0.0):
            return _Fused.apply(*(*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3])
        return func(*args, **kwargs)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])

"""Run only some layers of a model, from a hidden state that was computed before.

The model keeps its class, layers and configuration; a layer that is left out returns its input. So everything that a
decoder does around its layers (masks by layer type, positions, norms, heads) is unchanged on every architecture.
For training and evaluation only: a cache of keys and values would have empty places.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architecture import decoder_stack, eval_mode, find_stack
from ..errors import CheckpointError, CompatibilityError, ConfigurationError
from ..model.layers_in_files import layers_in_files
from ..model.strength import is_entrance
from ..numeric import is_finite

__all__ = [
    "PREFIX_STATES",
    "PartialRun",
    "block_ids",
    "block_states",
    "forward_replaced",
    "hidden_states",
    "recorded_states",
    "refuse_not_finite",
    "stack_of",
]

# The keyword argument with the hidden state that enters the first running layer.
PREFIX_STATES = "prefix_states"
_PROBE_TOKENS = 2
_Form = Callable[[torch.Tensor], Any]  # from a hidden state to the output of a layer


class PartialRun:
    """A model of which only some layers run inside a `with` block; the others return the hidden state they get.

    It is called like the model itself. Pass `use_cache=False`.

    Args:
        model: Any decoder-only model, a transplant included, without wrappers.
        numbers: The layers that run, by their running numbers.
        outer: The object to call instead of the model, such as a PEFT model around it.
        from_embeddings: Whether calls may omit `prefix_states` although layers before the first one are left out.
        find_states: Returns `prefix_states` for `input_ids`, where a call does not have them.

    Raises:
        ConfigurationError: No such layers, or a hidden state of another shape.
        CompatibilityError: A layer's output has no place for a hidden state.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from transplant_hf.partial import hidden_states
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8)).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> before_last = hidden_states(model, ids, [2])[2]
        >>> with PartialRun(model, [2]) as part:
        ...     logits = part(input_ids=ids, prefix_states=before_last, use_cache=False).logits
        >>> torch.equal(logits, model(input_ids=ids).logits)
        True
    """

    def __init__(
        self,
        model: Any,
        numbers: Collection[int],
        outer: Any = None,
        from_embeddings: bool = False,
        find_states: Callable[[torch.Tensor], torch.Tensor | None] | None = None,
    ) -> None:
        self.model = model
        self._outer = model if outer is None else outer
        self._from_embeddings, self._find_states = from_embeddings, find_states
        self._stack = stack_of(model)
        self._states: torch.Tensor | None = None  # of the current call
        self._forms: list[_Form] = []  # found when a layer is left out for the first time
        self._undo = ExitStack()
        self.numbers: list[int] = []
        self.choose(numbers)

    def choose(self, numbers: Collection[int]) -> None:
        """Choose the layers that run from the next start on.

        Args:
            numbers: Their running numbers; none, for hidden states that go on to the final norm.
        """
        if numbers and (min(numbers) < 0 or max(numbers) >= len(self._stack)):
            raise ConfigurationError(
                f"layers {sorted(numbers)} cannot run alone: the model runs layers 0..{len(self._stack) - 1}."
            )
        self.numbers = sorted(set(numbers))
        # Without layers the last one is called, too, and returns what it gets.
        self._first = self.numbers[0] if self.numbers else len(self._stack) - 1
        self._needs_states = self.numbers[:1] != [0] and not self._from_embeddings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; `prefix_states` `[batch, tokens, hidden]` enter its first running layer."""
        return self._outer(*args, **kwargs)

    def start(self) -> None:
        """Leave the other layers out, until `stop`."""
        for number in set(range(len(self._stack))) - set(self.numbers):
            self._undo.enter_context(self._left_out(number))
        hooks = (
            self._outer.register_forward_pre_hook(self._remember_states, with_kwargs=True),
            # Before a donor's own hook, which keeps what enters the donor.
            self._stack[self._first].register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
        )
        for hook in hooks:
            self._undo.callback(hook.remove)

    def stop(self) -> None:
        """Let all layers run again."""
        self._undo.close()
        self._states = None

    def __enter__(self) -> PartialRun:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @contextmanager
    def without(self, numbers: Collection[int]) -> Iterator[None]:
        """Leave further layers out inside a `with` block.

        Args:
            numbers: Their running numbers in the whole model, from 0.
        """
        with ExitStack() as undo:
            for number in numbers:
                undo.enter_context(self._left_out(number))
            yield

    def _left_out(self, number: int) -> AbstractContextManager[None]:
        if not self._forms:
            self._forms = _output_forms(self.model, self._stack)
        form = self._forms[number]
        return forward_replaced(self._stack[number], lambda *args, **kwargs: form(_hidden_argument(args, kwargs)[0]))

    def _remember_states(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # No forward method knows this argument, but it reaches this hook through every wrapper of the model.
        self._states = kwargs.pop(PREFIX_STATES, None)
        if self._states is None and self._find_states is not None:
            self._states = self._find_states(kwargs["input_ids"])
        return args, kwargs

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The states are kept after this: with gradient checkpointing the layer runs again in the backward pass.
        states = self._states
        if states is None:
            if self._needs_states:
                raise ConfigurationError(
                    f"layers {self.numbers} run alone and need {PREFIX_STATES}=, the hidden state before layer "
                    f"{self._first}; hidden_states(model, input_ids, [{self._first}]) computes it."
                )
            return None
        if not is_entrance(module):
            raise ConfigurationError(
                f"{PREFIX_STATES} cannot enter at layer {self._first}: it is inside a donor whose strength is not "
                "1, or its donor runs side by side with others before it. Let these run too, from the first on."
            )
        hidden, replace = _hidden_argument(args, kwargs)
        if states.shape != hidden.shape:
            raise ConfigurationError(
                f"{PREFIX_STATES} has shape {list(states.shape)}, the hidden state here has {list(hidden.shape)} "
                "([batch, tokens, hidden])."
            )
        return replace(states.to(hidden.device, hidden.dtype))


def stack_of(model: Any) -> nn.ModuleList:
    """Return the decoder layers that a model runs now.

    Args:
        model: Any decoder-only model, with donors or without.
    """
    state = getattr(model, "_transplant", None)
    return decoder_stack(model, state.blueprint.recipient.stack_path if state is not None else find_stack(model))


def _hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Callable[[Any], Any]]:
    """Return the hidden state that a layer is called with, and a function that replaces it in the arguments."""
    if args:
        return args[0], lambda states: ((states, *args[1:]), kwargs)
    return kwargs["hidden_states"], lambda states: (args, {**kwargs, "hidden_states": states})


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward method of one module inside a `with` block."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _output_forms(model: PreTrainedModel, stack: nn.ModuleList) -> list[_Form]:
    """Find out how each layer returns its hidden state: as a tensor, or first in a tuple."""
    outputs: dict[int, Any] = {}
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device=model.device)
    with ExitStack() as undo, eval_mode(model):
        _borrow_forward(model, stack, undo)
        for number, layer in enumerate(stack):
            hook = layer.register_forward_hook(lambda _, args, output, number=number: outputs.update({number: output}))
            undo.callback(hook.remove)
        model(input_ids=ids, use_cache=False)
    return [_form(outputs[number], number) for number in range(len(stack))]


def _borrow_forward(model: Any, stack: nn.ModuleList, undo: ExitStack) -> None:
    """Let layers whose weights are in files run as another layer does."""
    held = layers_in_files(model)
    absent = held.absent if held is not None else []
    present = [layer for number, layer in enumerate(stack) if number not in absent]
    if not present:  # donors that are switched off have weights
        present = list(model._transplant.idle_layers())
    for layer in (stack[number] for number in absent):
        # All layers of a stack are called in one way, and return their hidden state in one way.
        lender: Any = next((other for other in present if type(other) is type(layer)), present[-1])
        undo.enter_context(forward_replaced(layer, lender.forward))


def _form(output: Any, number: int) -> _Form:
    if isinstance(output, torch.Tensor):
        return lambda hidden: hidden
    if isinstance(output, tuple | list) and output and isinstance(output[0], torch.Tensor):
        kind, rest = type(output), [None] * (len(output) - 1)
        return lambda hidden: kind([hidden, *rest])
    raise CompatibilityError(
        f"layer {number} returns {type(output).__name__}, in which no hidden state can be found: the layers of this "
        "model cannot run alone. Train or evaluate the whole model instead."
    )


# -- Hidden states between layers ---------------------------------------------------------------------------------


class _LastPositionReached(Exception):  # noqa: N818 - not an error
    """Ends a forward pass once the last hidden state is recorded."""


@torch.no_grad()
def hidden_states(
    model: Any, input_ids: torch.Tensor, positions: Collection[int], **inputs: Any
) -> dict[int, torch.Tensor]:
    """Return the hidden states between a model's layers; layers after the last position do not run.

    Args:
        model: Any decoder-only model; its training mode is not changed.
        input_ids: `[batch, tokens]`.
        positions: Each is a number of layers that ran before, 0..L; L means after the last layer, before the norm.
        **inputs: Further inputs of the model, such as `attention_mask`.

    Returns:
        `{position: hidden state [batch, tokens, hidden]}`.

    Raises:
        ConfigurationError: A position outside 0..L.
    """
    with recorded_states(model, positions, stop=True) as states, suppress(_LastPositionReached):
        model(input_ids=input_ids, use_cache=False, **inputs)
    return states


@contextmanager
def recorded_states(model: Any, positions: Collection[int], stop: bool = False) -> Iterator[dict[int, torch.Tensor]]:
    """Record hidden states of the forward passes inside a `with` block."""
    stack = stack_of(model)
    last = max(positions, default=-1)
    if min(positions, default=0) < 0 or last > len(stack):
        raise ConfigurationError(
            f"positions {sorted(positions)} are not all in 0..{len(stack)}: the model runs {len(stack)} layers."
        )
    states: dict[int, torch.Tensor] = {}

    def record(position: int, state: torch.Tensor) -> None:
        states[position] = state
        if stop and position == last:
            raise _LastPositionReached

    def before(position: int) -> Any:
        return lambda layer, args, kwargs: record(position, _hidden_argument(args, kwargs)[0])

    def after(layer: Any, args: Any, output: Any) -> None:
        record(len(stack), output if isinstance(output, torch.Tensor) else output[0])

    hooks = [
        stack[position].register_forward_pre_hook(before(position), with_kwargs=True, prepend=True)
        for position in set(positions) - {len(stack)}
    ]
    if len(stack) in positions:
        hooks.append(stack[-1].register_forward_hook(after))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def block_ids(model: Any, blocks: Any, numbers: Sequence[int]) -> torch.Tensor:
    """Return blocks of text as input of a model, `[blocks, tokens]`."""
    return torch.stack([blocks[number]["input_ids"] for number in numbers]).to(model.device)


def block_states(
    model: Any, ids: torch.Tensor, count: int, autocast: Any = nullcontext, entering: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the hidden state after `count` layers on the CPU; `entering` goes into the first layer that runs."""
    prefix = {} if entering is None else {PREFIX_STATES: entering}
    with autocast():
        return hidden_states(model, ids, [count], **prefix)[count].cpu()


def refuse_not_finite(states: torch.Tensor, where: str, blocks: Sequence[int]) -> None:
    """Refuse hidden states of some blocks of text that contain NaN or infinity; `where` says which states."""
    if not is_finite(states):
        raise CheckpointError(
            f"the hidden state {where} is not finite for blocks {blocks[0]}..{blocks[-1]}: the recipient's weights "
            "contain NaN or infinity, or its dtype is too small. Try dtype=float32 (--dtype float32)."
        )

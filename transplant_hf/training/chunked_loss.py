"""The loss of a batch in chunks of tokens, so that the logits of the whole batch are never in memory together.

The gradient of each chunk is computed right after its loss, so the head runs no more often than without chunks. Logits
come from the model's own forward method, with its decoder replaced by hidden states that are known already: scaling
and softcapping of logits need no code here.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn import functional as F

from ..architecture import eval_mode
from ..errors import ConfigurationError
from ..partial.running import forward_replaced

__all__ = ["ChunkedLoss", "check_liger", "divergence_of", "reason_against", "tokens_per_chunk"]

_CHUNK_BYTES = 128 << 20  # of logits in float32
_IGNORED = -100
_SAMPLE_TOKENS, _SAMPLE_CHUNK = 32, 7
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-5, 2e-2  # relative, in float32 and in smaller types

Terms = Callable[[torch.Tensor, slice], Sequence[torch.Tensor]]  # of some tokens' hidden states: sums


def tokens_per_chunk(vocab_size: int, chosen: int | None) -> int:
    """Return how many tokens have their logits in memory at one time."""
    return max(_CHUNK_BYTES // (4 * vocab_size), 1) if chosen is None else chosen


class ChunkedLoss:
    """The cross entropy of a causal language model, and its divergence from a reference, in chunks.

    Args:
        inner: The model without wrappers; its head is frozen.
        chunk: Tokens in a chunk.
        autocast: Returns the context manager under which the model is trained.
    """

    def __init__(self, inner: Any, chunk: int, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self.chunk = chunk
        self._inner, self._decoder, self._autocast = inner, inner.base_model, autocast
        self._output_class: Any = None

    def hidden_states(self, model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Call the model, with its wrappers, for the hidden states `[batch, tokens, hidden]` that its head gets."""
        outputs: list[Any] = []
        hook = self._decoder.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            model(**inputs, logits_to_keep=1)
        finally:
            hook.remove()
        self._output_class = type(outputs[-1])
        states: torch.Tensor = outputs[-1].last_hidden_state
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits `[tokens, vocabulary]` of hidden states `[tokens, hidden]` in float32."""
        output = self._output_class(last_hidden_state=states[None])
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        with forward_replaced(self._decoder, lambda *args, **kwargs: output), self._autocast():
            # Not a call: hooks of the model belong to the pass that computed the hidden states.
            logits: torch.Tensor = self._inner.forward(input_ids=ids, use_cache=False).logits
        return logits[0].float()

    def __call__(
        self, model: Any, reference: torch.Tensor | None = None, rows: torch.Tensor | None = None, **inputs: Any
    ) -> dict[str, torch.Tensor]:
        """Return the loss of a batch, as a model does.

        With hidden states of a reference it has also the "divergence", KL(reference || model) in nats, the mean of the
        tokens in the marked rows, or in all if none is marked.
        """
        labels, count = inputs.pop("labels"), inputs.pop("num_items_in_batch", None)
        states = self.hidden_states(model, inputs)
        targets = F.pad(labels, (0, 1), value=_IGNORED)[:, 1:].reshape(-1).to(states.device)
        counted = torch.ones_like(labels, dtype=torch.bool)
        if rows is not None and bool(rows.any()):
            counted &= rows[:, None].to(counted.device)
        counted = counted.reshape(-1).to(states.device)
        known = None if reference is None else reference.flatten(0, 1)

        def terms(chunk_states: torch.Tensor, where: slice) -> Sequence[torch.Tensor]:
            logits = self.logits(chunk_states)
            entropy = F.cross_entropy(logits, targets[where], ignore_index=_IGNORED, reduction="sum")
            if known is None:
                return [entropy]
            with torch.no_grad():
                wanted = F.log_softmax(self.logits(known[where]), -1)
            each = F.kl_div(F.log_softmax(logits, -1), wanted, reduction="none", log_target=True).sum(-1)
            return [entropy, (each * counted[where]).sum()]

        number = 1 if known is None else 2
        sums = _SumsInChunks.apply(states.flatten(0, 1), terms, number, self.chunk)
        count = (targets != _IGNORED).sum() if count is None else count
        found = {"loss": sums[0] / (count.to(states.device) if isinstance(count, torch.Tensor) else count)}
        return found if known is None else {**found, "divergence": sums[1] / counted.sum()}

    def difference(self, model: Any, inputs: Mapping[str, Any]) -> str | None:
        """Return how the loss differs from the model's own on the first tokens of a batch; None if they agree."""
        sample = {
            name: value[:1, :_SAMPLE_TOKENS] if isinstance(value, torch.Tensor) and value.dim() > 1 else value
            for name, value in inputs.items()
        }
        sample["labels"] = sample["labels"].clone()
        sample["labels"][:, : sample["labels"].shape[1] // 4] = _IGNORED
        if "num_items_in_batch" in sample:
            sample["num_items_in_batch"] = torch.tensor(5, device=sample["labels"].device)
        chunk, self.chunk = self.chunk, _SAMPLE_CHUNK
        try:
            with eval_mode(model), self._autocast():
                exact = self._inner.dtype == torch.float32 and not torch.is_autocast_enabled(self._inner.device.type)
                own, found = model(**sample).loss.float(), self(model, **sample)["loss"]
        finally:
            self.chunk = chunk
        relative = float((own - found).abs() / own.abs().clamp_min(1e-12))
        if not relative <= (_TOLERANCE if exact else _LOW_PRECISION_TOLERANCE):
            return f"the model's own loss differs from it by {relative:.2g} (relative)"
        return None


def divergence_of(reference: torch.Tensor, logits: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The mean KL(reference || model) of a batch's tokens in nats; over the marked rows, or all if none is marked."""
    if rows is not None and bool(rows.any()):
        reference, logits = reference[rows], logits[rows]
    found, wanted = (F.log_softmax(values.flatten(0, 1).float(), -1) for values in (logits, reference))
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def reason_against(trainer: Any) -> str | None:
    """Return why a trainer's loss cannot be computed in chunks, as far as it can be known without running the model."""
    inner, args = trainer.inner, trainer.args
    trained = {id(parameter) for parameter in inner.parameters() if parameter.requires_grad}
    head = {id(parameter) for parameter in inner.parameters()} - {id(p) for p in inner.base_model.parameters()}
    head |= {id(parameter) for parameter in getattr(inner.get_output_embeddings(), "parameters", tuple)()}
    of_chosen_tokens = "logits_to_keep" in inspect.signature(type(inner).forward).parameters
    reasons = {
        "label_smoothing_factor is set": trainer.label_smoother is not None,
        "compute_loss_func is set": trainer.compute_loss_func is not None,
        "use_liger_kernel=True computes it in chunks of its own": args.use_liger_kernel,
        "torch_compile=True compiles the whole model": args.torch_compile,
        "the model is sharded by FSDP or DeepSpeed": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
        "DataParallel copies the model": args.n_gpu > 1,
        "the model has no decoder and head, or no logits_to_keep": inner.base_model is inner or not of_chosen_tokens,
        "the model returns tuples (return_dict=False)": not getattr(inner.config, "return_dict", True),
        "the head is trained": bool(trained & head),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def check_liger(args: Any, model_type: str, distillation: float) -> None:
    """Refuse `use_liger_kernel=True` where Transformers would ignore it or fail in the middle of the run."""
    if not args.use_liger_kernel:
        return
    without = "Leave use_liger_kernel out: the loss is computed in chunks without it."
    if args.device.type == "cpu":
        raise ConfigurationError(f"use_liger_kernel=True needs a GPU, and this run is on the CPU. {without}")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigurationError(f"use_liger_kernel=True needs liger-kernel: pip install liger-kernel. {without}")
    if distillation:
        raise ConfigurationError(f"use_liger_kernel=True gives no logits, which distillation compares. {without}")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigurationError(
            f"use_liger_kernel=True: Liger has no kernels for model type {model_type!r}. {without}"
        )


class _SumsInChunks(torch.autograd.Function):
    """Sums over tokens, and their gradients, which are computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, terms: Terms, number: int, chunk: int) -> tuple[torch.Tensor, ...]:
        sums = [torch.zeros((), device=states.device) for _ in range(number)]
        gradients = [torch.empty_like(states) for _ in range(number if ctx.needs_input_grad[0] else 0)]
        for start in range(0, len(states), chunk):
            where = slice(start, start + chunk)
            chunk_states = states[where].detach().requires_grad_(bool(gradients))
            with torch.set_grad_enabled(bool(gradients)):
                values = terms(chunk_states, where)
            for index, value in enumerate(values):
                sums[index] += value.detach().to(states.device)
                if gradients:
                    (gradients[index][where],) = torch.autograd.grad(
                        value, chunk_states, retain_graph=index < number - 1
                    )
        ctx.save_for_backward(*gradients)
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, *of_sums: torch.Tensor) -> Any:
        # Sums, not means, were differentiated: in float16 the gradients of a mean would be too small.
        pairs = zip(ctx.saved_tensors, of_sums, strict=True)
        return sum((of_sum * gradient.float()).to(gradient.dtype) for gradient, of_sum in pairs), None, None, None

"""Train a part of a model: everything that requires a gradient, running only the layers that matter."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments, default_data_collator

from ..architecture import eval_mode, is_quantized
from ..architecture.quantized import differentiable
from ..errors import CompatibilityError, ConfigurationError, TrainingError
from ..partial import PREFIX_STATES, PartialRun, stack_of
from .checkpoints import (
    check_same_run,
    check_sharding,
    gathered,
    last_checkpoint,
    load_optimizer,
    load_trained,
    save_optimizer,
    save_trained,
    trained_parameters,
)
from .chunked_loss import ChunkedLoss, check_liger, divergence_of, reason_against, tokens_per_chunk
from .data import REPLAYED, Rows, rows_per_step
from .prefix import CachePlan, PrefixStates
from .progress import StderrProgress

__all__ = ["COMPARED_TOKENS", "Part", "PartTrainer"]

COMPARED_TOKENS = 64  # whose logits by the part are compared with those of the whole model before the first step
_TOLERANCE = 1e-3
_LOSS_ONLY = "loss_only"  # marks a batch of an evaluation that needs no logits
_NOT_IN_CHUNKS = "the loss cannot be computed in chunks: {}. Leave out loss_chunk (--loss-chunk)."


@dataclass(frozen=True)
class Part:
    """Which layers of a model run while it is trained.

    Args:
        numbers: Their running numbers.
        from_embeddings: Whether the first of them gets the output of the embeddings, although layers before it are
            left out; otherwise it gets the hidden state that those compute.
        donor: Running numbers of the layers that the untouched recipient does not have, for distillation.
        rates: Parameters of these layers with a learning rate of their own, as `{(number, name): factor}`.
    """

    numbers: Sequence[int]
    from_embeddings: bool = False
    donor: Sequence[int] = ()
    rates: Mapping[tuple[int, str], float] = field(default_factory=dict)

    @property
    def position(self) -> int:
        """How many layers run before it."""
        return 0 if self.from_embeddings else min(self.numbers)


class PartTrainer(Trainer):
    """`Trainer` of Transformers for a model of which a part is trained.

    Frozen modules stay in evaluation mode. Only `part` of the model runs, from hidden states that are computed once
    for each block. Checkpoints hold what is trained. A loss that is not finite ends the run before the weights change.

    Args:
        model: The model; parameters that require a gradient are trained.
        args: As in Transformers; not changed.
        rows: All rows of the run.
        part: The layers that run; all by default.
        cache: Where hidden states before the part are kept.
        inner: The model inside `model`, where that is a wrapper such as PEFT's.
        run: What must be equal in a run that is resumed.
        distillation: Weight of the divergence from the untouched recipient.
        loss_chunk: Tokens whose logits are in memory at one time; by default as many as take 128 MiB in float32, where
            the loss can be computed so; 0 for the model's own loss.
        **kwargs: As in Transformers.
    """

    # Transformers types them as optional.
    args: Any
    model: Any
    state: Any
    lr_scheduler: Any
    resumed = False  # whether the last call of `train` continued a run
    signs = False  # whether the hidden states before the part also make a donor's signature

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        rows: Rows,
        *,
        part: Part | None = None,
        cache: CachePlan | None = None,
        inner: Any = None,
        run: Mapping[str, Any] | None = None,
        distillation: float = 0.0,
        loss_chunk: int | None = None,
        **kwargs: Any,
    ) -> None:
        if args.push_to_hub:
            raise ConfigurationError(
                "push_to_hub=True would upload checkpoints, which nobody can load. Train, then call push_donor(repo) "
                "or the model's push_to_hub(repo, thin=True)."
            )
        self.inner = inner if inner is not None else model
        check_liger(args, self.inner.config.model_type, distillation)
        kwargs.setdefault("data_collator", default_data_collator)
        args = copy.copy(args)
        args.max_steps = len(rows) // rows_per_step(args)
        # One pass over the rows is the whole run; their order is already drawn.
        args.train_sampling_strategy = "sequential"
        args.remove_unused_columns = False
        args.dataloader_pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # everything that is trained runs
        with _accepted_by_trainer(self.inner):
            super().__init__(model=model, args=args, train_dataset=rows, **kwargs)
        check_sharding(self)
        for to_standard_output in (PrinterCallback, ProgressCallback):
            self.pop_callback(to_standard_output)
        self._progress = StderrProgress(quiet=bool(args.disable_tqdm))
        self.add_callback(self._progress)
        self.rows = rows
        self.part = part or Part(range(len(stack_of(self.inner))), from_embeddings=True)
        self.prefix = PrefixStates(self, cache or CachePlan())
        self.distillation = distillation
        self._chunked: ChunkedLoss | None = None
        self._chunk_chosen, self._chunked_checked = bool(loss_chunk), False
        reason = reason_against(self)
        if reason is not None and loss_chunk:
            raise ConfigurationError(_NOT_IN_CHUNKS.format(reason))
        if reason is None and loss_chunk != 0:
            vocab_size = self.inner.config.get_text_config(decoder=True).vocab_size
            self._chunked = ChunkedLoss(self.inner, tokens_per_chunk(vocab_size, loss_chunk), self.accelerator.autocast)
        self._run = {**rows.described(), **dict(run or {}), "max_steps": args.max_steps}
        if rows.share:
            self._run["replay_drawn"] = 2  # version 1 drew both texts with one generator
        self._running: PartialRun | None = None
        self._frozen = list(_frozen_modules(model, stack_of(self.inner)))
        self.trainable_parameters = sum(parameter.numel() for parameter in trained_parameters(model).values())

    # -- The run --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see `Trainer.train`.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or `True` for the last complete one.
            *args: As in Transformers.
            **kwargs: As in Transformers.

        Raises:
            ConfigurationError: A checkpoint of another run, or none.
            TrainingError: The loss is not finite.
        """
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        self.resumed, completed = checkpoint is not None, False
        try:
            with differentiable(self.inner), self._partial_run():
                result = super().train(checkpoint, *args, **kwargs)
            completed = True
            return result
        finally:
            self.prefix.release(completed)
            self._progress.close()  # a run that was stopped too: messages after it start on a line of their own
            # Accelerate leaves its autocast around `forward`: the model computes as before from here on.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    @contextmanager
    def _partial_run(self) -> Iterator[None]:
        """Let only the part run, from hidden states that are computed now if they are not there yet."""
        part = self.part
        caching = part.position > 0 and self.prefix.plan.kind != "off"
        if caching:
            self.prefix.fill(part.position)
        numbers = part.numbers if caching or part.from_embeddings else range(max(part.numbers) + 1)
        if self.prefix.streams:  # donors may be switched off just now
            numbers = range(part.position, len(stack_of(self.inner)))
        wrapper = self.model if self.model is not self.inner else None
        try:
            with PartialRun(self.inner, numbers, wrapper, part.from_embeddings, self.prefix.find) as running:
                self._running = running
                if caching and not self.prefix.streams:
                    self._check_exact()
                yield
        finally:
            self._running = None

    def checkpoint_to_resume(self, checkpoint: Any) -> str | None:
        """Return the folder of the checkpoint to resume from, after a check that it belongs to this run.

        Args:
            checkpoint: A checkpoint's folder, or `True` for the last complete one.

        Raises:
            ConfigurationError: A checkpoint of another run, or none.
        """
        if not checkpoint:
            return None
        output = Path(str(self.args.output_dir))
        folder = last_checkpoint(output) if checkpoint is True else Path(os.fspath(checkpoint))
        if folder is None:
            raise ConfigurationError(
                f"there is no complete checkpoint in {output} to resume from. Start without resuming."
            )
        check_same_run(folder, self._run)
        return str(folder)

    # -- Hidden states before the part ----------------------------------------------------------------------------

    def _check_exact(self) -> None:
        """Compare the part with the whole model: layers may do more than their hidden state shows."""
        row, device = self.rows[0], self.args.device
        ids, states = (row[name][None, :COMPARED_TOKENS].to(device) for name in ("input_ids", PREFIX_STATES))
        with eval_mode(self.model), self.autocast_smart_context_manager():
            partial = self.model(input_ids=ids, use_cache=False, **{PREFIX_STATES: states}).logits.float()
            with self.measuring():
                whole = self.model(input_ids=ids, use_cache=False).logits.float()
        difference = float((partial - whole).norm() / whole.norm().clamp_min(1e-12))
        rounded = 10 if self.inner.dtype != torch.float32 or self.args.bf16 else 1
        # LLM.int8 chooses the columns that it computes in full precision by all rows of a batch.
        if not difference <= _TOLERANCE * (100 if is_quantized(self.inner) else rounded):
            raise CompatibilityError(
                f"{type(self.inner).__name__} computes something else when the layers before "
                f"{min(self.part.numbers)} are left out (relative difference of the logits "
                f"{difference:.2g}): they pass on more than a hidden state. "
                'Set cache_prefix="off" (--cache-prefix off).'
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the whole model; for a standalone donor, the donor between embeddings and head."""
        with self.measuring():
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Let the model compute on held-out text as it will be used, inside a `with` block; blocks can be nested."""
        running = self._running
        if running is None and self.prefix.streams:
            with self._partial_run():  # of which the hidden states before the part are computed
                yield
        elif running is None or self.prefix.streams or self.part.from_embeddings:
            yield
        else:
            running.stop()
            self._running = None
            try:
                yield
            finally:
                running.start()
                self._running = running

    # -- A step ---------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss; see `Trainer.compute_loss`."""
        if model.training:
            for module in self._frozen:
                # Frozen modules run without dropout, as in use. A checkpointed layer reads its mode again later.
                module.training = bool(getattr(module, "gradient_checkpointing", False))
        inputs = dict(inputs)
        replayed = inputs.pop(REPLAYED, None)
        loss_only = inputs.pop(_LOSS_ONLY, model.training and not return_outputs)
        chunked = self._chunked_loss(model, inputs) if loss_only else None
        reference = None
        if self.distillation and self._running is not None and model.training:
            plain = {name: value for name, value in inputs.items() if name != "labels"}
            with torch.no_grad(), self._running.without(self.part.donor):
                reference = chunked.hidden_states(model, plain) if chunked else model(**plain).logits
        call: Any = partial(chunked, model, reference=reference, rows=replayed) if chunked else model
        loss, outputs = super().compute_loss(call, inputs, True, num_items_in_batch)
        if reference is not None:
            divergence = outputs["divergence"] if chunked else divergence_of(reference, outputs["logits"], replayed)
            # With the number of items known, the loss is the batch's share of the mean over all accumulated batches.
            share = num_items_in_batch is not None and self.model_accepts_loss_kwargs
            loss = loss + self.distillation * divergence / (self.current_gradient_accumulation_steps if share else 1)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch; see `Trainer.prediction_step`."""
        inputs = {**inputs, _LOSS_ONLY: True} if prediction_loss_only else inputs
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def _chunked_loss(self, model: Any, inputs: Mapping[str, Any]) -> ChunkedLoss | None:
        """Return how to compute the loss of a batch in chunks, or None for the model's own loss."""
        labels = inputs.get("labels")
        if self._chunked is None or labels is None or labels.numel() <= self._chunked.chunk:
            return None
        if not self._chunked_checked:
            known = {**inputs, "num_items_in_batch": 1} if self.model_accepts_loss_kwargs else inputs
            reason = self._chunked.difference(model, known)
            self._chunked_checked = True
            if reason is not None and self._chunk_chosen:
                raise ConfigurationError(_NOT_IN_CHUNKS.format(reason))
            self._chunked = None if reason is not None else self._chunked
        return self._chunked

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute one loss and its gradients; see `Trainer.training_step`.

        Raises:
            TrainingError: The loss is not finite; weights and checkpoints are as before this step.
        """
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            last = last_checkpoint(Path(str(self.args.output_dir)))
            kept = f"The last good checkpoint is {last}" if last else "No checkpoint was written before"
            rate = self.lr_scheduler.get_last_lr()[0] if self.lr_scheduler is not None else self.args.learning_rate
            raise TrainingError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1} of {self.state.max_steps} "
                f"(learning rate {rate:.3g}). {kept}. Lower the learning rate, or check the text there."
            )
        return loss

    # -- Checkpoints ----------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a checkpoint of what is trained.

        Args:
            output_dir: The folder; by default the trainer's own.
        """
        tensors = gathered(trained_parameters(self.model))
        if self.args.should_save:
            save_trained(Path(output_dir or str(self.args.output_dir)), tensors, self._run)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(Path(resume_from_checkpoint), self.model if model is None else model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Give some parameters learning rates of their own, unless the caller made the optimizer."""
        alone = self._trained_alone() if self.optimizer is None else []
        optimizer = super().create_optimizer(*args, **kwargs)
        for parameter, options in alone:
            [group] = [one for one in optimizer.param_groups if any(other is parameter for other in one["params"])]
            group["params"] = [other for other in group["params"] if other is not parameter]
            optimizer.add_param_group({**group, "params": [parameter], **options})
        return optimizer

    def _trained_alone(self) -> list[tuple[nn.Parameter, dict[str, float]]]:
        """Return the parameters with options of the optimizer of their own."""
        return [
            (stack_of(self.inner)[number].get_parameter(name), {"lr": self.args.learning_rate * factor})
            for (number, name), factor in self.part.rates.items()
        ]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            save_optimizer(self, Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.is_fsdp_enabled:
            load_optimizer(self, Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        load_trained(Path(str(self.state.best_model_checkpoint)), self.model)

    @property
    def cache_seconds(self) -> float:
        """How long the computation of the hidden states before the part took."""
        return self.prefix.seconds


@contextmanager
def _accepted_by_trainer(model: Any) -> Iterator[None]:
    """Let `Trainer` take a quantized model without an adapter: what is trained here is in full precision."""
    if not is_quantized(model):
        yield
        return
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True


def _frozen_modules(model: nn.Module, stack: nn.ModuleList) -> Iterator[nn.Module]:
    """Yield the modules outside the trained layers in which nothing is trained."""
    in_trained_layers = {module for layer in stack if trained_parameters(layer) for module in layer.modules()}
    only_layers = sum(len(trained_parameters(layer)) for layer in stack) == len(trained_parameters(model))
    for module in model.modules():
        # Modules without weights, such as dropout of embeddings, are frozen only if nothing outside the layers learns.
        weightless = not any(True for _ in module.parameters())
        if module not in in_trained_layers and not trained_parameters(module) and (only_layers or not weightless):
            yield module

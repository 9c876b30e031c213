"""Train a part of a model: whatever requires a gradient, running only the layers that matter."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..errors import CompatibilityError, ConfigurationError, TrainingError
from ..partial import PREFIX_STATES, PartialRun, fill_cache, running_only, stack_of
from .checkpoints import check_same_run, last_checkpoint, load_trained, save_trained, trained_tensors
from .distillation import divergence
from .progress import StderrProgress
from .rows import REPLAYED, Numbered, Rows

__all__ = ["CachePlan", "Part", "PartTrainer"]

_IN_MEMORY = 1 << 30
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Part:
    """Which layers of a model run while it is trained.

    Args:
        numbers: Their running numbers.
        from_embeddings: Whether the first of them gets what the embeddings give, although layers before it are left
            out; else it gets the hidden state that those compute.
        donor: Running numbers of layers that make the difference to the untouched recipient, for distillation.
    """

    numbers: Sequence[int]
    from_embeddings: bool = False
    donor: Sequence[int] = ()

    @property
    def position(self) -> int:
        """How many layers run before it."""
        return 0 if self.from_embeddings else min(self.numbers)


@dataclass(frozen=True)
class CachePlan:
    """Where hidden states before a part are kept.

    Args:
        kind: "auto", "memory", "disk" or "off".
        limit: Most bytes.
        folder: For files; by default one in the output folder.
        kept: Whether files stay after training.
    """

    kind: str = "auto"
    limit: int | None = None
    folder: Path | None = None
    kept: bool = False


class PartTrainer(Trainer):
    """`Trainer` of Transformers for a model of which a part is trained.

    Frozen modules stay in evaluation mode; of the model only `part` runs, from hidden states computed once for each
    block; checkpoints hold what is trained; a loss that is not finite ends the run before the weights are touched.

    Args:
        model: The model; what requires a gradient is trained.
        args: As in Transformers.
        rows: Every row of the run.
        part: The layers that run; all by default.
        cache: Where hidden states before the part are kept.
        inner: The model inside `model`, where that is a wrapper such as PEFT's.
        run: What a run must agree in to be resumed.
        distillation: Weight of the divergence from the untouched recipient.
        **kwargs: As in Transformers.
    """

    # Transformers types them as if they could be missing.
    args: Any
    model: Any
    state: Any

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
        **kwargs: Any,
    ) -> None:
        if args.push_to_hub:
            raise ConfigurationError(
                "push_to_hub=True would upload checkpoints, which nobody can load. Train, then call push_donor(repo) "
                "or the model's push_to_hub(repo, thin=True)."
            )
        kwargs.setdefault("data_collator", default_data_collator)
        # One pass over the rows is the whole run; their order is already drawn.
        args.train_sampling_strategy = "sequential"
        args.remove_unused_columns = False
        args.dataloader_pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # what is trained always runs
        super().__init__(model=model, args=args, train_dataset=rows, **kwargs)
        for talkative in (PrinterCallback, ProgressCallback):
            self.pop_callback(talkative)
        self._progress = StderrProgress(quiet=bool(args.disable_tqdm))
        self.add_callback(self._progress)
        self.rows = rows
        self.part = part
        self.inner = inner if inner is not None else model
        self.cache_plan = cache or CachePlan()
        self.distillation = distillation
        self.cache_seconds = 0.0
        self._run = {**rows.described(), **dict(run or {}), "max_steps": args.max_steps}
        if rows.share:
            self._run["replay_drawn"] = 2  # general text by a generator of its own; version 1 had one for both
        self._running: PartialRun | None = None
        self._frozen = list(_frozen_modules(model, stack_of(self.inner)))

    # -- the run --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see `Trainer.train`.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or `True` for the last one that was written whole.
            *args: As in Transformers.
            **kwargs: The same.

        Raises:
            ConfigurationError: A checkpoint of another run, or none.
            TrainingError: The loss is not finite.
        """
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        try:
            return self._train_part(checkpoint, *args, **kwargs)
        finally:
            self._progress.close()  # also where the run was stopped, so that what is said next has a line of its own
            # Accelerate leaves its autocast around `forward`: the model shall compute as it did before.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def _train_part(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        if self.part is None:
            return super().train(checkpoint, *args, **kwargs)
        caching = self.part.position > 0 and self.cache_plan.kind != "off"
        if caching:
            self._fill_cache()
        numbers = self.part.numbers if caching or self.part.from_embeddings else range(max(self.part.numbers) + 1)
        try:
            with running_only(self.inner, numbers, self._outermost(), self.part.from_embeddings) as running:
                self._running = running
                if caching:
                    self._check_exact()
                return super().train(checkpoint, *args, **kwargs)
        finally:
            self._running = None
            self.rows.prefix = None
            if not self.cache_plan.kept and self.is_world_process_zero():
                shutil.rmtree(self._cache_folder, ignore_errors=True)

    def _outermost(self) -> Any:
        return self.model if self.model is not self.inner else None

    def checkpoint_to_resume(self, asked: Any) -> str | None:
        """Return the checkpoint that a run goes on from, once it is known to be of this run.

        Args:
            asked: A checkpoint's folder, or `True` for the last one that was written whole.

        Raises:
            ConfigurationError: A checkpoint of another run, or none.
        """
        if not asked:
            return None
        output = Path(str(self.args.output_dir))
        folder = last_checkpoint(output) if asked is True else Path(os.fspath(asked))
        if folder is None:
            raise ConfigurationError(
                f"there is no whole checkpoint in {output} to resume from. Start without resuming."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigurationError("runs under FSDP or DeepSpeed cannot be resumed here yet; start anew.")
        check_same_run(folder, self._run)
        return str(folder)

    # -- hidden states before the part ----------------------------------------------------------------------------

    @property
    def _cache_folder(self) -> Path:
        return self.cache_plan.folder or Path(str(self.args.output_dir), "prefix-cache")

    def _fill_cache(self) -> None:
        assert self.part is not None
        plan, position, numbers = self.cache_plan, self.part.position, self.rows.used
        width = self.inner.config.get_text_config(decoder=True).hidden_size
        size = len(numbers) * int(self.rows.domain.tokens.shape[1]) * width * self.inner.dtype.itemsize
        on_disk = plan.kind == "disk" or (plan.kind == "auto" and size > _IN_MEMORY) or self.args.world_size > 1
        told = [self.rows.fingerprints, numbers, position, str(self.inner.config.name_or_path), str(self.inner.dtype)]
        key = hashlib.sha256(json.dumps([*told, self.args.bf16, self.args.fp16]).encode()).hexdigest()
        with self.args.main_process_first(desc="hidden states before the part"):
            self.rows.prefix = fill_cache(
                self.inner,
                Numbered(self.rows),
                numbers,
                position,
                batch_size=max(1, 2 * self.args.train_batch_size),
                file=self._cache_folder / f"{key[:32]}.states" if on_disk else None,
                limit=plan.limit,
                autocast=self.autocast_smart_context_manager,
                quiet=self.args.disable_tqdm or not self.is_local_process_zero(),
            )
        self.cache_seconds = self.rows.prefix.seconds

    @torch.no_grad()
    def _check_exact(self) -> None:
        """Compare the part with the whole model: what a layer hands on may not be all that it does."""
        ids, states = (self.rows[0][name][None].to(self.args.device) for name in ("input_ids", PREFIX_STATES))
        self.model.eval()
        with self.autocast_smart_context_manager():
            short = self.model(input_ids=ids, use_cache=False, **{PREFIX_STATES: states}).logits.float()
            with self._whole():
                whole = self.model(input_ids=ids, use_cache=False).logits.float()
        distance = float((short - whole).norm() / whole.norm().clamp_min(1e-12))
        assert self.rows.prefix is not None
        if not distance <= _TOLERANCE * (10 if self.inner.dtype != torch.float32 or self.args.bf16 else 1):
            raise CompatibilityError(
                f"{type(self.inner).__name__} computes something else when its layers before "
                f"{self.rows.prefix.position} are left out (relative difference of the logits {distance:.2g}): what "
                'they do for later layers is not in the hidden state alone. Set cache_prefix="off".'
            )

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Let the whole model run, as it will be used."""
        running = self._running
        if running is None or (self.part is not None and self.part.from_embeddings):
            yield
            return
        running.stop()
        try:
            yield
        finally:
            running.start()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the whole model; of a standalone donor, the donor between embeddings and head."""
        with self._whole():
            return super().evaluate(*args, **kwargs)

    # -- a step ---------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss; see `Trainer.compute_loss`."""
        self._rest_frozen(model)
        inputs = dict(inputs)
        replayed = inputs.pop(REPLAYED, None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.distillation and self._running is not None and self.part is not None and model.training:
            with torch.no_grad(), self._running.without(self.part.donor):
                reference = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
            loss = loss + self.distillation * divergence(reference, outputs["logits"], replayed)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute one loss and its gradients; see `Trainer.training_step`.

        Raises:
            TrainingError: The loss is not finite; weights and checkpoints are as before this step.
        """
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            last = last_checkpoint(Path(str(self.args.output_dir)))
            kept = f"The last good checkpoint is {last}" if last else "No checkpoint had been written"
            raise TrainingError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1} of {self.state.max_steps} "
                f"(learning rate {self._get_learning_rate():.3g}). {kept}. Lower the learning rate, or look at the "
                "text there."
            )
        return loss

    def _rest_frozen(self, model: nn.Module) -> None:
        """Keep dropout and the like away from what is not trained: it shall do what it does when it is used."""
        if model.training:
            for module in self._frozen:
                # A checkpointed layer asks for its mode before it lets go of what it computed.
                module.training = bool(getattr(module, "gradient_checkpointing", False))

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_trained(Path(output_dir or str(self.args.output_dir)), self.model, self._run, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(Path(resume_from_checkpoint), self.model if model is None else model)

    def _load_best_model(self) -> None:
        load_trained(Path(str(self.state.best_model_checkpoint)), self.model)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in trained_tensors(self.model).values())


def _frozen_modules(model: nn.Module, stack: nn.ModuleList) -> Iterator[nn.Module]:
    """Yield the modules outside the layers that learn in which nothing is trained."""
    learning = {module for layer in stack if trained_tensors(layer) for module in layer.modules()}
    inside = sum(len(trained_tensors(layer)) for layer in stack) == len(trained_tensors(model))
    for module in model.modules():
        # Modules without weights, such as dropout of embeddings, rest only where nothing outside the layers learns.
        weightless = not any(True for _ in module.parameters())
        if module not in learning and not trained_tensors(module) and (inside or not weightless):
            yield module

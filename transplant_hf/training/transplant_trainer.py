"""What `DonorTrainer` and `RecoveryTrainer` share: texts and models by name, and thin transplants as results."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..architecture import quantization_fields
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from .arguments import PartTrainingArguments
from .checkpoints import refuse_sharded, unsharded
from .data import RunData, read_run
from .part_trainer import Part, PartTrainer
from .prefix import CachePlan
from .records import run_settings

__all__ = ["TransplantTrainer"]

# Arguments that must be equal in a run that is resumed, beside the settings that are recorded.
_RUN = ("bf16", "fp16", "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor")


class TransplantTrainer(PartTrainer):
    """Trains donors inside a model on text; the arguments are described in `DonorTrainer`."""

    arguments_class: type[PartTrainingArguments] = PartTrainingArguments
    label_after = "after"  # of the perplexity after training
    started_from: str | None = None
    signed_rows: tuple[int, int] | None = None
    interpolation = 1.0

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike[str],
        args: PartTrainingArguments,
        train_dataset: Any,
        replay_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        revision: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, self.arguments_class):
            raise ConfigurationError(f"args must be {self.arguments_class.__name__}, got {type(args).__name__}.")
        args = copy.copy(args)
        loading = {**(model_kwargs or {}), **self.streaming(model, args, model_kwargs)}
        data = read_run(model, args, train_dataset, replay_dataset, eval_dataset, processing_class, revision, loading)
        refuse_sharded(data.model)
        before = {"dtype": str(data.model.dtype), "quantization": quantization_fields(data.model)}
        prepared, part, run = self.prepare(data, args)
        run |= {
            "revision": data.commit,
            **before,
            "torch": torch.__version__,
            **run_settings(args),
            **{name: getattr(args, name) for name in _RUN},
        }
        super().__init__(
            prepared,
            args,
            data.rows(args, mark=bool(args.distillation)),
            part=part,
            cache=CachePlan.from_arguments(args),
            run=run,
            distillation=args.distillation,
            loss_chunk=args.loss_chunk,
            eval_dataset=data.held_out,
            processing_class=data.tokenizer,
            **kwargs,
        )

    def prepare(self, data: RunData, args: Any) -> tuple[Any, Part, dict[str, Any]]:
        """Return the model to train, the part of it that runs, and what must be equal in a run that is resumed."""
        raise NotImplementedError

    def streaming(self, model: Any, args: Any, model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the argument for loading a model of which layers stay in their files, if any."""
        return {}

    @property
    def transplant(self) -> Any:
        """The transplanted model, without wrappers for training."""
        return self.accelerator.unwrap_model(self.model)

    def states_before(self) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
        """Yield what is measured before training: a label, and a context manager for the state of the model."""
        yield RECIPIENT, self.transplant.disable_transplants()

    def finish(self) -> None:
        """Bring the model into the state in which it is measured and saved."""

    def note_measured(self, held_out: Mapping[str, Mapping[str, float | None]]) -> None:
        """Record in the donors' metadata what was measured: `{text: {state of the model: perplexity}}`."""
        raise NotImplementedError

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the result, as `save` does; inside a run, a checkpoint."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
        else:
            self.save(output_dir or str(self.args.output_dir))

    @contextmanager
    def _whole_result(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield what is saved, not sharded inside the block, and how."""
        with unsharded(self.transplant, needed=self.args.should_save):
            yield self.transplant, {"thin": True}

    def save(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the result: a trained donor as a repo, or a thin transplant, that `from_pretrained` can load.

        Args:
            folder: The folder.
            **kwargs: As in `save_pretrained` of a donor or a transplant.
        """
        with self._whole_result() as (made, how):
            if self.args.should_save:
                made.save_pretrained(folder, **{**how, **kwargs})

    def push(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload what `save` writes, as one commit.

        Args:
            repo_id: The repository; created if it does not exist.
            **kwargs: As in `push_to_hub` of a donor or a transplant.

        Returns:
            The commit.
        """
        with self._whole_result() as (made, how):
            return made.push_to_hub(repo_id, **{**how, **kwargs}) if self.args.should_save else None

"""From names to a saved donor or transplant: the commands `train` and `recover`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..cards import check_license
from ..donor.saved_files import check_artifact_folder
from ..errors import ConfigurationError
from ..evaluation.losses import perplexity_of_windows
from ..hub import check_can_push
from ..layer_map import RECIPIENT
from ..sources import points_to_folder
from ..storage import check_output_folder
from .checkpoints import checkpoints, last_checkpoint, remove_checkpoints
from .donor_trainer import DonorTrainer
from .prefix import CACHE_FOLDER, held_out_texts
from .recovery import RecoveryTrainer
from .transplant_trainer import TransplantTrainer

__all__ = ["TrainingReport", "recover", "train"]

_CHECKPOINTS = ".training"  # added to the output's name
_HeldOut = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class TrainingReport:
    """The result of a training; prints as a table.

    Args:
        output: Where it was saved: a folder or a repository.
        layer_map: The layers that run, as text.
        steps: Optimizer steps.
        train_loss: The mean loss; of a run that was resumed, over the steps since then, `None` if there were none.
        seconds: The time of training, since the run was resumed.
        cache_seconds: The time of computing hidden states before the trained part.
        trainable_parameters: How many numbers were trained.
        learning_rate: The peak.
        strength: The saved strength of each donor.
        held_out: `{text: {"recipient": ..., "before": ..., "after": ...}}`, perplexities on held-out texts; "after"
            at the saved strengths.
        started_from: Where the first weights of a donor for a quantized recipient are from.
        signed: How many rows of the text and of general text the donor's signature was made of, for `using("auto")`;
            `None` if it got none.
        interpolation: Where the weights of replaced layers are between those before training, 0, and the trained ones,
            1.
    """

    output: str
    layer_map: str
    steps: int
    train_loss: float | None
    seconds: float
    cache_seconds: float
    trainable_parameters: int
    learning_rate: float
    strength: Mapping[str, float]
    held_out: Mapping[str, Mapping[str, float]]
    started_from: str | None = None
    signed: tuple[int, int] | None = None
    interpolation: float = 1.0

    @property
    def perplexity(self) -> Mapping[str, float]:
        """The perplexities on the first held-out text."""
        return next(iter(self.held_out.values()), {})

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {**dataclasses.asdict(self), "perplexity": dict(self.perplexity)}

    def __str__(self) -> str:
        rows = {
            "saved to": self.output,
            "trained": f"{self.trainable_parameters:,} parameters in {self.steps} steps",
            **({} if self.train_loss is None else {"mean loss": f"{self.train_loss:.3f}"}),
            "seconds": f"{self.seconds:.1f} of training, {self.cache_seconds:.1f} for hidden states before it",
            "learning rate": f"{self.learning_rate:g}",
            "strength": ", ".join(f"{name} {value:g}" for name, value in self.strength.items()),
        }
        if self.interpolation != 1:
            rows["interpolated"] = f"{self.interpolation:g} of the training is in the weights"
        if self.started_from:
            rows["started from"] = self.started_from
        if self.signed is not None:
            rows["signed"] = f"from {self.signed[0]} rows of the text and {self.signed[1]} of general text"
        lines = [self.layer_map, "", *(f"{name:<20}{value}" for name, value in rows.items())]
        for text, numbers in self.held_out.items():
            measured = ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())
            lines.append(f"{'perplexity':<20}{text}: {measured}")
        return "\n".join(lines)


def train(
    recipient: str | os.PathLike[str],
    text: Any,
    output: str | os.PathLike[str] | None,
    *,
    general: Any = None,
    held_out: Any = None,
    push_to: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    keep_checkpoints: bool = False,
    license: str | None = None,
    revision: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    push_kwargs: Mapping[str, Any] | None = None,
    trainer_class: type[TransplantTrainer] = DonorTrainer,
    **arguments: Any,
) -> TrainingReport:
    """Train a donor on a text and save it as a donor repo.

    Args:
        recipient: Hub id or folder of a model, or of a transplant, which gets one more donor.
        text: The text to learn.
        output: The folder to write; may be omitted with `push_to`.
        general: General text to replay.
        held_out: Text to measure on before and after; several as `{name: text}`. The results are recorded.
        push_to: The repository to upload to.
        resume: Continue from the last checkpoint beside the output; the run may be longer than before.
        overwrite: Replace what transplant_hf wrote to the output before. Without it, an output that is not empty, or
            checkpoints of an earlier run that `resume` does not continue, are refused before any work is done.
        keep_checkpoints: Keep them beside the output after the run, to continue later with `resume`.
        license: The license that the card names; by default the recipient's.
        revision: The recipient's revision.
        model_kwargs: Further arguments for loading it.
        push_kwargs: Further arguments for the upload.
        trainer_class: What trains; `recover` passes `RecoveryTrainer`.
        **arguments: Those of `DonorTrainingArguments`; `donor_name` is by default the name of the output.

    Returns:
        The report.

    Raises:
        TransplantError: The reason; checkpoints of the training so far are kept.
    """
    named = {} if license is None else check_license(license)
    if issubclass(trainer_class, DonorTrainer) and arguments.get("donor_name") is None:
        last = Path(output).absolute().name if output is not None else str(push_to or "").rpartition("/")[2]
        arguments["donor_name"] = last if last not in ("", RECIPIENT) else None
    with _checkpoint_folder(output, push_to, resume, overwrite) as folder:
        args = trainer_class.arguments_class(str(folder), **arguments)
        trainer = trainer_class(recipient, args, text, general, held_out, revision=revision, model_kwargs=model_kwargs)
        if push_to is not None:
            config = trainer.transplant.transplant_config
            if points_to_folder(config.recipient, revision=config.recipient_revision) is not None:
                raise ConfigurationError(
                    f"a pushed donor must name a recipient on the Hub, and {config.recipient} is a folder. Push the "
                    "recipient first and train from there, or write to a folder only."
                )
            check_can_push(push_to, (push_kwargs or {}).get("token"))
        trainer.checkpoint_to_resume(resume)
        perplexities: _HeldOut = {}
        for label, state in trainer.states_before():
            with state:
                perplexities = _measure(trainer, label, perplexities)
        if not resume:
            remove_checkpoints(folder)
        result = trainer.train(resume_from_checkpoint=resume)
        trainer.finish()
        try:
            perplexities = _measure(trainer, trainer.label_after, perplexities)
            trainer.note_measured(_for_record(perplexities))
        finally:  # a measurement that fails loses no training
            if output is not None:
                trainer.save(output, **named)
            if push_to is not None:
                trainer.push(push_to, **{**named, **(push_kwargs or {})})
        if not keep_checkpoints:
            remove_checkpoints(folder)
    return TrainingReport(
        output=str(output or push_to),
        layer_map=str(trainer.transplant.layer_map),
        steps=trainer.state.global_step,
        train_loss=result.training_loss or None,  # 0 if no step ran: a cross-entropy is positive
        seconds=result.metrics["train_runtime"],
        cache_seconds=trainer.cache_seconds,
        trainable_parameters=trainer.trainable_parameters,
        learning_rate=trainer.args.learning_rate,
        strength=dict(trainer.transplant.strengths),
        held_out=perplexities,
        started_from=trainer.started_from,
        signed=trainer.signed_rows,
        interpolation=trainer.interpolation,
    )


def recover(
    transplant: str | os.PathLike[str], text: Any, output: str | os.PathLike[str] | None, **options: Any
) -> TrainingReport:
    """Train chosen parts of a transplant and save it thin.

    Args:
        transplant: Hub id or folder of a transplant or donor.
        text: The text to learn.
        output: The folder to write; may be omitted with `push_to`.
        **options: Those of `train`, and the fields of `RecoveryArguments`.

    Returns:
        The report.

    Raises:
        TransplantError: The reason; checkpoints of the training so far are kept.
    """
    return train(transplant, text, output, trainer_class=RecoveryTrainer, **options)


# -- Before the run --------------------------------------------------------------------------------------------------


@contextmanager
def _checkpoint_folder(
    output: str | os.PathLike[str] | None, push_to: str | None, resume: bool, overwrite: bool
) -> Iterator[Path]:
    """Yield a folder for checkpoints beside the output; it is removed again if it is empty."""
    if output is None and push_to is None:
        raise ConfigurationError("there is no place for the result: pass an output folder, or a repository to push to.")
    folder = Path(f"{os.fspath(output) if output is not None else str(push_to).replace('/', '--')}{_CHECKPOINTS}")
    if not resume and not overwrite and checkpoints(folder):
        raise ConfigurationError(
            f"{folder} has checkpoints of an earlier run. Continue it with resume=True (--resume), or start again "
            "with overwrite=True (--overwrite), which removes them."
        )
    if resume and not checkpoints(folder):
        raise ConfigurationError(
            f"there is no complete checkpoint in {folder} to resume from. A run that ends removes its checkpoints, "
            "unless it is given keep_checkpoints=True (--keep-checkpoints). Start without resume."
        )
    # The same command goes on with hidden states of a run that was stopped before its first checkpoint.
    only_states = folder.is_dir() and {path.name for path in folder.iterdir()} == {CACHE_FOLDER}
    check_output_folder(folder, resume or overwrite or only_states)
    if output is not None:
        # A finished run that continues replaces its own result.
        check_artifact_folder(output, overwrite or resume)
    try:
        yield folder
    except KeyboardInterrupt as stopped:
        last = last_checkpoint(folder)
        message = "no checkpoint was written, as the first one comes after save_steps (--save-steps) steps"
        if last:
            message = f"{last} is complete: continue from it with resume=True (--resume)"
        raise KeyboardInterrupt(f"training was stopped; {message}.") from stopped
    finally:
        with suppress(OSError):  # not empty: there are checkpoints to resume from
            folder.rmdir()


# -- Perplexity on held-out texts ------------------------------------------------------------------------------------


def _measure(trainer: Any, label: str, before: _HeldOut) -> _HeldOut:
    """Return the perplexities so far, and those of the model as it is now."""
    texts, quiet = held_out_texts(trainer), bool(trainer.args.disable_tqdm)
    if not texts:
        return {}
    with trainer.measuring():
        return {
            name: {**before.get(name, {}), label: perplexity_of_windows(trainer.model, windows, quiet=quiet).value}
            for name, windows in texts.items()
        }


def _for_record(held_out: _HeldOut) -> dict[str, dict[str, float | None]]:
    """Round, and replace infinity, which JSON does not have."""
    return {
        text: {state: round(value, 4) if math.isfinite(value) else None for state, value in numbers.items()}
        for text, numbers in held_out.items()
    }

"""From names to a saved donor: what the commands `train` and `recover` do."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..donor.saved_files import check_artifact_folder
from ..errors import ConfigurationError
from ..evaluation import perplexity
from ..hub import check_can_push
from ..layer_map import RECIPIENT
from ..outputs import check_output_folder
from ..sources import points_to_folder
from ..texts import Blocks
from .arguments import DonorTrainingArguments
from .checkpoints import checkpoints, last_checkpoint, remove_checkpoints
from .donor_trainer import DonorTrainer
from .recovery import RecoveryArguments, RecoveryTrainer

__all__ = ["TrainingReport", "recover_transplant", "train_donor"]

_WORK = ".training"
Measured = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class TrainingReport:
    """What a training gave.

    Args:
        output: Where it was saved: a folder or a repository.
        layer_map: What runs, as a picture.
        steps: Optimizer steps.
        train_loss: Mean loss over them.
        seconds: Of training.
        cache_seconds: Of computing hidden states before the trained part.
        trainable_parameters: How many numbers were trained.
        learning_rate: The peak.
        strength: The strength of each donor in what was saved.
        held_out: `{text: {"recipient": ..., "before": ..., "after": ...}}`, perplexities on held-out texts, where such
            were given; "after" at the strengths that were saved.
    """

    output: str
    layer_map: str
    steps: int
    train_loss: float
    seconds: float
    cache_seconds: float
    trainable_parameters: int
    learning_rate: float
    strength: Mapping[str, float]
    held_out: Mapping[str, Mapping[str, float]]

    @property
    def perplexity(self) -> Mapping[str, float]:
        """The perplexities on the first held-out text."""
        return next(iter(self.held_out.values()), {})

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {**dataclasses.asdict(self), "perplexity": dict(self.perplexity)}

    def __str__(self) -> str:
        strengths = ", ".join(f"{name} {value:g}" for name, value in self.strength.items())
        lines = [
            self.layer_map,
            "",
            f"saved to            {self.output}",
            f"trained             {self.trainable_parameters:,} parameters in {self.steps} steps",
            f"mean loss           {self.train_loss:.3f}",
            f"seconds             {self.seconds:.1f} of training, {self.cache_seconds:.1f} for hidden states before it",
            f"learning rate       {self.learning_rate:g}",
            f"strength            {strengths}",
        ]
        for text, numbers in self.held_out.items():
            lines += [f"perplexity on {text}"] if len(self.held_out) > 1 else []
            lines += [f"{f'perplexity {name}':<19} {value:.2f}" for name, value in numbers.items()]
        return "\n".join(lines)


def train_donor(
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
    revision: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    push_kwargs: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> TrainingReport:
    """Train a donor on a text and save it as a donor repo.

    Args:
        recipient: Hub id or folder of a model, or of a transplant, which gets one more donor.
        text: The text to learn.
        output: The folder to write; may be left out with `push_to`.
        general: General text to replay.
        held_out: Text to measure on before and after; several as `{name: text}`. What is found is recorded.
        push_to: The repository to upload to.
        resume: Go on from the last checkpoint beside the output; the run may be longer than before.
        keep_checkpoints: Keep them beside the output when all is done, to go on for longer with `resume`.
        overwrite: Replace what transplant_hf wrote to the output before; without it, an output that is not empty, or
            checkpoints of an earlier run that `resume` does not continue, are refused before anything else is done.
        revision: The recipient's revision.
        model_kwargs: Further arguments for loading it.
        push_kwargs: Further arguments for the upload.
        **arguments: Those of `DonorTrainingArguments`; `donor_name` is by default the name of the output.

    Returns:
        The report.

    Raises:
        TransplantError: Saying what is wrong; checkpoints of what was trained so far are kept.
    """
    if arguments.get("donor_name") is None:
        arguments["donor_name"] = _name_of(output, push_to)
    with _working(output, push_to, resume, overwrite) as work:
        args = DonorTrainingArguments(work, **arguments)
        trainer = DonorTrainer(recipient, args, text, general, held_out, revision=revision, model_kwargs=model_kwargs)
        name, model = trainer.donor_name, trainer.model

        def measure() -> Measured:
            with model.disable_transplants(name):
                return _measured(trainer, "recipient")

        def finish() -> None:
            model.set_strength(name, trainer.recommended_strength)

        def save() -> None:
            if output is not None:
                trainer.save_donor(output)
            if push_to is not None:
                trainer.push_donor(push_to, **dict(push_kwargs or {}))

        token = (push_kwargs or {}).get("token")
        return _carried_out(
            trainer, resume, output, push_to, measure, finish, save, "with donor", keep_checkpoints, token
        )


def recover_transplant(
    transplant: str | os.PathLike[str],
    text: Any,
    output: str | os.PathLike[str] | None,
    *,
    general: Any = None,
    held_out: Any = None,
    push_to: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    keep_checkpoints: bool = False,
    revision: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    push_kwargs: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> TrainingReport:
    """Train chosen parts of a transplant and save it thin.

    Args:
        transplant: Hub id or folder of a transplant or donor.
        text: The text to learn.
        output: The folder to write; may be left out with `push_to`.
        general: General text to replay.
        held_out: Text to measure on before and after; several as `{name: text}`. What is found is recorded.
        push_to: The repository to upload to.
        resume: Go on from the last checkpoint beside the output; the run may be longer than before.
        keep_checkpoints: Keep them beside the output when all is done, to go on for longer with `resume`.
        overwrite: Replace what transplant_hf wrote to the output before; without it, an output that is not empty, or
            checkpoints of an earlier run that `resume` does not continue, are refused before anything else is done.
        revision: The transplant's revision.
        model_kwargs: Further arguments for loading it.
        push_kwargs: Further arguments for the upload.
        **arguments: Those of `RecoveryArguments`.

    Returns:
        The report.

    Raises:
        TransplantError: Saying what is wrong; checkpoints of what was trained so far are kept.
    """
    with _working(output, push_to, resume, overwrite) as work:
        args = RecoveryArguments(work, **arguments)
        trainer = RecoveryTrainer(
            transplant, args, text, general, held_out, revision=revision, model_kwargs=model_kwargs
        )
        model = trainer.model

        def measure() -> Measured:
            with model.disable_transplants():
                found = _measured(trainer, "recipient")
            return _measured(trainer, "before", found)

        def save() -> None:
            if output is not None:
                trainer.save_transplant(output)
            if push_to is not None:
                model.push_to_hub(push_to, thin=True, **dict(push_kwargs or {}))

        token = (push_kwargs or {}).get("token")
        return _carried_out(
            trainer, resume, output, push_to, measure, lambda: None, save, "after", keep_checkpoints, token
        )


def _name_of(output: str | os.PathLike[str] | None, push_to: str | None) -> str | None:
    """Return the last part of the place of a donor, so that its name and its folder agree."""
    last = Path(output).absolute().name if output is not None else str(push_to or "").rpartition("/")[2]
    return last if last not in ("", RECIPIENT) else None


@contextmanager
def _working(
    output: str | os.PathLike[str] | None, push_to: str | None, resume: bool, overwrite: bool
) -> Iterator[str]:
    """Have a folder for checkpoints beside the output; where none was written, nothing stays of it."""
    if output is None and push_to is None:
        raise ConfigurationError("say where the result goes: an output folder, or a repository to push to.")
    work = Path(f"{os.fspath(output) if output is not None else str(push_to).replace('/', '--')}{_WORK}")
    _check_work(work, resume, overwrite)
    if output is not None:
        # A finished run that goes on for longer replaces its own result.
        check_artifact_folder(output, overwrite or resume)
    try:
        yield str(work)
    except KeyboardInterrupt as stopped:
        last = last_checkpoint(work)
        message = "no checkpoint was written, as the first one comes after save_steps (--save-steps) steps"
        if last:
            message = f"{last} is whole: go on from there with resume=True (--resume)"
        raise KeyboardInterrupt(f"training was stopped; {message}.") from stopped
    finally:
        with suppress(OSError):  # not empty: there is something to go on from
            work.rmdir()


def _check_work(work: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder for checkpoints that holds an earlier run's, unless they are meant to be used or to go."""
    if not resume and not overwrite and checkpoints(work):
        raise ConfigurationError(
            f"{work} holds checkpoints of an earlier run. Go on from them with resume=True (--resume), or start again "
            "with overwrite=True (--overwrite), which removes them."
        )
    if resume and not checkpoints(work):
        raise ConfigurationError(
            f"there is no whole checkpoint in {work} to resume from. A run that ends removes its checkpoints, unless "
            "it is given keep_checkpoints=True (--keep-checkpoints). Start without resume."
        )
    check_output_folder(work, resume or overwrite)


def _carried_out(
    trainer: Any,
    resume: bool,
    output: str | os.PathLike[str] | None,
    push_to: str | None,
    measure: Callable[[], Measured],
    finish: Callable[[], None],
    save: Callable[[], None],
    label: str,
    keep_checkpoints: bool,
    token: str | bool | None,
) -> TrainingReport:
    """Measure, train, measure, save, and remove the checkpoints of what is saved now."""
    config = trainer.model.transplant_config
    if push_to is not None and points_to_folder(config.recipient, revision=config.recipient_revision) is not None:
        raise ConfigurationError(
            f"what is pushed must name a recipient on the Hub, and {config.recipient} is a folder. Push the recipient "
            "first and train from there, or write to a folder only."
        )
    if push_to is not None:
        check_can_push(push_to, token)
    trainer.checkpoint_to_resume(resume)
    held_out = measure()
    work = Path(str(trainer.args.output_dir))
    if not resume:
        remove_checkpoints(work)
    result = trainer.train(resume_from_checkpoint=resume)
    finish()
    try:
        held_out = _measured(trainer, label, held_out)
        trainer.note_measured(_for_record(held_out))
    finally:
        save()  # whatever happens to a measurement, what was trained is not lost
    if not keep_checkpoints:
        remove_checkpoints(work)
    return TrainingReport(
        output=str(output or push_to),
        layer_map=str(trainer.model.layer_map),
        steps=trainer.state.global_step,
        train_loss=result.training_loss,
        seconds=result.metrics["train_runtime"],
        cache_seconds=trainer.cache_seconds,
        trainable_parameters=trainer.trainable_parameters,
        learning_rate=trainer.args.learning_rate,
        strength=dict(trainer.model.strengths),
        held_out=held_out,
    )


def _measured(trainer: Any, label: str, before: Measured | None = None) -> Measured:
    """Add to the perplexities on the held-out texts those of the model as it is now."""
    held = trainer.eval_dataset
    texts = held if isinstance(held, Mapping) else {held.name: held} if isinstance(held, Blocks) else {}
    quiet = bool(trainer.args.disable_tqdm)
    return {
        name: {**(before or {}).get(name, {}), label: perplexity(trainer.model, blocks, name=name, quiet=quiet).value}
        for name, blocks in texts.items()
    }


def _for_record(held_out: Measured) -> dict[str, dict[str, float | None]]:
    """JSON has no infinity."""
    return {
        text: {state: round(value, 4) if math.isfinite(value) else None for state, value in numbers.items()}
        for text, numbers in held_out.items()
    }

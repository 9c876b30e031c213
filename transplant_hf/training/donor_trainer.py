"""`DonorTrainer`: a donor learns a text inside a frozen recipient, and becomes a donor repo."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..donor import Donor
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT, check_position
from ..model.in_memory import transplant
from ..partial import stack_of
from .arguments import DonorTrainingArguments, default_learning_rate, default_position, default_strength
from .data import read_run, rows_per_step
from .part_trainer import CachePlan, Part, PartTrainer
from .records import note_in_donors, training_record

__all__ = ["DonorTrainer"]

# Arguments that must be equal in a run that is resumed.
_RUN = ("method", "mode", "donor_layers", "start_layers", "init", "distillation", "learning_rate", "seed")


class DonorTrainer(PartTrainer):
    """Trains a donor, with everything that `Trainer` of Transformers can do.

    By default the donor is inserted before the recipient's last layer, starts as the identity, and alone is trained.
    The hidden states before it are computed once for each block of text; a step runs only the donor and what follows.

    Args:
        model: The recipient: a loaded model (a transplant gets one more donor), a Hub id or a folder.
        args: `DonorTrainingArguments`; not changed.
        train_dataset: The text to learn: `Blocks`, a `TextSource`, a file or Hub id, or rows with a "text" column.
        replay_dataset: General text to replay against forgetting, in the same forms.
        eval_dataset: Text to measure on while training, in the same forms; several as `{name: text}`.
        processing_class: The recipient's tokenizer; by default the one beside the recipient.
        revision: The revision of a recipient that is named.
        model_kwargs: Further arguments for loading it, such as `dtype`.
        **kwargs: As in `Trainer`.

    Raises:
        ConfigurationError: A position out of range, or arguments that contradict each other.
        DataError: Text that is missing or too short, or a tokenizer of another model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from transplant_hf.texts import Blocks
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
        >>> config.vocab_size = 32
        >>> blocks = Blocks(torch.randint(0, 32, (8, 16)), name="noise")
        >>> args = DonorTrainingArguments("doctest", max_steps=2, donor_layers=1, save_strategy="no", disable_tqdm=True)
        >>> trainer = DonorTrainer(LlamaForCausalLM(config), args, train_dataset=blocks)
        >>> trainer.train().global_step
        2
        >>> trainer.donor.num_layers, trainer.model.layer_map.layers_of("noise")
        (1, [2])
    """

    label_after = "with donor"  # of the perplexity after training

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike[str],
        args: DonorTrainingArguments,
        train_dataset: Any,
        replay_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        revision: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, DonorTrainingArguments):
            raise ConfigurationError(f"args must be DonorTrainingArguments, got {type(args).__name__}.")
        args = copy.copy(args)
        data = read_run(
            model, args, train_dataset, replay_dataset, eval_dataset, processing_class, revision, model_kwargs
        )
        recipient = data.model
        self.donor_name = args.donor_name or (data.domain.name if data.domain.name not in ("", RECIPIENT) else "donor")
        self.held_out_perplexity: Mapping[str, Mapping[str, float | None]] = {}
        self.position = _position(recipient, args)
        self.recommended_strength = (
            args.strength if args.strength is not None else default_strength(args.mode, data.general is not None)
        )
        if args.learning_rate is None:
            width = recipient.config.get_text_config(decoder=True).hidden_size
            args.learning_rate = default_learning_rate(args.method, width)
        transplanted = _with_donor(recipient, args, self.position, self.donor_name, data.commit)
        own = transplanted.layer_map.layers_of(self.donor_name)
        if args.method == "standalone":
            part = Part(own, from_embeddings=True, donor=own)
        else:
            part = Part(range(own[0], len(transplanted.layer_map)), donor=own)
        super().__init__(
            transplanted,
            args,
            data.rows(args, mark=bool(args.distillation)),
            part=part,
            cache=CachePlan.from_arguments(args),
            run={
                "recipient": str(recipient.config.name_or_path),
                "position": self.position,
                **{name: getattr(args, name) for name in _RUN},
                "batch": rows_per_step(args),
                "dtype": str(recipient.dtype),
                "torch": torch.__version__,
            },
            distillation=args.distillation,
            eval_dataset=data.held_out,
            processing_class=data.tokenizer,
            **kwargs,
        )

    @property
    def transplant(self) -> Any:
        """The recipient with the donor, without wrappers for training."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def donor(self) -> Donor:
        """The donor as it is now, with the record of its training in its metadata."""
        model = self.transplant
        donor = Donor.from_model(model, model.layer_map.layers_of(self.donor_name), name=self.donor_name)
        record = dataclasses.replace(donor.record, metadata=training_record(self))
        return donor.replaced(record=record, **self._recommended)

    def states_before(self) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
        """Yield what is measured before training: a label, and a context manager for the state of the model."""
        yield RECIPIENT, self.transplant.disable_transplants(self.donor_name)

    def finish(self) -> None:
        """Give the trained donor its recommended strength."""
        self.transplant.set_strength(self.donor_name, self.recommended_strength)

    def note_measured(self, held_out: Mapping[str, Mapping[str, float | None]]) -> None:
        """Record in the donor's metadata what was measured on held-out text.

        Args:
            held_out: `{text: {state of the model: perplexity}}`.
        """
        self.held_out_perplexity = held_out

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the donor repo, as `save_donor` does; inside a run, a checkpoint.

        Args:
            output_dir: The folder; by default the trainer's own.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
        else:
            self.save_donor(output_dir or str(self.args.output_dir))

    def save_donor(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the donor as a repo that `from_pretrained` and `pipeline` can load.

        A donor that was trained beside others is saved with them, as a thin transplant.

        Args:
            folder: The folder.
            **kwargs: As in `Donor.save_pretrained`; position, mode and strength are those of the training.
        """
        if self.args.should_save and self._has_other_donors:
            self._finished_transplant().save_pretrained(folder, thin=True, **kwargs)
        elif self.args.should_save:
            self.donor.save_pretrained(folder, **{**self._recommended, **kwargs})

    def push_donor(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload what `save_donor` writes, as one commit.

        Args:
            repo_id: The repository; created if it does not exist.
            **kwargs: As in `Donor.push_to_hub`.

        Returns:
            The commit.
        """
        if not self.args.should_save:
            return None
        if self._has_other_donors:
            return self._finished_transplant().push_to_hub(repo_id, thin=True, **kwargs)
        return self.donor.push_to_hub(repo_id, **{**self._recommended, **kwargs})

    @property
    def _has_other_donors(self) -> bool:
        return len(self.transplant.transplant_config.donors) > 1

    def _finished_transplant(self) -> Any:
        self.finish()
        note_in_donors(self.transplant, {self.donor_name: training_record(self)})
        return self.transplant

    @property
    def _recommended(self) -> dict[str, Any]:
        return {"position": self.position, "mode": self.args.mode, "strength": self.recommended_strength}


def _position(recipient: Any, args: DonorTrainingArguments) -> int:
    state = getattr(recipient, "_transplant", None)
    layers = state.blueprint.splice.num_layers if state is not None else len(stack_of(recipient))
    if args.donor_layers > layers:
        raise ConfigurationError(
            f"donor_layers={args.donor_layers}, but the recipient has {layers} layers to start from."
        )
    position = default_position(args.mode, layers, args.donor_layers) if args.position is None else args.position
    return check_position(position, layers, replaced=args.donor_layers if args.mode == "replace" else 0)


def _with_donor(recipient: Any, args: DonorTrainingArguments, position: int, name: str, commit: str | None) -> Any:
    """Return the recipient with an untrained donor, whose parameters alone require gradients."""
    layer_map = getattr(recipient, "layer_map", None) or [(RECIPIENT, n) for n in range(len(stack_of(recipient)))]
    numbers = [number for number, (source, _) in enumerate(layer_map) if source == RECIPIENT]
    if args.start_layers is not None:
        start = list(args.start_layers)
    elif args.mode == "replace":
        start = list(range(position, position + args.donor_layers))
    else:
        first = min(max(position - args.donor_layers, 0), max(len(numbers) - args.donor_layers, 0))
        start = list(range(first, min(first + args.donor_layers, len(numbers))))
    if min(start) < 0 or max(start) >= len(numbers):
        raise ConfigurationError(
            f"the donor cannot start from layers {start}: {len(numbers)} recipient layers run, 0..{len(numbers) - 1}."
        )
    init = "copy" if args.mode == "replace" else args.init
    untrained = Donor.from_model(recipient, [numbers[n] for n in start], name=name, init=init, revision=commit)
    model = transplant(recipient, untrained, position=position, mode=args.mode, name=name)
    model.requires_grad_(False)
    for number in model.layer_map.layers_of(name):
        stack_of(model)[number].requires_grad_(True)
    return model

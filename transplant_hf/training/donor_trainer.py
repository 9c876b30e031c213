"""`DonorTrainer`: a donor learns a text inside a frozen recipient, and becomes a donor repo."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..display import parse_size
from ..donor import Donor
from ..errors import ConfigurationError
from ..layer_map import check_position
from ..model.memory import transplant
from ..partial import stack_of
from ..texts import Blocks
from .arguments import DonorTrainingArguments
from .defaults import default_learning_rate, default_position, default_strength
from .making import note_in_donors, record_of_making
from .part_trainer import CachePlan, Part, PartTrainer
from .reading import blocks_of_run, model_and_tokenizer, rows_of_run

__all__ = ["DonorTrainer"]


class DonorTrainer(PartTrainer):
    """Trains a donor, with everything that `Trainer` of Transformers can do.

    By default the donor stands before the recipient's last layer, starts as identity, and alone is trained; the hidden
    states before it are computed once for each block of text, and only the donor and what follows it runs.

    Args:
        model: The recipient: a loaded model (a transplant included, which gets one more donor), a Hub id or a folder.
        args: What to do; `DonorTrainingArguments`.
        train_dataset: The text to learn: `Blocks`, a `TextSource`, a file or Hub id, or rows with a "text" column.
        replay_dataset: General text to replay against forgetting, likewise.
        eval_dataset: Text to measure on while training, in the same forms; several as `{name: text}`.
        processing_class: The recipient's tokenizer; by default the one beside the recipient.
        revision: The recipient's revision, where it is named.
        model_kwargs: Further arguments for loading it, such as `dtype`.
        **kwargs: As in `Trainer`.

    Raises:
        ConfigurationError: A position out of range, or arguments that do not go together.
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
        recipient, processing_class, commit = model_and_tokenizer(model, processing_class, revision, model_kwargs)
        domain, replay, evaluated = blocks_of_run(
            recipient, processing_class, args, train_dataset, replay_dataset, eval_dataset
        )
        self.donor_name = args.donor_name or _default_name(domain)
        self.held_out_perplexity: Mapping[str, Mapping[str, float | None]] = {}
        self.position = _position(recipient, args)
        self.recommended_strength = (
            args.strength if args.strength is not None else default_strength(args.mode, replay is not None)
        )
        width = recipient.config.get_text_config(decoder=True).hidden_size
        if args.learning_rate is None:
            args.learning_rate = default_learning_rate(args.method, args.mode, width)
        grown = _with_donor(recipient, args, self.position, self.donor_name, commit)
        rows = rows_of_run(domain, replay, args, args.replay_share, mark=bool(args.distillation))
        super().__init__(
            grown,
            args,
            rows,
            part=_part(grown, args, self.donor_name),
            cache=CachePlan(
                args.cache_prefix,
                parse_size(args.prefix_cache_limit),
                Path(args.prefix_cache_dir) if args.prefix_cache_dir is not None else None,
                kept=args.prefix_cache_dir is not None,
            ),
            run=_run(recipient, args, self.position),
            distillation=args.distillation,
            eval_dataset=evaluated,
            processing_class=processing_class,
            **kwargs,
        )

    def note_measured(self, held_out: Mapping[str, Mapping[str, float | None]]) -> None:
        """Record in the donor's metadata what was measured on held-out text.

        Args:
            held_out: `{text: {state of the model: perplexity}}`.
        """
        self.held_out_perplexity = held_out

    @property
    def donor(self) -> Donor:
        """The donor as it is now, with what made it in its metadata."""
        model: Any = self.accelerator.unwrap_model(self.model)
        donor = Donor.from_model(model, model.layer_map.layers_of(self.donor_name), name=self.donor_name)
        record = dataclasses.replace(donor.record, metadata=record_of_making(self))
        return donor.replaced(record=record, **self._recommended)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the donor repo, as `save_donor` does; inside a run, a checkpoint of it.

        Args:
            output_dir: The folder; by default the trainer's own.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
        else:
            self.save_donor(output_dir or str(self.args.output_dir))

    def save_donor(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the donor as a repo that `from_pretrained` and `pipeline` load as it stands.

        A donor that was trained beside others is saved with them, as a thin transplant.

        Args:
            folder: The folder.
            **kwargs: As in `Donor.save_pretrained`; position, mode and strength are those of the training.
        """
        if not self.args.should_save:
            return
        if self._beside_others:
            self._finished_transplant().save_pretrained(folder, thin=True, **kwargs)
        else:
            self.donor.save_pretrained(folder, **{**self._recommended, **kwargs})

    def push_donor(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload what `save_donor` writes, as one commit.

        Args:
            repo_id: The repository; made if it does not exist.
            **kwargs: As in `Donor.push_to_hub`.

        Returns:
            The commit.
        """
        if not self.args.should_save:
            return None
        if self._beside_others:
            return self._finished_transplant().push_to_hub(repo_id, thin=True, **kwargs)
        return self.donor.push_to_hub(repo_id, **{**self._recommended, **kwargs})

    @property
    def _beside_others(self) -> bool:
        return len(self.accelerator.unwrap_model(self.model).transplant_config.donors) > 1

    def _finished_transplant(self) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        model.set_strength(self.donor_name, self.recommended_strength)
        note_in_donors(model, {self.donor_name: record_of_making(self)})
        return model

    @property
    def _recommended(self) -> dict[str, Any]:
        return {"position": self.position, "mode": self.args.mode, "strength": self.recommended_strength}


def _default_name(domain: Blocks) -> str:
    return domain.name if domain.name not in ("", "recipient") else "donor"


def _position(recipient: Any, args: DonorTrainingArguments) -> int:
    state = getattr(recipient, "_transplant", None)
    layers = state.blueprint.splice.num_layers if state is not None else len(stack_of(recipient))
    if args.donor_layers > layers:
        raise ConfigurationError(
            f"donor_layers={args.donor_layers}, but the recipient has {layers} layers to start from."
        )
    position = (
        default_position(args.method, args.mode, layers, args.donor_layers) if args.position is None else args.position
    )
    return check_position(position, layers, replaced=args.donor_layers if args.mode == "replace" else 0)


def _start_layers(args: DonorTrainingArguments, position: int, layers: int) -> list[int]:
    if args.start_layers is not None:
        return list(args.start_layers)
    if args.mode == "replace":
        return list(range(position, position + args.donor_layers))
    first = min(max(position - args.donor_layers, 0), layers - args.donor_layers)
    return list(range(first, first + args.donor_layers))


def _with_donor(recipient: Any, args: DonorTrainingArguments, position: int, name: str, commit: str | None) -> Any:
    """Put an untrained donor into the recipient, and let it alone require gradients."""
    own = [number for number, slot in enumerate(_map(recipient)) if slot[0] == "recipient"]
    chosen = [own[number] for number in _start_layers(args, position, len(own)) if number < len(own)]
    init = "copy" if args.mode == "replace" else args.init
    start = Donor.from_model(recipient, chosen, name=name, init=init, revision=commit)
    model = transplant(recipient, start, position=position, mode=args.mode, name=name)
    model.requires_grad_(False)
    stack = stack_of(model)
    for number in model.layer_map.layers_of(name):
        stack[number].requires_grad_(True)
    return model


def _map(model: Any) -> Any:
    known = getattr(model, "layer_map", None)
    return known if known is not None else [("recipient", number) for number in range(len(stack_of(model)))]


def _part(model: Any, args: DonorTrainingArguments, name: str) -> Part:
    own = model.layer_map.layers_of(name)
    if args.method == "standalone":
        return Part(own, from_embeddings=True, donor=own)
    return Part(range(own[0], len(model.layer_map)), donor=own)


def _run(recipient: Any, args: DonorTrainingArguments, position: int) -> dict[str, Any]:
    """What a run must agree in to be resumed."""
    named = (
        "method",
        "mode",
        "donor_layers",
        "start_layers",
        "init",
        "distillation",
        "learning_rate",
        "seed",
    )
    return {
        "recipient": str(recipient.config.name_or_path),
        "position": position,
        **{name: getattr(args, name) for name in named},
        "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "dtype": str(recipient.dtype),
        "torch": torch.__version__,
    }

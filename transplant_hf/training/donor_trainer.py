"""`DonorTrainer`: a donor learns a text inside a frozen recipient, and becomes a donor repo."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..architecture import find_stack, is_quantized, output_weights, quantization_fields, was_gguf
from ..donor import Donor
from ..donor.signature import Signature
from ..errors import ConfigurationError
from ..evaluation.reports import label_of
from ..layer_map import RECIPIENT, Placement, Position, starting_layers, trained_placement
from ..model.in_memory import transplant
from ..model.layers_in_files import layers_in_files
from ..model.starting_copies import FROM_DEQUANTIZED, STARTED_FROM, full_precision_copies
from ..partial import stack_of
from ..partial.streaming import layers_in_memory
from .arguments import DonorTrainingArguments, default_init, default_learning_rate
from .checkpoints import fill, gathered, trained_parameters, unsharded
from .data import RunData
from .part_trainer import Part
from .prefix import held_back_layers
from .records import note_in_donors, training_record
from .transplant_trainer import TransplantTrainer

__all__ = ["DonorTrainer"]

logger = logging.get_logger(__name__)

_NORM_STEP = 0.2  # the best of 0.2 and 1 for Gemma 3 270M, at 1e-3 and 3e-3

# Arguments that must be equal in a run that is resumed.
_RUN = ("method", "mode", "donor_layers", "start_layers", "init", "distillation")


class DonorTrainer(TransplantTrainer):
    """Trains a donor, with everything that `Trainer` of Transformers can do.

    By default the donor's layers are spread through a recipient of at least 12 layers, and inserted before the last
    layer of others. They start as the identity, and they alone are trained. The hidden states before the first of them
    are computed once for each block of text; a step runs only this layer and what follows.

    `save_donor(folder)` or `save` writes the donor as a repo that `from_pretrained` and `pipeline` can load, and
    `push_donor(repo_id)` or `push` uploads it, with arguments as in `Donor.save_pretrained` and `Donor.push_to_hub`;
    position, mode and strength are those of the training. A donor that was trained beside others is saved with them,
    as a thin transplant.

    Args:
        model: The recipient: a loaded model (a transplant gets one more donor), a Hub id or a folder. A loaded model
            that is quantized gets the donor in place.
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

    arguments_class = DonorTrainingArguments
    label_after = "with donor"
    signs = True

    def prepare(self, data: RunData, args: Any) -> tuple[Any, Part, dict[str, Any]]:
        """Return the recipient with an untrained donor, the part that runs, and what identifies the run."""
        recipient = data.model
        self.donor_name = args.donor_name or (data.domain.name if data.domain.name not in ("", RECIPIENT) else "donor")
        self.held_out_perplexity: Mapping[str, Mapping[str, float | None]] = {}
        # What the domain looks like where the donor begins; `signed_rows`: of how many rows of each text it was made.
        self.signature: Signature | None = None
        state = getattr(recipient, "_transplant", None)
        layers = state.blueprint.splice.num_layers if state is not None else len(stack_of(recipient))
        self.position = _position(layers, args, layers_in_files(recipient) is not None)
        strength = args.strength
        if strength is None:  # less without general text
            strength = 1.0 if args.mode == "replace" or data.replay_share(args) > 0 else 0.75
        # Layers that replace others have no strength at run time: it goes into their weights.
        self.interpolation = strength if args.mode == "replace" else 1.0
        self.recommended_strength = 1.0 if args.mode == "replace" else strength
        self.quantization = quantization_fields(recipient)
        transplanted, part = with_untrained_donor(
            recipient,
            self.position,
            args.donor_layers,
            mode=args.mode,
            init=args.init,
            name=self.donor_name,
            start_layers=args.start_layers,
            commit=data.commit,
            alone=args.method == "standalone",
        )
        trained = trained_parameters(transplanted)
        if args.learning_rate is None:
            width = recipient.config.get_text_config(decoder=True).hidden_size
            args.learning_rate = default_learning_rate(args, width, trained.values(), normed=bool(part.rates))
        before = trained if self.interpolation != 1 else {}
        self._before = {name: parameter.detach().clone() for name, parameter in before.items()}
        untrained = transplanted._transplant.blueprint.part(self.donor_name).donor
        self.started_from = untrained.metadata.get(STARTED_FROM)
        run = {
            "recipient": str(recipient.config.name_or_path),
            "position": self.position,
            **{name: getattr(args, name) for name in _RUN},
        }
        return transplanted, part, run

    def streaming(self, model: Any, args: Any, model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        """Let the layers before the donor stay in their files, where `stream_prefix` says so or memory is short."""
        held_back = held_back_layers(model, args, model_kwargs or {}, lambda layers: _position(layers, args, True))
        return {} if held_back is None else {"held_back": held_back}

    @contextmanager
    def _partial_run(self) -> Iterator[None]:
        with super()._partial_run():
            first = self.transplant.layer_map[: self.part.position]
            made = self.prefix.signature(self.part.position) if {source for source, _ in first} == {RECIPIENT} else None
            self.signature, self.signed_rows = made or (None, None)
            yield

    @property
    def donor(self) -> Donor:
        """The donor as it is now, with the record of its training in its metadata."""
        model = self.transplant
        donor = Donor.from_model(model, model.layer_map.layers_of(self.donor_name), name=self.donor_name)
        signature = donor.record.signature if self.signature is None else self.signature.to_dict()
        record = dataclasses.replace(donor.record, metadata=training_record(self), signature=signature)
        return donor.replaced(record=record, **self._recommended)

    def states_before(self) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
        """Yield the recipient, or the recipient with the donors that it had before."""
        others = [name for name in self.transplant.strengths if name != self.donor_name]
        yield label_of(others), self.transplant.disable_transplants(self.donor_name)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `Trainer.train`. The weights of layers that replace others are interpolated then."""
        result = super().train(*args, **kwargs)
        if self._before:
            parameters = trained_parameters(self.transplant)
            for name, learned in gathered(parameters).items():
                fill(parameters[name], torch.lerp(self._before[name].to(learned.device), learned, self.interpolation))
        return result

    def finish(self) -> None:
        """Give the trained donor its recommended strength."""
        self.transplant.set_strength(self.donor_name, self.recommended_strength)

    def note_measured(self, held_out: Mapping[str, Mapping[str, float | None]]) -> None:
        """Record in the donor's metadata what was measured on held-out text."""
        self.held_out_perplexity = held_out

    @contextmanager
    def _whole_result(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yield the donor; one that was trained beside others is saved with them, as a thin transplant."""
        model, layer_map, held = self.transplant, self.transplant.layer_map, layers_in_files(self.transplant)
        if len(model.transplant_config.donors) > 1:
            self.finish()
            note_in_donors(model, {self.donor_name: training_record(self)})
            others = [number for number, (source, _) in enumerate(layer_map) if source != RECIPIENT]
            in_memory = nullcontext() if held is None else held.loaded(others, self.args.device)
            with in_memory, super()._whole_result() as found:
                yield found
            return
        own = nn.ModuleList(stack_of(model)[number] for number in layer_map.layers_of(self.donor_name))
        with unsharded(own, needed=self.args.should_save):
            yield self.donor if self.args.should_save else None, self._recommended

    save_donor = TransplantTrainer.save
    push_donor = TransplantTrainer.push

    @property
    def _recommended(self) -> dict[str, Any]:
        return {"position": self.position, "mode": self.args.mode, "strength": self.recommended_strength}


def _position(layers: int, args: DonorTrainingArguments, streamed: bool) -> Position:
    late = streamed or args.method == "standalone"
    placement = trained_placement(layers, args.donor_layers, args.mode, args.position, late=late)
    if args.start_layers is None:
        starting_layers(placement, layers)  # checks that there are enough
    return placement.position


def with_untrained_donor(
    recipient: Any,
    position: Position,
    count: int,
    *,
    mode: str = "insert",
    init: str | None = None,
    name: str = "donor",
    start_layers: Sequence[int] | None = None,
    commit: str | None = None,
    alone: bool = False,
) -> tuple[Any, Part]:
    """Return the recipient with an untrained donor, whose parameters alone require gradients, and what runs of it."""
    layer_map = getattr(recipient, "layer_map", None) or [(RECIPIENT, n) for n in range(len(stack_of(recipient)))]
    running = {index: number for number, (source, index) in enumerate(layer_map) if source == RECIPIENT}
    placement = Placement(name, position, tuple(range(count)), mode == "replace")
    state = getattr(recipient, "_transplant", None)
    start = list(
        start_layers or starting_layers(placement, state.blueprint.splice.num_layers if state else len(running))
    )
    if start_layers is None and mode == "insert":
        for index in [index for index in start if index not in running]:  # another donor replaces it
            start[start.index(index)] = max((n for n in running if n < index and n not in start), default=index)
        start.sort()
    if missing := [index for index in start if index not in running]:
        raise ConfigurationError(
            f"the donor cannot start from layers {start}: recipient layers {missing} do not run here. Those that run "
            f"are {', '.join(map(str, sorted(running)))}. Choose another position (--position), or, for a donor that "
            "is inserted, start_layers (--start-layers)."
        )
    init = init or default_init(mode)
    copied = [running[index] for index in start]
    quantized, started_from = is_quantized(recipient), FROM_DEQUANTIZED if was_gguf(recipient) else None
    with layers_in_memory(recipient, copied):
        norms = [_norm_weights(stack_of(recipient)[number]) for number in copied]
        if quantized:
            untrained, started_from = full_precision_copies(recipient, copied, name, commit)
        else:
            untrained = Donor.from_model(recipient, copied, name=name, init=init, revision=commit)
    # A model whose layers are in files was loaded for this run alone, and cannot share what it does not have.
    in_place = quantized or layers_in_files(recipient) is not None
    if started_from is not None:
        logger.warning(f"The donor starts from {started_from} of the recipient, layers {', '.join(map(str, start))}.")
        record = dataclasses.replace(untrained.record, metadata={STARTED_FROM: started_from})
        untrained = untrained.replaced(record=record)
    model = transplant(recipient, untrained, position=position, mode=mode, name=name, in_place=in_place)
    if in_place:
        model._transplant.blueprint = model._transplant.blueprint.without_tensors(name)
    own = model.layer_map.layers_of(name)
    if quantized and init == "identity":
        with layers_in_memory(model, own):
            _make_identity(model, own)
    model.requires_grad_(False)
    for number in own:
        stack_of(model)[number].requires_grad_(True)
    part = Part(
        own if alone else range(own[0], len(model.layer_map)),
        from_embeddings=alone,
        donor=own,
        rates=_rates_of_norms(model, dict(zip(own, norms, strict=True))) if init == "identity" else {},
    )
    return model, part


def _norm_weights(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters of modules that have vectors alone."""
    return {
        f"{path}.{name}": parameter.detach().clone()
        for path, module in layer.named_modules()
        if all(parameter.dim() == 1 for parameter in module.parameters(recurse=False))
        for name, parameter in module.named_parameters(recurse=False)
    }


def _rates_of_norms(model: Any, norms: Mapping[int, Mapping[str, torch.Tensor]]) -> dict[tuple[int, str], float]:
    """Return learning rates of norms that an identity starts at 0 or -1, as factors.

    Adam moves all numbers by the same amount in a step, and these have a long way to go: in Gemma 3 270M up to 400. The
    factor makes a step as large, relative to the weights that they had in the recipient, as one of a matrix is.
    """
    width = model.config.get_text_config(decoder=True).hidden_size
    rates = {}
    for number, weights in norms.items():
        for name, before in weights.items():
            now = stack_of(model)[number].get_parameter(name).detach().to(before.device)
            moved = (before - now).float().square().mean().sqrt().item()
            if moved and bool((now == now[0]).all()):
                rates[number, name] = _NORM_STEP * math.sqrt(width) * moved
    return rates


def _make_identity(model: Any, numbers: Sequence[int]) -> None:
    """Make layers in full precision the identity, in place."""
    with torch.no_grad():
        for number, weights in output_weights(model, find_stack(model), numbers).items():
            for name, value in weights.items():
                stack_of(model)[number].get_parameter(name).fill_(value)

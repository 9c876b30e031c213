"""What users call on a model with donors: the methods that it has beyond those of the recipient's class."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..config import DonorSpec, TransplantConfig, check_composition
from ..display import position_text
from ..donor import Donor
from ..donor.record import DonorRecord
from ..layer_map import RECIPIENT, LayerMap, Position
from ..sources import at_revision
from .active_donors import state_of
from .calls import counted, deep_copy
from .generate_each import generate_each
from .live import change, changing, open_donor
from .native_methods import NativeMethods, recipient_class
from .routing import Route
from .save import push_transplant, save_transplant
from .using import Block, OpenBlock, generating

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

logger = logging.get_logger(__name__)

_COUNTED = ("generate", "state_dict", "load_state_dict", "_apply", "requires_grad_")


class TransplantMixin(NativeMethods):
    """The methods that a transplanted model has beyond its recipient's class.

    A model that was built without a transplant, as by `type(model)(config)`, behaves like the recipient's class.
    """

    @property
    def transplant_config(self) -> TransplantConfig | None:
        """The transplant's configuration, with resolved revisions; `None` without a transplant."""
        return copy.deepcopy(self._transplant.blueprint.config) if self._transplant else None

    @property
    def layer_map(self) -> LayerMap:
        """The source and source index of each layer that runs now, and the settings of each donor; `print` draws it."""
        if self._transplant is None:
            layers = self.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[attr-defined]
            return LayerMap((RECIPIENT, index) for index in range(layers))
        return LayerMap(self._transplant.blueprint.layer_map(self._transplant.disabled), self._legend())

    def _legend(self) -> list[tuple[str, str]]:
        """One line for the recipient and one for each donor: name and description."""
        config = self._transplant.blueprint.config
        known = config.recipient and at_revision(config.recipient, config.recipient_revision)
        lines = [(RECIPIENT, known)] if known else []
        for spec in config.donors:
            place = "replaces layers from" if spec.mode == "replace" else "inserted at"
            on = "off" if spec.name in self._transplant.disabled else "on"
            strength = self.strengths[str(spec.name)]
            lines.append((str(spec.name), f"{place} {position_text(spec.position)}, strength {strength:g}, {on}"))
        return lines

    def extra_repr(self) -> str:
        """The lines that `print(model)` shows before the modules."""
        native = super().extra_repr()  # type: ignore[misc]
        legend = self._legend() if self._transplant else []
        return "\n".join([*([native] if native else []), *(f"{name}: {description}" for name, description in legend)])

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters, of all parameters, and their ratio, in the format of PEFT.

        Example:
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> from transplant_hf import Donor, transplant
            >>> recipient = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
            >>> model = transplant(recipient, Donor.from_model(recipient, layers=[1], name="law"), position=2)
            >>> model.print_trainable_parameters()
            trainable params: 3,696 || all params: 3,696 || trainable%: 100.0000
        """
        trained, count = self.num_parameters(only_trainable=True), self.num_parameters()  # type: ignore[attr-defined]
        print(f"trainable params: {trained:,d} || all params: {count:,d} || trainable%: {100 * trained / count:.4f}")

    @property
    def strengths(self) -> dict[str, float]:
        """The strength of each donor, by name."""
        if self._transplant is None:
            return {}
        strengths = {part.name: part.spec.strength for part in self._transplant.blueprint.parts}
        return strengths | {name: float(gate.detach()) for name, gate in self._transplant.hooks.gates().items()}

    def set_strength(self, name: str, value: float) -> None:
        """Set the strength s of a donor d, which turns the hidden state h into h + s (d(h) - h).

        Models saved later have the new strength. Caches that were filled with the old strength are refused.

        Args:
            name: The donor's name.
            value: Any finite number. 0 is exactly the recipient; 1 is the donor as it is, at no extra cost. Above 1 the
                donor's change is enlarged, and below 0 it is subtracted.

        Raises:
            ConfigurationError: No such donor, a value that is not finite, or a donor that replaces layers.

        Example:
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> from transplant_hf import Donor, transplant
            >>> recipient = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
            >>> model = transplant(recipient, Donor.from_model(recipient, layers=[1], name="law"), position=2)
            >>> model.set_strength("law", 0.5)
            >>> model.strengths
            {'law': 0.5}
        """
        state_of(self).set_strengths({name: value})

    def set_composition(self, composition: str) -> None:
        """Set how donors that are inserted at one position are combined.

        Args:
            composition: "stacked": one runs after another. "side_by_side": each gets the hidden state h that enters
                the position, and h + sum_i s_i (d_i(h) - h) goes on.

        Raises:
            ConfigurationError: Another value.
        """
        state_of(self).set_strengths({}, check_composition(composition, "this model"))

    def disable_transplants(self, names: str | Iterable[str] | None = None) -> AbstractContextManager[None]:
        """Switch donors off inside a `with` block. With all donors off, the model is exactly the recipient.

        The donors are switched back on when the block ends, also by an exception. Blocks can be nested.

        Args:
            names: One name or several; all donors by default.

        Returns:
            A context manager, which can also be used as a decorator.

        Raises:
            ConfigurationError: No such donor, or one that replaced layers which were not kept.
        """
        selected = None if names is None else [names] if isinstance(names, str) else list(names)
        off = functools.partial(state_of(self).off, selected)
        off()  # checks the names now
        return Block(off, nests=True)

    @property
    def routes(self) -> tuple[Route, ...]:
        """Where each row went in this thread's last call with `using("auto")` or `strength="auto"`, with its score."""
        return self._transplant.choices.routes if self._transplant else ()

    def using(
        self, donors: Any = None, *, rows: Sequence[Any] | None = None, threshold: float = 0.0
    ) -> AbstractContextManager[None]:
        """Choose donors for the calls inside a `with` block, without a change of the model.

        Other threads, asyncio tasks and generators can choose other donors at the same time. A donor runs on the rows
        that use it, and its part of the cache holds these rows. A row without donors gets exactly the recipient's
        output. The innermost block applies. `asyncio.to_thread` takes the choice along; in other
        threads, begin a block there.

        Args:
            donors: One donor name or several, each at its own strength; or `{name: strength}`, where a strength is a
                number or a list with one number for each row. Other donors are left out; `()` leaves out all. "auto":
                each row uses the donor that fits its prompt, or none; see `routes`. Donors need a signature, which
                training with general text and `transplant_hf.sign` make.
            rows: One entry for each row of the batch, instead of `donors`: what `donors` takes, or `None` for no
                donor. For `generate`, one for each text: its beams and returned sequences follow it.
            threshold: For "auto", the score from which on a row uses a donor: how much more likely the beginning of
                its prompt is with the donor, as a logarithm.

        Raises:
            ConfigurationError: No such donor, a donor that is switched off, or one that replaces layers and was not
                chosen. For "auto", donors without signatures, or with those of another recipient or position.

        Example:
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> from transplant_hf import Donor, transplant
            >>> import torch
            >>> recipient = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
            >>> model = transplant(recipient, Donor.from_model(recipient, layers=[1], name="law"), position=2).eval()
            >>> with model.using(rows=["law", None]):
            ...     logits = model(input_ids=torch.tensor([[1, 2], [1, 2]])).logits
            >>> bool((logits[0] == logits[1]).all())
            False
        """
        return Block(lambda: OpenBlock(*state_of(self).choose(donors, rows, threshold)), nests=False)

    def generate_each(self, inputs: Any, donors: Sequence[Any], **kwargs: Any) -> Any:
        """Generate an answer to one prompt for each of several choices of donors.

        The layers before the first donor run once for all tokens of the prompt but the last, where layers can share
        what they get; otherwise this is `generate` with as many rows.

        Args:
            inputs: `input_ids` `[1, tokens]`, or what a tokenizer returns for one prompt.
            donors: One entry for each answer, as in `using(rows=...)`.
            **kwargs: As in `generate`.

        Returns:
            What `generate` returns for as many rows as there are entries.

        Raises:
            ConfigurationError: More than one prompt, or no such donor.

        Example:
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> from transplant_hf import Donor, transplant
            >>> import torch
            >>> recipient = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
            >>> model = transplant(recipient, Donor.from_model(recipient, layers=[1], name="law"), position=2).eval()
            >>> model.generate_each(torch.tensor([[1, 2, 3]]), ["law", None], max_new_tokens=2, pad_token_id=0).shape
            torch.Size([2, 5])
        """
        return generate_each(self, inputs, donors, kwargs)

    def add_donor(
        self,
        donor: Donor | str,
        position: Position | None = None,
        mode: str | None = None,
        *,
        name: str | None = None,
        strength: float | None = None,
    ) -> None:
        """Add a donor to this loaded model. Only the donor's weights are read.

        Caches that were filled before are refused. After an error the model is as it was.

        Args:
            donor: The donor, or its Hub id or folder.
            position: The number of recipient layers that run before it, 0..L; by default the donor's recommendation.
            mode: "insert" or "replace". By default the donor's recommendation at its recommended position, and
                "insert" at another. Replaced layers are kept.
            name: The donor's name in this model; by default its own name.
            strength: By default the donor's recommendation at its recommended position, and 1 at another.

        Raises:
            ConfigurationError: A position out of range, a name that is in use, or a model that cannot change now.
            CompatibilityError: The donor does not fit; lists every mismatch.
            CheckpointError: The donor's weights are malformed.
        """
        with changing(self, "add_donor()") as state:
            new = open_donor(donor, position, mode, name, strength)
            change(self, [*state.blueprint.parts, new], "add_donor()")

    def remove_donor(self, name: str) -> None:
        """Remove a donor from this model and free its memory.

        Args:
            name: The donor's name.

        Raises:
            ConfigurationError: No such donor, or one that replaced layers which were not kept.
        """
        with changing(self, "remove_donor()", name) as state:
            state.hooks.refuse_gates([name])
            change(self, [part for part in state.blueprint.parts if part.name != name], "remove_donor()")

    def move_donor(self, name: str, position: Position) -> None:
        """Move a donor to another position. No weight is read or copied.

        Args:
            name: The donor's name.
            position: The number of recipient layers that run before it, 0..L.

        Raises:
            ConfigurationError: No such donor, or a position out of range.
        """
        with changing(self, "move_donor()", name) as state:
            old = state.blueprint.part(name)
            moved = dataclasses.replace(old, spec=dataclasses.replace(old.spec, position=position))
            change(self, [moved if part is old else part for part in state.blueprint.parts], "move_donor()")

    def swap_donor(
        self,
        name: str,
        donor: Donor | str,
        *,
        position: Position | None = None,
        new_name: str | None = None,
        strength: float | None = None,
    ) -> None:
        """Replace one donor by another in one step.

        Args:
            name: The donor to remove.
            donor: The donor to add, or its Hub id or folder.
            position: By default the position of the removed donor.
            new_name: By default the name of the removed donor.
            strength: By default the strength of the removed donor.

        Raises:
            ConfigurationError: As for `add_donor` and `remove_donor`.
            CompatibilityError: The donor does not fit.
            CheckpointError: The donor's weights are malformed.
        """
        with changing(self, "swap_donor()", name) as state:
            state.hooks.refuse_gates([name])
            old = state.blueprint.part(name).spec
            position = old.position if position is None else position
            strength = old.strength if strength is None else strength
            new = open_donor(donor, position, old.mode, new_name or name, strength)
            if (old.mode, new[1].mode) == ("insert", "replace"):
                logger.warning(
                    f"donor {new[0].name!r} recommends mode replace, and runs with mode insert, as {name!r} did."
                )
            change(self, [new if part.name == name else part for part in state.blueprint.parts], "swap_donor()")

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, thin: bool = False, **kwargs: Any
    ) -> Any:
        """Save the model. See `PreTrainedModel.save_pretrained` for the other arguments.

        Args:
            save_directory: The folder. A model that was saved there before is replaced in one step; other files and
                folders stay. If a folder of yours has the name of a donor, the donor's folder is called `donor-` and
                its number.
            *args: As in Transformers.
            thin: Save the donors and a pinned reference to the recipient, instead of all weights.
            **kwargs: As in Transformers. `license` is written to the model card. An edited `README.md` is kept.

        Raises:
            ConfigurationError: `thin` with a recipient weight that differs from the pinned recipient's; an argument
                that does not apply to a thin save or to the transplant format; or a folder of yours called
                `recipient` that the save would replace.
        """
        native = functools.partial(super().save_pretrained)  # type: ignore[misc]
        return save_transplant(self, native, save_directory, args, thin, kwargs)

    def push_to_hub(self, repo_id: str, *, thin: bool = False, **kwargs: Any) -> Any:
        """Upload the model as one commit.

        Args:
            repo_id: The repository; created if it does not exist.
            thin: As in `save_pretrained`.
            **kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`, and the
                arguments of `save_pretrained`.

        Raises:
            ConfigurationError: Another argument.
        """
        if self._transplant is None or (getattr(self, "_hf_peft_config_loaded", False) and not thin):
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[misc]
        native = functools.partial(super().save_pretrained)  # type: ignore[misc]
        return push_transplant(self, native, repo_id, thin, kwargs)

    def _record_of_layers(
        self, numbers: Sequence[int], name: str | None
    ) -> tuple[DonorRecord, DonorSpec | None] | None:
        """The record of a donor that is made from running layers, for `Donor.from_model`."""
        if self._transplant is None:
            return None
        return self._transplant.blueprint.record_of([self.layer_map[number] for number in numbers], numbers, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy through the recipient's class: this class has its name, but cannot be imported by it."""
        if self._transplant is not None:
            self._transplant.calls.begin_copy()
        return (_new, (recipient_class(type(self)),), *super().__reduce_ex__(protocol)[2:])


def _new(native: Any) -> Any:
    model_class = transplant_class(native)
    return model_class.__new__(model_class)


@functools.cache
def transplant_class(native: Any) -> Any:
    """Return the class of transplanted models for a native model class.

    It has the name and the module of the native class: Transformers looks up weight conversions and loss functions by
    them.
    """
    if issubclass(native, TransplantMixin):
        return native
    names = {"__module__": native.__module__, "__qualname__": native.__qualname__, "__doc__": native.__doc__}
    methods = {name: getattr(TransplantMixin, name, None) or getattr(native, name, None) for name in _COUNTED}
    if methods["generate"]:
        methods["generate"] = generating(methods["generate"])
    names |= {name: counted(method) for name, method in methods.items() if method}
    return type(native.__name__, (TransplantMixin, native), {**names, "__deepcopy__": deep_copy})


if TYPE_CHECKING:

    class TransplantedModel(TransplantMixin, PreTrainedModel, GenerationMixin):
        """What a transplanted model is for a type checker, which cannot know the recipient's class.

        For annotations only. At run time the model is of the recipient's own class; `isinstance` narrows to it.
        """

        # A narrower type would exclude the recipients' own classes, or calls that are valid.
        push_to_hub: Any
        generate: Any

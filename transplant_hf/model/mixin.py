"""The class of a transplanted model: the recipient's own, with a few methods more."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..architecture.build import initialize, inner_models, settle, thread_contexts
from ..config import DonorSpec, TransplantConfig, check_composition
from ..donor import Donor
from ..donor.record import DonorRecord
from ..layer_map import RECIPIENT, LayerMap
from ..splice import insert_layers
from .adapters import refuse_replaced
from .calls import copied, counted
from .gates import gates_of, refuse_gate
from .hot import add_donor, move_donor, remove_donor, swap_donor
from .loading import active_loading
from .requests import Block, Choice, Requests, Wanted
from .saving import push_transplant, save_transplant
from .state import finish, record_of_layers, state_of

__all__ = ["TransplantMixin", "native_class", "transplant_class"]

_ASIDE = "_transplant_aside"
_COUNTED = ("generate", "state_dict", "load_state_dict", "_apply", "requires_grad_")


class TransplantMixin:
    """What a transplanted model can do beyond its recipient's class.

    Without a transplant, as in `type(model)(config)`, everything works as in the recipient's class.
    """

    _transplant: Any = None  # a TransplantState once the model is loaded

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        load = active_loading()
        claimed = load is not None and load.claim(self)
        with inner_models(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if claimed and load is not None and not load.blueprint.built_config.native:
            insert_layers(self, load.blueprint, load.blueprint.built)  # type: ignore[arg-type]
        settle(self)  # type: ignore[arg-type]

    @property
    def transplant_config(self) -> TransplantConfig | None:
        """The transplant's configuration, revisions resolved; `None` without a transplant."""
        return self._transplant.blueprint.config if self._transplant else None

    @property
    def layer_map(self) -> LayerMap:
        """For each layer that runs now, its source and its index there; prints as a picture, and what each donor is."""
        if self._transplant is None:
            layers = self.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[attr-defined]
            return LayerMap((RECIPIENT, index) for index in range(layers))
        running = self._transplant.blueprint.layer_map(self._transplant.switch.disabled)
        return LayerMap(running, self._legend())

    def _legend(self) -> list[tuple[str, str]]:
        """What the recipient and each donor are, on one line each."""
        config = self._transplant.blueprint.config
        revision = f"@{config.recipient_revision}" if config.recipient_revision else ""
        lines = [(RECIPIENT, f"{config.recipient}{revision}")] if config.recipient else []
        for spec in config.donors:
            how = "replaces layers from" if spec.mode == "replace" else "inserted at"
            strength = self.strengths[str(spec.name)]
            state = "off" if spec.name in self._transplant.switch.disabled else "on"
            lines.append((str(spec.name), f"{how} position {spec.position}, strength {strength:g}, {state}"))
        return lines

    def extra_repr(self) -> str:
        """What `print(model)` says before the modules."""
        native = super().extra_repr()  # type: ignore[misc]
        lines = [native] if native else []
        return "\n".join([*lines, *(f"{name}: {told}" for name, told in (self._legend() if self._transplant else ()))])

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, how many there are, and the share, as PEFT prints it.

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
        """How much of what each donor adds to the hidden state is kept, by the donors' names."""
        if self._transplant is None:
            return {}
        known = {part.name: part.spec.strength for part in self._transplant.blueprint.parts}
        return {**known, **{name: float(gate.detach()) for name, gate in gates_of(self._transplant).items()}}

    def set_strength(self, name: str, value: float) -> None:
        """Set how much of what a donor adds is kept: h + value (donor(h) - h).

        What is saved from then on has the new strength. A cache that was filled before belongs to the old one: start
        with a new cache.

        Args:
            name: The donor's name.
            value: Any finite number; 0 is exactly the recipient, and 1 costs nothing.

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
        state = state_of(self)
        state.check_name(name)
        refuse_gate(state, name)
        state.turn({name: value})

    def set_composition(self, composition: str) -> None:
        """Set how donors that are inserted at one position go together.

        Args:
            composition: "stacked", one after another; or "side_by_side", where each gets the hidden state h that
                enters the position, and h + sum_i s_i (d_i(h) - h) goes on.

        Raises:
            ConfigurationError: Neither of them.
        """
        state_of(self).turn({}, check_composition(composition, "this model"))

    def disable_transplants(self, names: str | Iterable[str] | None = None) -> AbstractContextManager[None]:
        """Switch donors off inside a `with` block: exactly the recipient, `generate` and its cache included.

        Args:
            names: A donor's name or several; all donors by default.

        Returns:
            A context manager; blocks nest, and what they switched is switched back when they end, by an exception
            too.

        Raises:
            ConfigurationError: No such donor, or one that replaced layers that were not kept.
        """
        named = None if names is None else [names] if isinstance(names, str) else list(names)
        off = functools.partial(state_of(self).off, named)
        off()  # refuses names now
        return Block(off)

    def using(self, donors: Any = None, *, rows: Sequence[Any] | None = None) -> AbstractContextManager[None]:
        """Choose donors for the calls inside a `with` block; the model itself stays as it is.

        Other threads, asyncio tasks and generators may meanwhile choose otherwise. Every donor's layers run in any
        case, and what they add is left out where it is not wanted: a row without donors gets exactly what the
        recipient computes. Blocks nest, the inner one counts. `asyncio.to_thread` takes the choice along; other
        threads begin a block of their own.

        Args:
            donors: A donor's name or several, each at its strength; or `{name: strength}`, a number or one for each
                row. Those that are not named are left out; `()` leaves out all.
            rows: Instead, for each row of the batch what `donors` takes; `None` for a row without donors. `generate`
                may make several sequences of a row.

        Raises:
            ConfigurationError: No such donor, one that replaces layers and is not named, one that is switched off.

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
        return Choice(functools.partial(self._request, donors, rows))

    def _request(self, donors: Any, rows: Sequence[Any] | None) -> tuple[Requests, Wanted]:
        state = state_of(self)
        for name in gates_of(state):
            refuse_gate(state, name)
        return state.request(donors, rows)

    def add_donor(
        self,
        donor: Donor | str,
        position: int | None = None,
        mode: str | None = None,
        *,
        name: str | None = None,
        strength: float | None = None,
    ) -> None:
        """Insert a donor into this model where it is loaded: only the donor's bytes are read and moved.

        Caches that were filled before are refused from then on. No call may run meanwhile in another thread.

        Args:
            donor: The donor, or its Hub id or folder.
            position: How many recipient layers run before it, 0..L; by default what it recommends.
            mode: "insert" or "replace"; by default what it recommends together with its position, at a position of
                your own "insert". Replaced layers are kept.
            name: What to call it; by default its own name.
            strength: By default what it recommends together with its position, at a position of your own 1.

        Raises:
            ConfigurationError: A position out of range, two donors of one name, or a model that cannot change now.
            CompatibilityError: The donor does not fit, with every mismatch.
            CheckpointError: Its weights are malformed. The model stays as it was, as after every error.
        """
        add_donor(self, donor, position, mode, name, strength)

    def remove_donor(self, name: str) -> None:
        """Take a donor out of this model and free its memory.

        Args:
            name: The donor's name.

        Raises:
            ConfigurationError: No such donor, or one that replaced layers which were not kept.
        """
        remove_donor(self, name)

    def move_donor(self, name: str, position: int) -> None:
        """Move a donor to another position; no weight is read or copied.

        Args:
            name: The donor's name.
            position: How many recipient layers run before it, 0..L.

        Raises:
            ConfigurationError: No such donor, or a position out of range.
        """
        move_donor(self, name, position)

    def swap_donor(
        self,
        name: str,
        donor: Donor | str,
        *,
        position: int | None = None,
        new_name: str | None = None,
        strength: float | None = None,
    ) -> None:
        """Put another donor in the place of one, in one step.

        Args:
            name: The donor that goes.
            donor: The donor that comes, or its Hub id or folder.
            position: Where it goes; by default where the other was.
            new_name: What to call it; by default as the other.
            strength: By default as the other's.

        Raises:
            ConfigurationError: As for `add_donor` and `remove_donor`.
            CompatibilityError: The donor does not fit.
            CheckpointError: Its weights are malformed.
        """
        swap_donor(self, name, donor, position, new_name, strength)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, thin: bool = False, **kwargs: Any
    ) -> Any:
        """Save the model; see `PreTrainedModel.save_pretrained` for what is not listed.

        Args:
            save_directory: The folder; an old artefact in it is replaced in one step, other files and folders stay. A
                donor whose name a folder of yours has there gets a folder called `donor-` and its number.
            *args: As in Transformers.
            thin: Save the donors and a pinned reference to the recipient instead of every weight.
            **kwargs: As in Transformers; and `license`, which the model card then names. A `README.md` that a person
                wrote or edited is kept.

        Raises:
            ConfigurationError: `thin` where a recipient weight differs from the pinned recipient's; an argument that a
                thin save, or one in the transplant format, cannot honor; or a folder of yours called `recipient` that
                such a save would replace.
        """
        native = functools.partial(super().save_pretrained)  # type: ignore[misc]
        return save_transplant(self, native, save_directory, args, thin, kwargs)

    def push_to_hub(self, repo_id: str, *, thin: bool = False, **kwargs: Any) -> Any:
        """Upload the model as one commit.

        Args:
            repo_id: The repository; made if it does not exist.
            thin: As in `save_pretrained`.
            **kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`, and what
                `save_pretrained` takes.

        Raises:
            ConfigurationError: Another argument.
        """
        if self._transplant is None or (getattr(self, "_hf_peft_config_loaded", False) and not thin):
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[misc]
        native = functools.partial(super().save_pretrained)  # type: ignore[misc]
        return push_transplant(self, native, repo_id, thin, kwargs)

    @classmethod
    def get_init_context(cls, dtype: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """What Transformers builds a model under while it loads one, for this thread alone."""
        return thread_contexts(super().get_init_context(dtype, *args, **kwargs), dtype)  # type: ignore[misc]

    def initialize_weights(self) -> None:
        """Initialize what was not loaded, for this thread alone."""
        initialize(self, native_class(type(self)))  # type: ignore[arg-type]

    def load_adapter(self, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Load an adapter of PEFT; see `PreTrainedModel.load_adapter`."""
        native = super().load_adapter  # type: ignore[misc]
        load = active_loading()
        if load is None or load.model is not self:
            return native(peft_model_id, *args, **kwargs)
        # It lies beside the recipient's weights, and was trained on the recipient's layers.
        refuse_replaced(self, peft_model_id)
        with self.disable_transplants():
            return native(peft_model_id, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        """Transformers' step from files to weights (private there; `tests/test_private_names.py` watches it)."""
        native = native_class(type(model))._load_pretrained_model
        load = active_loading()
        # Adapters are loaded through the same step: only the transplant's own model, and only once.
        if load is None or load.model is not model or model._transplant is not None:
            return native(model, state_dict, checkpoint_files, load_config, expected_keys)
        return load.read(
            model,
            state_dict,
            checkpoint_files,
            load_config,
            lambda tensors, files, config: native(model, tensors, files, config, expected_keys),
        )

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """Transformers' step from weights to a whole model (private there; watched likewise)."""
        native = native_class(type(model))._finalize_model_loading
        load = active_loading()
        if load is None or load.model is not model or model._transplant is not None:
            return native(model, load_config, loading_info)
        load.check_before_finish(loading_info)
        loading_info = native(model, load_config, loading_info)
        load.check_after_finish(loading_info)
        model._transplant = finish(model, load.blueprint)
        return loading_info

    # Layers that do not run now are no children of the model: they are not saved, counted or optimized. What is set on
    # the model meanwhile reaches them all the same, as they come back.

    @property
    def _transplant_aside(self) -> nn.ModuleDict:
        """Layers that the model holds and that do not run now; where `named_modules` says that they are."""
        layers = self._transplant.switch.sidelined() if self._transplant else []
        return nn.ModuleDict({f"layer{number}": layer for number, layer in enumerate(layers)})

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As in torch; and modules of layers that do not run now, where something may be turned on or off in them.

        That are modules with parts: gradient checkpointing is set on layers, and adapters are around weights. Not bare
        weights, so that a search for what to adapt finds only what runs.
        """
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)  # type: ignore[misc]
        for name, layer in self._transplant_aside.items():
            path = ".".join(filter(None, (prefix, _ASIDE, name)))
            parts = layer.named_modules(memo, path, remove_duplicate)
            yield from ((where, module) for where, module in parts if module._modules)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As in torch: those of the layers that run now."""
        yield from (pair for pair in super().named_parameters(*args, **kwargs) if _ASIDE not in pair[0])  # type: ignore[misc]

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """As in torch: those of the layers that run now."""
        yield from (pair for pair in super().named_buffers(*args, **kwargs) if _ASIDE not in pair[0])  # type: ignore[misc]

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Move and cast layers that do not run now too."""
        self._transplant_aside._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Any:
        """As in torch; layers that do not run now too."""
        self._transplant_aside.train(mode)
        return super().train(mode)  # type: ignore[misc]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As in torch; layers that do not run now too."""
        self._transplant_aside.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)  # type: ignore[misc]

    def _record_of_layers(
        self, numbers: Sequence[int], name: str | None
    ) -> tuple[DonorRecord, DonorSpec | None] | None:
        """Say what running layers were built from, for a donor made of them."""
        if self._transplant is None:
            return None
        return record_of_layers(self._transplant, self.layer_map, numbers, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the recipient's class: this one has its name but cannot be found by it."""
        if self._transplant is not None:
            self._transplant.switch.calls.begin_copy()
        return (_new, (native_class(type(self)),), *super().__reduce_ex__(protocol)[2:])


def _new(native: Any) -> Any:
    made = transplant_class(native)
    return made.__new__(made)


@functools.cache
def transplant_class(native: Any) -> Any:
    """Return the transplanted counterpart of a model class.

    It keeps the name and the module of the native class: Transformers tells its own classes by them, and applies
    weight conversions and loss functions to those only.
    """
    if issubclass(native, TransplantMixin):
        return native
    names = {"__module__": native.__module__, "__qualname__": native.__qualname__, "__doc__": native.__doc__}
    found = {name: vars(TransplantMixin).get(name) or getattr(native, name, None) for name in _COUNTED}
    names |= {name: counted(method) for name, method in found.items() if method}
    return type(native.__name__, (TransplantMixin, native), {**names, "__deepcopy__": copied})


def native_class(model_class: Any) -> Any:
    """Return the recipient's own class of a transplanted model's class."""
    # FSDP2 puts a class of its own before a model's; what is native stands behind ours.
    bases = model_class.__mro__
    return bases[bases.index(TransplantMixin) + 1]

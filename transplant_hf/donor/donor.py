"""`Donor`: contiguous decoder layers of some model, on the Hub, in a folder or in memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo
from transformers import PreTrainedModel

from ..config import DonorSpec
from ..display import position_text
from ..errors import CheckpointError, ConfigurationError, IntegrityError
from ..layer_map import Position
from ..numeric import consecutive_layers, shown
from ..sources import HubArguments, HubOptions, Source, locate
from .extract import layers_of_model
from .from_pt import PtTensors, match_pt_file
from .place import recommendation, recommended_in
from .record import DONOR_CONFIG, DonorRecord, without_sha256
from .save import output_folder, push_saved, save_donor
from .tensors import FileTensors, TensorInfo, TensorStore, layer_of, open_donor_files

if TYPE_CHECKING:
    from typing_extensions import Unpack

DONOR_FILES = (DONOR_CONFIG, "donor*.safetensors", "donor.safetensors.index.json", "config.json")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Donor:
    """Contiguous decoder layers, with a record of where they came from.

    Created by `from_pretrained`, `from_model` or `from_pt`. Tensors in files are read when they are needed. A donor
    does not change; `replaced` returns a changed copy.

    Args:
        record: Its record.
        store: Its tensors.
        position: The recommended position, if any; several for a donor that is spread through its recipient.
        mode: The recommended mode, "insert" or "replace".
        strength: The recommended strength.
        source: Where it was read from, if anywhere.
        companions: The recipient whose tokenizer is saved with the donor, if it is on this machine.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        >>> donor = Donor.from_model(model, layers=[1, 2], name="tail")
        >>> donor.num_layers, donor.layer_indices
        (2, [1, 2])
    """

    record: DonorRecord
    store: TensorStore
    _: dataclasses.KW_ONLY
    position: Position | None = None
    mode: str = "insert"
    strength: float = 1.0
    source: Source | None = None
    companions: Source | None = None

    def __post_init__(self) -> None:
        for name, kinds in (("record", DonorRecord), ("source", Source | None), ("companions", Source | None)):
            if not isinstance(getattr(self, name), kinds):
                raise ConfigurationError(f"{name} of a donor cannot be {shown(getattr(self, name))}.")
        place = DonorSpec(str(self), self.position, self.mode, strength=self.strength)  # type: ignore[arg-type]
        vars(self).update(recommendation(place))
        found = {layer_of(name)[0] for name in self.infos()}
        expected = set(range(self.num_layers))
        if found != expected:
            raise CheckpointError(
                f"donor {self}: its record names {self.num_layers} layers ({self.layer_indices}), its weights hold "
                f"layers {sorted(found)}. Missing: {sorted(expected - found)}, unexpected: {sorted(found - expected)}."
            )

    def replaced(self, **changes: Any) -> Donor:
        """Return a copy with other values for some arguments of `Donor`.

        Args:
            **changes: Arguments of `Donor`, such as `position=2`.

        Raises:
            ConfigurationError: No such argument, or a value that it cannot have.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            raise ConfigurationError(f"a donor has no {', '.join(unknown)}; it has {', '.join(known)}.")
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | os.PathLike[str],
        revision: str | None = None,
        subfolder: str | None = None,
        **hub: Unpack[HubArguments],
    ) -> Donor:
        """Open a donor; only headers are read.

        Args:
            repo_or_folder: Hub id or folder.
            revision: Branch, tag or commit.
            subfolder: Folder inside the repo.
            **hub: `token`, `cache_dir`, `local_files_only`, `force_download`, as in `from_pretrained` of Transformers.

        Raises:
            HubError: The repository is missing, gated or private, or the Hub cannot be reached.
            CheckpointError: Files are missing or malformed.
            IntegrityError: A weight file has another size than recorded.
        """
        name, options = os.fspath(repo_or_folder), HubOptions(**hub)
        return cls.open(locate(name, files=DONOR_FILES, revision=revision, subfolder=subfolder, hub=options))

    @classmethod
    def open(cls, source: Source, store: TensorStore | None = None) -> Donor:
        """Open a donor whose files, or their headers, are on this machine.

        Args:
            source: The folder, and the name the donor was asked for by.
            store: Its tensors, if only their headers are on this machine.
        """
        if not (source.folder / DONOR_CONFIG).exists():
            if source.from_hub:
                why = ", or the local cache holds only a part of it. In that case load it once with a connection."
            else:
                pickled = [path.name for path in sorted(source.folder.glob("*.pt"))]
                why = f". `transplant-hf convert` makes a donor from {pickled[0]}." if pickled else "."
            raise CheckpointError(f"{source} is not a donor: it has no {DONOR_CONFIG}{why}")
        record = DonorRecord.read(source.folder)
        if store is None:
            store = _open_files(source, record)
            unrecorded = without_sha256(record, {path.name for path in store.files}, source.from_hub)
            if unrecorded:
                raise IntegrityError(
                    f"{', '.join(unrecorded)} of donor {source} has no sha256 in {DONOR_CONFIG}, so that its bytes "
                    "cannot be checked. Save the donor again with save_pretrained."
                )
        return cls(record, store, **recommended_in(source.folder), source=source)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        layers: Iterable[int],
        name: str | None = None,
        init: str = "copy",
        revision: str | None = None,
    ) -> Donor:
        """Make a donor from layers of a loaded model, sharing its memory.

        Args:
            model: Any decoder-only model, also a transplant; wrappers of torch.compile, DataParallel or PEFT are
                removed.
            layers: Running numbers in ascending order, such as `range(4, 7)`; `[9, 19, 28]` for a donor that is going
                to be spread through its recipient.
            name: The donor's name.
            init: "copy" copies the layers. "identity" sets their output projections to zero in the donor, so that it
                changes nothing until it is trained; the projections are found by running the model on a few tokens.
            revision: The commit that the model was loaded from, for the record. A transplant knows its own; a plain
                model of Transformers does not.

        Returns:
            The donor, with the tensor names and types of the model's checkpoint.

        Raises:
            ConfigurationError: Not a loaded model, or layers that are not in ascending order or do not exist.
            CheckpointError: Weights that are offloaded, quantized or computed from others.
            CompatibilityError: Layers that cannot start as the identity, with the reason.

        Example:
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
            >>> donor = Donor.from_model(model, layers=[1, 2], name="new", init="identity")
            >>> donor.tensors()["layers.0.mlp.c_proj.weight"].any()
            tensor(False)
        """
        record, store, place = layers_of_model(model, layers, name, init, revision)
        return cls(record, store, **recommendation(place))

    @classmethod
    def from_pt(
        cls,
        path: str | os.PathLike[str],
        recipient: str | os.PathLike[str],
        metadata: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        layers: Sequence[int] | None = None,
        name: str | None = None,
        recipient_revision: str | None = None,
        **hub: Unpack[HubArguments],
    ) -> Donor:
        """Open a `.pt` file of decoder layers. Nothing in the file runs.

        The layout is recognized by matching names and shapes of the tensors with the source model: lists of state
        dicts, `{index: state_dict}`, whole models, wrappers and pickled modules can all be read. Only the recipient's
        configuration and tokenizer are fetched.

        Args:
            path: The file.
            recipient: The model the layers came from: Hub id, folder or `config.json`.
            metadata: What the author recorded, or a JSON file with it; by default `donor_metadata.json` beside the
                file, if there is one.
            layers: The layer indices in the source model; by default those that the metadata or the file names.
            name: What to call the donor; by default after the folder or repo it is saved to.
            recipient_revision: The recipient's revision.
            **hub: `token`, `cache_dir`, `local_files_only`, `force_download`, as in `from_pretrained` of Transformers.

        Returns:
            The donor; `position` is the best that the metadata knows, else the first quarter of the recipient.

        Raises:
            CheckpointError: Not a `torch.save` file, damaged, or no such layers in it.
            ConfigurationError: Nothing says which layers they are.
            HubError: The recipient is out of reach.
        """
        found = match_pt_file(path, recipient, metadata, layers, name, recipient_revision, HubOptions(**hub))
        return cls(found.record, found.store, position=found.position, companions=found.recipient)

    @property
    def name(self) -> str | None:
        """The donor's name: the one in its record, else the last part of its folder or repository."""
        known = (self.source.subfolder or self.source.reference) if self.source else ""
        return self.record.name or PurePath(known).name or None

    @property
    def num_layers(self) -> int:
        """K, the number of layers."""
        return len(self.record.layer_indices)

    @property
    def layer_indices(self) -> list[int]:
        """The layers' numbers in the source model."""
        return list(self.record.layer_indices)

    @property
    def metadata(self) -> dict[str, Any]:
        """What the author recorded, unchanged."""
        return dict(self.record.metadata)

    @property
    def model_type(self) -> str:
        """The source model's type."""
        return self.record.model_type

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return shape and type of every tensor, from headers."""
        return self.store.infos()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Read the tensors.

        Returns:
            `{"layers.{i}.{name inside the layer}": tensor}`, i = 0..k-1.

        Raises:
            IntegrityError: The bytes of a weight file differ from its recorded sha256.
        """
        self.verify()
        return {name: part[...] for name, part in self.store.slices().items()}

    def part(self, layers: Sequence[int]) -> Donor:
        """Return some consecutive layers of this donor.

        Args:
            layers: Their numbers in the donor, 0..k-1.

        Raises:
            ConfigurationError: It has no such layers.
        """
        what = f"layers of donor {self}, counted from 0 in the donor,"
        layers = consecutive_layers(layers, what, "[0, 1]", self.num_layers)
        record = dataclasses.replace(
            self.record, layer_indices=tuple(self.record.layer_indices[number] for number in layers)
        )
        return self.replaced(record=record, store=_PartOf(self.store, layers[0], len(layers)))

    def verify(self) -> None:
        """Compare every weight file with its recorded sha256; raise an `IntegrityError` if the bytes differ."""
        for name, stamp in self.record.files.items() if self.source else ():
            stamp.check_bytes(self.source.folder / name, str(self.source))  # type: ignore[union-attr]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        position: Position | None = None,
        recipient: str | None = None,
        recipient_revision: str | None = None,
        max_shard_size: int | str = "5GB",
        license: str | None = None,
        mode: str | None = None,
        strength: float | None = None,
    ) -> None:
        """Save the donor as a repository that `from_pretrained` and `pipeline` can load.

        Args:
            save_directory: The folder; a donor in it is replaced in one step. A `README.md` that a person wrote or
                edited is kept.
            position: The recommended position; by default the donor's. Several, such as `(10, 20, 29)`, spread the
                donor through the recipient, in parts of one size.
            recipient: Its recipient; by default the model that its layers came from.
            recipient_revision: The recipient's revision.
            max_shard_size: The size of the largest weight file.
            license: The license in the card, such as "apache-2.0"; by default the one in the metadata, or in the
                recipient's card if that is on this machine.
            mode: The recommended mode, "insert" or "replace"; by default the donor's.
            strength: The recommended strength; by default the donor's.

        Raises:
            ConfigurationError: No position or no recipient is known, or a strength that is not 1 with "replace".
            IntegrityError: The bytes of a weight file of the donor differ from its recorded sha256.
        """
        about: dict[str, Any] = {"recipient": recipient, "recipient_revision": recipient_revision, "license": license}
        place: dict[str, Any] = {"position": position, "mode": mode, "strength": strength}
        save_donor(self, Path(save_directory), max_shard_size=max_shard_size, **about, **place)

    def push_to_hub(
        self,
        repo_id: str,
        position: Position | None = None,
        *,
        commit_message: str = "Upload donor",
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> CommitInfo:
        """Upload the donor repo as one commit.

        Args:
            repo_id: The repository; created if it does not exist.
            position: As in `save_pretrained`.
            commit_message: Its first line.
            token: As in huggingface_hub.
            private: As in huggingface_hub.
            revision: The branch to push to.
            create_pr: Open a pull request instead.
            **options: The other arguments of `save_pretrained`.

        Raises:
            HubError: The repository is missing, gated or private, or the Hub cannot be reached.
            IntegrityError: The bytes of a weight file of the donor differ from its recorded sha256.
        """
        hub: dict[str, Any] = {"token": token, "private": private, "revision": revision, "create_pr": create_pr}
        with output_folder(None, repo_id) as folder:
            files = save_donor(self, folder, position=position, repo_id=repo_id, **options)
            return push_saved(folder, repo_id, files, commit_message, **hub)

    def __str__(self) -> str:
        file = self.store.path if isinstance(self.store, PtTensors) else None
        return str(self.source or file or self.name or "in memory")

    def __repr__(self) -> str:
        place = "no recommended position" if self.position is None else f"{self.mode} at {position_text(self.position)}"
        source = f", from {self.source}" if self.source else ""
        return f"Donor({self.name!r}, {self.model_type}, layers {self.layer_indices}, {place}{source})"


class _PartOf:
    """Consecutive layers of a donor, numbered from 0."""

    def __init__(self, whole: TensorStore, start: int, count: int) -> None:
        self._whole, self._start, self._count = whole, start, count

    def _only(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        kept = {}
        for name, tensor in tensors.items():
            number, rest = layer_of(name)
            if 0 <= number - self._start < self._count:
                kept[f"layers.{number - self._start}.{rest}"] = tensor
        return kept

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._only(self._whole.infos())

    def slices(self) -> Mapping[str, Any]:
        return self._only(self._whole.slices())


def _open_files(source: Source, record: DonorRecord) -> FileTensors:
    for name, stamp in record.files.items():
        stamp.check_size(source.folder / name, str(source))
    try:
        return open_donor_files(source.folder)
    except CheckpointError:
        # Changed bytes can look like any other fault; the sha256 tells which it is.
        for name, stamp in record.files.items():
            stamp.check_bytes(source.folder / name, str(source))
        raise

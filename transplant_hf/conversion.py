"""`convert`: a `.pt` file of decoder layers, opened, matched, written as a donor repo, compared and published."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .architecture import Anatomy, LayerOrigin, decoder_stack, native_class
from .architecture.build import build_on_meta, initialize
from .architecture.native import splice_config
from .cards import check_license
from .display import bytes_text, numbers_text, position_text, progress_bar
from .donor import Donor
from .donor.from_pt import METADATA_FILE, match_pt_file
from .donor.save import output_folder, push_saved, write_donor_repo
from .donor.saved_files import check_artifact_folder, replaced_in
from .donor.tensors import TensorStore, loaded_dtype
from .errors import CheckpointError, ConfigurationError
from .layer_map import Position, check_position
from .model.in_memory import transplant
from .numeric import is_finite
from .sources import HubArguments, HubOptions, locate
from .storage import files_in, publish

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CHECKPOINTS", "SEEDS", "Conversion", "Seed", "convert", "convert_seeds"]

CHECKPOINTS = "zuraiqi/neural-organ-transplantation-checkpoints"
_WEIGHTS = "donor_layers.pt"
_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of converting a `.pt` file.

    Args:
        source: The file.
        folder: The donor repo; `None` when it was only pushed.
        recipient: The recipient it is meant for, with the commit.
        model_type: The source model's type.
        layer_indices: The donor layers' numbers in the source model.
        position: The recommended position.
        prefix: The part of the file's names before the numbers of the layers.
        dropped: Tensors of the file that belong to no layer of the donor.
        classes: Classes and functions that the file names; none of them was imported or run.
        files: sha256 and size of every weight file.
        verified: Whether a layer was run with the weights of both files.
        commit: The address of the commit, when it was pushed.
    """

    source: str
    folder: str | None
    recipient: str
    model_type: str
    layer_indices: tuple[int, ...]
    position: Position
    prefix: str
    dropped: tuple[str, ...]
    classes: tuple[str, ...]
    files: Mapping[str, Mapping[str, Any]]
    verified: bool
    commit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        size = sum(stamp["size"] for stamp in self.files.values())
        lines = [
            f"{self.source} -> {self.commit or self.folder}",
            f"  {len(self.layer_indices)} layers of {self.recipient} ({self.model_type}): "
            f"{numbers_text(self.layer_indices)}; recommended {position_text(self.position)}",
            f"  {len(self.files)} weight file{'s' if len(self.files) > 1 else ''}, {bytes_text(size)}, equal to the "
            f"file bit for bit{'; layer 0 gives equal outputs' if self.verified else ''}",
        ]
        if self.dropped:
            names = ", ".join(self.dropped[:4]) + (", ..." if len(self.dropped) > 4 else "")
            lines.append(f"  left out, not part of these layers: {len(self.dropped)} tensors ({names})")
        if self.classes:
            lines.append(f"  classes named in the file, not run: {', '.join(self.classes[:4])}")
        return "\n".join(lines)


def convert(
    path: str | os.PathLike[str],
    recipient: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    layers: Sequence[int] | None = None,
    position: Position | None = None,
    name: str | None = None,
    recipient_revision: str | None = None,
    max_shard_size: int | str = "5GB",
    license: str | None = None,
    verify: bool = False,
    push_to: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    **hub: Unpack[HubArguments],
) -> Conversion:
    """Turn a `.pt` file of decoder layers into a donor repo. Nothing in the file runs.

    The written files are read back and compared with the `.pt` file bit for bit before they take their place.

    Args:
        path: The file.
        recipient: The model the layers came from: Hub id, folder or `config.json`.
        output: The folder to write.
        overwrite: Replace what transplant_hf wrote to the output before; without it, an output that is not empty is
            refused, before anything else is done.
        metadata: As in `Donor.from_pt`.
        layers: As in `Donor.from_pt`.
        position: The recommended position; by default the best known one, else the first quarter.
        name: The donor's name; by default that of the folder or repository it is written to.
        recipient_revision: The recipient's revision.
        max_shard_size: Largest weight file.
        license: The license that the card names; by default the one in the metadata, or the recipient's.
        verify: Also run one layer on random hidden states with the weights of both files.
        push_to: A repository to upload to, as one commit.
        private: As in huggingface_hub.
        revision: The branch to push to.
        **hub: `token`, `cache_dir`, `local_files_only`, `force_download`, as in `from_pretrained`.

    Raises:
        CheckpointError: The file is damaged, or holds no such layers.
        ConfigurationError: Unknown layer indices, a position outside 0..L, or an output that is not empty.
        HubError: The recipient or the repository is out of reach.
    """
    if license is not None:
        check_license(license)
    if output is not None:
        check_artifact_folder(output, overwrite)
    matched = match_pt_file(path, recipient, metadata, layers, name, recipient_revision, HubOptions(**hub))
    if position is None:
        position = matched.position
    position = check_position(position, matched.num_layers, recipient=str(matched.recipient))
    donor = Donor(matched.record, matched.store, position=position, companions=matched.recipient)
    commit = None
    with output_folder(output, push_to) as folder:
        with publish(folder, replaced_in) as staging:
            write_donor_repo(donor, staging, folder, max_shard_size=max_shard_size, repo_id=push_to, license=license)
            written = Donor.from_pretrained(staging)
            _compare_tensors(matched.store, written.store, str(path), str(staging))
            if verify:
                _compare_outputs(donor, written)
            files = files_in(staging)
        if push_to is not None:
            message, where = f"Upload donor {donor.name or folder.name}", {"private": private, "revision": revision}
            commit = str(push_saved(folder, push_to, files, message, token=hub.get("token"), **where).commit_url)
    return Conversion(
        source=str(path),
        folder=None if output is None else str(output),
        recipient=str(matched.recipient),
        model_type=matched.record.model_type,
        layer_indices=matched.layout.layers,
        position=position,
        prefix=matched.layout.prefix,
        dropped=matched.layout.dropped,
        classes=matched.classes,
        files={name: dataclasses.asdict(stamp) for name, stamp in written.record.files.items()},
        verified=verify,
        commit=commit,
    )


def _compare_tensors(source: TensorStore, written: TensorStore, source_name: str, written_name: str) -> None:
    """Compare a donor's files with the tensors they were written from, bit for bit."""
    wanted, found = source.slices(), written.slices()
    if set(wanted) != set(found):
        names = sorted(set(wanted) ^ set(found))
        raise CheckpointError(f"{written_name} and {source_name} hold different tensors, first {names[0]!r}.")
    with progress_bar(len(wanted), "Comparing", unit="tensor") as progress:
        for name in sorted(wanted):
            one, other = wanted[name][...], found[name][...]
            same_kind = (one.shape, one.dtype) == (other.shape, other.dtype)
            if not same_kind or not torch.equal(*(bits.reshape(-1).view(torch.uint8) for bits in (one, other))):
                raise CheckpointError(
                    f"{written_name}: {name} differs from that of {source_name}. The disk or the memory may be "
                    "faulty; nothing was kept."
                )
            progress.update()


def _compare_outputs(one: Donor, other: Donor) -> None:
    """Run the first layer of two donors on the same random hidden states."""
    first, second = _first_layer_output(one), _first_layer_output(other)
    if not torch.equal(first, second):
        worst = float((first.float() - second.float()).abs().max())
        raise CheckpointError(
            f"layer 0 of {other} gives other hidden states than that of {one} (largest difference {worst:.3g})."
        )


def _first_layer_output(donor: Donor) -> torch.Tensor:
    """Run a donor's first layer alone, in a model that has no other layer."""
    fields = {**donor.record.source_config, "model_type": donor.model_type}
    fields.pop("quantization_config", None)  # a donor's weights are in full precision
    model_class, config = native_class(AutoModelForCausalLM, AutoConfig.for_model(**fields), str(donor))
    anatomy = Anatomy(model_class, config, f"the source model of donor {donor}")
    model = transplant(_empty_model(anatomy, donor), donor.part([0]), 0, mode="replace")
    outputs: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_stack(model, anatomy.stack_path)[0].register_forward_hook(keep)
    size = config.get_text_config().hidden_size
    hidden = torch.randn(1, _TOKENS, size, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    with torch.no_grad():
        model.base_model(inputs_embeds=hidden, use_cache=False)
    handle.remove()
    if not is_finite(outputs[0]):
        raise CheckpointError(f"layer 0 of {donor} turns random hidden states into NaN or infinity.")
    return outputs[0]


def _empty_model(anatomy: Anatomy, donor: Donor) -> PreTrainedModel:
    """A model with a layer like the donor's first and no other; memory for embeddings is reserved but not touched."""
    spliced = splice_config(anatomy, [LayerOrigin(anatomy, donor.layer_indices[0])])
    if not spliced.native:
        raise ConfigurationError(
            f"layer {donor.layer_indices[0]} of {donor} cannot be run alone ({spliced.reasons[0]}); convert it without "
            "verifying outputs."
        )
    spliced.config.dtype = _main_dtype(donor.part([0]))
    model = build_on_meta(anatomy.model_class, spliced.config).to_empty(device="cpu")
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    large = {id(part.weight) for part in ends if part is not None}
    parameter: Any
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
        if id(parameter) not in large:
            parameter.data.zero_()
    initialize(model, anatomy.model_class)  # the buffers
    model.tie_weights()
    return model.eval()


def _main_dtype(donor: Donor) -> torch.dtype:
    """The type of the largest tensor: some norms are kept in another, and the order of tensors says nothing."""
    dtype = loaded_dtype(max(donor.infos().values(), key=lambda info: info.num_elements).dtype)
    if dtype.itemsize == 1:
        raise ConfigurationError(f"donor {donor}: no layer runs in {dtype}; convert it without verifying outputs.")
    return dtype


@dataclasses.dataclass(frozen=True)
class Seed:
    """One of the author's donors.

    Args:
        folder: Its folder in the author's repository.
        recipient: The model its layers came from.
        layers: Their indices in that model.
        position: The best position that the author found.
        name: The name of the converted donor.
    """

    folder: str
    recipient: str
    layers: tuple[int, ...]
    position: Position
    name: str


SEEDS = (
    Seed("gpt2", "openai-community/gpt2", (4, 5, 6), 1, "not-gpt2"),
    Seed("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", (7, 8, 9), 3, "not-tinyllama"),
    Seed("gptoss", "openai/gpt-oss-20b", (8, 9, 10), 4, "not-gpt-oss-20b"),
)


def convert_seeds(
    output: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] = CHECKPOINTS,
    seeds: Iterable[Seed] = SEEDS,
    revision: str | None = None,
    push_to: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> list[Conversion]:
    """Convert the author's donors into one donor repo each.

    Args:
        output: The folder that receives a folder for each donor.
        source: The author's repository, which is gated, or a folder with its files.
        seeds: Which donors.
        revision: The revision of the author's repository.
        push_to: A user or organization; each donor is pushed to a repository of its own there.
        overwrite: As in `convert`, for each donor.
        **options: `max_shard_size`, `verify`, `private`, and how to reach the Hub, as in `convert`.

    Raises:
        HubError: No access to the repository, or out of reach.
        CheckpointError: A file is missing, or is not what it should be.
    """
    seeds = list(seeds)
    for seed in seeds:  # all of them before any work
        check_artifact_folder(Path(output) / seed.name, overwrite)
    hub = HubOptions.from_kwargs(options)
    conversions = []
    for seed in seeds:
        files = (f"{seed.folder}/{_WEIGHTS}", f"{seed.folder}/{METADATA_FILE}")
        found = locate(os.fspath(source), files=files, revision=revision, hub=hub)
        path = found.folder / seed.folder / _WEIGHTS
        if not path.exists():
            raise CheckpointError(f"{found} has no {files[0]}; the files must be as in {CHECKPOINTS}.")
        donor: dict[str, Any] = {"layers": seed.layers, "position": seed.position, "name": seed.name}
        repo_id = f"{push_to}/{seed.name}" if push_to else None
        place = Path(output) / seed.name
        conversions.append(
            convert(path, seed.recipient, place, push_to=repo_id, overwrite=overwrite, **donor, **options)
        )
    return conversions

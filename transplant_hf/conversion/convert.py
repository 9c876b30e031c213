"""From a `.pt` file to a donor repo: open, match, write, compare with the file, publish."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..display import bytes_text, numbers_text, progress_bar
from ..donor import Donor
from ..donor.deliver import output_folder, push_donor
from ..donor.from_pt import MatchedFile, match_pt_file
from ..donor.save import write_donor_repo
from ..donor.saved_files import check_artifact_folder, replaced_in
from ..donor.tensors import TensorStore
from ..errors import CheckpointError
from ..layer_map import check_position
from ..sources import HubOptions
from ..storage import files_in, publish
from .verify import compare_outputs

__all__ = ["Conversion", "convert"]


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
    position: int
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
            f"{numbers_text(self.layer_indices)}; recommended position {self.position}",
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
    position: int | None = None,
    name: str | None = None,
    recipient_revision: str | None = None,
    max_shard_size: int | str = "5GB",
    verify: bool = False,
    push_to: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
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
        verify: Also run one layer on random hidden states with the weights of both files.
        push_to: A repository to upload to, as one commit.
        private: As in huggingface_hub.
        revision: The branch to push to.
        token: As in `from_pretrained`.
        cache_dir: As in `from_pretrained`.
        local_files_only: As in `from_pretrained`.

    Returns:
        What was written.

    Raises:
        CheckpointError: The file is damaged, or holds no such layers.
        ConfigurationError: Unknown layer indices, a position outside 0..L, or an output that is not empty.
        HubError: The recipient or the repository is out of reach.
    """
    if output is not None:
        check_artifact_folder(output, overwrite)
    hub = HubOptions(token, cache_dir, local_files_only)
    matched = match_pt_file(path, recipient, metadata, layers, name, recipient_revision, hub)
    if position is None:
        position = matched.position
    position = check_position(position, matched.num_layers, recipient=str(matched.recipient))
    donor = Donor(matched.record, matched.store, position=position, companions=matched.recipient)
    commit = None
    with output_folder(output, push_to) as folder:
        with publish(folder, replaced_in) as staging:
            write_donor_repo(donor, staging, folder, max_shard_size=max_shard_size, repo_id=push_to)
            written = Donor.from_pretrained(staging)
            compare_tensors(matched.store, written.store, str(path), str(staging))
            if verify:
                compare_outputs(donor, written)
            files = files_in(staging)
        if push_to is not None:
            message, where = f"Upload donor {donor.name or folder.name}", {"private": private, "revision": revision}
            commit = str(push_donor(folder, push_to, files, message, token=token, **where).commit_url)
    conversion = _conversion(path, matched, written, verify)
    return dataclasses.replace(conversion, folder=None if output is None else str(output), commit=commit)


def _conversion(path: str | os.PathLike[str], matched: MatchedFile, written: Donor, verified: bool) -> Conversion:
    assert written.position is not None
    return Conversion(
        source=str(path),
        folder=None,
        recipient=str(matched.recipient),
        model_type=matched.record.model_type,
        layer_indices=matched.layout.layers,
        position=written.position,
        prefix=matched.layout.prefix,
        dropped=matched.layout.dropped,
        classes=matched.classes,
        files={name: dataclasses.asdict(stamp) for name, stamp in written.record.files.items()},
        verified=verified,
    )


def compare_tensors(source: TensorStore, written: TensorStore, source_name: str, written_name: str) -> None:
    """Compare a donor's files with the tensors they were written from, bit for bit."""
    wanted, found = source.slices(), written.slices()
    if set(wanted) != set(found):
        names = sorted(set(wanted) ^ set(found))
        raise CheckpointError(f"{written_name} and {source_name} hold different tensors, first {names[0]!r}.")
    with progress_bar(len(wanted), "Comparing", unit="tensor") as progress:
        for name in sorted(wanted):
            if not _same_bits(wanted[name][...], found[name][...]):
                raise CheckpointError(
                    f"{written_name}: {name} has other bits than in {source_name}. The disk or the memory may be "
                    "faulty; nothing was kept."
                )
            progress.update()


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    same_kind = (one.shape, one.dtype) == (other.shape, other.dtype)
    return same_kind and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))

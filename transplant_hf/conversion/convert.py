"""From a `.pt` file to a donor repo: read as a stream, checked on both sides, published whole or not at all."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..donor import Donor
from ..donor.deliver import deliver
from ..donor.from_pt import OpenedPt, open_pt
from ..donor.save import save_donor
from ..donor.saved_files import check_artifact_folder
from ..layer_map import check_position
from ..sources import HubOptions
from ..storage import files_in
from .readback import compare_tensors
from .verify import compare_outputs

__all__ = ["Conversion", "convert"]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What became of a `.pt` file.

    Args:
        source: The file.
        folder: The donor repo; `None` when it was only pushed.
        recipient: What it is made for, with the commit.
        model_type: The source model's type.
        layer_indices: The donor layers' numbers in it.
        position: The recommended position.
        prefix: What stands before the layers' numbers in the file.
        dropped: Tensors of the file that belong to no layer of the donor.
        classes: Pickled classes in the file, of which nothing was run.
        files: sha256 and size of every weight file.
        verified: Whether a layer was run with the weights of both files.
        commit: Where it was pushed to.
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
        """The fields, for JSON."""
        return {**dataclasses.asdict(self), "files": {name: dict(stamp) for name, stamp in self.files.items()}}

    def __str__(self) -> str:
        size = sum(stamp["size"] for stamp in self.files.values())
        lines = [
            f"{self.source} -> {self.commit or self.folder}",
            f"  {len(self.layer_indices)} layers of {self.recipient} ({self.model_type}): "
            f"{', '.join(map(str, self.layer_indices))}; recommended position {self.position}",
            f"  {len(self.files)} weight file{'s' if len(self.files) > 1 else ''}, {size:,} bytes, read back and equal "
            f"bit for bit{'; layer 0 gives equal outputs' if self.verified else ''}",
        ]
        if self.dropped:
            shown = ", ".join(self.dropped[:4]) + (", ..." if len(self.dropped) > 4 else "")
            lines.append(f"  left out, no part of these layers: {len(self.dropped)} tensors ({shown})")
        if self.classes:
            lines.append(f"  pickled classes, not run: {', '.join(self.classes[:4])}")
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
    """Convert a `.pt` file into a donor repo, in a folder, on the Hub, or both.

    Nothing is unpickled, memory stays small whatever the file's size, and the result takes its place only after it
    was read back and found equal to the file bit for bit.

    Args:
        path: The file.
        recipient: The model its layers came from: Hub id, folder or `config.json`.
        output: The folder to write.
        overwrite: Replace what transplant_hf wrote to the output before; without it, an output that is not empty is
            refused, before anything else is done.
        metadata: As in `Donor.from_pt`.
        layers: The same.
        position: The recommended position; by default the best known one, else the first quarter.
        name: What to call the donor; by default after the folder or repository it is written to.
        recipient_revision: The recipient's revision.
        max_shard_size: Largest weight file.
        verify: Also run one layer on random hidden states with the weights of both files.
        push_to: A repository to upload to, as one commit.
        private: As in huggingface_hub.
        revision: The branch to push to.
        token: As in `from_pretrained`.
        cache_dir: The same.
        local_files_only: The same.

    Returns:
        What was done.

    Raises:
        CheckpointError: The file is damaged, or holds no such layers.
        ConfigurationError: Unknown layer indices, a position outside 0..L, or an output that is not empty.
        HubError: The recipient or the repository is out of reach.
    """
    if output is not None:
        check_artifact_folder(output, overwrite)
    opened = open_pt(
        path, recipient, metadata, layers, name, recipient_revision, HubOptions(token, cache_dir, local_files_only)
    )
    if position is not None:
        position = check_position(position, opened.num_layers, recipient=str(opened.recipient))
    donor = Donor(opened.record, opened.store, position=opened.position, companions=opened.recipient)

    names: set[str] = set()
    written: list[Donor] = []

    def check(folder: Path) -> None:
        names.update(files_in(folder))
        written.append(Donor.from_pretrained(folder))
        compare_tensors(donor.store, written[0].store, str(path), str(folder))
        if verify:
            compare_outputs(donor, written[0])

    def write(target: Path) -> set[str]:
        save_donor(donor, target, position, None, None, max_shard_size, push_to, check)
        return names

    folder, commit = deliver(write, output, push_to, donor.name, token=token, private=private, revision=revision)
    return dataclasses.replace(_report(path, opened, written[0], verify), folder=folder, commit=commit)


def _report(path: str | os.PathLike[str], opened: OpenedPt, written: Donor, verified: bool) -> Conversion:
    assert written.position is not None
    return Conversion(
        source=str(path),
        folder=None,
        recipient=str(opened.recipient),
        model_type=opened.record.model_type,
        layer_indices=opened.layout.layers,
        position=written.position,
        prefix=opened.layout.prefix,
        dropped=opened.layout.dropped,
        classes=opened.classes,
        files={name: dataclasses.asdict(stamp) for name, stamp in written.record.files.items()},
        verified=verified,
    )

"""The three donors of the paper's author: what they were made from, and their conversion."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..donor.from_pt import METADATA_FILE
from ..donor.saved_files import check_artifact_folder
from ..errors import CheckpointError
from ..sources import HubOptions, locate
from .convert import Conversion, convert

__all__ = ["CHECKPOINTS", "SEEDS", "Seed", "convert_seeds"]

CHECKPOINTS = "zuraiqi/neural-organ-transplantation-checkpoints"
_WEIGHTS = "donor_layers.pt"


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
    position: int
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
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
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
        token: As in `from_pretrained`.
        cache_dir: As in `from_pretrained`.
        local_files_only: As in `from_pretrained`.
        overwrite: As in `convert`, for each donor.
        **options: `max_shard_size`, `verify` and `private`, as in `convert`.

    Returns:
        What was written, for each donor.

    Raises:
        HubError: No access to the repository, or out of reach.
        CheckpointError: A file is missing, or is not what it should be.
    """
    seeds = list(seeds)
    for seed in seeds:  # all of them before any work
        check_artifact_folder(Path(output) / seed.name, overwrite)
    hub = HubOptions(token, cache_dir, local_files_only)
    options |= {"overwrite": overwrite, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    conversions = []
    for seed in seeds:
        files = (f"{seed.folder}/{_WEIGHTS}", f"{seed.folder}/{METADATA_FILE}")
        found = locate(os.fspath(source), files=files, revision=revision, hub=hub)
        path = found.folder / seed.folder / _WEIGHTS
        if not path.exists():
            raise CheckpointError(f"{found} has no {files[0]}; the files must be as in {CHECKPOINTS}.")
        conversion = convert(
            path,
            seed.recipient,
            Path(output) / seed.name,
            layers=seed.layers,
            position=seed.position,
            name=seed.name,
            push_to=f"{push_to}/{seed.name}" if push_to else None,
            **options,
        )
        conversions.append(conversion)
    return conversions

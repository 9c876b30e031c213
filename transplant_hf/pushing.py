"""`push`: what was saved in a folder, checked and uploaded as one commit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from .cards import CARD_FILE, TERMS, name_in_card
from .config import TransplantConfig
from .display import progress_bar
from .donor import Donor
from .donor.companions import code_named_in, companions_in
from .donor.entry import read_entry
from .donor.saved_files import recorded_files, refuse_references_outside, replaced_among
from .donor.tensors import FileTensors, read_shard_index
from .errors import CheckpointError, ConfigurationError
from .hub import push_folder
from .numeric import is_finite
from .sources import Source, points_to_folder
from .storage import files_in

__all__ = ["Push", "push"]

_CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".bin")


@dataclasses.dataclass(frozen=True)
class Push:
    """What was uploaded.

    Args:
        folder: The folder on this machine.
        kind: "donor", "transplant" or "model".
        repo_id: The repository.
        commit: The commit's id.
        url: Its page; for a pull request, that of the pull request.
        tensors: How many tensors were checked.
        size: Their bytes.
        files: The uploaded files: their sizes by their paths in the repository.
        left_out: What else is in the folder and was not uploaded; a folder ends in `/`.
    """

    folder: str
    kind: str
    repo_id: str
    commit: str
    url: str
    tensors: int
    size: int
    files: Mapping[str, int]
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        files = [{"name": name, "size": size} for name, size in self.files.items()]
        return {**dataclasses.asdict(self), "files": files}

    def __str__(self) -> str:
        return f"{self.folder}: a {self.kind}, {self.tensors} tensors, {self.size:,} bytes, all finite\n{self.url}"


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    to_revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    on_files: Callable[[Mapping[str, int], Sequence[str]], None] | None = None,
) -> Push:
    """Check a saved donor, transplant or exported model and upload it as one commit.

    Before anything is sent, every weight is read: donors must have their recorded sha256, no weight may be NaN or
    infinite, and nothing may refer to a folder that only this machine has. Only the files of what was saved are
    uploaded, with tokenizer, card and license. Files that the repository has already are not sent again, and files of
    an earlier save in it are removed. A card that transplant_hf wrote is changed: its examples load the repository.

    Args:
        folder: The folder.
        repo_id: The repository; created if it does not exist.
        private: As in huggingface_hub.
        to_revision: The branch to push to; created if it does not exist.
        create_pr: Open a pull request instead.
        commit_message: The first line of the commit message.
        token: As in huggingface_hub.
        on_files: Called before anything is sent, with the sizes of the files by their paths, and with the names of
            what is left out.

    Returns:
        What was uploaded, and where it is.

    Raises:
        ConfigurationError: There is no such folder, nothing was saved in it, it refers to another folder on this
            machine, or one of the files is a link.
        CheckpointError: Weights that are missing, malformed or not finite.
        IntegrityError: The sha256 of a donor file is not the recorded one.
        HubError: The repository is missing, gated or private, or the Hub cannot be reached.
    """
    place = Path(folder).expanduser()
    if not (place / _CONFIG).is_file():
        what = "not a folder" if not place.is_dir() else "not a saved donor, transplant or model: it has no config.json"
        raise ConfigurationError(f"{folder} is {what}. Name a folder that save_pretrained or `export` wrote.")
    kind = _check_references(place)
    tensors, size = _check_weights(place)
    name_in_card(place / CARD_FILE, repo_id)
    files, left_out = _files_to_upload(place)
    if on_files is not None:
        on_files(files, left_out)
    commit: CommitInfo = push_folder(
        place,
        repo_id,
        only=files.keys(),
        commit_message=commit_message or f"Upload {kind} {place.resolve().name}",
        token=token,
        private=private,
        revision=to_revision,
        create_pr=create_pr,
        replaced=replaced_among,
    )
    url = str(commit.pr_url or commit.commit_url)
    return Push(str(folder), kind, repo_id, str(commit.oid), url, tensors, size, files, left_out)


def _files_to_upload(folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the sizes of the files that belong to what was saved in a folder, and the names of all other files."""
    code = code_named_in(folder, [folder / _CONFIG])
    wanted = recorded_files(folder) | companions_in(folder) | code | {*TERMS, CARD_FILE}
    present = files_in(folder)
    sent = {name: (folder / name).lstat().st_size for name in sorted(wanted & present)}
    others = sorted(present - set(sent))
    folders = {name.partition("/")[0] for name in sent if "/" in name}
    # A folder of which nothing is sent is named once.
    names = (name if (top := name.partition("/")[0]) in folders or top == name else f"{top}/" for name in others)
    return sent, tuple(dict.fromkeys(names))


def _check_references(folder: Path) -> str:
    """Say what kind of save is in a folder, and check what its configuration refers to."""
    fields = read_entry(folder)
    if fields is None:
        return "model"
    config = TransplantConfig(**{**fields, "name_or_path": str(folder)})
    source = Source(str(folder), folder)
    refuse_references_outside(folder)
    for spec in config.donors:
        donor = folder if spec.donor == "." else points_to_folder(spec.donor, source, spec.revision)
        if donor is not None:
            place = donor / (spec.subfolder or "")
            Donor.open(Source(str(place), place)).verify()
    recipient = points_to_folder(str(config.recipient), source, config.recipient_revision)
    alone = recipient is None and [spec.donor for spec in config.donors] == ["."]
    return "donor" if alone else "transplant"


def _check_weights(folder: Path) -> tuple[int, int]:
    """Read every weight file of what was saved in a folder; return the number of its tensors, and their bytes."""
    names = recorded_files(folder)
    for index in (name for name in names if name.endswith(".index.json")):
        shards = read_shard_index(folder / index).values()
        missing = [name for name in sorted(set(shards)) if Path(index).with_name(name).as_posix() not in names]
        if missing:
            raise CheckpointError(f"{folder / index} names {missing[0]}, which is missing.")
    files = sorted(name for name in names if name.endswith(_WEIGHTS))
    if not files:
        raise CheckpointError(f"{folder} holds no weights that its records name.")
    count = size = 0
    with progress_bar(sum((folder / name).stat().st_size for name in files), "Checking weights") as bar:
        for path in (folder / name for name in files):
            if path.suffix != ".safetensors":
                raise CheckpointError(f"{path} is not in safetensors format. Load the model, save it again, push that.")
            for name, part in FileTensors([path]).slices().items():
                tensor = part[...]
                if not is_finite(tensor):
                    raise CheckpointError(f"{name} in {path} holds NaN or infinity; nothing was uploaded.")
                count, size = count + 1, size + tensor.nbytes
                bar.update(tensor.nbytes)
    return count, size


def push_artefact(folder: Any, repo_id: str, *, revision: str | None = None, **options: Any) -> Push:
    """The old name of `push`, for one release; `revision` is now `to_revision`."""
    return push(folder, repo_id, to_revision=revision, **options)

"""The recipient's checkpoint: which files it is in, opened by their headers."""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePosixPath
from typing import Any

from ..archive import PtFile
from ..donor.dtypes import stored_dtype
from ..donor.tensors import TensorInfo
from ..errors import CheckpointError
from ..sources import HubOptions, Source, locate
from ..splice import open_checkpoint
from ..storage import read_json

__all__ = ["StoredTensor", "open_recipient"]

_INDEX = ".index.json"
# As Transformers looks for them: files that cannot run code come first.
_FORMS = (
    ("model.safetensors", f"model.safetensors{_INDEX}"),
    ("pytorch_model.bin", f"pytorch_model.bin{_INDEX}"),
)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file.

    Args:
        info: Its shape and type.
        part: Reads it, by `[...]` or slices of its first dimension.
        origin: Which file, and under which name, for messages.
    """

    info: TensorInfo
    part: Any
    origin: str


def open_recipient(reference: str, revision: str | None, named: str | None, hub: HubOptions) -> dict[str, StoredTensor]:
    """Open a model's weights by their headers; what is not on this machine yet is downloaded.

    Args:
        reference: Hub id or folder.
        revision: Its commit.
        named: The weight file or index that its configuration names, if it names one.
        hub: How to reach the Hub.

    Returns:
        Its tensors, by the names they have in its checkpoint.

    Raises:
        CheckpointError: No weights, a malformed index, or a file that is not whole.
        HubError: Out of reach.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_files(reference, revision, named, hub):
        opened = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
        twice = sorted(tensors.keys() & opened.keys())
        if twice:
            raise CheckpointError(f"tensor {twice[0]!r} is in two files of {reference}, one of them {path}.")
        tensors |= opened
    return tensors


def _weight_files(reference: str, revision: str | None, named: str | None, hub: HubOptions) -> list[Path]:
    forms = (((named, named),) if named else ()) + _FORMS
    for names in forms:
        # The configuration comes first: it is there, so that a cache without a connection is not taken for empty.
        source = locate(reference, files=("config.json", *names), revision=revision, hub=hub)
        for name in names:
            if (source.folder / name).exists():
                return _shards(source, name, hub) if name.endswith(_INDEX) else [source.folder / name]
    wanted = ", ".join(dict.fromkeys(name for form in forms for name in form))
    raise CheckpointError(f"{source} has no weights that can be read: looked for {wanted} in {source.folder}.")


def _shards(source: Source, index: str, hub: HubOptions) -> list[Path]:
    path = source.folder / index
    weight_map = read_json(path, "the recipient's shard index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map.")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        raise CheckpointError(f"{path} names {outside[0]!r}, which lies outside its folder.")
    found = locate(source.reference, files=("config.json", *names), revision=source.revision, hub=hub)
    missing = [name for name in names if not (found.folder / name).exists()]
    if missing:
        raise CheckpointError(f"{found} lacks {missing[0]}, which {index} names.")
    return [found.folder / name for name in names]


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    tensors, _ = open_checkpoint([str(path)], None, True)
    return {
        name: StoredTensor(TensorInfo(tuple(part.get_shape()), part.get_dtype(), path, name), part, f"{name} in {path}")
        for name, part in tensors.items()
    }


def _open_pickle(path: Path) -> dict[str, StoredTensor]:
    """Open a file of `torch.save`; nothing is unpickled, and tensors are read as they are needed."""
    file = PtFile(path)
    found = {}
    for name, ref in file.tensors.items():
        file.region(name)  # refuses a tensor that claims more than the file holds
        info = TensorInfo(tuple(ref.shape), stored_dtype(ref.dtype, name), path, name)
        found[name] = StoredTensor(info, file[name], f"{name} in {path}")
    return found

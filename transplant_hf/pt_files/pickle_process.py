"""The program of the child process that reads the pickle of a `.pt` file. It needs the standard library alone.

Python's own unpickler reads the pickle, and every class or function that the pickle names is an inert class: nothing is
imported, and nothing real can be called. The operating system limits memory and processor time, and a crash ends only
this process. What goes back is JSON: names, shapes, places in the file and plain values.

Why not torch.load(weights_only=True): `safe_globals`, which pickled modules need, is a list of the whole process, and
nothing bounds the memory and the time that a hostile pickle takes.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple, NoReturn

_ZIP_START = b"PK\x03\x04"
_MAX_PICKLE_BYTES = 1 << 26
_MAX_ANSWER_BYTES = 1 << 26
_MAX_STEPS = 1 << 21
_MAX_DEPTH = 64
_MAX_NAME = 4096
_MAX_CLASSES = 10_000
_MAX_CLASS_NAME = 500
_MAX_COUNT = 1 << 62
_MAX_BITS = 4096  # Python refuses to print longer numbers
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_TENSORS = {
    "torch._utils._rebuild_tensor": 4,
    "torch._utils._rebuild_tensor_v2": 6,
    "torch._utils._rebuild_tensor_v3": 7,
}
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_SETS = ("builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset")
# What plain files name: not worth a mention among the pickled classes.
_USUAL = {"collections.OrderedDict", "collections.defaultdict", "torch.Size", "torch.device", _SUBCLASS}
_USUAL |= {*_PARAMETERS, *_TENSORS, *_SETS}
_USUAL_TYPES = re.compile(r"torch\.(storage\.|cuda\.)?(\w+Storage|bool|b?float\w+|u?int\d+|complex\d+)")


class Inert:
    """An object of a class that was not imported: its arguments, its state and its items, and no behavior."""

    made_of = ""

    def __new__(cls, *args: Any, **_: Any) -> Inert:
        """Keep the arguments; pickles call this, with and without `__init__`."""
        self = object.__new__(cls)
        self.args, self.state, self.items = args, None, []
        return self

    args: tuple[Any, ...]
    state: Any
    items: list[tuple[Any, Any]]

    def __call__(self, *_: Any) -> Inert:
        """Stand for the result of calling it."""
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, item: Any) -> None:
        """Keep an item of a list or a set."""
        self.items.append((len(self.items), item))

    add = append

    def extend(self, items: Iterable[Any]) -> None:
        """Keep items of a list."""
        for item in items:
            self.append(item)


class Storage(NamedTuple):
    """The description of a storage: its name in the file, its torch class and its number of elements."""

    key: str
    kind: str
    elements: int


class InertUnpickler(pickle.Unpickler):
    """Python's unpickler, to which every class and function is an inert class."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.classes: dict[str, type[Inert]] = {}
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return an inert class; nothing is imported."""
        full = f"{module}.{name}"
        if full not in self.classes:
            if len(self.classes) >= _MAX_CLASSES or len(full) > _MAX_CLASS_NAME or not full.isprintable():
                refuse(f"names too many classes, or one that cannot be shown: {full[:80]!r}; no donor does.")
            self.classes[full] = type("Inert", (Inert,), {"made_of": full})
        return self.classes[full]

    def persistent_load(self, pid: Any) -> Any:
        """Describe the storage of a tensor; old files name the classes of modules here too."""
        what, kind, *rest = pid
        if what == "module":
            return kind
        key, _, elements, *view = rest
        if what != "storage" or any(part is not None for part in view):
            refuse("holds views of storages, as torch before 0.4 wrote them. Load it there and save it again.")
        if not isinstance(key, str) or len(key) > _MAX_NAME:
            raise ValueError("a storage has no name")
        storage = Storage(key, kind.made_of.rpartition(".")[2], _count(elements))
        return self.storages.setdefault(storage.key, storage)


def refuse(reason: str) -> NoReturn:
    """End the process; `reason` goes on after the path of the file."""
    answer({"refused": reason})


def answer(content: dict[str, Any]) -> NoReturn:
    """Write the answer and end the process, without the time that freeing the objects would take."""
    data = json.dumps(content)
    if len(data) > _MAX_ANSWER_BYTES:
        data = json.dumps({"refused": "holds more names and values than any donor does. Save the layers alone."})
    sys.stdout.write(data)
    sys.stdout.flush()
    os._exit(0)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX_COUNT:
        raise ValueError("a tensor or storage has an impossible size")
    return value


class Tree:
    """Tensors and plain values under dotted names; the same object may be in many places, itself included."""

    def __init__(self) -> None:
        self.tensors: dict[str, tuple[Any, ...]] = {}
        self.values: dict[str, Any] = {}
        self._steps = 0

    def walk(self, value: Any, name: str = "", depth: int = 0) -> None:
        """Collect what is in `value`."""
        self._steps += 1 + len(name) // 16
        if depth > _MAX_DEPTH or len(name) > _MAX_NAME or self._steps > _MAX_STEPS:
            refuse(f"is nested too deeply or without end, at {name[:80]!r}; no donor is. Save the state dicts alone.")
        tensor = _tensor(value)
        if tensor is not None:
            self._add_tensor(name, tensor)
        elif isinstance(value, str | int | float | None) or _is_plain_list(value):
            self._add_value(name, value)
        else:
            for key, child in _children(value):
                self._steps += 1
                if isinstance(key, str | int) and (isinstance(key, str) or key.bit_length() < 64):
                    self.walk(child, f"{name}.{key}" if depth else str(key), depth + 1)

    def _add_tensor(self, name: str, tensor: tuple[Any, ...]) -> None:
        if not name.isprintable():
            refuse(f"holds a tensor whose name cannot be printed: {name[:80]!r}. Save it under another name.")
        if self.tensors.setdefault(name, tensor) != tensor:
            refuse(f"holds two tensors named {name!r}; save the file again with one.")

    def _add_value(self, name: str, value: Any) -> None:
        items = list(value) if isinstance(value, list | tuple) else [value]
        self._steps += len(items)
        bits = max((item.bit_length() for item in items if isinstance(item, int)), default=0)
        if bits > _MAX_BITS:
            refuse(f"holds a number of {bits} bits, named {name[:80]!r}; no donor does.")
        self.values[name] = items if isinstance(value, list | tuple) else value


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str | int | float | None) for item in value)


def _children(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Inert):
        state = value.state
        is_module = isinstance(state, dict) and isinstance(state.get("_modules"), dict)
        return _in_module(state) if is_module else value.items
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()


def _in_module(state: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """What `nn.Module.state_dict` would hold: parameters, buffers that are saved, and submodules."""
    unsaved = state.get("_non_persistent_buffers_set")
    if isinstance(unsaved, Inert) and unsaved.made_of in _SETS:
        unsaved = unsaved.args[0] if unsaved.args else ()
    for part in ("_parameters", "_buffers", "_modules"):
        members = state.get(part)
        for key, child in _children(members if isinstance(members, dict | Inert) else {}):
            if child is not None and not (part == "_buffers" and isinstance(unsaved, set | list) and key in unsaved):
                yield key, child


def _tensor(value: Any) -> tuple[Any, ...] | None:
    """The description of a tensor, or `None` for anything else."""
    while isinstance(value, Inert):
        if value.made_of in _PARAMETERS:
            value = value.args[0]
        elif value.made_of == _SUBCLASS:
            build, _, args, *_ = value.args
            if not (isinstance(build, type) and issubclass(build, Inert) and build.made_of in _TENSORS):
                return None
            value = build(*args)
        elif value.made_of in _TENSORS:
            return _described(*value.args, metadata_at=_TENSORS[value.made_of] - 4)
        else:
            return None
    return None


def _described(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any, metadata_at: int) -> tuple[Any, ...]:
    if rest[metadata_at:] and rest[metadata_at]:
        refuse("holds a tensor that is a negated or conjugated view; save it with .resolve_neg().resolve_conj()")
    if not isinstance(storage, Storage) or len(shape) != len(stride) or len(shape) > _MAX_DEPTH:
        raise ValueError("a tensor's description is malformed")
    dtype = rest[2].made_of if metadata_at == 3 else None
    return *storage, dtype, _count(offset), tuple(map(_count, shape)), tuple(map(_count, stride))


def _read_zip(file: BinaryIO) -> tuple[Any, dict[str, type[Inert]], dict[str, Any]]:
    archive = zipfile.ZipFile(file)
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.orig_filename
        if name in members:
            refuse(f"has two members named {name[:80]!r}. Get the file again from its author.")
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            refuse(f"has a compressed member {name[:80]!r}; torch.save compresses none. Save it again with torch.save.")
        members[name] = member
    roots = {name.partition("/")[0] for name in members}
    root = roots.pop() if len(roots) == 1 else ""
    pickled = members.get(f"{root}/data.pkl")
    if pickled is None:
        kind = "a TorchScript archive" if f"{root}/constants.pkl" in members else "a zip archive of another kind"
        refuse(f"is {kind}: torch.save writes a folder with a data.pkl. Save the state dicts with torch.save.")
    if pickled.file_size > _MAX_PICKLE_BYTES:
        refuse(f"has a data.pkl of {pickled.file_size} bytes; at most {_MAX_PICKLE_BYTES} are read.")
    order = members.get(f"{root}/byteorder")  # torch writes it since 2.1
    if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
        refuse("was not written in little-endian byte order. Save it again on a little-endian machine.")
    unpickler = InertUnpickler(io.BytesIO(archive.read(pickled)))
    content = unpickler.load()
    storages = {
        name.removeprefix(f"{root}/data/"): [_data_start(file, member), member.file_size, member.CRC]
        for name, member in members.items()
        if name.startswith(f"{root}/data/")
    }
    return content, unpickler.classes, {"storages": storages}


def _data_start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin: after its header, whose name and extra field have lengths of their own."""
    file.seek(member.header_offset)
    header = file.read(30)
    if len(header) < 30 or not header.startswith(_ZIP_START):
        refuse(f"has no member {member.orig_filename[:80]!r} where its directory says. Get the file again.")
    return member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _read_legacy(file: BinaryIO) -> tuple[Any, dict[str, type[Inert]], dict[str, Any]]:
    """Read a file from before torch 1.6: pickles in a row, then each storage after its number of elements."""
    _magic, _protocol, system = (InertUnpickler(file).load() for _ in range(3))
    if system.get("little_endian") is not True:
        refuse("was not written in little-endian byte order. Save it again on a little-endian machine.")
    unpickler = InertUnpickler(file)
    content = unpickler.load()
    storages = [unpickler.storages[key] for key in InertUnpickler(file).load()]
    return content, unpickler.classes, {"legacy_storages": storages, "legacy_start": file.tell()}


def _limit(memory: int, seconds: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits; the parent's timeout remains
        return
    for kind, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds)):
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # macOS does not limit address space
            continue


def main(path: str, memory: str, seconds: str) -> None:
    """Describe the file `path` on standard output."""
    _limit(int(memory), int(seconds))
    with open(path, "rb") as file:
        read = _read_zip if file.read(4) == _ZIP_START else _read_legacy
        file.seek(0)
        content, classes, places = read(file)
    tree = Tree()
    tree.walk(content)
    named = sorted(name for name in classes if name not in _USUAL and not _USUAL_TYPES.fullmatch(name))
    answer({"tensors": tree.tensors, "values": tree.values, "classes": named, **places})


if __name__ == "__main__":
    main(*sys.argv[1:])

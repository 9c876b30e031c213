"""Small files that would take much time or memory are refused, or read, in little of both."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import pytest

from tests.archive.crafted import long_of, pickled_file, tensor_code, text
from tests.helpers import run_python

READ_ALL = """
import json, resource, signal, sys, time
from pathlib import Path
from transplant_hf import CheckpointError
from transplant_hf.archive import PtFile

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), -1))
signal.alarm(300)
for path in sorted(Path(sys.argv[1]).iterdir()):
    began = time.process_time()
    try:
        file = PtFile(path)
        for name in file.tensors:
            file[name][0:1]
        said = "read"
    except CheckpointError as error:
        said = str(error)
    seconds = time.process_time() - began
    print(json.dumps({"name": path.name, "said": said, "seconds": seconds}), flush=True)
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def wide(count: int, item: bytes = b"N") -> bytes:
    """A list of one thing many times, kept as number 0."""
    return b"](" + item * count + b"eq\x00"


def laughing(leaf: bytes, twice: bytes, levels: int = 60) -> bytes:
    """A thing that holds a thing twice, and so on."""
    return leaf + b"".join(twice for _ in range(levels))


PAIR = b"2\x86"  # what is there, again, both in a tuple
LIST = b"q\x010](h\x01h\x01e"
DICT = b"q\x010}(" + text("a") + b"h\x01" + text("b") + b"h\x01u"
TORCH_SIZE, ORDERED = b"ctorch\nSize\n", b"ccollections\nOrderedDict\n"

BOMBS = {
    "a giant place in the memo": b"Nr\xff\xff\xff\xff",
    "places in the memo": b"N" + b"\x94" * ((1 << 22) + 9),
    "bytes of a giant length": b"\x8e" + struct.pack("<Q", 1 << 45) + b"x",
    "changeable bytes of a giant length": b"\x96" + struct.pack("<Q", 1 << 45) + b"x",
    "changeable bytes of a great length": b"\x96" + struct.pack("<Q", 1 << 34) + b"x",
    "text of a giant length": b"\x8d" + struct.pack("<Q", 1 << 45) + b"x",
    "a number of a giant length": b"\x8b\xff\xff\xff\x7fx",
    "a frame of a giant length": b"\x95" + struct.pack("<Q", 1 << 45) + b"N",
    "lists in lists": b"]" * 500_000 + b"a" * 499_999,
    "tuples in tuples": b")" + b"\x85" * 500_000,
    "a list that holds itself": b"]q\x00h\x00a",
    "a dictionary that holds itself": b"}q\x00" + text("a") + b"h\x00s",
    "an object that holds itself": b"cx\nY\n)\x81q\x00}" + text("_modules") + b"}" + text("a") + b"h\x00ssb",
    "laughing lists": laughing(b"G" + bytes(8), LIST),
    "laughing empty lists": laughing(b"]", LIST),
    "laughing dictionaries": laughing(b"}", DICT),
    "laughing tuples": laughing(b")", PAIR),
    "laughing tensors": laughing(tensor_code(), LIST, 30),
    "a laughing key": b"}" + laughing(b")", PAIR) + b"Ns",
    "a laughing key of many": b"}(" + laughing(b")", PAIR) + b"Nu",
    "a laughing key of a new dictionary": b"(" + laughing(b")", PAIR) + b"Nd",
    "a laughing member": b"\x8f(" + laughing(b")", PAIR) + b"\x90",
    "a laughing frozen member": b"(" + laughing(b")", PAIR) + b"\x91",
    "a laughing member of a made set": b"cbuiltins\nset\n(](" + laughing(b")", PAIR) + b"etR",
    "a laughing key of an ordered dictionary": ORDERED + b"(](" + laughing(b")", PAIR) + b"N\x86etR",
    "a laughing reference": laughing(b")", PAIR) + b"Q",
    "a laughing dictionary as a reference": laughing(b"}", DICT) + b"Q",
    "a laughing kind of reference": b"(" + laughing(b"}", DICT) + b"NNNNtQ",
    "a laughing shape": b"ctorch._utils\n_rebuild_tensor_v2\n(N" + laughing(b"}", DICT) + b"NNtR",
    "laughing metadata": tensor_code()[:-2] + laughing(b"}", DICT) + b"tR",
    "sizes of a wide list": wide(60_000) + b"0](" + (TORCH_SIZE + b"h\x00\x85R") * 20_000 + b"e",
    "sets of a wide list": wide(60_000) + b"0](" + (b"cbuiltins\nset\nh\x00\x85R") * 20_000 + b"e",
    "dictionaries of a wide one": b"}q\x00("
    + b"".join(long_of(n) + b"N" for n in range(50_000))
    + b"u0]("
    + (ORDERED + b"h\x00\x85R") * 20_000
    + b"e",
    "objects of wide arguments": b"(" + b"N" * 60_000 + b"tq\x000](" + b"cx\nY\nh\x00R" * 20_000 + b"e",
    "copies of a wide list": wide(60_000, b"K\x01") + b"0](" + b"h\x00" * 60_000 + b"N\x85e",
    "a wide key, again and again": b"(" + b"N" * 30_000 + b"tq\x00}(" + b"h\x00N" * 20_000 + b"u",
    "a long key, again and again": text("a" * 5000) + b"q\x000}(" + b"h\x00N" * 20_000 + b"u",
    "modules of many parts that are not there": b"}("
    + b"".join(b"M" + struct.pack("<H", n) + b"N" for n in range(3000))
    + b"uq\x000}("
    + text("_modules")
    + b"h\x00uq\x010]("
    + b"cx\nY\n)\x81h\x01b" * 20_000
    + b"e",
    "long names": laughing(b"K\x01", b"q\x010}(" + text("a" * 30_000) + b"h\x01" + text("b" * 30_000) + b"h\x01u", 19),
    "a long dotted name": b"}" + text("." * (1 << 22)) + tensor_code() + b"s",
    "many classes": b"](" + b"".join(f"cm{n}\nx\n".encode() for n in range(50_000)) + b"e",
    "many dictionaries": b"}" * ((1 << 22) + 9),
    "many objects": b"cx\nY\nq\x00(" + b"h\x00)\x81" * (1 << 17) + b"t",
    "huge numbers in a shape": tensor_code(shape=((1 << 4_000_000) + 1, 2)),
    "a huge number as a key": b"}" + long_of(1 << 4_000_000) + b"Ns",
    "a huge number in a reference": b"(" + text("storage") + long_of(1 << 4_000_000) + b"NNNtQ",
    "a huge number in text": b"}I" + b"9" * 5000 + b"\nNs",
    "a huge hexadecimal number": b"}I0x" + b"f" * 5000 + b"\nNs",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[str, float]]]:
    """What reading each bomb said, and how many seconds it took, in a process that has 1 GiB to spare."""
    folder = tmp_path_factory.mktemp("bombs")
    for name, code in BOMBS.items():
        pickled_file(folder / f"{name}.pt", b"\x80\x05" + code + b".", {"0": bytes(16)})
    lines = [json.loads(line) for line in run_python(READ_ALL, folder).splitlines()]
    assert lines.pop()["peak"] < 3 << 29
    yield {line["name"].removesuffix(".pt"): (line["said"], line["seconds"]) for line in lines}


READ = {"a giant place in the memo", "a frame of a giant length", "many objects"}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_a_bomb_does_not_go_off(name: str, outcomes: dict[str, tuple[str, float]]) -> None:
    said, seconds = outcomes[name]
    assert seconds < 20
    if said != "read":
        assert f"{name}.pt" in said
        assert len(said) < 1500
    assert (said == "read") == (name in READ), said

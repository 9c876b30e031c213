"""Time and memory that converting a `.pt` donor takes, compared with copying the file and hashing the copy.

Every run is a new process; a round runs every way once, in random order. Layers have random weights in real shapes and
are written once into the work folder (up to 7 GB, and as much again during a run).

example: python benchmarks/convert.py --folder bench-convert --runs 5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the package beside this folder, installed or not

from cost import status  # noqa: E402
from report import compare, facts, header, table  # noqa: E402
from tqdm import tqdm  # noqa: E402

REFERENCE = "copy + sha256"
_MIB = 1 << 20
_LONGEST_RUN = 1800


# -- One way of converting, in a process of its own -------------------------------------------------------------


def _copy_and_hash(source: Path, _recipient: Path, target: Path) -> None:
    from transplant_hf.storage import sha256_of

    target.mkdir()
    shutil.copyfile(source, target / "copy.pt")
    sha256_of(target / "copy.pt")


def _convert(source: Path, recipient: Path, target: Path) -> None:
    from transplant_hf.conversion import convert

    convert(source, recipient, target)


def _load_and_save(source: Path, _recipient: Path, target: Path, mmap: bool = False) -> None:
    import torch
    from safetensors.torch import save_file

    layers = torch.load(source, weights_only=True, mmap=mmap)
    target.mkdir()
    names = {f"layers.{i}.{name}": tensor for i, layer in enumerate(layers) for name, tensor in layer.items()}
    save_file(names, target / "donor.safetensors")


def _map_and_save(source: Path, recipient: Path, target: Path) -> None:
    _load_and_save(source, recipient, target, mmap=True)


WAYS: dict[str, Callable[[Path, Path, Path], None]] = {
    REFERENCE: _copy_and_hash,
    "convert": _convert,
    "torch.load + save_file": _load_and_save,
    "torch.load(mmap) + save_file": _map_and_save,
}


def _one(way: str, source: Path, recipient: Path, target: Path) -> None:
    import time

    import safetensors.torch
    import torch
    import transformers  # noqa: F401 - what every way may use is imported before the clock starts
    from one_load import PeakAnonymous

    import transplant_hf.conversion  # noqa: F401

    assert safetensors.torch and torch
    before = status("VmHWM")
    with PeakAnonymous() as memory:
        start = time.perf_counter()
        WAYS[way](source, recipient, target)
        seconds = time.perf_counter() - start
    rss = (status("VmHWM") - before) / 2**20
    print(json.dumps({"seconds": seconds, "anon_mib": memory.mib, "rss_mib": rss}))


# -- The files ---------------------------------------------------------------------------------------------------


def _configs() -> dict[str, tuple[str, Any, int]]:
    from transformers import GptOssConfig, LlamaConfig

    llama = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=32, dtype="bfloat16"
    )
    return {
        "llama": ("4 layers of Llama 7B's shape, bf16", llama, 4),
        "gpt-oss": (
            "3 layers of GPT-OSS-20B's shape, experts in bf16",
            GptOssConfig(num_hidden_layers=24, num_local_experts=32),
            3,
        ),
    }


def _prepare(name: str, folder: Path) -> tuple[Path, Path, str]:
    """Write layers of a shape as the author's files are, unless they are there."""
    import torch
    from transformers import AutoModelForCausalLM

    from transplant_hf.architecture import decoder_stack, find_stack, native_class
    from transplant_hf.architecture.build import build_on_meta

    title, config, count = _configs()[name]
    recipient, path = folder / f"{name}-recipient", folder / f"{name}.pt"
    config.save_pretrained(recipient)
    if not path.exists():
        model = build_on_meta(native_class(AutoModelForCausalLM, config, name)[0], config)
        layers = list(decoder_stack(model, find_stack(model)))[4 : 4 + count]
        generator = torch.Generator().manual_seed(0)
        states = []
        for layer in tqdm(layers, desc=f"{name}: writing layers", file=sys.stderr):
            shapes = {key: tuple(tensor.shape) for key, tensor in layer.state_dict().items()}
            states.append({key: _random(shape, generator) for key, shape in shapes.items()})
        torch.save(states, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        numbers = json.dumps({"layer_indices": list(range(4, 4 + count))})
        (folder / "donor_metadata.json").write_text(numbers)
    return path, recipient, title


def _random(shape: tuple[int, ...], generator: Any) -> Any:
    import torch

    return torch.randint(1 << 13, 1 << 14, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)


# -- The rounds --------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure what the command line names."""
    args = _parser().parse_args()
    if args.one:
        _one(args.one, args.source, args.recipient, args.target)
        return
    known = facts(args.threads)
    if not args.json:
        print(header(known), end="\n\n")
    found: dict[str, Any] = {**known, "runs": args.runs, "files": {}}
    with tempfile.TemporaryDirectory(prefix="transplant-bench-") as scratch:
        folder = args.folder or Path(scratch)
        for name in args.files:
            place = folder / name
            place.mkdir(parents=True, exist_ok=True)
            source, recipient, title = _prepare(name, place)
            rows = _rounds(name, source, recipient, place, args)
            found["files"][name] = rows
            if not args.json:
                _show(f"{title}: {source.stat().st_size / _MIB:,.0f} MiB", rows)
    if args.json:
        print(json.dumps(found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--files", nargs="+", choices=["llama", "gpt-oss"], default=["llama", "gpt-oss"], help="default: both")
    add("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="default: all")
    add("--runs", type=int, default=5, help="rounds (default: 5)")
    add("--folder", type=Path, help="work folder, reused if present (default: a temporary one)")
    add("--threads", type=int, default=1, help="threads of torch; 0: its own choice (default: 1)")
    add("--json", action="store_true", help="print everything measured as JSON instead of tables")
    for hidden in ("--one", "--source", "--recipient", "--target"):
        add(hidden, type=str if hidden == "--one" else Path, help=argparse.SUPPRESS)
    return parser


def _rounds(
    name: str, source: Path, recipient: Path, place: Path, args: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    ways = [way for way in WAYS if way in {*args.ways, REFERENCE}]
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tqdm(total=args.runs * len(ways), desc=name, unit="run", file=sys.stderr) as bar:
        for _ in range(args.runs):
            for way in random.sample(ways, len(ways)):
                bar.set_postfix_str(way)
                rows[way].append(_child(way, source, recipient, place / "out", args.threads))
                bar.update()
    return rows


def _child(way: str, source: Path, recipient: Path, target: Path, threads: int) -> dict[str, float]:
    _warm(source)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, __file__, "--one", way, "--source", source, "--recipient", recipient, "--target", target]
    try:
        done = subprocess.run(
            list(map(str, command)),
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            timeout=_LONGEST_RUN,
            check=True,
        )
    finally:
        shutil.rmtree(target, ignore_errors=True)
        os.sync()  # the next run must not wait for this one's pages to reach the disk
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _warm(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(_MIB * 16):
            pass


def _show(title: str, rows: dict[str, list[dict[str, float]]]) -> None:
    print(f"## {title}\n")
    reference = [run["seconds"] for run in rows[REFERENCE]]
    lines = []
    for way, runs in rows.items():
        memory = [f"{statistics.median(run[key] for run in runs):.0f}" for key in ("anon_mib", "rss_mib")]
        lines.append([way, *compare([run["seconds"] for run in runs], reference).cells, *memory])
    head = ["", "median s", "min - max", "ratio", "paired ratio", "peak anon MiB", "peak RSS MiB"]
    print(table(head, lines), end="\n\n")


if __name__ == "__main__":
    main()

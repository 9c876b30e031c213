"""Time and memory of exporting a transplant as a plain checkpoint, compared with copying and hashing its files.

Every run is a fresh process; rounds hold every way once, in random order. Recipient and donor have random weights in
real shapes and are written once into the work folder (up to 5 GB, and the same size again during a run).

example: python benchmarks/export.py --folder bench-export --runs 5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the package beside this folder, installed or not

from report import compare, facts, header, table  # noqa: E402
from tqdm import tqdm  # noqa: E402

REFERENCE = "copy + sha256"
_MIB = 1 << 20
_LONGEST_RUN = 1800


# -- One way of writing, in a process of its own ----------------------------------------------------------------


def _copy_and_hash(recipient: Path, donor: Path, target: Path) -> None:
    from transplant_hf.storage import sha256_of

    target.mkdir()
    for path in _weight_files(recipient, donor):
        shutil.copyfile(path, target / path.name)
        sha256_of(target / path.name)


def _export(recipient: Path, donor: Path, target: Path, **options: Any) -> None:
    from transplant_hf.exporting import export

    export(recipient, target, {str(donor): 1}, **{"verify": False, **options})


def _export_verified(recipient: Path, donor: Path, target: Path) -> None:
    _export(recipient, donor, target, verify=True)


def _export_cast(recipient: Path, donor: Path, target: Path) -> None:
    _export(recipient, donor, target, dtype="float32")


def _load_and_save(recipient: Path, donor: Path, target: Path) -> None:
    from transplant_hf import AutoModelWithTransplant

    AutoModelWithTransplant.from_pretrained(recipient, donors={str(donor): 1}).save_pretrained(target)


WAYS: dict[str, Callable[[Path, Path, Path], None]] = {
    REFERENCE: _copy_and_hash,
    "export": _export,
    "export, logits compared": _export_verified,
    "export as float32": _export_cast,
    "load + save_pretrained": _load_and_save,
}


def _weight_files(recipient: Path, donor: Path) -> list[Path]:
    return sorted([*recipient.glob("*.safetensors"), *donor.glob("*.safetensors")])


def _one(way: str, place: Path) -> None:
    import time

    import safetensors.torch
    import torch
    import transformers  # noqa: F401 - what every way may use is imported before the clock starts
    from one_load import PeakAnonymous

    import transplant_hf.exporting  # noqa: F401
    from transplant_hf.donor.record import DonorRecord

    assert safetensors.torch and torch and DonorRecord
    with PeakAnonymous() as memory:
        start = time.perf_counter()
        WAYS[way](place / "recipient", place / "donor", place / "out")
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "anon_mib": memory.mib, "before_mib": memory.before_mib}))


# -- The models --------------------------------------------------------------------------------------------------


def _configs() -> dict[str, tuple[str, Any, int]]:
    from transformers import GptOssConfig, LlamaConfig

    llama = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_hidden_layers=22,
        dtype="bfloat16",
    )
    return {
        "llama": ("1.1B Llama, bf16, and 3 donor layers", llama, 3),
        "gpt-oss": (
            "2 layers of GPT-OSS-20B's shape, experts in bf16, and 1 donor layer",
            GptOssConfig(num_hidden_layers=2, num_local_experts=32, vocab_size=4096, dtype="bfloat16"),
            1,
        ),
    }


def _prepare(name: str, place: Path) -> str:
    """Write a recipient, a file for each layer, and a donor, unless they are there."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from transplant_hf.architecture.build import build_on_meta
    from transplant_hf.donor import Donor
    from transplant_hf.donor.record import DonorRecord
    from transplant_hf.donor.tensors import MemoryTensors

    title, config, count = _configs()[name]
    if (place / "donor").exists():
        return title
    recipient = place / "recipient"
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    config.architectures = [model_class.__name__]
    config.save_pretrained(recipient)
    generator = torch.Generator().manual_seed(0)
    groups: dict[str, dict[str, Any]] = {}
    for key, tensor in build_on_meta(model_class, config).state_dict().items():
        group = key.split(".")[2] if ".layers." in key else "rest"
        groups.setdefault(group, {})[key] = tuple(tensor.shape)
    weight_map = {}
    for group, shapes in tqdm(groups.items(), desc=f"{name}: writing", file=sys.stderr):
        filename = f"model-{group}.safetensors"
        tensors = {key: _random(shape, generator) for key, shape in shapes.items()}
        save_file(tensors, recipient / filename, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, filename)
    index = {"metadata": {}, "weight_map": weight_map}
    (recipient / "model.safetensors.index.json").write_text(json.dumps(index))
    fields = json.loads((recipient / "config.json").read_text())
    layers = {
        f"layers.{number}.{key.split('.', 3)[3]}": _random(shape, generator)
        for number in range(count)
        for key, shape in groups[str(number)].items()
    }
    record = DonorRecord(config.model_type, fields, tuple(range(count)), str(recipient), None, "donor")
    Donor(record, MemoryTensors(layers), position=1).save_pretrained(place / "donor")
    return title


def _random(shape: tuple[int, ...], generator: Any) -> Any:
    """Finite numbers of any size between 2e-9 and 2: no file system finds a pattern in them."""
    import torch

    return torch.randint(0x3100, 0x3F80, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)


# -- The rounds --------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure what the command line names."""
    args = _parser().parse_args()
    if args.one:
        _one(args.one, args.place)
        return
    known = facts(args.threads)
    if not args.json:
        print(header(known), end="\n\n")
    found: dict[str, Any] = {**known, "runs": args.runs, "models": {}}
    with tempfile.TemporaryDirectory(prefix="transplant-bench-") as scratch:
        folder = args.folder or Path(scratch)
        for name in args.models:
            place = folder / name
            place.mkdir(parents=True, exist_ok=True)
            title = _prepare(name, place)
            rows = _rounds(name, place, args)
            found["models"][name] = rows
            if not args.json:
                size = sum(path.stat().st_size for path in _weight_files(place / "recipient", place / "donor"))
                _show(f"{title}: {size / _MIB:,.0f} MiB", rows)
    if args.json:
        print(json.dumps(found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=["llama", "gpt-oss"], default=["llama", "gpt-oss"], help="default: both")
    add("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="default: all")
    add("--runs", type=int, default=5, help="rounds (default: 5)")
    add("--folder", type=Path, help="work folder, used again when present (default: a temporary one)")
    add("--threads", type=int, default=1, help="threads of torch; 0: its own choice (default: 1)")
    add("--json", action="store_true", help="print everything measured as JSON instead of tables")
    add("--one", help=argparse.SUPPRESS)
    add("--place", type=Path, help=argparse.SUPPRESS)
    return parser


def _rounds(name: str, place: Path, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    ways = [way for way in WAYS if way in {*args.ways, REFERENCE}]
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tqdm(total=args.runs * len(ways), desc=name, unit="run", file=sys.stderr) as bar:
        for _ in range(args.runs):
            for way in random.sample(ways, len(ways)):
                bar.set_postfix_str(way)
                rows[way].append(_child(way, place, args.threads))
                bar.update()
    return rows


def _child(way: str, place: Path, threads: int) -> dict[str, float]:
    for path in _weight_files(place / "recipient", place / "donor"):
        _warm(path)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--one", way, "--place", str(place)],
            env=environment,
            text=True,
            capture_output=True,
            timeout=_LONGEST_RUN,
            check=False,
        )
    finally:
        shutil.rmtree(place / "out", ignore_errors=True)
        os.sync()  # the next run must not wait for this one's pages to reach the disk
    if done.returncode:
        raise SystemExit(f"{way}: exit status {done.returncode}\n{done.stderr[-4000:]}")
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
        memory = [f"{max(run['anon_mib'] for run in runs):.0f}"]
        lines.append([way, *compare([run["seconds"] for run in runs], reference).cells, *memory])
    head = ["", "median s", "min - max", "ratio", "paired ratio", "peak anon MiB"]
    print(table(head, lines), end="\n\n")


if __name__ == "__main__":
    main()

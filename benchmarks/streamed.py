"""Memory and seconds of training or measuring a donor whose recipient stays in its files, beside the same in memory.

Each run is a fresh process; the two kinds take turns. Memory is the peak of resident memory, mapped pages included,
above what the imports, a training of a tiny model and its evaluation took. Seconds of all cores are beside those of the
clock, which other programs make longer.

    python benchmarks/streamed.py --shape llama-1b --rounds 3
    python benchmarks/streamed.py --shape llama-1b --rounds 3 --evaluate
    python benchmarks/streamed.py --shape llama-8b --streamed-only      # writes 16 GB
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import report
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from transplant_hf import extract

__all__: list[str] = []

_SECONDS = {
    "states_processor_seconds": "processor s, states",
    "states_seconds": "s, states",
    "step_seconds": "s, steps",
    "processor_seconds": "processor s",
    "seconds": "s",
}
SHAPES: dict[str, LlamaConfig] = {
    "llama-1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
    ),
    "llama-8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}


def main() -> None:
    """Measure a shape and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-1b")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=16, help="blocks of 64 tokens")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--evaluate", action="store_true", help="measure a donor, instead of training one")
    parser.add_argument("--streamed-only", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    config = SHAPES[options.shape]
    print(report.header(report.facts(0)), end="\n\n")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = write_recipient(config, Path(folder, "recipient"))
        if options.evaluate:
            last = config.num_hidden_layers - 1
            extract(Path(folder, "recipient"), Path(folder, "donor"), layers=[last - 1], position=last)
        kinds = ["streamed"] if options.streamed_only else ["streamed", "resident"]
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for number in range(options.rounds):
            for kind in kinds if number % 2 == 0 else kinds[::-1]:
                runs[kind].append(measure(Path(folder), kind, options))
                print(kind, runs[kind][-1], file=sys.stderr)
    print_runs(runs, size, [2 * parts(config)[0]] * (config.num_hidden_layers - 1))
    if not options.evaluate:
        print(f"planned above imports, without activations: {plan(config) / 1e9:.2f} GB")


def print_runs(runs: Mapping[str, list[dict[str, Any]]], size: int, prefix: list[int]) -> None:
    """Print a table of the runs of a recipient of a size in bytes, with layers of these sizes before the donor."""
    timed = [name for name in _SECONDS if name in next(iter(runs.values()))[0]]
    head = ["", "GB above imports", "of the weights", "GB in all", "GB read", *(_SECONDS[name] for name in timed)]
    print(report.table(head, [row(kind, found, size, timed) for kind, found in runs.items()]))
    print(f"\nweights {size / 1e9:.2f} GB, of the layers before the donor {sum(prefix) / 1e9:.2f} GB")
    if "resident" in runs:
        for name in timed:
            ratio = report.compare(*([run[name] for run in runs[kind]] for kind in ("streamed", "resident")))
            spread = f"{ratio.paired:.2f} ({ratio.paired_low:.2f} - {ratio.paired_high:.2f})"
            print(f"{_SECONDS[name]}, streamed by resident: {spread}")
    print("each byte of the layers before the donor was read", end=" ")
    print("once" if all(run["read"] == prefix for run in runs["streamed"]) else "NOT once")


def plan(config: LlamaConfig) -> float:
    """Return embeddings, head and last layer, and a donor with gradients and two numbers of Adam, in bfloat16."""
    layer, outer = parts(config)
    return 2 * (outer + layer + 4 * layer)


def parts(config: LlamaConfig) -> tuple[int, int]:
    """Return the numbers in a layer, and in embeddings and head."""
    sizes = shapes_of_layer(config)
    return sum(torch.Size(shape).numel() for shape in sizes.values()), 2 * config.vocab_size * config.hidden_size


def shapes_of_layer(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a layer."""
    width, inner = config.hidden_size, config.intermediate_size
    narrow = width // config.num_attention_heads * config.num_key_value_heads
    return {
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (narrow, width),
        "self_attn.v_proj.weight": (narrow, width),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }


def write_recipient(config: LlamaConfig, folder: Path) -> int:
    """Write a recipient in one file for each layer, of random numbers that all layers share; returns its bytes."""
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def filled(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    layer = {name: filled(shape) for name, shape in shapes_of_layer(config).items()}
    table = (config.vocab_size, config.hidden_size)
    files = {
        f"layer-{number}.safetensors": {f"model.layers.{number}.{name}": value for name, value in layer.items()}
        for number in range(config.num_hidden_layers)
    }
    files["outer.safetensors"] = {
        "model.embed_tokens.weight": filled(table),
        "lm_head.weight": filled(table),
        "model.norm.weight": filled(table[1:]),
    }
    weight_map = {}
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())


def measure(folder: Path, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train or measure a donor in a fresh process."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command = [sys.executable, str(Path(__file__).with_name("one_streamed.py")), str(folder / "recipient"), work]
        command += ["--blocks", str(options.blocks), "--steps", str(options.steps)]
        command += ["--batch-size", str(options.batch_size)]
        command += ["--resident"] if kind == "resident" else []
        command += ["--donor", str(folder / "donor")] if options.evaluate else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(kind: str, runs: list[dict[str, Any]], size: int, timed: list[str]) -> list[str]:
    """Return a row of the table: smallest and largest memory, the medians of seconds."""
    low, high = (found(run["peak"] for run in runs) for found in (min, max))
    cells = [f"{low / 1e9:.2f} - {high / 1e9:.2f}", f"{low / size:.2f} - {high / size:.2f}"]
    cells += [f"{max(run['peak'] + run['before'] for run in runs) / 1e9:.2f}", f"{sum(runs[0]['read']) / 1e9:.2f}"]
    return [kind, *cells, *(f"{statistics.median(run[name] for run in runs):.1f}" for name in timed)]


if __name__ == "__main__":
    main()

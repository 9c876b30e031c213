"""Bits of a bfloat16 recipient that are changed after a learned part was put in and taken out again.

    python benchmarks/removal.py RECIPIENT --text german.txt --cycles 1000

A donor of three layers, LoRA (rank 16, all linear layers) and full fine-tuning learn the text for a few steps in
float32, and are converted to bfloat16. Then they are put into the recipient and taken out again, and all of its weights
are compared with those in its files. Full fine-tuning is the difference to the tuned weights, added and subtracted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import report
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from transplant_hf import transplant
from transplant_hf.comparison import METHODS
from transplant_hf.comparison.methods import Setting, donor_of
from transplant_hf.comparison.runs import Budget, train_once
from transplant_hf.model.load_any_model import load_model
from transplant_hf.texts import Blocks, pack

_RATES = {"donor": 3e-3, "lora": 3e-3, "full": 1e-4}
_BITS_SET = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8)
Ways = Iterable[tuple[str, Callable[[], None], Callable[[], Mapping[str, torch.Tensor]]]]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipient", help="Hub id or folder")
    parser.add_argument("--text", required=True, help="text to learn")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args()
    logging.disable_progress_bar()
    found = measure(options.recipient, options.text, options.steps, options.cycles)
    if options.json:
        print(json.dumps(found))
        return
    head = ["put in and taken out", "cycles", "weights changed", "bits changed", "largest change"]
    rows = [
        [way, str(cycles), f"{row['weights'] / row['of']:.2%}", f"{row['bits']:,}", f"{row['largest']:.2g}"]
        for way, by_cycles in found.items()
        for cycles, row in by_cycles.items()
    ]
    print(report.header(report.facts(torch.get_num_threads())), report.table(head, rows), sep="\n\n")


def measure(
    recipient: str, text: str, steps: int, cycles: int, block_length: int = 128
) -> dict[str, dict[int, dict[str, float]]]:
    """Return what changed, by way and by the number of cycles: after the first, and after all."""

    def load() -> Any:
        return load_model(recipient, dtype=torch.float32)

    setting = Setting(load, load().eval().requires_grad_(False))
    original = dict(load().bfloat16().named_parameters())
    blocks = pack(text, AutoTokenizer.from_pretrained(recipient), block_length, quiet=True).part(0, 2 * steps)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for method in _RATES:
        for way, cycle, weights in _ways(method, setting, blocks, steps, original):
            for done in range(1, cycles + 1):
                cycle()
                if done in (1, cycles):
                    print(f"{way}: {done} of {cycles}", file=sys.stderr)
                    found.setdefault(way, {})[done] = difference(original, weights())
    return found


def _ways(method: str, setting: Setting, blocks: Blocks, steps: int, original: Mapping[str, torch.Tensor]) -> Ways:
    """Yield each way to use what a method learned: its name, one cycle, and the recipient's weights after it."""
    prepared = METHODS[method].prepare(setting)
    with tempfile.TemporaryDirectory() as folder:
        train_once(prepared, folder, _RATES[method], Budget(steps, 2), blocks, None)
    model = prepared.model.bfloat16()
    if method == "donor":
        donor, position = donor_of(model), setting.count - 1
        live = transplant(setting.load().bfloat16(), donor, position=position, name="donor", in_place=True)

        def switch() -> None:
            with live.disable_transplants():
                pass

        def remove() -> None:
            live.remove_donor("donor")
            live.add_donor(donor, position, name="donor")

        def without() -> dict[str, torch.Tensor]:
            with live.disable_transplants():
                return dict(live.named_parameters())

        yield "donor, switched off and on", switch, without
        yield "donor, removed and added", remove, without
    elif method == "lora":

        def merge() -> None:
            model.merge_adapter()
            model.unmerge_adapter()

        def disable() -> None:
            with model.disable_adapter():
                pass

        def base() -> dict[str, torch.Tensor]:
            named = model.get_base_model().named_parameters()
            return {name.replace(".base_layer", ""): weight for name, weight in named if ".lora_" not in name}

        yield "LoRA of PEFT, disabled and enabled", disable, base
        yield "LoRA of PEFT, merged and unmerged", merge, base
    else:
        changes = {name: weight.detach() - original[name] for name, weight in model.named_parameters()}
        weights = {name: weight.detach().clone() for name, weight in original.items()}

        def add() -> None:
            for name, change in changes.items():
                weights[name].add_(change).sub_(change)

        yield "full fine-tuning, difference added and subtracted", add, lambda: weights


@torch.no_grad()
def difference(wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Compare weights of the same names, bit for bit.

    Example:
        >>> one = {"w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}
        >>> difference(one, {"w": torch.tensor([1.0, 3.0], dtype=torch.bfloat16)})
        {'weights': 1, 'bits': 1, 'of': 2, 'largest': 1.0}
    """
    if set(wanted) != set(found):
        raise SystemExit(f"weights have other names: {sorted(set(wanted) ^ set(found))[:4]}")
    weights = bits = count = 0
    largest = 0.0
    for name, tensor in wanted.items():
        other = found[name]
        changed = tensor.view(torch.int16) ^ other.view(torch.int16)
        weights += int((changed != 0).sum())
        bits += int(_BITS_SET[changed.flatten().view(torch.uint8).int()].sum())
        count += tensor.numel()
        largest = max(largest, float((tensor - other).abs().max()))
    return {"weights": weights, "bits": bits, "of": count, "largest": largest}


if __name__ == "__main__":
    main()

"""Write docs/architectures.md from a survey.

`python -m tests.architectures.matrix --json survey.json && python -m tests.architectures.report survey.json`
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.architectures.matrix import CAUSAL_LM_TYPES, CHECKED_TYPES, LEFT_OUT, NOT_AT, REFUSED
from tests.architectures.tiny_overrides import CACHE_DIFFERS

TARGET = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
PLACES = ("insert 0", "insert 1", "insert 2", "insert 4", "replace")

HEAD = """# Architectures

This page shows what `pytest -m slow tests/architectures` checks for each model type. These commands write it:

```bash
python -m tests.architectures.matrix --json survey.json
python -m tests.architectures.report survey.json
```

The last run used transformers {transformers} and torch {torch} on a CPU, in float32. For each type, a random
recipient of four layers has every kind of layer of the architecture. Layers 1 and 2 of another random model are
inserted at positions 0, 1, 2 (middle) and 4 (end), or replace the recipient's layers 1 and 2. Each case checks:

- logits against an independent reference: the plain recipient, with the donor's own layer objects called in its forward
  pass;
- greedy `generate` gives the same tokens with and without a cache;
- with the donor switched off, logits and cached `generate` are bit-identical to the recipient's (`torch.equal`);
- a full save, reloaded by plain `AutoModelForCausalLM`, gives logits within 1e-5, with no missing or unexpected keys;
- a thin save, reloaded, gives the same.

Of {all} types in Transformers' mapping for causal language modeling, **{ok} pass everywhere**, {partly} at some
positions, {refused} are refused by name and {left} were left out. `native` means that the recipient's own class
describes the layers in a plain checkpoint. `own format` means that the layers are inserted into the built model, and
that a full save needs transplant_hf to load. The last column is the largest absolute difference of a logit from the
reference; logits are between 1 and 10.

Cached and uncached `generate` are not compared for {uncached}, because they differ in Transformers itself. In zamba and
zamba2 only layer 2 is moved, because layers that share weights cannot be moved.
"""


def main(arguments: list[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("survey", type=Path, help="what `tests.architectures.matrix --json` wrote")
    survey = json.loads(parser.parse_args(arguments).survey.read_text())
    rows, refused, failed = [], [], []
    for name, found in survey.items():
        if "refused" in found:
            refused.append(f"| {name} | {_reason(found['refused'])} |")
            continue
        if "crash" in found:
            failed.append(f"{name}: {found['crash']}")
            continue
        failed += [
            f"{name}, {place}: {line}"
            for place, seen in found.items()
            for line in seen["failures"]
            if place not in {f"insert {position}" for position in NOT_AT.get(name, {})}
        ]
        rows.append(_row(name, found))
    if failed:
        print("\n".join(["the survey has failures:", *failed]), file=sys.stderr)
        return 1
    types = Counter(partial=sum(name in NOT_AT for name in CHECKED_TYPES))
    types["refused"] = sum("refused" in survey[name] for name in CHECKED_TYPES)
    page = HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        all=len(CAUSAL_LM_TYPES),
        ok=len(CHECKED_TYPES) - types["refused"] - types["partial"],
        partly=types["partial"],
        refused=types["refused"],
        left=len(LEFT_OUT),
        uncached=" and ".join(sorted(set(CACHE_DIFFERS) & set(CHECKED_TYPES) - set(REFUSED))),
    )
    page += "\n## Checked\n\n| type | 0 | 1 | middle | end | replace | largest difference |\n"
    page += "|---|---|---|---|---|---|---|\n"
    page += "\n".join(rows)
    page += "\n\nA name with a colon is a variant: see `VARIANTS` in `tests/architectures/matrix.py`.\n"
    page += "\n## Refused by name\n\n| type | what the user reads |\n|---|---|\n" + "\n".join(refused)
    page += "\n\n## Left out\n\n| type | why |\n|---|---|\n"
    page += "\n".join(f"| {name} | {reason} |" for name, reason in sorted(LEFT_OUT.items())) + "\n"
    TARGET.write_text(page)
    return 0


def _row(name: str, found: dict[str, Any]) -> str:
    cells = []
    for place in PLACES:
        if place in {f"insert {position}" for position in NOT_AT.get(name, {})}:
            cells.append("refused: " + NOT_AT[name][int(place.split()[1])])
        else:
            cells.append("native" if found[place]["native"] else "own format")
    largest = max(seen.get("difference", 0.0) for seen in found.values())
    return f"| {name} | {' | '.join(cells)} | {'0' if largest == 0 else f'{largest:.1g}'} |"


def _reason(text: str) -> str:
    return text.partition(": ")[2] if text.startswith("recipient /") else text


if __name__ == "__main__":
    sys.exit(main())

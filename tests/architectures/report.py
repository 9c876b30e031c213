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

What `pytest -m slow tests/architectures` checks, type by type; this page is written by

```bash
python -m tests.architectures.matrix --json survey.json
python -m tests.architectures.report survey.json
```

last run with transformers {transformers}, torch {torch} on a CPU, in float32. For each type a random recipient of four
layers (every kind of layer the architecture has) gets layers 1 and 2 of another random model, inserted at positions 0,
1, middle (2) and end (4), and in place of its own layers 1 and 2. Checked at each place:

- logits against an independent reference: the plain recipient with the donor's own layer objects called inside its
  forward pass, with the masks and positions of their own kind;
- greedy `generate` with a cache gives the same tokens as without one;
- switched off, logits and cached `generate` are the recipient's, bit for bit (`torch.equal`);
- saved in full and reloaded by plain `AutoModelForCausalLM`, logits agree within 1e-5, no key missing or left over;
- saved thin and reloaded, likewise.

Of {all} types in Transformers' causal language modelling mapping, **{ok} pass everywhere**, {partly} at some
positions, {refused} are refused by name and {left} were left out. `native` means a plain checkpoint of the recipient's
own class describes the layers; `own format` means the layers are inserted into the built model, and a full save needs
transplant_hf to load. The last column is the largest absolute difference of a logit from the reference at any place;
logits are of order 1 to 10.

Not checked: cached against uncached `generate` for {uncached}, which differ in Transformers itself. Of zamba and zamba2
layer 2 alone is moved, since layers that share weights cannot leave their model.
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

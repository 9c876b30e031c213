"""From outcomes of tests to docs/ecosystem.md: a test function is a row, an architecture a column."""

from __future__ import annotations

import ast
import dataclasses
import platform
import textwrap
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.ecosystem.cases import ARCHITECTURES

__all__ = ["PAGE", "REPORT", "Outcomes", "Row", "known_rows", "rows_of_page", "write_page"]

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "ecosystem.md"
COMMAND = "make ecosystem"
# Names the page to write at the end, if everything in the table was run and nothing failed.
REPORT = "TRANSPLANT_HF_ECOSYSTEM_REPORT"
# Others follow in the order in which they are met.
SECTIONS = (
    "Pipelines",
    "Generation",
    "Attention",
    "Compilation",
    "Export",
    "Heads and embeddings",
    "Evaluation and serving",
    "Training",
    "PEFT",
)
PACKAGES = (
    *("transformers", "torch", "accelerate", "peft", "trl", "torchao", "bitsandbytes", "optimum-quanto", "hqq"),
    *("lm_eval", "sentence-transformers", "onnx", "onnxscript", "onnxruntime", "gguf"),
)
NOT_RUN, LIMIT, NOT_APPLICABLE = "not run", "limit", "n/a"

HEAD = """# What transplants work with

Each row is a test, each column an architecture, each cell what was seen when this page was written. It is written by

```bash
{command}
```

from a run of `tests/ecosystem` in which nothing failed, last on a CPU with
{versions}.
The models are random, in float32 and of width 32 unless the row or its heading says otherwise: a recipient of four
layers, with layers 1 and 2 of another model inserted at position 1.

- **pass**: the results are those of a reference, the same tokens, or numbers to the last digits that the order of sums
  leaves open. The reference is the same six layers put together by hand as an ordinary model of Transformers, which has
  never gone through this package. Running without an error is not enough.
- **limit**: it does not work, and the note says why; the test shows that it is so.
- **not run**: the test could not run where the page was written, and the note says what it needs.
- **n/a**: the feature does not exist for the architecture.

The recipients are GPT-2 (learned positions), Llama (rotary positions, grouped queries), GPT-OSS (experts, sinks,
sliding and full attention), Qwen3 (norms on queries and keys) and Gemma 3 (text; two rotary bases, sliding and full
attention). The last column names the test: `pytest tests/ecosystem -k NAME -m "slow or not slow"` runs one row.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """A test function, and what it stands for on the page.

    Args:
        test: File and function, as `test_generation.py::test_greedy`.
        section: Under which heading.
        feature: The first cell.
    """

    test: str
    section: str
    feature: str


class Outcomes:
    """What the tests of one run showed: by test and architecture, "pass" or a kind and a reason."""

    def __init__(self) -> None:
        self._cells: dict[str, dict[str, tuple[str, str]]] = {}

    def note(self, item: Any, report: Any) -> None:
        """Take in the report of one test."""
        test = f"{item.path.name}::{item.originalname}"
        column = item.callspec.params["case"]  # a row has a cell for each case
        seen = self._cells.setdefault(test, {})
        if seen.get(column, ("pass", ""))[0] == "pass":  # of several parts of a cell the first reason counts
            seen[column] = _outcome(report)

    def cell(self, row: Row, architecture: str) -> tuple[str, str] | None:
        """What was seen, and why; `None` where nothing was run."""
        return self._cells.get(row.test, {}).get(architecture)

    def missing(self, rows: list[Row]) -> list[str]:
        """Cells that nothing is known of."""
        return [f"{row.test}[{name}]" for row in rows for name in ARCHITECTURES if self.cell(row, name) is None]


def _outcome(report: Any) -> tuple[str, str]:
    if hasattr(report, "wasxfail"):
        return LIMIT, report.wasxfail.removeprefix("reason: ")
    if report.skipped:
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if reason.startswith("not applicable: "):
            return NOT_APPLICABLE, reason.removeprefix("not applicable: ")
        return NOT_RUN, reason
    return ("pass", "") if report.passed else ("failed", "")


def known_rows() -> list[Row]:
    """Read the rows from the test files: every function marked `ecosystem`, in the order of files and lines."""
    return [row for path in sorted(HERE.glob("test_*.py")) for row in _rows_of(path)]


def _rows_of(path: Path) -> list[Row]:
    rows, constants = [], dict[str, str]()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            constants |= {ast.unparse(target): node.value.value for target in node.targets}
        for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.ecosystem":
                fields = {str(word.arg): _text(word.value, constants) for word in mark.keywords}
                rows.append(Row(f"{path.name}::{node.name}", **fields))
    return rows


def _text(value: ast.expr, constants: dict[str, str]) -> str:
    """The value of a string, or of a name that the file gives to one."""
    return constants[value.id] if isinstance(value, ast.Name) else ast.literal_eval(value)


def write_page(target: Path, outcomes: Outcomes) -> None:
    """Write the page."""
    rows, notes = known_rows(), dict[str, int]()
    page = [HEAD.format(command=COMMAND, versions=_versions())]
    for section in _in_order({row.section: None for row in rows}):
        page += [f"## {section}", "", f"| feature | {' | '.join(ARCHITECTURES)} | test |"]
        page.append("|---" * (len(ARCHITECTURES) + 2) + "|")
        for row in rows:
            if row.section == section:
                cells = [_cell(outcomes.cell(row, name), notes) for name in ARCHITECTURES]
                page.append(f"| {row.feature} | {' | '.join(cells)} | `{row.test}` |")
        page.append("")
    if notes:
        page += ["## Notes", "", *(f"{number}. {' '.join(text.split())}" for text, number in notes.items()), ""]
    target.write_text("\n".join(page))


def _cell(seen: tuple[str, str] | None, notes: dict[str, int]) -> str:
    kind, reason = seen or ("", "")
    if not reason:
        return kind
    return f"{kind} [{notes.setdefault(reason, len(notes) + 1)}](#notes)"


def _in_order(sections: dict[str, None]) -> list[str]:
    known = [name for name in SECTIONS if name in sections]
    return known + [name for name in sections if name not in known]


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return textwrap.fill(", ".join(found), 119)


def rows_of_page(page: str) -> list[Row]:
    """Read the rows back from the page."""
    rows, section = [], ""
    for line in page.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| ") and line.endswith("` |"):
            parts = [part.strip() for part in line.strip("|").split("|")]
            rows.append(Row(parts[-1].strip("`"), section, parts[0]))
    return rows

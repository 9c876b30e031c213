"""The page has the rows that there are tests for."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ecosystem.cases import ARCHITECTURES
from tests.ecosystem.table import PAGE, REPORT, Outcomes, known_rows, rows_of_page, write_page


def _report(outcome: str = "passed", reason: str = "", **fields: Any) -> Any:
    skipped = outcome == "skipped"
    return SimpleNamespace(passed=outcome == "passed", skipped=skipped, longrepr=("file", 1, reason), **fields)


def _noted(*reports: Any) -> Outcomes:
    """The same reports for every cell."""
    outcomes = Outcomes()
    for row in known_rows():
        file, _, name = row.test.partition("::")
        for architecture in ARCHITECTURES:
            callspec = SimpleNamespace(params={"case": architecture})
            item = SimpleNamespace(path=Path(file), originalname=name, callspec=callspec)
            for report in reports:
                outcomes.note(item, report)
    return outcomes


@pytest.mark.skipif(bool(os.environ.get(REPORT)), reason="this run writes the page")
def test_the_page_has_exactly_the_rows_of_the_tests() -> None:
    rows, written = known_rows(), rows_of_page(PAGE.read_text())
    assert {row.test for row in written} == {row.test for row in rows}, "run `make ecosystem` again"
    assert sorted(written, key=str) == sorted(rows, key=str)


@pytest.mark.parametrize(
    ("reports", "cell"),
    [
        ([_report()], "pass"),
        ([_report(), _report("skipped", "Skipped: no hqq"), _report()], "not run [1](#notes)"),
        ([_report("skipped", "Skipped: not applicable: no MXFP4")], "n/a [1](#notes)"),
        ([_report("skipped", wasxfail="reason: says why"), _report("skipped", "Skipped: later")], "limit [1](#notes)"),
    ],
)
def test_cells(reports: list[Any], cell: str, tmp_path: Path) -> None:
    outcomes = _noted(*reports)
    assert not outcomes.missing(known_rows())
    write_page(tmp_path / "page.md", outcomes)
    page = (tmp_path / "page.md").read_text()
    assert rows_of_page(page) and set(rows_of_page(page)) == set(known_rows())
    assert f"| {' | '.join([cell] * len(ARCHITECTURES))} |" in page


def test_what_was_not_run_is_missing() -> None:
    assert len(Outcomes().missing(known_rows())) == len(ARCHITECTURES) * len(known_rows())

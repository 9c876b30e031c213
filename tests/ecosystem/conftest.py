"""What the rows of docs/ecosystem.md share: the `case` fixture, the marker that names a row, and the record."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ecosystem.cases import ARCHITECTURES, Case, make_case
from tests.ecosystem.table import REPORT, Outcomes, known_rows, write_page

OUTCOMES = Outcomes()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ecosystem(section, feature): a row of docs/ecosystem.md")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)  # `make ecosystem` runs them


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    if item.get_closest_marker("ecosystem") is not None and (report.when == "call" or not report.passed):
        OUTCOMES.note(item, report)
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    target = os.environ.get(REPORT)
    if not target:
        return
    missing = OUTCOMES.missing(known_rows())
    if exitstatus or missing:
        lines = [f"{target} is not written: exit status {int(exitstatus)}", *(f"not run: {name}" for name in missing)]
        session.config.get_terminal_writer().write("\n" + "\n".join(lines) + "\n")
    else:
        write_page(Path(target), OUTCOMES)


@pytest.fixture(scope="session")
def made_cases() -> dict[str, Case]:
    """Those that were made in this run."""
    return {}


@pytest.fixture(params=list(ARCHITECTURES))
def case(request: pytest.FixtureRequest, made_cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Each of the five architectures."""
    name = request.param
    if name not in made_cases:
        made_cases[name] = make_case(name, tmp_path_factory.mktemp(f"ecosystem-{name}"))
    return made_cases[name]

"""Tables and hulls of the evidence, from the files of runs alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transplant_hf.comparison import RunResult


@pytest.fixture
def evidence(script: Callable[[str], Any]) -> Any:
    return script("evidence")


def write_run(folder: Path, rate: float, gain: float, forgetting: float, view: str = "", **more: Any) -> None:
    changes = {"general": forgetting / 2, "python": forgetting}
    test = {"domain": 50 * math.exp(-gain), **{name: 20 * math.exp(change) for name, change in changes.items()}}
    known: dict[str, Any] = {"method": "donor", "steps": 4, "replay_share": 0.25, "trainable_parameters": 10**6}
    known |= {"gain": gain, "forgetting": forgetting / 2, "forgetting_on": changes, "test": test, "removal_error": 0.0}
    known |= {"validation": 1 - gain, "seconds": 2.0, **more}
    result = RunResult(view=view, learning_rate=rate, **known)
    path = folder / "runs" / f"{result.method}-{view}-{rate}-{result.seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    setup = {"layers": 3, "recipient": "somewhere/smollm2"}
    path.write_text(json.dumps({**dataclasses.asdict(result), "views": ["", "at 0.75"], "setup": setup}))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_hull_is_the_best_gain_that_forgets_no_more_than_allowed_on_any_text(
    evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "FOLDER", tmp_path / "evidence")
    write_run(tmp_path / "out", 1e-3, 0.2, 0.008)
    write_run(tmp_path / "out", 3e-3, 0.5, 0.2)
    write_run(tmp_path / "out", 3e-3, 0.3, 0.02, view="at 0.75")
    for seed, gain in ((0, 0.4), (1, 0.6)):
        write_run(tmp_path / "out", 1e-2, gain, 0.25, seed=seed, method="full", removal_error=None)
    write_run(tmp_path / "out", 3e-2, 0.9, 0.25, method="full")  # one seed only: not a finalist
    evidence.add("german", [tmp_path / "out"])
    kept = [json.loads(path.read_text())["setup"] for path in (tmp_path / "evidence" / "german").iterdir()]
    assert {setup["recipient"] for setup in kept} == {"smollm2"}, "folders are not published"
    quality, costs = evidence.tables(tmp_path / "evidence" / "german").split("\n\n")
    untouched, donor, full = map(cells, quality.splitlines()[2:])
    assert untouched[4:7] == ["50.0", "20.0", "20.0"]
    assert donor[:4] == ["donor at L-1, k = 3", "0.003", "4", "1"] and donor[7:] == ["0.500", "0.200"]
    assert full[0] == "full fine-tuning" and full[1:4] == ["0.01", "4", "2"] and full[7] == "0.500 ± 0.100"
    assert cells(costs.splitlines()[2])[2:5] == ["0.200", "0.300", "0.300"]
    assert cells(costs.splitlines()[3])[2:5] == ["none", "none", "none"]
    assert cells(costs.splitlines()[2])[-1] == "exact" and cells(costs.splitlines()[3])[-1] == "impossible"


def test_the_page_is_written_from_the_files(evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(evidence, "FOLDER", tmp_path / "evidence")
    monkeypatch.setattr(evidence, "PAGE", tmp_path / "results.md")
    (tmp_path / "img").mkdir()
    write_run(tmp_path / "out", 1e-3, 0.2, 0.008)
    evidence.add("german", [tmp_path / "out"])
    (tmp_path / "results.md").write_text("before\n<!-- evidence: german -->\nold\n<!-- end of evidence -->\nafter\n")
    evidence.write()
    page = (tmp_path / "results.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page and "0.200" in page
    assert (tmp_path / "img" / "evidence-german.png").read_bytes().startswith(b"\x89PNG")
    evidence.write()
    assert (tmp_path / "results.md").read_text() == page, "writing again changes nothing"
    (tmp_path / "results.md").write_text("no place for it")
    with pytest.raises(SystemExit, match="has no lines <!-- evidence: german -->"):
        evidence.write()

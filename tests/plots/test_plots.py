"""Pictures are drawn without a screen, in any format."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import refused
from transplant_hf import ConfigurationError
from transplant_hf.evaluation import Perplexity, StrengthCurve, SweepReport, SweepRow
from transplant_hf.plots import plot_strengths, plot_sweep

pytest.importorskip("matplotlib")


def test_a_sweep_with_a_gap(tmp_path: Path) -> None:
    rows = [SweepRow("law", p, s, Perplexity(3.0 - p * s / 10, 10)) for s in (0.5, 1.0) for p in range(3)]
    report = SweepReport((*rows, SweepRow("law", 3, 1.0, None, "no")), Perplexity(3.0, 10), "noise", {})
    plot_sweep(report, tmp_path / "new" / "sweep.svg")
    drawn = (tmp_path / "new" / "sweep.svg").read_text()
    assert drawn.lstrip().startswith("<?xml") and "svg" in drawn


def test_a_curve_is_on_two_texts(tmp_path: Path) -> None:
    point = {"law": Perplexity(2.0, 10), "general": Perplexity(3.0, 10)}
    plot_strengths(StrengthCurve({0.0: point, 1.0: point}, ("law",), {}), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with refused(ConfigurationError, "on two texts, this one has law"):
        plot_strengths(StrengthCurve({1.0: {"law": Perplexity(2.0, 10)}}, ("law",), {}), tmp_path / "no.png")

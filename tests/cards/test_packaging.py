"""The templates are found wherever the package is installed from."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from transplant_hf.cards import render

ROOT = Path(__file__).parents[2]
TEMPLATES = (render.DONOR_TEMPLATE, render.FULL_TEMPLATE)
PROBE = """
from pathlib import Path
import transplant_hf
from transplant_hf import DonorSpec, TransplantConfig
from transplant_hf.cards import DONOR_TEMPLATE, FULL_TEMPLATE, render, render_card
from transplant_hf.donor import DonorRecord
config = TransplantConfig(recipient="user/base", donors=[DonorSpec(".", 0, name="law")])
for template in (DONOR_TEMPLATE, FULL_TEMPLATE):
    assert "law" in str(render_card(template, "x", config, [DonorRecord("gpt2", {}, (1,))]))
print(render.template_path("donor.md").parent)
"""


def test_a_checkout_has_them_at_its_top() -> None:
    for name in TEMPLATES:
        assert render.template_path(name).parent in render.PLACES
        assert (ROOT / "model_cards" / name).is_file()


def test_a_wheel_carries_them_where_they_are_looked_for() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    inside = render.PLACES[0].relative_to(ROOT).as_posix()
    for name in TEMPLATES:
        assert f'"model_cards/{name}" = "{inside}/{name}"' in text
    assert '"/model_cards"' in text.partition("[tool.hatch.build.targets.sdist]")[2].partition("[tool.")[0]


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["wheel", "sdist"])
def test_a_built_package(tmp_path: Path, steps: str) -> None:
    pytest.importorskip("hatchling")
    root, tree = ROOT, tmp_path / "tree"
    if steps == "sdist":
        sdist = importlib.import_module("hatchling.builders.sdist").SdistBuilder(str(root))
        archive = next(sdist.build(directory=str(tmp_path / "dist"), versions=["standard"]))
        subprocess.run(["tar", "-xf", archive, "-C", str(tmp_path)], check=True)
        root = next(tmp_path.glob("transplant_hf-*"))
    wheel = importlib.import_module("hatchling.builders.wheel").WheelBuilder(str(root))
    with zipfile.ZipFile(next(wheel.build(directory=str(tmp_path / "dist"), versions=["standard"]))) as archive:
        names = archive.namelist()
        archive.extractall(tree)
    assert {name for name in names if name.endswith(".md")} == {f"transplant_hf/cards/templates/{n}" for n in TEMPLATES}
    run = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "PYTHONPATH": str(tree)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(tree / "transplant_hf" / "cards" / "templates")

"""Every notebook in docs/ runs from its first cell to its last, against the stand-in Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import ALICE, HubServer

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow  # minutes each; a stage of .ci/run
@pytest.mark.hub
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(
    path: Path, hub: HubServer, as_user: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    as_user(ALICE)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "python-source" in "".join(str(cell.get("outputs", "")) for cell in notebook.cells)

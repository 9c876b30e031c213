"""The site builds without a warning and without a connection, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import DOCS, ROOT

PAGES = sorted(path for path in (*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")))


@pytest.fixture(scope="module")
def hooks() -> Any:
    """What the build adds to the pages."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (the extra `docs`)")
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def links_of(page: Path) -> Iterator[str]:
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", prose)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_every_file_that_a_page_links_to_is_there(page: Path) -> None:
    missing = [target for target in links_of(page) if not (page.parent / target).exists()]
    assert not missing


def test_every_picture_is_shown() -> None:
    shown = {(page.parent / target).resolve() for page in PAGES for target in links_of(page)}
    assert {path for path in (DOCS / "img").iterdir()} <= shown


def relinked(hooks: Any, page: str, markdown: str) -> str:
    class Page:
        class file:  # noqa: N801
            src_uri = page

    return str(hooks.on_page_markdown(markdown, Page))


def test_links_lead_to_pages_of_the_site(hooks: Any) -> None:
    for page, link, wanted in (
        ("training.md", "[b](../benchmarks/README.md#training)", "[b](benchmarks.md#training)"),
        ("training.md", "[n](notebooks/text_to_donor.ipynb)", "[n](notebooks/text_to_donor.md)"),
        ("notebooks/text_to_donor.md", "[t](../training.md)", "[t](../training.md)"),
        ("api/errors.md", "[f](../faq.md#files)", "[f](../faq.md#files)"),
        ("overview.md", "[d](docs/design.md)", "[d](design.md)"),
        ("overview.md", "![p](docs/img/sweep.png)", "![p](img/sweep.png)"),
        ("overview.md", "[CONTRIBUTING.md](CONTRIBUTING.md)", "[CONTRIBUTING.md](contributing.md)"),
        ("benchmarks.md", "[t](../docs/training.md)", "[t](training.md)"),
        # Files that the site does not have are named, broken links stay for mkdocs to refuse.
        ("benchmarks.md", "[load.py](load.py)", "load.py (`benchmarks/load.py`)"),
        ("contributing.md", "[`Makefile`](Makefile)", "`Makefile`"),
        ("training.md", "[x](no/such.md)", "[x](no/such.md)"),
        ("training.md", "[x](../../outside.md)", "[x](../../outside.md)"),
        ("training.md", "[x](https://arxiv.org/abs/2601.13580)", "[x](https://arxiv.org/abs/2601.13580)"),
        ("training.md", "```\n[b](../benchmarks/README.md)\n```", "```\n[b](../benchmarks/README.md)\n```"),
    ):
        assert relinked(hooks, page, link) == wanted, (page, link)


def test_the_help_of_every_command_is_a_page(hooks: Any) -> None:
    page = hooks.command_line_page()
    commands = re.findall(r"^## (\S+)$", page, re.MULTILINE)
    assert {"demo", "convert", "inspect", "check", "extract", "train", "recover", "sweep", "evaluate"} <= set(commands)
    assert page.count("example:\n  transplant-hf ") == len(commands)


def build(tree: Path, site: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(tree)}
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the site is made from."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (the extra `docs`)")
    pytest.importorskip("material", reason="mkdocs-material is not installed (the extra `docs`)")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed (the extra `docs`)")
    tree = tmp_path_factory.mktemp("tree")
    for path in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml", ROOT / "LICENSE", ROOT / "Makefile"):
        shutil.copy(path, tree)
    for name in ("docs", "transplant_hf", "benchmarks", "conversion_scripts", "examples", "model_cards", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


@pytest.mark.slow
def test_the_site_builds_and_fetches_nothing(tree: Path, tmp_path: Path) -> None:
    done = build(tree, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//[^>]*>", html), page
    for name in ("site_hooks.py", "site_docstrings.py"):
        assert not (tmp_path / "site" / name).exists()
    reference = (tmp_path / "site" / "api" / "models.html").read_text(encoding="utf-8")
    assert 'id="transplant_hf.AutoModelWithTransplant.from_pretrained"' in reference
    assert 'id="transplant_hf.model.surface.TransplantMixin.disable_transplants"' in reference


@pytest.mark.slow
def test_broken_links_are_errors(tree: Path, tmp_path: Path) -> None:
    page = tree / "docs" / "index.md"
    whole = page.read_text(encoding="utf-8")
    broken = ("[x](no_such_page.md)", "[x](load.md#no-such-heading)", "[x](../no_such_file.md)")
    page.write_text("\n".join((whole, *broken)), encoding="utf-8")
    try:
        done = build(tree, tmp_path / "site")
    finally:
        page.write_text(whole, encoding="utf-8")
    assert done.returncode == 1
    assert all(name in done.stderr for name in ("no_such_page.md", "#no-such-heading", "no_such_file.md")), done.stderr
    assert "Aborted with 3 warnings" in done.stdout + done.stderr

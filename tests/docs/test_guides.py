"""Every block of code in the guides runs, in the order of the page, or says why a test does not run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2LMHeadModel

from tests.docs.pages import DOCS, ROOT, Block, blocks_of, make_desk, publish_desk, run_block
from tests.helpers import copied
from tests.hub_server import ALICE, HubServer

# Pages whose blocks are run here, but for those that say why not.
GUIDES = ("getting_started", "load", "convert", "training", "compose", "hot_changes", "export", "scale")
# Blocks of them that are not run here, by the beginning of one of their lines.
LEFT_OUT = {
    "vllm serve": "needs vLLM",
    "python llama.cpp": "needs llama.cpp; tests/ecosystem/test_gguf.py runs it where it is",
    "import runpy": "the same",
    "from transformers.distributed": "needs several processes; tests/ecosystem/test_distributed.py has them",
    "from torch.distributed": "the same",
}
# Pages that are tested elsewhere as a whole.
ELSEWHERE = {
    "ecosystem": "it is generated from a test run",
    "architectures": "it is generated from a test run",
    "design": "it shows how things hang together, in no language that runs",
    "faq": "tests/docs/test_faq.py provokes what it quotes",
}

pytestmark = pytest.mark.hub


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_desk(tmp_path_factory.mktemp("made"))


@pytest.fixture
def desk(made: Path, hub: HubServer, as_user: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    as_user(ALICE)
    publish_desk(made, hub)
    monkeypatch.chdir(copied(made, tmp_path / "desk"))
    return tmp_path / "desk"


def test_no_page_is_forgotten() -> None:
    for page in sorted(DOCS.glob("*.md")):
        left = [block for block in blocks_of(page) if block.is_run]
        assert not left or page.stem in {*GUIDES, *ELSEWHERE}, f"{page.name}:{left[0].line} is run by no test"


@pytest.mark.parametrize("guide", GUIDES[1:])
def test_every_block_runs(guide: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = blocks_of(DOCS / f"{guide}.md")
    assert any(block.is_run for block in blocks)
    known: dict[str, Any] = {}
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if not block.is_run or any(line.startswith(tuple(LEFT_OUT)) for line in block.code.splitlines()):
            continue
        printed = run_block(block, known, capsys)
        if after is not None and after.language == "text":  # what the page says that the block prints
            assert after.code.strip() in printed, f"{block.page}:{after.line}\n{printed}"


def test_the_getting_started_page(desk: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    known: dict[str, Any] = {}
    printed = [run_block(block, known, capsys) for block in blocks_of(DOCS / "getting_started.md") if block.is_run]
    assert isinstance(known["model"], GPT2LMHeadModel)
    assert known["model"].layer_map.layers_of("gpt2-manual") == [6, 12]
    assert "perplexity" in printed[1]
    assert "class ArgumentParser" in printed[-1]
    assert known["writer"].model.transplant_config.recipient == "openai-community/gpt2"
    assert known["writer"].model.transplant_config.recipient_revision


def as_script(blocks: list[Block]) -> str:
    """The page as one script for bash."""
    parts = ["set -euo pipefail"]
    for block in blocks:
        if block.language == "python":
            parts.append(f"python - <<'PYTHON'\n{block.code}PYTHON\n")
        elif block.language == "bash" and "hf auth login" not in block.code:
            parts.append(block.code)
    return "\n".join(parts)


@pytest.mark.slow
def test_the_getting_started_page_in_a_new_environment(desk: Path) -> None:
    """From `pip install` to a pushed donor, as the page says; pip needs its index or its cache."""
    script = as_script(blocks_of(DOCS / "getting_started.md"))
    install = "pip install -c constraints.txt ."
    assert script.count(install) == 1
    script = script.replace(install, f"(cd {ROOT} && {install} -q)").replace(
        "python3 -m venv", f"{sys.executable} -m venv"
    )
    settings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=settings, timeout=3000, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"layers run: 12 recipient, 2 gpt2-manual", done.stdout), done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith("class ArgumentParser"), done.stdout

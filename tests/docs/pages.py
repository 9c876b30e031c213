"""Pages of the documentation as blocks of code, and how a test runs them."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import (
    copied,
    edit_json,
    make_family,
    tiny_gpt2_model,
    tiny_gpt_oss_model,
    tiny_llama_model,
    write_tokenizer,
)
from tests.hub_server import HubServer
from transplant_hf import Donor
from transplant_hf.cli import main

__all__ = ["DOCS", "ROOT", "Block", "blocks_of", "make_desk", "publish_desk", "run_block"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LAYERS = [4, 5, 6]

_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code on a page.

    Args:
        page: The page's path inside the repository.
        line: Where it begins.
        language: As the fence says.
        code: What stands in it.
        reason: Why it is not run, where it is not.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def is_run(self) -> bool:
        """Whether a test has to run it."""
        return self.language in ("bash", "python") and self.reason is None


def blocks_of(path: Path) -> list[Block]:
    """Return the blocks of a page, in order; what looks like the account of a user is the stand-in Hub's."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(
            path.relative_to(ROOT).as_posix(),
            text.count("\n", 0, found.start("code")),
            found["language"],
            found["code"].replace("user/", "alice/"),
            found["reason"],
        )
        for found in _BLOCK.finditer(text)
    ]


def make_desk(folder: Path) -> Path:
    """Make what the guides speak of: texts, a `.pt` file, `recipient` with its donors `law` and `code`.

    In `made`, what `publish_desk` puts on the Hub: a small `openai-community/gpt2` and two donors. Returns the folder.
    """
    fields: dict[str, Any] = {"n_layer": 12, "n_positions": 256}
    recipient = tiny_gpt2_model(seed=6, **fields)
    recipient.generation_config.max_new_tokens = 8
    recipient.save_pretrained(folder / "made" / "recipient")
    write_tokenizer(folder / "made" / "recipient")
    for seed, name in enumerate(("gpt2-law", "gpt2-code"), 7):
        donor = Donor.from_model(tiny_gpt2_model(seed=seed, **fields), layers=LAYERS, name=name)
        donor.save_pretrained(folder / "made" / name, position=10, recipient="openai-community/gpt2")
        write_tokenizer(folder / "made" / name)
    tiny_gpt_oss_model(seed=9, num_hidden_layers=6).config.save_pretrained(folder / "made" / "gpt-oss")
    source = tiny_gpt2_model(seed=7, **fields)
    torch.save([source.transformer.h[n].state_dict() for n in LAYERS], folder / "donor_layers.pt")
    make_family(folder, tiny_llama_model)  # `recipient`
    edit_json(folder / "donor" / "config.json", recipient="../recipient")
    for name in ("law", "code"):
        edit_json(copied(folder / "donor", folder / name) / "donor_config.json", name=name)
    for name in ("law.txt", "law-test.txt", "wikitext.txt", "general-test.txt"):
        (folder / name).write_text("The court holds that the contract is void. " * 10, encoding="utf-8")
    return folder


def publish_desk(folder: Path, hub: HubServer) -> None:
    """Put models and donors on the Hub."""
    for name, repo in (("recipient", "openai-community/gpt2"), ("gpt-oss", "openai/gpt-oss-20b")):
        hub.add_repo(repo, folder / "made" / name)
    for name in ("gpt2-law", "gpt2-code"):
        hub.add_repo(f"alice/{name}", folder / "made" / name)


def run_block(block: Block, known: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a block in the current folder and return what it printed; Python blocks of a page share their names."""
    if block.language == "python":
        # Lines are counted as on the page.
        exec(compile("\n" * block.line + block.code, block.page, "exec"), known)  # noqa: S102 - our own page
        return capsys.readouterr().out
    printed = ""
    for command in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(command, comments=True)
        if words[:1] == ["transplant-hf"]:
            status = main(words[1:])
            said = capsys.readouterr()
            assert status == 0, f"{command}\n{said.err}"
            printed += said.out
        elif words:
            run = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
            done = subprocess.run(["bash", "-ec", run], capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            printed += done.stdout
    return printed

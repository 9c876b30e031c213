"""Fixtures of all tests.

The first thing that happens is that this process is pointed at a stand-in Hub: no test can reach the network, and
nobody's own cache or token is used.
"""

from __future__ import annotations

from tests.hub_server.client import start_session_server

HUB = start_session_server()

# ruff: noqa: E402 - huggingface_hub reads its settings when it is imported, so the stand-in comes first
import gc
import itertools
import logging as stdlib_logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from tests.helpers import BUILDERS, Shelf, copied, make_family
from tests.hub_server import ENDPOINT, HubServer

# For models this small a second thread costs more than it brings, most of all on a busy machine.
torch.set_num_threads(1)
logging.disable_progress_bar()
_number = itertools.count()


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections, which take a sixth of the time otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GPT-2 `recipient/`, a `source/` and a `donor/` of its layers 1 and 2; not to be changed."""
    return make_family(tmp_path_factory.mktemp("gpt2"), BUILDERS["gpt2"])


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with Llama models."""
    return make_family(tmp_path_factory.mktemp("llama"), BUILDERS["llama"])


@pytest.fixture(scope="session")
def tiny_gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with GPT-OSS models, whose layers are sliding and full in turn."""
    return make_family(tmp_path_factory.mktemp("gpt_oss"), BUILDERS["gpt_oss"])


@pytest.fixture(params=["gpt2", "gpt_oss", pytest.param("llama", marks=pytest.mark.slow)])
def tiny(request: pytest.FixtureRequest) -> Path:
    """Each of the three families; many tests of `tiny_llama` alone run by default."""
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture
def family(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the Llama family, to be changed."""
    return copied(tiny_llama, tmp_path / "family")


@pytest.fixture(scope="session")
def inverse_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 whose attention is scaled by the layer's number, which no native configuration of a transplant can say."""
    return make_family(tmp_path_factory.mktemp("inverse"), BUILDERS["gpt2"], scale_attn_by_inverse_layer_idx=True)


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The shared models and texts; tests that need them are skipped where they are not."""
    folder = Path(os.environ.get("TRANSPLANT_HF_SHARED") or Path(__file__).parents[2] / "shared")
    if not (folder / "models").is_dir():
        pytest.skip(f"no shared models in {folder}; set TRANSPLANT_HF_SHARED")
    return folder


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What the package warns of, in order; Transformers' loggers do not reach pytest's own capture."""
    seen: list[str] = []
    handler = stdlib_logging.Handler(stdlib_logging.WARNING)
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = stdlib_logging.getLogger("transplant_hf")
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own of one mebibyte, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"no disk can be mounted here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """The stand-in Hub this process talks to, empty."""
    if ENDPOINT:
        pytest.skip(f"needs the stand-in's users, faults and request log, which {ENDPOINT} does not offer")
    HUB.reset()
    yield HUB
    assert not HUB.crashes, "\n".join(HUB.crashes)


@pytest.fixture
def shelf(hub: HubServer, tiny_llama: Path, tmp_path: Path) -> Shelf:
    """Nothing published yet."""
    number = next(_number)
    return Shelf(hub, copied(tiny_llama, tmp_path / "family"), f"alice/base-{number}", f"alice/law-{number}")


@pytest.fixture
def both(shelf: Shelf) -> Shelf:
    """Recipient and donor published, open to all."""
    return shelf.put_base().put_law()


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Log in as a user; nobody before that."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield lambda token: monkeypatch.setenv("HF_TOKEN", token)

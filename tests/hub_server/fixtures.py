"""Pytest fixtures of the test Hub. Use them with `pytest_plugins = ("tests.hub_server.fixtures",)`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .client import json_result, run_with_hub, start_session_server
from .script import run_script
from .server import HubServer

__all__ = [
    "hub_cache",
    "hub_server",
    "json_result",
    "run_script",
    "run_with_hub",
    "small_hub",
    "start_session_server",
]


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    """An empty Hub of a test's own. The test fails if an endpoint crashed meanwhile."""
    with HubServer() as server:
        yield server
        crashes = server.crashes
    assert not crashes, "\n".join(crashes)


@pytest.fixture
def small_hub() -> Iterator[HubServer]:
    """A Hub whose limits are so low that a few kilobytes meet all of them.

    The test also fails if the client asked for an endpoint that the server does not have.
    """
    with HubServer(lfs_threshold=1000, multipart_threshold=6000, part_size=2500, page_size=3) as server:
        yield server
        crashes, unrouted = server.crashes, server.requests.unrouted()
    assert not crashes, "\n".join(crashes)
    assert not unrouted, unrouted


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A folder for the `HF_HOME` of several runs."""
    return tmp_path / "hf-home"

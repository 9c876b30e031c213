"""The example app in a real browser: what a person does, and what stands on the page then."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.examples.conftest import PROMPT
from transplant_hf.evaluation import perplexity

pytest.importorskip("gradio", reason="the example app needs gradio")
sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")

ROOT = Path(__file__).parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome")
# Without its own business, so that every request that is seen is the page's.
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.slow  # the app starts as a process of its own, and the browser too

PATIENCE = 60_000  # milliseconds, for a busy machine


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = os.environ.get("TRANSPLANT_HF_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium found; name one in TRANSPLANT_HF_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the app serves its tiny models."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scratch, log = tmp_path_factory.mktemp("scratch"), tmp_path_factory.mktemp("app") / "log"
    with log.open("w") as output:
        app = subprocess.Popen(
            [sys.executable, ROOT / "examples" / "app.py", "--tiny", "--port", str(port)],
            stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
        )  # fmt: skip
    deadline = time.monotonic() + 120
    try:
        while not _answers(port):
            assert app.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        app.terminate()
        assert app.wait(timeout=60) == 0, log.read_text()
    assert not list(scratch.glob("tiny-donors-*"))
    assert "Traceback" not in log.read_text(), log.read_text()


def _answers(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


class Visitor:
    """A person at the page, in a browser window of their own that reaches this machine alone."""

    def __init__(self, chromium: Any, address: str) -> None:
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self.page = chromium.new_context(viewport={"width": 1180, "height": 860}).new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._look(request.url, urlsplit(address).netloc))
        self.page.goto(address)

    def _look(self, url: str, host: str) -> None:
        if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).netloc != host:
            self.elsewhere.append(url)

    def pick(self, name: str, recommended: int) -> None:
        """Pick a donor, and wait until everything on the page says so."""
        self.page.locator("#donor input").click()
        self.page.get_by_role("option", name=name).click()
        self.sees("#stack", f" {name}")
        self.sees("#facts", f"Recommended position: {recommended}.")
        sync_api.expect(self._field("position")).to_have_value(str(recommended), timeout=PATIENCE)

    def turn(self, slider: str, value: float) -> None:
        self._field(slider).fill(str(value))
        self._field(slider).press("Tab")
        sync_api.expect(self._field(slider)).to_have_value(str(value), timeout=PATIENCE)

    def _field(self, slider: str) -> Any:
        return self.page.locator(f"#{slider} input[type=number]")

    def write(self, prompt: str = PROMPT) -> None:
        self.page.locator("#prompt textarea").fill(prompt)
        self.page.locator("#write").click()

    def reads(self, side: str, text: str) -> None:
        """Wait until one side holds exactly this text."""
        sync_api.expect(self.page.locator(f"#{side} textarea")).to_have_value(text, timeout=PATIENCE)

    def sees(self, place: str, text: str) -> None:
        sync_api.expect(self.page.locator(place)).to_contain_text(text, timeout=PATIENCE)

    def written(self, side: str) -> str:
        return self.page.locator(f"#{side} textarea").input_value()

    def sees_layers(self, layer_map: Any) -> None:
        """Wait until the picture shows these layers."""
        expected = [f"{number}{slot.source} {slot.index}" for number, slot in enumerate(layer_map)]
        sync_api.expect(self.page.locator("#stack .layer")).to_have_text(expected, timeout=PATIENCE)


@pytest.fixture
def visitors(chromium: Any, address: str) -> Iterator[Callable[[], Visitor]]:
    """Make visitors; afterwards no page may have complained or asked another host for anything."""
    made: list[Visitor] = []

    def come() -> Visitor:
        made.append(Visitor(chromium, address))
        return made[-1]

    yield come
    for visitor in made:
        visitor.page.context.close()
        assert visitor.complaints == []
        assert visitor.elsewhere == []


def test_donor_position_and_strength(visitors: Callable[[], Visitor], reference: Callable[..., Any]) -> None:
    visitor = visitors()
    visitor.sees_layers(reference("law", 3).model.layer_map)
    visitor.sees("body", "Weights are random")
    visitor.turn("tokens", 16)
    visitor.write()
    visitor.reads("recipient", reference().continued(16))
    visitor.reads("transplant", reference("law", 3).continued(16))

    visitor.pick("code", 5)
    moved = reference("code", 2, 0.5)
    visitor.turn("position", 2)
    visitor.sees_layers(moved.model.layer_map)
    visitor.turn("strength", 0.5)
    visitor.write()
    visitor.reads("transplant", moved.continued(16))
    visitor.reads("recipient", reference().continued(16))
    visitor.sees_layers(moved.model.layer_map)

    visitor.turn("strength", 0)
    visitor.write()
    visitor.reads("transplant", reference().continued(16))
    visitor.reads("recipient", reference().continued(16))


def test_a_donor_that_does_not_fit(visitors: Callable[[], Visitor], reference: Callable[..., Any]) -> None:
    visitor = visitors()
    visitor.pick("too-wide", 2)
    visitor.sees("#stack [role=alert]", "hidden_size: donor 48, recipient 32")
    visitor.write()
    visitor.sees(".toast-body", "does not fit recipient")
    visitor.sees(".toast-body", "hidden_size: donor 48, recipient 32")
    visitor.pick("law", 3)
    visitor.turn("tokens", 8)
    visitor.write()
    visitor.reads("transplant", reference("law", 3).continued(8))


def test_two_visitors(visitors: Callable[[], Visitor], reference: Callable[..., Any]) -> None:
    """One model, and each gets their own donor and position."""
    first, second = visitors(), visitors()
    second.pick("code", 5)
    for visitor, donor, position in ((first, "law", 0), (second, "code", 6)):
        visitor.turn("position", position)
        visitor.sees_layers(reference(donor, position).model.layer_map)
        visitor.turn("tokens", 48)
    first.write()
    second.write()
    first.reads("transplant", reference("law", 0).continued(48))
    second.reads("transplant", reference("code", 6).continued(48))
    for visitor in (first, second):
        visitor.reads("recipient", reference().continued(48))


def test_stop(visitors: Callable[[], Visitor], reference: Callable[..., Any]) -> None:
    visitor = visitors()
    visitor.turn("tokens", 2048)
    visitor.write()
    # In one step: before the generation ends by itself.
    visitor.page.wait_for_function(
        "document.querySelector('#transplant textarea').value && !document.querySelector('#stop').click()"
    )
    visitor.page.wait_for_timeout(1000)
    stopped = visitor.written("transplant")
    visitor.page.wait_for_timeout(1000)
    assert visitor.written("transplant") == stopped
    assert len(stopped) < 2048  # every token is at least a letter
    visitor.turn("position", 1)  # a move waits for what runs
    visitor.turn("tokens", 4)
    visitor.write()
    visitor.reads("transplant", reference("law", 1).continued(4))


def test_perplexity(visitors: Callable[[], Visitor], reference: Callable[..., Any]) -> None:
    visitor, text = visitors(), "the clerk said that the record was in the other room."
    visitor.page.get_by_text("Perplexity of a text").click()
    visitor.page.locator("#text textarea").fill(text)
    visitor.page.locator("#measure").click()
    for which, row in (((), "recipient"), (("law", 3), "with law")):
        other = reference(*which)
        found = perplexity(other.model, other.tokenizer(text, return_tensors="pt").input_ids[0])
        visitor.sees(f"#table tr:has-text('{row}')", str(found))

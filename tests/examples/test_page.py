"""What the controls of the example app do, without a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.examples.conftest import PROMPT

gradio = pytest.importorskip("gradio", reason="the example app needs gradio")

from examples.donor_app.engine import Engine  # noqa: E402
from examples.donor_app.page import Page  # noqa: E402


@pytest.fixture
def page(tiny_folder: Path) -> Page:
    return Page(Engine(str(tiny_folder / "recipient"), [str(tiny_folder / name) for name in ("law", "too-wide")]))


def test_pick(page: Page) -> None:
    position, strength, known, picture = page.pick("law")
    assert (position, strength) == (3, 1.0)
    assert known == "Layers 2 to 3 of its source model. Recommended position: 3."
    assert "law 2" in picture
    page.engine.donors["law"] = page.engine.donors["law"].replaced(position=None, mode="replace")
    position, strength, known, _ = page.pick("law")
    assert (position, strength) == (6, 1.0)
    assert "No position is recommended." in known
    assert "meant to replace layers" in known


def test_preview(page: Page) -> None:
    assert page.preview("law", 2.0, 0.5).index("recipient 1") < page.preview("law", 2.0, 0.5).index("law 2")
    refusal = page.preview("too-wide", 2, 1)
    assert 'role="alert"' in refusal
    assert "hidden_size: donor 48, recipient 32" in refusal
    assert "the position must be a number from 0 to 6, got 9" in page.preview("law", 9, 1)


def test_write(page: Page, reference: Callable[..., Any]) -> None:
    *_, (left, right, picture) = page.write(PROMPT, "law", 2.0, 0.5, 6.0, 0.0, 0.0)
    assert left == reference().continued(6)
    assert right == reference("law", 2, 0.5).continued(6)
    assert picture == page.preview("law", 2.0, 0.5)


def test_refusals_are_messages(page: Page) -> None:
    with pytest.raises(gradio.Error) as caught:
        list(page.write(PROMPT, "too-wide", 2, 1, 4, 0, 0))
    assert "hidden_size: donor 48, recipient 32<br>" in caught.value.message
    assert not caught.value.print_exception
    with pytest.raises(gradio.Error, match="the prompt is empty"):
        list(page.write("", "law", 2, 1, 4, 0, 0))
    with pytest.raises(gradio.Error, match="the text is empty"):
        list(page.measure(" ", "law", 2, 1))


@pytest.mark.parametrize(
    ("position", "strength", "tokens", "temperature", "seed", "said"),
    [
        (None, 1, 4, 0, 0, "the position must be a number from 0 to 6, got nothing"),
        (7, 1, 4, 0, 0, "the position must be a number from 0 to 6, got 7"),
        (2, float("nan"), 4, 0, 0, "the strength must be a number from 0 to 2"),
        (2, 3, 4, 0, 0, "the strength must be a number from 0 to 2, got 3"),
        (2, 1, 0, 0, 0, "the number of new tokens must be a number at least 1"),
        (2, 1, 4, -1, 0, "the temperature must be a number at least 0"),
        (2, 1, 4, 1, -1, "the seed must be a number at least 0"),
        (2, 1, 4, 1, 2**64, "the seed must be at least 0, and no more than"),
    ],
)
def test_numbers_outside_their_sliders_are_refused(
    page: Page, position: Any, strength: Any, tokens: Any, temperature: Any, seed: Any, said: str
) -> None:
    with pytest.raises(gradio.Error, match=said):
        list(page.write(PROMPT, "law", position, strength, tokens, temperature, seed))


def test_no_earlier_answer_stands_under_a_refusal(page: Page) -> None:
    writing, measuring = page.write("", "law", 2, 1, 4, 0, 0), page.measure("", "law", 2, 1)
    assert next(writing)[:2] == ("", "")
    assert next(measuring) == ""
    for under_way in (writing, measuring):
        with pytest.raises(gradio.Error, match="is empty"):
            next(under_way)


def test_measure(page: Page) -> None:
    text = "the record was in the other room."
    before, after = page.engine.perplexities(text, page.choice("law", 2, 0.5))
    *_, table = page.measure(text, "law", 2, 0.5)
    assert f"| recipient | {before} |\n| with law | {after} |" in table
    assert f"{before.tokens} tokens" in table


def test_nothing_is_reported_to_others(page: Page) -> None:
    assert page.build().analytics_enabled is False


def test_the_command(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    import app

    monkeypatch.setattr(app.signal, "signal", lambda *_: None)
    for wrong in ([], ["--tiny", "recipient"], ["recipient"]):
        with pytest.raises(SystemExit) as stopped:
            app.main(wrong)
        assert stopped.value.code == 2
    capsys.readouterr()
    assert app.main([str(tiny_folder / "nowhere"), str(tiny_folder / "law")]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert app.main([str(tiny_folder / "recipient"), str(tiny_folder / "nothing")]) == 1
    assert capsys.readouterr().err.startswith("error: ")

"""The page: what a person sees and what each control does."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from transplant_hf import ConfigurationError, TransplantError

from .engine import AT_ONCE, Choice, Engine, Sampling
from .picture import STYLE, draw, refusal

__all__ = ["Page", "launch"]

MOST_STRENGTH = 2
_PAUSE = 0.1  # seconds between two pictures of what is written; a browser that draws more hears no clicks
_CSS = (
    STYLE
    + """
.answer textarea, .text textarea { font-family: var(--font-mono); font-size: 13px; }
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
"""
)


@contextmanager
def spoken() -> Iterator[None]:
    """Show what the package refuses as a message on the page."""
    try:
        yield
    except TransplantError as error:
        text = html.escape(str(error)).replace("\n", "<br>")
        raise gr.Error(text, duration=None, print_exception=False) from error


def number(value: float | None, what: str, least: float, most: float = math.inf) -> float:
    """Return a number from a control; one may also type beside a slider, or nothing at all.

    Raises:
        ConfigurationError: None, or outside the control's range.
    """
    if value is None or not least <= value <= most or math.isinf(value):
        limit = f"at least {least}" if math.isinf(most) else f"from {least} to {most}"
        raise ConfigurationError(f"{what} must be a number {limit}, got {'nothing' if value is None else value}.")
    return float(value)


class Page:
    """What the controls do.

    Args:
        engine: The loaded model and its donors.
        note: A sentence to put at the top.
    """

    def __init__(self, engine: Engine, note: str = "") -> None:
        self.engine = engine
        self.note = note

    def pick(self, name: str) -> tuple[int, float, str, str]:
        """A donor was picked: its recommended position and strength, what is known of it, and the picture."""
        donor = self.engine.donors[name]
        wanted = self.engine.num_layers if donor.position is None else donor.position
        position = min(wanted, self.engine.num_layers)
        strength = donor.strength if donor.mode == "insert" else 1.0
        known = f"{_counted(donor.layer_indices)} of its source model. "
        known += "No position is recommended." if donor.position is None else f"Recommended position: {wanted}."
        if donor.mode != "insert":
            known += " It is meant to replace layers; here it is inserted, so that each call can leave it out."
        return position, strength, known, self.preview(name, position, strength)

    def choice(self, name: str, position: float | None, strength: float | None) -> Choice:
        """What the controls on the left say.

        Raises:
            ConfigurationError: A number that was typed beside a slider lies outside it.
        """
        place = number(position, "the position", 0, self.engine.num_layers)
        return Choice(name, int(place), number(strength, "the strength", 0, MOST_STRENGTH))

    def preview(self, name: str, position: float | None, strength: float | None) -> str:
        """The picture of what would run, or the reasons why it cannot."""
        try:
            choice = self.choice(name, position, strength)
            report = self.engine.check(choice)
        except TransplantError as error:
            return refusal(str(error))
        return draw(report.layer_map, choice.strength) if report.compatible else refusal(str(report))

    def write(
        self,
        prompt: str,
        name: str,
        position: float | None,
        strength: float | None,
        tokens: float | None,
        temperature: float | None,
        seed: float | None,
    ) -> Iterator[tuple[str, str, str]]:
        """Both answers as they grow, and the picture of what ran."""
        state, shown = ("", "", self.preview(name, position, strength)), -math.inf
        yield state  # so that no earlier answer stands under a refusal
        with spoken():
            choice = self.choice(name, position, strength)
            sampling = Sampling(
                int(number(tokens, "the number of new tokens", 1)),
                number(temperature, "the temperature", 0),
                int(number(seed, "the seed", 0)),
            )
            for answers in self.engine.answers(prompt, choice, sampling):
                state = answers.recipient, answers.transplant, draw(answers.layer_map, choice.strength)
                if time.monotonic() - shown > _PAUSE:
                    yield state
                    shown = time.monotonic()
        yield state  # the last one, shown or not

    def measure(self, text: str, name: str, position: float | None, strength: float | None) -> Iterator[str]:
        """Perplexities of a text, as a table."""
        yield ""  # so that no earlier table stands under a refusal
        with spoken():
            before, after = self.engine.perplexities(text, self.choice(name, position, strength))
        yield (
            f"| | perplexity |\n|---|---|\n| recipient | {before} |\n| with {name} | {after} |\n\n"
            f"{before.tokens} tokens were predicted."
        )

    def build(self) -> gr.Blocks:
        """Lay the page out."""
        engine, names = self.engine, list(self.engine.donors)
        position, strength, known, drawn = self.pick(names[0])
        most = min(2048, (engine.room or 1024) // 2)  # leaves as much for the prompt
        with gr.Blocks(title="Recipient and transplant", analytics_enabled=False) as page:
            gr.Markdown(
                "# Recipient and transplant, side by side\n"
                f"Recipient: `{engine.recipient}`, {engine.num_layers} layers. {self.note}"
            )
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=280):
                    donor = gr.Dropdown(names, value=names[0], label="Donor", elem_id="donor")
                    facts = gr.Markdown(known, elem_id="facts")
                    place = gr.Slider(
                        0, engine.num_layers, position, step=1, label="Position", elem_id="position",
                        info="Recipient layers that run before the donor",
                    )  # fmt: skip
                    dial = gr.Slider(
                        0, MOST_STRENGTH, strength, step=0.05, label="Strength", elem_id="strength",
                        info="0 is exactly the recipient",
                    )  # fmt: skip
                    picture = gr.HTML(drawn, elem_id="stack")
                with gr.Column(scale=5):
                    prompt = gr.Textbox("Once upon a time", label="Prompt", lines=2, elem_id="prompt")
                    with gr.Row():
                        tokens = gr.Slider(
                            1, most, min(60, most), step=1, label="New tokens", info="At most", elem_id="tokens"
                        )
                        heat = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 is greedy", elem_id="heat")
                        seed = gr.Number(
                            0, label="Seed", info="Same luck on both sides", precision=0, minimum=0, elem_id="seed"
                        )
                    with gr.Row():
                        go = gr.Button("Write", variant="primary", scale=4, elem_id="write")
                        stop = gr.Button("Stop", scale=1, elem_id="stop")
                    with gr.Row():
                        left = self._answer("Recipient", "recipient")
                        right = self._answer("Transplant", "transplant")
                    with gr.Accordion("Perplexity of a text", open=False):
                        text = gr.Textbox(label="Text", lines=4, max_length=20_000, elem_id="text", elem_classes="text")
                        measure = gr.Button("Measure", size="md", elem_id="measure")
                        table = gr.Markdown(elem_id="table")
            chosen = [donor, place, dial]
            donor.input(self.pick, donor, [place, dial, facts, picture], show_progress="hidden")
            for slider in (place, dial):
                slider.input(self.preview, chosen, picture, show_progress="hidden", trigger_mode="always_last")
            writing = gr.on(
                [go.click, prompt.submit],
                self.write,
                [prompt, *chosen, tokens, heat, seed],
                [left, right, picture],
                show_progress="minimal",
                show_progress_on=[left, right],
                concurrency_limit=AT_ONCE,
            )
            stop.click(None, cancels=writing)
            measure.click(self.measure, [text, *chosen], table, concurrency_limit=AT_ONCE)
        return page

    @staticmethod
    def _answer(label: str, name: str) -> gr.Textbox:
        return gr.Textbox(label=label, lines=14, max_lines=14, interactive=False, elem_id=name, elem_classes="answer")


def _counted(layers: list[int]) -> str:
    return f"Layer {layers[0]}" if len(layers) == 1 else f"Layers {layers[0]} to {layers[-1]}"


def launch(page: Page, host: str, port: int | None) -> Any:
    """Serve the page from this machine alone: no telemetry, no link to the outside, nothing kept in the browser."""
    system = ("system-ui", "sans-serif")
    theme = gr.themes.Base(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=system,
        font_mono=("ui-monospace", "monospace"),
    )  # fmt: skip
    return page.build().launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        footer_links=[],
        theme=theme,
        css=_CSS,
    )

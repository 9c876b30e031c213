"""The stack of layers as a small picture in HTML."""

from __future__ import annotations

import html
import itertools

from transplant_hf import LayerMap

__all__ = ["STYLE", "draw"]

_LONG = 10  # recipient layers in a row, of which only the ends are drawn

STYLE = """
.stack { display: flex; flex-direction: column; gap: 3px; font-size: 13px; font-family: var(--font-mono); }
.stack .layer { display: flex; justify-content: space-between; padding: 2px 10px; border-radius: 4px;
                background: color-mix(in srgb, #0d9488 16%, transparent); border-left: 4px solid #0d9488; }
.stack .donor { margin-left: 18px; border-left-color: #ea580c;
                background: color-mix(in srgb, #ea580c calc(8% + 30% * var(--strength)), transparent); }
.stack .gap { text-align: center; opacity: .6; }
.stack .sum { margin-top: 4px; opacity: .75; }
.refusal { white-space: pre-wrap; overflow-wrap: anywhere; padding: 8px 12px; border-left: 4px solid #dc2626;
           background: color-mix(in srgb, #dc2626 10%, transparent); border-radius: 4px; font-size: 13px; }
"""


def draw(layer_map: LayerMap, strength: float = 1.0) -> str:
    """Draw which layers run, first to last from the top; a donor's color is as strong as its strength."""
    rows: list[str] = []
    numbered = list(enumerate(layer_map))
    for source, run in itertools.groupby(numbered, key=lambda layer: layer[1].source):
        layers = [_row(number, slot.source, slot.index) for number, slot in run]
        if source == "recipient" and len(layers) > _LONG:
            layers[2:-2] = [f'<div class="gap">⋮ {len(layers) - 4} more</div>']
        rows += layers
    counts = ", ".join(f"{len(layer_map.layers_of(source))} {html.escape(source)}" for source in layer_map.sources)
    shade = min(max(abs(strength), 0.0), 1.0)
    return (
        f'<div class="stack" style="--strength: {shade:.2f}">{"".join(rows)}'
        f'<div class="sum">{len(layer_map)} layers: {counts}</div></div>'
    )


def refusal(text: str) -> str:
    """What stands in the picture's place where a donor does not fit."""
    return f'<div class="refusal" role="alert">{html.escape(text)}</div>'


def _row(number: int, source: str, index: int) -> str:
    kind = "layer" if source == "recipient" else "layer donor"
    return f'<div class="{kind}"><span>{number}</span><span>{html.escape(source)} {index}</span></div>'

"""What a run of the demo found, and how it is printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from textwrap import indent
from typing import Any

from .stages import Stage

__all__ = ["DemoReport", "PerplexityRow", "Sample", "print_report"]


@dataclass(frozen=True)
class PerplexityRow:
    """Perplexity of one model on the held-out text of both domains.

    Args:
        model: Which model.
        english: Perplexity on English.
        source: Perplexity on Python source.
    """

    model: str
    english: float
    source: float


@dataclass(frozen=True)
class Sample:
    """One prompt continued by both models, greedily.

    Args:
        domain: Domain of the prompt.
        prompt: The prompt.
        before: Continuation by the recipient alone.
        after: Continuation with the donor.
    """

    domain: str
    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class DemoReport:
    """Everything the demo measured.

    Args:
        folder: The demo's folder.
        recipient: The recipient's folder.
        donor: The donor's folder.
        recipient_parameters: Number of the recipient's parameters.
        donor_parameters: Number of the donor's parameters.
        position: Number of recipient layers that run before the donor.
        layer_map: Picture of the running layers.
        layers: Source and index of each running layer, in order.
        held_out_tokens: Number of held-out tokens of each domain.
        perplexities: Untouched recipient, with the donor, and with the donor switched off, in this order.
        samples: Prompts and continuations.
        stages: Recipient and donor, with their times.
        seconds: Wall time of this run, in seconds.
    """

    folder: str
    recipient: str
    donor: str
    recipient_parameters: int
    donor_parameters: int
    position: int
    layer_map: str
    layers: tuple[tuple[str, int], ...]
    held_out_tokens: dict[str, int]
    perplexities: tuple[PerplexityRow, ...]
    samples: tuple[Sample, ...]
    stages: tuple[Stage, ...]
    seconds: float

    @property
    def recipient_unchanged(self) -> bool:
        """Whether switching the donor off gives exactly the recipient's perplexities."""
        untouched, _, switched_off = self.perplexities
        return (untouched.english, untouched.source) == (switched_off.english, switched_off.source)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values.

        Returns:
            A dictionary that `json.dumps` accepts.
        """
        return {**asdict(self), "recipient_unchanged": self.recipient_unchanged}


def print_report(report: DemoReport) -> None:
    """Print a report to standard output.

    Args:
        report: The report.
    """
    for sample in report.samples:
        _heading(f"{sample.domain}, prompt: {sample.prompt!r}")
        print("Recipient alone:")
        print(indent(sample.prompt + sample.before, "    ", lambda line: True))
        print("\nWith the donor:")
        print(indent(sample.prompt + sample.after, "    ", lambda line: True))
    _heading("Perplexity on held-out text (lower is better)")
    width = max(len(row.model) for row in report.perplexities)
    print(f"{'':{width}}  {'English':>10}  {'Python source':>14}")
    for row in report.perplexities:
        print(f"{row.model:{width}}  {row.english:10.2f}  {row.source:14.2f}")
    before, after, _ = report.perplexities
    print(
        f"\nThe donor changes perplexity by {after.source / before.source - 1:+.1%} on Python source and by "
        f"{after.english / before.english - 1:+.1%} on English;"
    )
    verdict = "equals" if report.recipient_unchanged else "DIFFERS FROM"
    print(f"switched off, the model {verdict} the recipient.")
    tokens = ", ".join(f"{count:,} tokens of {domain}" for domain, count in report.held_out_tokens.items())
    print(f"Held-out text: {tokens}.")
    _heading("Layers, in running order")
    print(report.layer_map)
    print(
        f"\nRecipient: {report.recipient_parameters:,} parameters. Donor at position {report.position}: "
        f"{report.donor_parameters:,} parameters."
    )
    _heading("Time")
    for stage in report.stages:
        made = "made earlier, in" if stage.reused else "made in"
        print(f"{stage.name:<10} {made} {stage.seconds:.0f} s ({stage.cpu_seconds:.0f} s of processor time)")
    print(f"{'this run':<10} {report.seconds:.0f} s")
    _heading("Files")
    print(f"recipient  {report.recipient}")
    print(f"donor      {report.donor}")
    print("\nUse the donor from Python:\n")
    print("    import transplant_hf")
    print("    from transformers import pipeline")
    print(f'    generate = pipeline("text-generation", model={report.donor!r})')


def _heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")

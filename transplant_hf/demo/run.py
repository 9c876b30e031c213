"""The demo from start to end: recipient, donor, and what the donor changes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, Pipeline, PreTrainedModel, pipeline

from ..outputs import check_output_folder
from .budget import DemoBudget
from .donor import DONOR_NAME, build_donor
from .evaluate import perplexity
from .recipient import build_recipient
from .report import DemoReport, PerplexityRow, Sample
from .stages import check_stage, clear_stage, is_stage, run_stage
from .texts import load_texts
from .threads import quickest_threads
from .tokenizer import encode_stream

__all__ = ["PROMPTS", "run_demo"]

_REPETITION_PENALTY = 1.15

PROMPTS = (
    ("English", "If the value of the expression is"),
    ("Python source", "class Message:\n    def __init__(self,"),
)


def run_demo(
    folder: Path,
    *,
    fresh: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    budget: DemoBudget | None = None,
) -> DemoReport:
    """Train a recipient and a donor on this machine and measure what the donor changes.

    What an earlier run with the same budget and the same Python installation finished is reused.

    Args:
        folder: Where `recipient` and `donor` are written.
        fresh: Make both anew.
        overwrite: Write into a folder that holds other files; these stay.
        quiet: Show no progress of the training on standard error.
        budget: Sizes and steps; the default takes about three minutes on two CPU cores.

    Returns:
        The report; `print_report` prints it.

    Raises:
        TransplantError: Texts are missing in this Python installation, or a folder is in the way.
    """
    start = time.perf_counter()
    budget = budget or DemoBudget()
    # Resolved, so that what the donor notes of its recipient does not depend on the working directory.
    folder = Path(folder).expanduser().resolve()
    earlier = folder.is_dir() and any(map(is_stage, folder.iterdir()))
    check_output_folder(folder, overwrite or earlier)
    for name in ("donor", "recipient"):
        # Both are checked before any time is spent.
        check_stage(folder, name)
    if fresh:
        clear_stage(folder, "donor")
        clear_stage(folder, "recipient")
    texts = load_texts(budget)
    fingerprint = budget.fingerprint(texts.digest())
    recipient_folder, donor_folder = folder / "recipient", folder / "donor"
    recipient_stage = run_stage(
        folder,
        "recipient",
        fingerprint,
        lambda place: build_recipient(texts, budget, place, quiet),
        in_place=False,
    )
    if not recipient_stage.reused:
        # A donor belongs to the weights it was trained in.
        clear_stage(folder, "donor")
    donor_stage = run_stage(
        folder,
        "donor",
        fingerprint,
        lambda place: build_donor(texts, budget, recipient_folder, place, quiet),
        # `Donor.save_pretrained` writes whole or not at all, and names the recipient relative to its folder.
        in_place=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(recipient_folder)
    english = encode_stream(tokenizer, texts.english.held_out_texts())
    source = encode_stream(tokenizer, texts.source.held_out_texts())

    def row(name: str, model: PreTrainedModel) -> PerplexityRow:
        return PerplexityRow(
            name, perplexity(model, english, budget.context), perplexity(model, source, budget.context)
        )

    untouched = AutoModelForCausalLM.from_pretrained(recipient_folder)
    generate = pipeline("text-generation", model=str(donor_folder))
    # Any: Transformers types a model's own methods too loosely.
    model: Any = generate.model
    with quickest_threads(lambda: perplexity(untouched, english[: 8 * budget.context], budget.context)):
        rows = [row("recipient, untouched", untouched), row("recipient with donor", model)]
        with model.disable_transplants():
            rows.append(row("donor switched off", model))
            before = [_continue(generate, prompt, budget.new_tokens) for _, prompt in PROMPTS]
        after = [_continue(generate, prompt, budget.new_tokens) for _, prompt in PROMPTS]
    recipient_parameters = untouched.num_parameters()
    return DemoReport(
        folder=str(folder),
        recipient=str(recipient_folder),
        donor=str(donor_folder),
        recipient_parameters=recipient_parameters,
        donor_parameters=model.num_parameters() - recipient_parameters,
        position=min(model.layer_map.layers_of(DONOR_NAME)),
        layer_map=str(model.layer_map),
        layers=tuple((str(name), int(index)) for name, index in model.layer_map),
        held_out_tokens={texts.english.name: len(english) - 1, texts.source.name: len(source) - 1},
        perplexities=tuple(rows),
        samples=tuple(
            Sample(domain, prompt, *pair)
            for (domain, prompt), pair in zip(PROMPTS, zip(before, after, strict=True), strict=True)
        ),
        stages=(recipient_stage, donor_stage),
        seconds=time.perf_counter() - start,
    )


def _continue(generate: Pipeline, prompt: str, new_tokens: int) -> str:
    """Continue a prompt greedily, and return what was added."""
    [answer] = generate(
        prompt,
        max_new_tokens=new_tokens,
        do_sample=False,
        # Greedy continuations of small models go round in circles otherwise.
        repetition_penalty=_REPETITION_PENALTY,
        return_full_text=False,
    )
    return str(answer["generated_text"])

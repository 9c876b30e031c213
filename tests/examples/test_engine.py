"""The engine of the example app: its answers are those of the public API, whoever else asks at the same time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.donor_app.engine import Answers, Choice, Engine, OneDraw, Sampling
from tests.examples.conftest import PROMPT
from tests.helpers import refused
from transplant_hf import AutoModelWithTransplant, CompatibilityError, ConfigurationError, DataError
from transplant_hf.evaluation import perplexity


@pytest.fixture
def engine(tiny_folder: Path) -> Engine:
    return Engine(str(tiny_folder / "recipient"), [str(tiny_folder / name) for name in ("law", "code", "too-wide")])


def last(engine: Engine, choice: Choice, sampling: Sampling, prompt: str = PROMPT) -> Answers:
    *_, answers = engine.answers(prompt, choice, sampling)
    return answers


def test_both_answers(engine: Engine, reference: Callable[..., Any]) -> None:
    for choice in (Choice("law", 3), Choice("law", 1), Choice("code", 6, 0.5), Choice("law", 1, 0.25)):
        found = last(engine, choice, Sampling(12))
        other = reference(choice.donor, choice.position, choice.strength)
        assert found.recipient == reference().continued(12)
        assert found.transplant == other.continued(12) != found.recipient
        assert found.layer_map == other.model.layer_map
        assert str(found.layer_map) == str(engine.check(choice).layer_map)


def test_answers_grow_token_by_token(engine: Engine) -> None:
    steps = list(engine.answers(PROMPT, Choice("law", 3), Sampling(8)))
    assert len(steps) == 8
    for earlier, later in itertools.pairwise(steps):
        assert later.recipient.startswith(earlier.recipient)
        assert later.transplant.startswith(earlier.transplant)


def test_strength_0_is_the_recipient(engine: Engine, reference: Callable[..., Any]) -> None:
    found = last(engine, Choice("law", 3, 0.0), Sampling(12))
    assert found.transplant == found.recipient == reference().continued(12)
    found = last(engine, Choice("law", 3, 0.0), Sampling(12, temperature=1.5, seed=3))
    assert found.transplant == found.recipient != reference().continued(12)


def test_sampling_is_repeated_by_its_seed(engine: Engine) -> None:
    choice = Choice("code", 2)
    first, again, other = (last(engine, choice, Sampling(12, 1.0, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.recipient != other.recipient
    assert first.transplant != other.transplant


def test_draws_follow_the_softmax() -> None:
    logits, temperature, draws = torch.tensor([[1.0, 0.0, -1.0, 2.0]]), 0.7, 4000
    processor = OneDraw(Sampling(temperature=temperature, seed=0))
    ids = torch.zeros(1, 1, dtype=torch.long)
    counts = torch.bincount(torch.stack([processor(ids, logits).argmax() for _ in range(draws)]), minlength=4)
    torch.testing.assert_close(counts / draws, (logits[0] / temperature).softmax(-1), atol=0.02, rtol=0)


def test_many_at_a_time(engine: Engine, reference: Callable[..., Any]) -> None:
    """Other donors, strengths and positions meanwhile, and each gets what it would get alone."""
    choices = [Choice("law", 3), Choice("code", 5, 0.5), Choice("law", 0), Choice("code", 5), Choice("law", 3, 0.0)] * 2
    with ThreadPoolExecutor(len(choices)) as visitors:
        found = list(visitors.map(lambda choice: last(engine, choice, Sampling(16)), choices))
    alone = reference().continued(16)
    for choice, answers in zip(choices, found, strict=True):
        assert answers.recipient == alone
        assert answers.transplant == reference(choice.donor, choice.position, choice.strength).continued(16)
        assert answers.layer_map.layers_of(choice.donor) == [choice.position, choice.position + 1]


def test_who_goes_away_ends_the_generation(engine: Engine, reference: Callable[..., Any]) -> None:
    steps: list[Any] = []
    engine.model.lm_head.register_forward_hook(lambda *_: steps.append(None))
    answers = engine.answers(PROMPT, Choice("law", 3), Sampling(400))
    next(answers)
    answers.close()
    # Another position: this waits for the first to end.
    assert last(engine, Choice("law", 1), Sampling(4)).transplant == reference("law", 1).continued(4)
    assert len(steps) < 200


def test_a_donor_that_does_not_fit(engine: Engine, reference: Callable[..., Any]) -> None:
    choice = Choice("too-wide", 2)
    with refused(CompatibilityError, "too-wide", "hidden_size: donor 48, recipient 32", "layers of the same shape"):
        last(engine, choice, Sampling(4))
    assert not engine.check(choice).compatible
    assert last(engine, Choice("law", 3), Sampling(4)).transplant == reference("law", 3).continued(4)
    with refused(CompatibilityError, "hidden_size: donor 48, recipient 32"):
        last(engine, choice, Sampling(4))
    assert last(engine, Choice("law", 3), Sampling(4)).transplant == reference("law", 3).continued(4)


def test_prompts_that_cannot_be_continued(engine: Engine) -> None:
    with refused(DataError, "the prompt is empty"):
        last(engine, Choice("law", 3), Sampling(4), prompt="")
    with refused(DataError, "with 4090 new ones", "more than the 4096"):
        last(engine, Choice("law", 3), Sampling(4090), prompt="the court " * 20)


def test_perplexities(engine: Engine, reference: Callable[..., Any]) -> None:
    text = "the clerk said that the record was in the other room."
    before, after = engine.perplexities(text, Choice("law", 2, 0.5))
    stream = engine.tokenizer(text, return_tensors="pt").input_ids[0]
    assert before.nll == pytest.approx(perplexity(reference().model, stream).nll, rel=1e-6)
    assert after.nll == pytest.approx(perplexity(reference("law", 2, 0.5).model, stream).nll, rel=1e-6)
    with refused(DataError, "the text is empty"):
        engine.perplexities("", Choice("law", 2))


def test_what_cannot_be_started(tiny_folder: Path, tmp_path: Path) -> None:
    recipient, law = str(tiny_folder / "recipient"), str(tiny_folder / "law")
    with refused(ConfigurationError, "two donors are named 'law'", law):
        Engine(recipient, [law, law])
    AutoModelWithTransplant.from_pretrained(law).save_pretrained(tmp_path / "thin", thin=True)
    Engine(recipient, [law]).tokenizer.save_pretrained(tmp_path / "thin")
    with refused(ConfigurationError, f"{tmp_path / 'thin'} holds donors already", recipient):
        Engine(str(tmp_path / "thin"), [law])


def test_a_donor_that_is_meant_to_replace_layers_is_inserted(engine: Engine) -> None:
    engine.donors["law"] = engine.donors["law"].replaced(mode="replace")
    assert len(last(engine, Choice("law", 3), Sampling(2)).layer_map) == 8

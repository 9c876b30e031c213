"""Requests of a server as rows of one batch."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.architectures.matrix import prepare
from tests.helpers import refused, two_donors
from tests.model.test_routing import signed as signed
from tests.model.test_routing import text_of
from transplant_hf import AutoModelWithTransplant, ConfigurationError, DonorSpec
from transplant_hf.serving.batches import MOST_ROWS, Batches, separates_rows

A, B, BOTH, NONE = {"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 0.5}, dict[str, float]()
CHOICES = [A, B, BOTH, NONE]
PROMPTS = [[5], [7, 8, 9, 10], [11] * 12, [3, 4]]


@pytest.fixture(params=["gpt2", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> Any:
    return two_donors(request.getfixturevalue(f"tiny_{request.param}")).eval()


both = pytest.mark.parametrize("model", ["gpt2", "gpt_oss"], indirect=True)


class Requests:
    """Requests in threads of their own, and the rows of each call of `generate`."""

    def __init__(self, model: Any) -> None:
        self.model, self.batches = model, Batches(model, ThreadPoolExecutor(1).submit)
        self.rows: list[list[int]] = []  # tokens without padding, by call
        self.before: Callable[[int], None] = lambda number: None
        self.generate, model.generate = model.generate, self._generate
        self.pool = ThreadPoolExecutor(32)

    def _generate(self, **given: Any) -> Any:
        mask = given.get("attention_mask")
        self.rows.append(mask.sum(1).tolist() if mask is not None else [0])
        self.before(len(self.rows))
        return self.generate(**given)

    def ask(self, choice: Any, prompt: list[int], new: int = 8, **given: Any) -> Future[list[int]]:
        config = copy.deepcopy(self.model.generation_config)
        streamer = given.pop("streamer", None)
        config.update(max_new_tokens=new, **given)
        ids = torch.tensor([prompt])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "generation_config": config}
        return self.pool.submit(lambda: self.batches.generate(choice, streamer, **inputs)[0].tolist())

    def expected(self, choice: Any, prompt: list[int], new: int = 8, **given: Any) -> list[int]:
        with self.model.using(choice):
            ids = self.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=0, **given)
        return ids[0].tolist()  # type: ignore[no-any-return]

    def wait_for(self, count: int) -> None:
        """Wait until as many requests wait for the batch."""
        end = time.monotonic() + 60
        while len(self.batches._waiting) != count:
            assert time.monotonic() < end
            time.sleep(0.001)

    @contextmanager
    def first_held(self) -> Iterator[threading.Event]:
        """Hold the first call of `generate` until the end of the block; yields what says that it has begun."""
        began, go = threading.Event(), threading.Event()

        def before(number: int) -> None:
            if number == 1:
                began.set()
                assert go.wait(60)

        self.before = before
        try:
            yield began
        finally:
            go.set()


@pytest.fixture
def requests(model: Any) -> Iterator[Requests]:
    made = Requests(model)
    yield made
    made.pool.shutdown()


def several(requests: Requests, work: list[Any], **given: Any) -> list[Future[list[int]]]:
    """Ask for the first alone, and for the others once it runs."""
    with requests.first_held() as began:
        asked = [requests.ask(*work[0], **given)]
        assert began.wait(60)
        asked += [requests.ask(*one, **given) for one in work[1:]]
        requests.wait_for(len(work) - 1)
    return asked


@both
def test_requests_with_different_donors_are_one_batch(requests: Requests) -> None:
    work = [(choice, prompt, 4 + n) for n, choice in enumerate(CHOICES) for prompt in PROMPTS[: 4 - n // 3]]
    right = [requests.expected(*one) for one in work]
    assert len({tuple(ids) for ids in right}) > 8
    assert [one.result(60) for one in several(requests, work)] == right
    assert max(len(rows) for rows in requests.rows) >= len(work) - 1  # the first may have ended


def test_requests_join_a_batch_that_runs(requests: Requests) -> None:
    long = requests.expected(A, [5], 40), requests.expected(B, [6, 7], 40)
    asked = [requests.ask(A, [5], 40), requests.ask(B, [6, 7], 40)]
    assert requests.ask(NONE, [9]).result(60) == requests.expected(NONE, [9])
    assert [one.result(60) for one in asked] == [*long]


def test_no_more_rows_than_allowed(requests: Requests) -> None:
    work = [(CHOICES[n % 4], [n + 3]) for n in range(MOST_ROWS + 6)]
    right = [requests.expected(*one) for one in work]
    assert [one.result(60) for one in several(requests, work)] == right
    assert max(len(rows) for rows in requests.rows) == MOST_ROWS


def test_a_row_ends_at_its_own_token(requests: Requests) -> None:
    end = requests.expected(A, PROMPTS[1], 8)[6]
    requests.model.generation_config.eos_token_id = [end, 0]
    work = [(choice, prompt) for choice in CHOICES for prompt in PROMPTS]
    right = [requests.expected(*one) for one in work]
    assert len({len(ids) - len(prompt) for ids, (_, prompt) in zip(right, work, strict=True)}) > 1
    assert [one.result(60) for one in several(requests, work)] == right


@both
def test_a_row_at_the_limit_of_the_model_does_not_end_the_others(requests: Requests) -> None:
    work = [(A, [5], 1), (A, [5] * 60, 4), (B, [6], 50)]
    right = [requests.expected(*one) for one in work]
    assert [one.result(60) for one in several(requests, work)] == right


class Leaves:
    """The streamer of a client that leaves."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.tokens += tokens.tolist()
        if len(self.tokens) > 3:
            raise KeyError("left")

    def end(self) -> None:
        raise AssertionError


def test_a_client_that_leaves_ends_its_row_only(requests: Requests) -> None:
    with requests.first_held() as began:
        asked = requests.ask(A, [5], 40, streamer=Leaves())
        assert began.wait(60)
        other = requests.ask(B, [6], 3)
        requests.wait_for(1)
    with pytest.raises(KeyError):
        asked.result(60)
    assert other.result(60) == requests.expected(B, [6], 3)


def test_a_donor_is_removed_after_the_rows_that_run_and_before_those_that_wait(requests: Requests) -> None:
    first, third = requests.expected(A, [5], 20), requests.expected(B, [7], 4)
    with requests.first_held() as began:
        asked = [requests.ask(A, [5], 20)]
        assert began.wait(60)
        removed = requests.pool.submit(requests.model.remove_donor, "a")
        while not requests.batches._calls.change_waits:
            time.sleep(0.001)
        asked += [requests.ask(A, [6], 4), requests.ask(B, [7], 4)]
        requests.wait_for(2)
    assert asked[0].result(60) == first
    removed.result(60)
    with refused(ConfigurationError, "'a'"):
        asked[1].result(60)
    assert asked[2].result(60) == third


def test_a_batch_that_fails_costs_one_request_its_answer(requests: Requests) -> None:
    work = [(A, [5], 2), (A, [6], 8), (B, [7, 8], 8), (NONE, [9] * 5, 8)]
    right = [requests.expected(*one) for one in work]
    native = requests.generate

    def generate(input_ids: torch.Tensor, **given: Any) -> Any:
        if (input_ids == 9).any():
            raise RuntimeError("out of memory")
        return native(input_ids=input_ids, **given)

    requests.generate = generate
    asked = several(requests, work)
    assert [one.result(60) for one in asked[:3]] == right[:3]
    with pytest.raises(RuntimeError, match="out of memory"):
        asked[3].result(60)
    assert requests.ask(B, [7, 8]).result(60) == right[2]
    assert requests.ask(B, [7, 8]).result(60) == right[2]


@pytest.mark.parametrize(
    "given",
    [
        {"do_sample": True, "top_k": 1},
        {"repetition_penalty": 3.0},
        {"num_beams": 2},
        {"stop_strings": ["a"]},
        {"cache_implementation": "static"},
    ],
)
def test_other_settings_are_no_part_of_the_batch(requests: Requests, given: dict[str, Any]) -> None:
    with requests.first_held() as began:
        first = requests.ask(A, [5], 6)
        assert began.wait(60)
        tokenizer = {"tokenizer": None} if "stop_strings" in given else {}
        other = requests.ask(B, [6], 6, **given)
        if tokenizer:
            with pytest.raises(ValueError, match="tokenizer"):  # it got as far as generate
                other.result(60)
        else:
            with requests.model.using(B):
                ids = requests.generate(torch.tensor([[6]]), max_new_tokens=6, pad_token_id=0, **given)
            assert other.result(60) == ids[0].tolist()
        assert not first.done()
    assert first.result(60) == requests.expected(A, [5], 6)


def test_requests_that_sample_alike_are_one_batch(requests: Requests) -> None:
    work = [(choice, prompt) for choice in CHOICES for prompt in PROMPTS]
    right = [requests.expected(*one) for one in work]
    asked = several(requests, work, do_sample=True, top_k=1, temperature=0.5)  # one token to draw from
    assert [one.result(60) for one in asked] == right
    assert max(len(rows) for rows in requests.rows) >= len(work) - 1  # the first may have ended


def test_requests_whose_donors_choose_themselves(signed: Path) -> None:
    specs = [DonorSpec(str(signed / name), position=1) for name in ("low", "high")]
    requests = Requests(AutoModelWithTransplant.from_pretrained(signed / "recipient", donors=specs).eval())
    prompts = [text_of(kind, 1, 32, 11)[0].tolist() for kind in ("low", "high", "general")]
    work = [({"low": 1.0}, [5]), *(("auto", prompt) for prompt in prompts), (NONE, [6])]
    right = [requests.expected(*one) for one in work]
    assert [one.result(60) for one in several(requests, work)] == right
    assert max(len(rows) for rows in requests.rows) >= len(work) - 1  # the first may have ended


@both
def test_rows_are_separate(model: Any) -> None:
    assert separates_rows(model)


def test_requests_of_a_model_that_reads_padding_run_beside(tmp_path: Path) -> None:
    prepare("rwkv", tmp_path)
    model = AutoModelWithTransplant.from_pretrained(tmp_path / "donor", dtype=torch.float32).eval()
    assert not separates_rows(model)
    requests = Requests(model)
    choice = model.strengths
    work = [(choice, [5, 6]), (NONE, [5, 6]), (choice, [7])]
    right = [requests.expected(*one) for one in work]
    with requests.first_held() as began:
        asked = [requests.ask(*work[0])]
        assert began.wait(60)
        asked += [requests.ask(*one) for one in work[1:]]
        assert [one.result(60) for one in asked[1:]] == right[1:]
        assert not asked[0].done()
    assert asked[0].result(60) == right[0]
    assert [len(rows) for rows in requests.rows] == [1, 1, 1]

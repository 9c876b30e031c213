"""Requests that come at the same time are rows of one batch, each with its own donors.

A batch is a series of calls of `generate` inside `using(rows=[...])`, in one thread; the threads of the requests wait
for their tokens. A call ends early so that later requests can join, and the next call begins with the texts so far.
That needs no change of a cache, at the price of reading the texts again.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import torch
from transformers.utils import logging

from ..architecture import max_context_length
from ..errors import ConfigurationError
from ..model.active_donors import state_of
from ..model.routing import AUTO

Choice = dict[str, float] | str  # what `using` takes: strengths by donor, or AUTO
MOST_ROWS = 16
_BESIDE = 4  # requests that run at the same time beside the batch
# Requests wait until the steps of a call took this many times as long as its prompts, which bounds what joining costs.
_STEPS_TO_PROMPTS = 3.0
# Settings that look at nothing but the logits of a row; others may look at the padding before its text.
_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "typical_p"}
_BY_LOGITS = {*_SAMPLING, "do_sample", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache"}
_NO_EFFECT = {
    **{"num_beams": 1, "num_return_sequences": 1, "min_length": 0, "no_repeat_ngram_size": 0},
    **{"repetition_penalty": 1.0, "length_penalty": 1.0, "cache_implementation": "hybrid"},
}

logger = logging.get_logger(__name__)


@dataclasses.dataclass(eq=False)
class Row:
    """A request in the batch."""

    choice: dict[str, float]  # strengths by donor
    ids: list[int]  # tokens so far
    missing: int  # how many tokens may follow
    last: Collection[int | None]  # tokens that end it
    config: Any  # how its tokens are chosen
    ended: bool = False
    # Its new tokens; `None` says that no more come from the batch.
    found: SimpleQueue[int | None] = dataclasses.field(default_factory=SimpleQueue)

    def add(self, token: int) -> None:
        """Add a token to its text."""
        self.ids.append(token)
        self.missing -= 1
        self.found.put(token)
        if not self.missing or token in self.last:
            self.ended = True
            self.found.put(None)


class Batches:
    """Generates for the requests of a server; `submit` runs a function in the thread of the batch."""

    def __init__(self, model: Any, submit: Callable[[Callable[[], None]], Future[None]]) -> None:
        self._model, self._submit, self._calls = model, submit, state_of(model).calls
        self._possible = separates_rows(model)
        self._beside = threading.Semaphore(_BESIDE)
        self._lock = threading.Lock()
        # Of the batch: its settings, `None` if there is none; its rows; and those that will join it.
        self._settings: dict[str, Any] | None = None
        self._rows: list[Row] = []
        self._waiting: list[Row] = []

    def generate(self, choice: Choice, streamer: Any = None, **given: Any) -> torch.Tensor:
        """Generate for one request, with others if possible; returns `[1, tokens]`."""
        row = self._add(choice, **given) if self._possible else None
        if row is None:
            with self._beside, self._model.using(choice):
                return self._model.generate(streamer=streamer, **given)

        def stream(*tokens: int) -> None:
            if streamer is not None:
                streamer.put(torch.tensor(tokens))

        try:
            stream(*row.ids[: given["input_ids"].shape[1]])  # as `generate` does; streamers leave out the prompt
            for token in iter(row.found.get, None):
                stream(token)
            if not row.ended:  # the batch failed; an error that belongs to this request comes again
                with self._beside:
                    self._generate([row], lambda: False)
                for token in iter(row.found.get, None):
                    stream(token)
        finally:  # also for a client that left
            row.ended = True
        if streamer is not None:
            streamer.end()
        return torch.tensor([row.ids])

    def _add(self, choice: Choice, input_ids: torch.Tensor, generation_config: Any, **more: Any) -> Row | None:
        """Let a request wait for the batch; returns `None` if it cannot be a row of it."""
        others = {name for name, value in more.items() if value is not None} - {"attention_mask", "tokenizer"}
        settings = _settings(self._model.generation_config, generation_config)
        if others or settings is None or generation_config.max_new_tokens is None:
            return None
        if isinstance(choice, str):  # rows that name their donors and rows that do not cannot be in one batch
            with self._beside, self._calls.generation(), self._model.using(AUTO):
                self._model.generate(input_ids=input_ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
                (route,) = self._model.routes
                choice = {} if route.donor is None else {route.donor: self._model.strengths[route.donor]}
        last = settings.get("eos_token_id")
        last = last if isinstance(last, list) else [last]
        row = Row(choice, input_ids[0].tolist(), generation_config.max_new_tokens, last, generation_config)
        with self._lock:
            begins = self._settings is None
            if not begins and self._settings != settings:
                return None
            self._settings = settings
            self._waiting.append(row)
        if begins:
            self._submit(self._run).add_done_callback(self._leave_after_error)
        return row

    def _run(self) -> None:
        """Generate until no request waits."""
        while self._settings is not None:
            # Donors are changed between batches. While a change waits, no request joins.
            with self._calls.generation():
                while rows := self._joined():
                    self._generate(rows, self._joins)
            with self._lock:
                if not self._waiting:
                    self._settings = None

    def _joined(self) -> list[Row]:
        """The rows that have not ended and those that join them."""
        with self._lock:
            self._rows = [row for row in self._rows if not row.ended]
            room = 0 if self._calls.change_waits else MOST_ROWS - len(self._rows)
            joining, self._waiting = self._waiting[:room], self._waiting[room:]
            for row in joining:
                if row.ended or row.choice.keys() - self._model.strengths.keys():
                    row.found.put(None)  # `generate` refuses it if a donor was removed meanwhile
                else:
                    self._rows.append(row)
        return self._rows

    def _joins(self) -> bool:
        """Whether a request can join the batch."""
        running = sum(not row.ended for row in self._rows)
        return bool(self._waiting) and running < MOST_ROWS and not self._calls.change_waits

    def _leave_after_error(self, run: Future[None]) -> None:
        """After an error, which may belong to one of the requests, let each go on alone."""
        if (error := run.exception()) is None:
            return
        with self._lock:
            rows, self._rows, self._waiting, self._settings = [*self._rows, *self._waiting], [], [], None
        logger.warning(f"A batch failed, and each of its {len(rows)} requests goes on alone: {error}")
        for row in rows:
            row.found.put(None)

    def _generate(self, rows: Sequence[Row], joins: Callable[[], bool]) -> None:
        """Call `generate` once for several rows, until all have ended or a request joins them."""
        longest, limit = max(len(row.ids) for row in rows), max_context_length(self._model.config)
        config = copy.deepcopy(rows[0].config)
        config.max_new_tokens = max(row.missing for row in rows)
        if limit is not None:  # rows that ended grow too, as long as the call runs
            config.max_new_tokens = min(config.max_new_tokens, limit - longest)
        config.pad_token_id = config.pad_token_id or 0  # of rows that ended
        left = [longest - len(row.ids) for row in rows]
        ids = torch.tensor([[0] * n + row.ids for n, row in zip(left, rows, strict=True)], device=self._model.device)
        mask = (torch.arange(longest) >= torch.tensor(left)[:, None]).long().to(ids.device)
        began, until, stopped = time.monotonic(), 0.0, False

        def end(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            """Give the rows their tokens, and say which have ended: a criterion that `generate` asks at each step."""
            nonlocal until, stopped
            now = time.monotonic()
            until = until or now + _STEPS_TO_PROMPTS * (now - began)
            if not stopped:  # on some devices `generate` makes one step more
                for row, token in zip(rows, input_ids[:, -1].tolist(), strict=True):
                    if not row.ended:
                        row.add(token)
                stopped = now >= until and joins()
            return torch.tensor([stopped or row.ended for row in rows], device=input_ids.device)

        with self._model.using(rows=[row.choice for row in rows]):
            self._model.generate(input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=[end])


def _settings(of_model: Any, of_request: Any) -> dict[str, Any] | None:
    """What rows of one call of `generate` must have in common; `None` for settings that no batch can have."""
    found = of_model.to_dict() | {name: value for name, value in of_request.to_dict().items() if value is not None}
    left_out = {"max_length", "max_new_tokens", "transformers_version"}
    left_out |= set() if found["do_sample"] else _SAMPLING
    settings = {
        name: value
        for name, value in found.items()
        if name not in left_out and name[0] != "_" and value is not False and value not in (None, _NO_EFFECT.get(name))
    }
    return settings if settings.keys() <= _BY_LOGITS else None


def separates_rows(model: Any) -> bool:
    """Whether rows of a batch can have donors of their own and texts of different lengths.

    Padding is tried out: it must change the logits much less than tokens in its place do.
    """
    ids = torch.arange(16)[None] % model.config.get_text_config(decoder=True).vocab_size
    longer, ones = torch.nn.functional.pad(ids, (5, 0)), torch.ones_like(ids)
    tried = ((ids, ones), (longer, torch.nn.functional.pad(ones, (5, 0))), (longer, torch.ones_like(longer)))
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    try:
        with model.using(rows=[list(model.strengths), ()]):
            pass
        with model.using(list(model.strengths)):
            alone, padded, other = (
                model.generate(text.to(model.device), attention_mask=mask.to(model.device), **options).logits[0]
                for text, mask in tried
            )
    except (ConfigurationError, ValueError) as error:
        logger.warning(f"Requests are not batched, because rows of this model are not separate: {error}")
        return False
    return bool((padded - alone).abs().max() < 0.1 * (other - alone).abs().max())

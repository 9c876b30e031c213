"""One loaded model that answers with and without a donor, to several people at a time."""

from __future__ import annotations

import copy
import dataclasses
import math
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from transplant_hf import (
    CompatibilityReport,
    ConfigurationError,
    DataError,
    Donor,
    LayerMap,
    check_compatibility,
    transplant,
)
from transplant_hf.evaluation import Perplexity, perplexity

__all__ = ["AT_ONCE", "Answers", "Choice", "Engine", "Sampling"]

AT_ONCE = 4  # generations that run at the same time; further ones wait


@dataclasses.dataclass(frozen=True)
class Choice:
    """A donor and what to do with it.

    Args:
        donor: Its name.
        position: How many recipient layers run before it, 0..L.
        strength: How much of what it adds to the hidden state is kept.
    """

    donor: str
    position: int
    strength: float = 1.0


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        new_tokens: At most so many are written.
        temperature: 0 takes the likeliest token each time.
        seed: Of the draws at any other temperature.
    """

    new_tokens: int = 60
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for what, value, least, most in (
            ("the number of new tokens", self.new_tokens, 1, math.inf),
            ("the temperature", self.temperature, 0, sys.float_info.max),
            ("the seed", self.seed, 0, 2**63 - 1),
        ):
            if not least <= value <= most:
                raise ConfigurationError(f"{what} must be at least {least}, and no more than {most}, got {value}.")


@dataclasses.dataclass(frozen=True)
class Answers:
    """What both sides have written so far.

    Args:
        recipient: The recipient's continuation of the prompt.
        transplant: The continuation with the donor.
        layer_map: Which layers had a say in the second: the recipient's and the donor's.
    """

    recipient: str
    transplant: str
    layer_map: LayerMap


class Engine:
    """A recipient that is loaded once, and donors that are put into it when somebody first asks for them.

    Which donor counts, and how much, is chosen by call: requests with different donors run at the same time. Only the
    donors' positions belong to the model. A request that wants another one waits until the calls that run have ended.

    Args:
        recipient: Hub id or folder.
        donors: Hub ids or folders; only their headers are read here.
        revision: The recipient's branch, tag or commit.
        device: Where it runs.
        dtype: As in `from_pretrained`.

    Raises:
        TransplantError: A donor cannot be opened, or two have one name.
    """

    def __init__(
        self,
        recipient: str,
        donors: Sequence[str],
        revision: str | None = None,
        device: str = "cpu",
        dtype: str = "auto",
    ) -> None:
        self.recipient = recipient
        self.donors: dict[str, Donor] = {}
        for reference in donors:
            donor = Donor.from_pretrained(reference)
            name = donor.name or "donor"
            if name in self.donors:
                raise ConfigurationError(f"two donors are named {name!r}; {reference} is the second. Leave one out.")
            self.donors[name] = donor
        self.tokenizer = AutoTokenizer.from_pretrained(recipient, revision=revision)
        self.model = AutoModelForCausalLM.from_pretrained(recipient, revision=revision, dtype=dtype).to(device)
        if getattr(self.model, "transplant_config", None) is not None:
            raise ConfigurationError(
                f"{recipient} holds donors already. Name its recipient {self.model.transplant_config.recipient} "
                f"instead, and {recipient} among the donors."
            )
        self._config = copy.deepcopy(self.model.config)  # the recipient's own, whatever goes into the model later
        self._workers = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="generate")
        self._entrance = threading.Lock()
        self._left = threading.Condition()
        self._running = 0

    @property
    def num_layers(self) -> int:
        """L, the recipient's layers."""
        return int(self._config.get_text_config(decoder=True).num_hidden_layers)

    @property
    def room(self) -> int | None:
        """How many tokens the recipient can read, if its configuration says so."""
        return getattr(self._config.get_text_config(decoder=True), "max_position_embeddings", None)

    def check(self, choice: Choice) -> CompatibilityReport:
        """Say whether a donor fits at a position and what would run, from headers alone; the model is not touched."""
        return check_compatibility(self._config, self.donors[choice.donor], choice.position, "insert")

    def answers(self, prompt: str, choice: Choice, sampling: Sampling | None = None) -> Iterator[Answers]:
        """Continue a prompt without and with a donor, both in one batch, and yield what is written as it grows.

        Closing the iterator ends the generation.

        Raises:
            TransplantError: The donor does not fit, or the prompt is empty or too long.
        """
        sampling = sampling or Sampling()
        ids = self._encoded(prompt, sampling.new_tokens)
        heard: queue.SimpleQueue[Answers | None] = queue.SimpleQueue()
        gone = threading.Event()
        # A choice belongs to the thread that begins it, and an iterator may be continued in any.
        done = self._workers.submit(self._generate, ids, choice, sampling, heard, gone)
        done.add_done_callback(lambda _: heard.put(None))
        try:
            while (written := heard.get()) is not None:
                yield written
            done.result()
        finally:
            gone.set()

    def perplexities(self, text: str, choice: Choice) -> tuple[Perplexity, Perplexity]:
        """Measure the recipient and the transplant on a text.

        Raises:
            TransplantError: The donor does not fit, or there is nothing to predict.
        """
        if not text.strip():
            raise DataError("the text is empty: there is nothing to measure. Write or paste some.")
        stream = self.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        with self._arranged(choice):
            with self.model.using(()):
                before = perplexity(self.model, stream.long(), name="your text", quiet=True)
            with self.model.using({choice.donor: choice.strength}):
                return before, perplexity(self.model, stream.long(), name="your text", quiet=True)

    def _encoded(self, prompt: str, new_tokens: int) -> torch.Tensor:
        ids = self.tokenizer(prompt, return_tensors="pt", verbose=False).input_ids.long()
        if not prompt.strip() or ids.shape[1] == 0:  # a tokenizer may begin even nothing with a token
            raise DataError("the prompt is empty: there is nothing to continue. Write a few words.")
        if self.room is not None and ids.shape[1] + new_tokens > self.room:
            raise DataError(
                f"the prompt has {ids.shape[1]} tokens, and with {new_tokens} new ones that is more than the "
                f"{self.room} which the recipient can read. Shorten it, or ask for fewer."
            )
        return ids.to(self.model.device)

    def _generate(
        self,
        ids: torch.Tensor,
        choice: Choice,
        sampling: Sampling,
        heard: queue.SimpleQueue[Any],
        gone: threading.Event,
    ) -> None:
        with self._arranged(choice), self.model.using(rows=[None, {choice.donor: choice.strength}]):
            shown = LayerMap(slot for slot in self.model.layer_map if slot.source in ("recipient", choice.donor))

            def tell(tokens: torch.Tensor) -> bool:
                texts = self.tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
                heard.put(Answers(*texts, layer_map=shown))
                return gone.is_set()

            self.model.generate(
                ids.repeat(2, 1),
                attention_mask=torch.ones_like(ids).repeat(2, 1),
                max_new_tokens=sampling.new_tokens,
                do_sample=False,  # draws come from the processor, which has a generator of its own
                logits_processor=LogitsProcessorList([OneDraw(sampling)] if sampling.temperature else []),
                stopping_criteria=StoppingCriteriaList([Listener(tell)]),
            )

    @contextmanager
    def _arranged(self, choice: Choice) -> Iterator[None]:
        """Hold the model as it is, with the donor at its position, while the block runs."""
        with self._entrance, self._left:  # those who come later wait here, so that nobody waits for ever
            self._left.wait_for(lambda: self._running == 0 or self._stands(choice))
            if not self._stands(choice):
                self._place(choice)
            self._running += 1
        try:
            yield
        finally:
            with self._left:
                self._running -= 1
                self._left.notify_all()

    def _positions(self) -> dict[str, int]:
        config = getattr(self.model, "transplant_config", None)
        return {spec.name: spec.position for spec in config.donors} if config else {}

    def _stands(self, choice: Choice) -> bool:
        return self._positions().get(choice.donor) == choice.position

    def _place(self, choice: Choice) -> None:
        """Put a donor where it is wanted; nothing runs meanwhile."""
        held, donor = self._positions(), self.donors[choice.donor]
        if choice.donor in held:
            self.model.move_donor(choice.donor, choice.position)
        elif held:
            self.model.add_donor(donor, choice.position, "insert", name=choice.donor)
        else:
            transplant(self.model, donor, choice.position, name=choice.donor, in_place=True)


class OneDraw(LogitsProcessor):
    """Draws each next token from a generator of this call alone, with the same luck in every row.

    So calls do not disturb each other, and what differs between the rows is the donor's doing. The largest of logits
    with Gumbel noise is a draw from their softmax; greedy search takes it.

    Args:
        sampling: Temperature and seed.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._temperature = sampling.temperature
        self._luck = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = -torch.empty(scores.shape[-1]).exponential_(generator=self._luck).log()
        return scores.float() / self._temperature + noise.to(scores.device)


class Listener(StoppingCriteria):
    """Hears every token as it is written, and may end the generation.

    Args:
        tell: Takes the tokens so far, `[rows, tokens]`; returns whether to end.
    """

    def __init__(self, tell: Any) -> None:
        self._tell = tell

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._tell(input_ids), device=input_ids.device)

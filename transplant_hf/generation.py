"""Text that a model writes with its donors and without, side by side."""

from __future__ import annotations

import dataclasses
import os
import textwrap
from collections.abc import Sequence
from typing import Any

import torch

from .architecture import eval_mode, max_context_length
from .errors import ConfigurationError
from .evaluation.models_and_texts import find_tokenizer, model_to_measure
from .evaluation.reports import label_of

__all__ = ["Generation", "generate"]

_WIDTH = 96  # characters of two columns


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a model wrote after a prompt.

    Args:
        prompt: The prompt.
        texts: `{label: text}`: "with NAME" for the transplant, "recipient" for the model without its donors.
        chat: Whether the prompt was put into the tokenizer's chat template.
    """

    prompt: str
    texts: dict[str, str]
    chat: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if len(self.texts) == 1:
            # One text with the prompt before it; an answer in a chat stands alone.
            return ("" if self.chat else self.prompt) + next(iter(self.texts.values()))
        width = (_WIDTH - 3) // len(self.texts)
        columns = [[label, "-" * len(label), *_wrap(text, width)] for label, text in self.texts.items()]
        height = max(map(len, columns))
        rows = zip(*([*lines, *[""] * (height - len(lines))] for lines in columns), strict=True)
        head = [f"prompt: {self.prompt}", ""]
        return "\n".join([*head, *(" | ".join(cell.ljust(width) for cell in row).rstrip() for row in rows)])


def _wrap(text: str, width: int) -> list[str]:
    return [piece for line in text.splitlines() for piece in textwrap.wrap(line, width) or [""]]


def generate(
    model: str | os.PathLike[str],
    prompt: str,
    donors: Any = None,
    *,
    off: bool = False,
    max_new_tokens: int = 60,
    chat: bool | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> Generation:
    """Continue a prompt by greedy decoding, with the donors and without.

    Args:
        model: Hub id or folder of a donor, a transplant or a model.
        prompt: Text to continue, or the message to a chat model.
        donors: Donors for a plain model, as in `AutoModelWithTransplant.from_pretrained`.
        off: Generate without the donors only.
        max_new_tokens: The largest number of tokens to generate.
        chat: Put the prompt into the chat template; by default if the tokenizer has one.
        revision: The model's revision.
        **kwargs: As in `from_pretrained`.

    Returns:
        The texts; prints them side by side.

    Raises:
        ConfigurationError: The prompt is empty or too long, or there is no tokenizer or no chat template.
    """
    loaded = model_to_measure(model, revision, {**kwargs, **({"donors": donors} if donors else {})})
    tokenizer = find_tokenizer(loaded)
    chat = bool(tokenizer.chat_template) if chat is None else chat
    inputs = _encode(tokenizer, prompt, chat).to(loaded.model.device)
    length = inputs["input_ids"].shape[1]
    limit = max_context_length(loaded.model.config)
    if not length:
        raise ConfigurationError("the prompt is empty: there is nothing to continue.")
    if limit is not None and length + max_new_tokens > limit:
        raise ConfigurationError(
            f"the prompt has {length} tokens; with max_new_tokens={max_new_tokens} (--max-new-tokens) that is more "
            f"than the {limit} tokens the model can read. Use a shorter prompt or fewer new tokens."
        )
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def write() -> str:
        # None: greedy decoding has no use for the sampling settings that the model may recommend.
        settings = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        tokens = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, **settings)
        return str(tokenizer.decode(tokens[0, length:], skip_special_tokens=True))

    texts: dict[str, str] = {}
    names: Sequence[str] = list(getattr(loaded.model, "strengths", None) or ())
    with torch.inference_mode(), eval_mode(loaded.model):
        if names and not off:
            texts[label_of(names)] = write()
        if names:
            with loaded.model.disable_transplants():
                texts[label_of([])] = write()
        else:
            texts["model"] = write()
    return Generation(prompt, texts, chat)


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise ConfigurationError("the tokenizer of this model has no chat template; use chat=False (--no-chat).")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)

"""From what a caller names to what is measured: a loaded model, its tokenizer, and text as tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ConfigurationError, DataError
from ..model.opening import load_model, load_tokenizer
from ..sources import HubOptions
from ..texts import Blocks, TextSource, check_tokenizer, documents, encode, starting_token

__all__ = ["Opened", "Text", "find_tokenizer", "open_model", "read_text"]

Text = Blocks | torch.Tensor


class Opened:
    """A model, and where it came from.

    Args:
        model: The loaded model.
        reference: The Hub id or folder it was loaded from; `None` where it was loaded before.
        revision: Of that.
        hub: How to reach the Hub.
        gguf_file: The file there that it was read from, if it was one of that kind.
    """

    def __init__(
        self,
        model: Any,
        reference: str | None = None,
        revision: str | None = None,
        hub: HubOptions | None = None,
        gguf_file: str | None = None,
    ) -> None:
        self.model = model
        self.reference = reference
        self.revision = revision
        self.hub = hub or HubOptions()
        self.gguf_file = gguf_file

    @property
    def name(self) -> str:
        """What to call it: the last part of its name."""
        known = self.reference or getattr(self.model.config, "name_or_path", "") or type(self.model).__name__
        return os.path.basename(known.rstrip("/\\")) or known


def open_model(model: Any, revision: str | None = None, kwargs: Mapping[str, Any] | None = None) -> Opened:
    """Load what is named; what is loaded already stays as it is.

    Args:
        model: A model, or the Hub id or folder of one, of a transplant or of a donor.
        revision: Its revision, where it is named.
        kwargs: As in `from_pretrained`.

    Raises:
        ConfigurationError: Arguments for loading a model that is loaded already.
        TransplantError: It cannot be loaded.
    """
    kwargs = dict(kwargs or {})
    if isinstance(model, str | os.PathLike):
        reference = os.fspath(model)
        loaded = load_model(reference, revision=revision, keep_replaced=True, **kwargs)
        return Opened(loaded, reference, revision, HubOptions.from_kwargs(kwargs), kwargs.get("gguf_file"))
    if revision is not None or kwargs:
        given = ", ".join([*(["revision"] if revision is not None else []), *kwargs])
        raise ConfigurationError(f"{given}: these are for loading a model by its name, but a loaded model was given.")
    return Opened(model)


def find_tokenizer(opened: Opened) -> Any:
    """Load the tokenizer beside a model, or beside the recipient of a transplant.

    Raises:
        ConfigurationError: There is none.
    """
    places: list[tuple[str, str | None]] = []
    if opened.reference is not None:
        places.append((opened.reference, opened.revision))
    state = getattr(opened.model, "_transplant", None)
    if state is not None:
        places.append((state.blueprint.config.recipient, state.blueprint.config.recipient_revision))
    elif opened.reference is None:
        places.append((opened.model.config.name_or_path, None))
    for reference, revision in places:
        if not reference:
            continue
        found = load_tokenizer(reference, revision, opened.hub, opened.gguf_file)
        if found is not None:
            return found
    looked = ", ".join(reference for reference, _ in places if reference) or "a model without a name"
    raise ConfigurationError(f"there is no tokenizer in {looked}: pass tokenizer=.")


def read_text(
    text: Any,
    model: Any,
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    token: str | bool | None = None,
    quiet: bool = False,
) -> tuple[Text, int | None]:
    """Return text as tokens, and the token that goes before each window of it.

    Args:
        text: `Blocks`, a stream `[tokens]`, a `TextSource`, a file, folder or Hub id.
        model: The model that reads it.
        tokenizer: A function that returns the tokenizer, called where text must be encoded.
        max_tokens: Read no further.
        token: As in `from_pretrained`, for a dataset on the Hub.
        quiet: Show no progress bar.

    Raises:
        DataError: Text that is missing, empty or of another kind, or a tokenizer of another model.
    """
    if isinstance(text, torch.Tensor):
        return text[:max_tokens], None
    if isinstance(text, Blocks):
        return text if max_tokens is None else text.part(0, max(1, max_tokens // text.block_length)), None
    if isinstance(text, str | os.PathLike):
        text = TextSource.parse(os.fspath(text))
    if not isinstance(text, TextSource):
        raise DataError(
            f"a text is Blocks, a stream of tokens, a TextSource or the name of one, got {type(text).__name__}."
        )
    found = tokenizer()
    known = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    if known is not None:
        check_tokenizer(found, known, str(model.config.name_or_path or type(model).__name__))
    stream = encode(documents(text, token), found, max_tokens=max_tokens, name=str(text.name), quiet=quiet)
    return stream, starting_token(found)

"""Sign donors: record what the text of a donor's domain looks like where it enters the donor."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch

from .architecture import eval_mode
from .display import position_text, progress_bar
from .donor import DONOR_CONFIG, Donor, DonorRecord
from .donor.signature import PROBE_TOKENS, TOKENS, Discriminant, Signature, describe_rows
from .errors import ConfigurationError, DataError
from .evaluation.losses import check_tokenizer_of
from .evaluation.models_and_texts import LoadedModel, find_tokenizer, model_to_measure, untouched
from .numeric import whole_number
from .partial import hidden_states
from .sources import points_to_folder
from .storage import publish_file
from .texts import starting_token
from .texts.blocks import read_stream
from .texts.documents import check_texts

__all__ = ["SignReport", "sign"]

_MOST_TOKENS = 1 << 21
_HELD_OUT = 5  # every fifth row is only measured on


@dataclasses.dataclass(frozen=True)
class SignReport:
    """The result of `sign`.

    Args:
        donor: The donor's folder.
        position: The position that the signature is for.
        rows: How many rows of text and of general text it was made of.
        right: The shares of other rows of text and of general text that it tells apart.
        bytes: The size of the signature.
    """

    donor: str
    position: int
    rows: tuple[int, int]
    right: tuple[float, float]
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.donor}: signed {position_text(self.position)}, from {self.rows[0]} rows of the text and "
            f"{self.rows[1]} of general text, {self.bytes:,} bytes\n  other rows of {TOKENS} tokens: "
            f"{self.right[0]:.1%} of the text and {self.right[1]:.1%} of general text are told apart"
        )


def sign(
    donor: str | os.PathLike[str],
    text: Any,
    general: Any,
    *,
    position: int | None = None,
    recipient: Any = None,
    tokenizer: Any = None,
    max_rows: int = 512,
    batch_size: int = 16,
    quiet: bool = False,
    **kwargs: Any,
) -> SignReport:
    """Write into a donor's record what the text of its domain looks like, for `model.using("auto")`.

    Donors that are used together need the same general text and one position: that of the first of them.

    Args:
        donor: The donor's folder.
        text: Text of the donor's domain: a file, a folder, a dataset on the Hub, a `TextSource` or strings.
        general: General text, for which the untouched recipient is used.
        position: How many recipient layers run before the first donor; by default the donor's own position.
        recipient: A loaded model, a Hub id or a folder; by default the donor's recipient.
        tokenizer: By default the recipient's.
        max_rows: How many rows of 32 tokens to use of each text, spread evenly over it.
        batch_size: Rows in each forward pass.
        quiet: Show no progress bar.
        **kwargs: As in `from_pretrained`, for the recipient.

    Returns:
        The report. A fifth of the rows is left out of the signature and measured on.

    Raises:
        ConfigurationError: Not a folder with a donor, or a position that the recipient does not have.
        DataError: Texts that are missing or too short.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> folder = tempfile.mkdtemp()
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=64, n_positions=32))
        >>> Donor.from_model(model, layers=[1], name="low").save_pretrained(folder, position=2, recipient="recipient")
        >>> low, high = torch.arange(2560) % 32, torch.arange(2560) % 32 + 32
        >>> sign(folder, low, high, recipient=model, quiet=True).rows
        (64, 64)
    """
    folder = points_to_folder(os.fspath(donor))
    if folder is None or not (folder / DONOR_CONFIG).is_file():
        raise ConfigurationError(
            f"{os.fspath(donor)} is not a folder with a donor ({DONOR_CONFIG}), which signing changes. Download the "
            "donor, sign the folder, and push it."
        )
    check_texts(text, general)
    unsigned, max_rows = Donor.from_pretrained(folder), whole_number(max_rows, "max_rows")
    if position is None and unsigned.position is None:
        raise ConfigurationError(f"donor {folder} recommends no position: pass position= (--position).")
    own = unsigned.position if isinstance(unsigned.position, int) else min(unsigned.position or (0,))
    position = own if position is None else whole_number(position, "the position")
    loaded = model_to_measure(os.fspath(folder) if recipient is None else recipient, None, kwargs)
    rows = {
        name: _rows(loaded, data, tokenizer, max_rows, name, quiet)
        for name, data in (("text", text), ("general text", general))
    }
    domain, other = (_describe(loaded.model, ids, position, batch_size, quiet) for ids in rows.values())
    probe_ids = torch.arange(PROBE_TOKENS, device=loaded.model.device)[None]
    (probe,) = _describe(loaded.model, probe_ids, position, 1, True)
    (fitted, held_out), (general_fitted, general_held_out) = _split(domain), _split(other)
    signature = Signature.of_rows(position, fitted, general_fitted, probe)
    discriminant = Discriminant([signature])
    right = (discriminant.scores(held_out) > 0, discriminant.scores(general_held_out) <= 0)
    content = signature.to_dict()
    with publish_file(folder / DONOR_CONFIG) as staged:
        dataclasses.replace(DonorRecord.read(folder), signature=content).write(staged.parent)
    return SignReport(
        str(folder),
        position,
        (len(fitted), len(general_fitted)),
        (float(right[0].float().mean()), float(right[1].float().mean())),
        sum(len(str(value)) for value in content.values()),
    )


def _rows(loaded: LoadedModel, data: Any, tokenizer: Any, count: int, name: str, quiet: bool) -> torch.Tensor:
    """Return rows of a text as prompts begin, `[rows, TOKENS]`."""
    start = None
    if not isinstance(data, torch.Tensor):
        tokenizer = find_tokenizer(loaded) if tokenizer is None else tokenizer
        check_tokenizer_of(loaded.model, tokenizer)
        start = starting_token(tokenizer)
    stream, _ = read_stream(data, tokenizer, _MOST_TOKENS, name=name, quiet=quiet)
    width = TOKENS - (start is not None)
    whole = stream[: len(stream) // width * width].long().reshape(-1, width)
    if not len(whole):
        raise DataError(f"the {name} has {len(stream)} tokens, fewer than a row of {width}.")
    rows = whole[torch.linspace(0, len(whole) - 1, min(count, len(whole))).long()]
    return rows if start is None else torch.cat([torch.full((len(rows), 1), start), rows], dim=1)


def _describe(model: Any, ids: torch.Tensor, position: int, batch_size: int, quiet: bool) -> torch.Tensor:
    """Describe rows by the hidden states of the recipient alone, `[rows, hidden]`."""
    found = []
    with (
        untouched(model),
        eval_mode(model),
        progress_bar(len(ids), f"Hidden states at {position}", unit="row", quiet=quiet) as bar,
    ):
        for batch in ids.split(batch_size):
            found.append(describe_rows(hidden_states(model, batch.to(model.device), [position])[position]).cpu())
            bar.update(len(batch))
    return torch.cat(found)


def _split(rows: torch.Tensor) -> Sequence[torch.Tensor]:
    measured = torch.arange(len(rows)) % _HELD_OUT == _HELD_OUT - 1
    return rows[~measured], rows[measured]

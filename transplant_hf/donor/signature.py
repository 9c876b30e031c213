"""The signature of a donor's domain: what the hidden states of its text look like where they enter the donor.

A row of text is described by the mean of its first hidden states, each divided by its root mean square. A signature has
the mean of such rows for the domain and for general text, and the covariance within the two, in low rank. Several
signatures give one linear discriminant: made one by one, discriminants would not tell the domains from each other.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import CheckpointError, ConfigurationError, DataError

__all__ = ["FEWEST_ROWS", "FEWEST_TOKENS", "PROBE_TOKENS", "TOKENS", "Discriminant", "Signature", "describe_rows"]

VERSION = 1
# How many tokens of a row are looked at, and how many there must be.
TOKENS, FEWEST_TOKENS = 32, 8
# Tokens 0, 1, 2, ... whose hidden states tell whether a model is the one that a signature was made with.
PROBE_TOKENS = 8
_RANK = 16
FEWEST_ROWS = 2 * _RANK
_SHRINKAGE = 0.1
_LEAST_VARIANCE = 1e-6  # of text that repeats itself; the values of hidden states are near 1 here
_VECTORS = ("domain", "general", "factor", "probe")


def describe_rows(states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Describe rows of text by their states, `[rows, tokens, hidden]`; `mask` is 1 for tokens and 0 for padding.

    Returns `[rows, hidden]` in float32; NaN for rows with fewer than `FEWEST_TOKENS` tokens.
    """
    if mask is None:
        states = states[:, :TOKENS].float()
        seen = torch.ones(states.shape[:2], device=states.device)
    else:
        states, mask = states.float(), mask.to(states.device) != 0
        seen = (mask & (mask.cumsum(1) <= TOKENS)).float()
    alike = states * states.pow(2).mean(-1, keepdim=True).rsqrt()
    count = seen.sum(1, keepdim=True)
    rows = torch.where(seen[..., None] > 0, alike, 0.0).sum(1) / count.clamp(min=1)
    return rows.masked_fill(count < FEWEST_TOKENS, torch.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class Signature:
    """What a donor's domain and general text look like at a position."""

    position: int  # how many recipient layers ran
    domain: torch.Tensor  # the mean of its rows, `[hidden]`
    general: torch.Tensor  # that of general text
    factor: torch.Tensor  # `[rank, hidden]`: the covariance within both is `factor.T @ factor + rest * I`
    rest: float  # the variance in all other directions
    probe: torch.Tensor  # the description of tokens 0, 1, ... `PROBE_TOKENS` - 1, `[hidden]`

    @classmethod
    def of_rows(cls, position: int, domain: torch.Tensor, general: torch.Tensor, probe: torch.Tensor) -> Signature:
        """Make a signature from descriptions of rows of the domain and of general text, and of the probe."""
        for name, rows in (("the text", domain), ("the general text", general)):
            if len(rows) < FEWEST_ROWS or not rows.isfinite().all():
                raise DataError(
                    f"a signature needs at least {FEWEST_ROWS} rows of {TOKENS} tokens of {name}, whose hidden states "
                    f"are finite; got {len(rows)}."
                )
        domain, general = domain.double(), general.double()
        centered = torch.cat([domain - domain.mean(0), general - general.mean(0)])
        hidden, rank = centered.shape[1], min(_RANK, centered.shape[1] - 1)
        values, vectors = _largest(centered, rank)
        total = float(centered.pow(2).sum()) / (len(centered) - 2)
        values = (1 - _SHRINKAGE) * values + _SHRINKAGE * total / hidden
        rest = max((total - float(values.sum())) / (hidden - rank), _LEAST_VARIANCE)
        factor = (vectors * (values - rest).clamp(min=0).sqrt()).T
        means = (domain.mean(0).float(), general.mean(0).float())
        return cls(position, *means, factor.float(), rest, probe.float())

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON; vectors in float16, base64."""
        return {
            "version": VERSION,
            "position": self.position,
            "hidden": len(self.domain),
            "rest": self.rest,
            **{name: _encode(getattr(self, name)) for name in _VECTORS},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], what: str) -> Signature:
        """Read what `to_dict` returned; `what` names the donor."""
        if content.get("version") != VERSION:
            raise ConfigurationError(
                f"the signature of {what} has version {content.get('version')!r}; this version of transplant_hf reads "
                f"version {VERSION}. Sign the donor again, or update transplant_hf."
            )
        try:
            position, hidden, rest = int(content["position"]), int(content["hidden"]), float(content["rest"])
            vectors = {name: _decode(content[name], hidden) for name in _VECTORS}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the signature of {what} is malformed: {error!r}. Sign the donor again.") from error
        return cls(position, vectors["domain"][0], vectors["general"][0], vectors["factor"], rest, vectors["probe"][0])


def _largest(centered: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest eigenvalues and eigenvectors of a covariance, from rows without their means."""
    degrees = len(centered) - 2
    if len(centered) >= centered.shape[1]:
        values, vectors = torch.linalg.eigh(centered.T @ centered / degrees)
        return values[-rank:], vectors[:, -rank:]
    values, left = torch.linalg.eigh(centered @ centered.T / degrees)  # fewer rows than directions, in a wide model
    lengths = (values[-rank:].clamp(min=1e-12) * degrees).sqrt()
    return values[-rank:], centered.T @ left[:, -rank:] / lengths


def _encode(vectors: torch.Tensor) -> str:
    return base64.b64encode(vectors.cpu().numpy().astype("<f2").tobytes()).decode()


def _decode(text: str, hidden: int) -> torch.Tensor:
    found = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float16)
    if not len(found) or hidden < 1 or len(found) % hidden or not found.isfinite().all():
        raise ValueError(f"expected finite vectors of {hidden} numbers, got {len(found)} numbers")
    return found.float().reshape(-1, hidden)


class Discriminant:
    """Tells the domains of several donors, of one position and one recipient, from each other and from general text."""

    def __init__(self, signatures: Sequence[Signature]) -> None:
        general = torch.stack([one.general for one in signatures]).mean(0).double()
        rest = sum(one.rest for one in signatures) / len(signatures)
        factor = torch.cat([one.factor for one in signatures]).double() / len(signatures) ** 0.5
        domains = torch.stack([one.domain for one in signatures]).double()
        # The inverse of factor.T @ factor + rest I, applied to the differences, without a matrix [hidden, hidden].
        differences = domains - general
        inner = torch.linalg.solve(rest * torch.eye(len(factor)) + factor @ factor.T, factor @ differences.T)
        weight = (differences - inner.T @ factor) / rest
        self.weight = weight.float()
        self.bias = (-(weight * (domains + general)).sum(1) / 2).float()

    def scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Return how much more each domain explains rows than general text does, as log odds `[rows, donors]`."""
        return rows @ self.weight.to(rows.device).T + self.bias.to(rows.device)

"""The demo's two domains, each split into training documents and held-out ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import TransplantError
from .budget import DemoBudget
from .library import PARAGRAPH, Document, english_documents, source_documents

__all__ = ["DemoTexts", "Domain", "load_texts", "paragraph_keys", "split_documents"]

# Shorter paragraphs ("return self", "Examples:") recur everywhere and give nothing away.
_SHORTEST_COMPARED = 40


@dataclass(frozen=True)
class Domain:
    """Texts of one kind, split by document.

    Args:
        name: Name for tables, for example `English`.
        train: Documents to train upon.
        held_out: Documents that only evaluation reads.
    """

    name: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    def train_texts(self) -> list[str]:
        """Training texts, one string per document."""
        return [document.text for document in self.train]

    def held_out_texts(self) -> list[str]:
        """Held-out texts, one string per document."""
        return [document.text for document in self.held_out]


@dataclass(frozen=True)
class DemoTexts:
    """Both domains of the demo.

    Args:
        english: What the recipient learns.
        source: What the donor learns.
    """

    english: Domain
    source: Domain

    def digest(self) -> str:
        """Digest of all texts and of their split, 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for part in (self.english.train, self.english.held_out, self.source.train, self.source.held_out):
            for document in part:
                digest.update(hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest())
            digest.update(b"|")
        return digest.hexdigest()


def load_texts(budget: DemoBudget) -> DemoTexts:
    """Read both domains from the running Python installation.

    Args:
        budget: Gives the sizes.

    Returns:
        English text and Python source. No held-out paragraph of either is in the training text of the other.

    Raises:
        TransplantError: The installation has no language reference or no standard library source.
    """
    english = split_documents("English", english_documents(), budget.held_out_characters, budget.english_characters)
    source = split_documents("Python source", source_documents(), budget.held_out_characters, budget.source_characters)
    held_out = {key for d in (*english.held_out, *source.held_out) for key in paragraph_keys(d.text)}
    return DemoTexts(_free_of(english, held_out), _free_of(source, held_out))


def split_documents(name: str, documents: Iterable[Document], held_out_size: int, train_size: int) -> Domain:
    """Split documents into held-out and training ones that share no paragraph.

    Several reference topics quote others whole, so paragraphs of held-out documents are taken out of the
    training documents; so are repeated paragraphs.

    Args:
        name: Name of the domain.
        documents: Documents in the order in which they are chosen.
        held_out_size: Least size of the held-out part, in characters; its last document is kept whole.
        train_size: Largest size of the training part, in characters; its last document is cut.

    Returns:
        The domain.

    Raises:
        TransplantError: The documents do not suffice for a held-out and a training part.
    """
    # Neither one long document nor a crowd of near-empty files may make up the held-out part.
    shortest, longest = min(500, held_out_size), max(held_out_size // 4, 4000)
    held_out: list[Document] = []
    others: list[Document] = []
    missing = held_out_size
    for document in documents:
        if missing > 0 and shortest <= len(document.text) <= longest:
            held_out.append(document)
            missing -= len(document.text)
        else:
            others.append(document)
    seen = {key for document in held_out for key in paragraph_keys(document.text)}
    train: list[Document] = []
    left = train_size
    for document in others:
        if left <= 0:
            break
        text = _without(document.text, seen)[:left]
        if text.strip():
            train.append(Document(document.name, text))
            left -= len(text)
    if not train or not held_out:
        raise TransplantError(f"Too little text for the demo's domain {name!r} in this Python installation.")
    return Domain(name, tuple(train), tuple(held_out))


def paragraph_keys(text: str) -> Iterator[str]:
    """Paragraphs of a text as they are compared: white space joined, short ones left out.

    Args:
        text: Any text.

    Yields:
        One string per paragraph of at least 40 characters.
    """
    for paragraph in PARAGRAPH.split(text):
        key = " ".join(paragraph.split())
        if len(key) >= _SHORTEST_COMPARED:
            yield key


def _without(text: str, seen: set[str]) -> str:
    """Leave out the paragraphs already seen, and note the others as seen."""
    kept = []
    for paragraph in PARAGRAPH.split(text):
        keys = list(paragraph_keys(paragraph))
        if not seen.isdisjoint(keys):
            continue
        seen.update(keys)
        kept.append(paragraph)
    return "\n\n".join(kept)


def _free_of(domain: Domain, held_out: set[str]) -> Domain:
    """Leave out of the training documents what the other domain holds out."""
    train = []
    for document in domain.train:
        if not held_out.isdisjoint(paragraph_keys(document.text)):
            document = Document(document.name, _without(document.text, set(held_out)))
        train.append(document)
    return Domain(domain.name, tuple(train), domain.held_out)

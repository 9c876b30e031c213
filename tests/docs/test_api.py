"""The API reference has every public name, and each docstring tells of every parameter."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.docs.pages import DOCS
from transplant_hf.model.surface import TransplantMixin

# Modules whose public names users import; the package's own names come first.
MODULES = (
    "evaluation",
    "texts",
    "partial",
    "training",
    "comparison",
    "plots",
    "inspection",
    "conversion",
    "exporting",
    "pushing",
    "planning",
)
# Names of other modules that the reference shows too.
MORE = ("donor.DonorRecord", "model.surface.TransplantMixin")

ENTRIES = [
    entry
    for page in sorted((DOCS / "api").glob("*.md"))
    for entry in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]


def wanted() -> Iterator[str]:
    """The full name of every public object, once: the first that it has.

    The site reads files, so the verb `export`, which is also a submodule there, has the name that it has in its module.
    """
    seen: set[int] = set()
    for module in ("", *(f".{module}" for module in MODULES)):
        found = importlib.import_module(f"transplant_hf{module}")
        for name in found.__all__:
            value = getattr(found, name)
            hidden = module == "" and importlib.util.find_spec(f"transplant_hf.{name}")
            if not name.startswith("__") and not hidden and id(value) not in seen:
                seen.add(id(value))
                yield f"{found.__name__}.{name}"
    yield from (f"transplant_hf.{name}" for name in MORE)


def object_named(entry: str) -> Any:
    module, _, name = entry.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_public_name_has_an_entry() -> None:
    assert sorted(ENTRIES) == sorted(wanted())


def test_every_page_is_reached_from_the_first() -> None:
    index = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    pages = {path.name for path in (DOCS / "api").glob("*.md")} - {"index.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", index))


def told(documented: str | None) -> set[str]:
    """The parameters that a docstring tells of."""
    text = inspect.cleandoc(documented or "")
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", f"{text}\n", re.MULTILINE)
    named = re.findall(r"^    (\S[^:]*):", section[1], re.MULTILINE) if section else []
    return {name.strip("*` ") for line in named for name in line.split(",")}


def parameters_of(function: Callable[..., Any], inherited: set[str]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "cls"} - inherited


def gaps_of(entry: str, value: Any) -> Iterator[str]:
    """What the docstrings of an object leave out."""
    if inspect.isclass(value):
        yield from gaps_of_class(entry, value)
    elif inspect.isfunction(value):
        yield from gaps_of_function(entry, value, value.__doc__, set())


def gaps_of_class(entry: str, kind: type[Any]) -> Iterator[str]:
    # What the mixin overrides is Transformers' and torch's.
    bases = (*kind.__mro__[1:], *(PreTrainedModel.__mro__ if kind is TransplantMixin else ()))
    if "__init__" in vars(kind) and kind is not TransplantMixin:  # its constructor is the recipient's
        inherited = {name for base in bases for name in told(base.__doc__)}
        inherited |= {name for base in bases for name in getattr(base, "__dataclass_fields__", ())}
        yield from gaps_of_function(entry, kind, kind.__doc__, inherited)
    for name, member in vars(kind).items():
        method = getattr(member, "__func__", member)
        if name.startswith("_") or not (inspect.isfunction(method) or isinstance(member, property)):
            continue
        if isinstance(member, property):
            if not member.__doc__:
                yield f"{entry}.{name} has no docstring"
            continue
        # What Transformers documents is not told again.
        overridden = any(name in vars(base) for base in bases)
        inherited = parameters_of(method, set()) if overridden else set()
        yield from gaps_of_function(f"{entry}.{name}", method, inspect.getdoc(method), inherited)


def gaps_of_function(
    entry: str, function: Callable[..., Any], documented: str | None, inherited: set[str]
) -> Iterator[str]:
    if not documented:
        yield f"{entry} has no docstring"
    missing = parameters_of(function, inherited) - told(documented)
    if missing:
        yield f"{entry} does not tell of {', '.join(sorted(missing))}"


@pytest.mark.parametrize("entry", ENTRIES)
def test_docstrings_tell_of_every_parameter(entry: str) -> None:
    assert not list(gaps_of(entry, object_named(entry)))


def test_a_gap_is_seen() -> None:
    """The check itself: a function that tells of one parameter of two, and a class that tells of none."""

    def half(one: int, two: int) -> None:
        """Do.

        Args:
            one: The first.
        """

    class Bare:
        """Hold."""

        def __init__(self, three: int) -> None:
            self.three = three

        def four(self, five: int) -> None: ...

    assert list(gaps_of("half", half)) == ["half does not tell of two"]
    assert list(gaps_of("Bare", Bare)) == [
        "Bare does not tell of three",
        "Bare.four has no docstring",
        "Bare.four does not tell of five",
    ]

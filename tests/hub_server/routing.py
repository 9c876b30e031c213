"""From a path to the function that answers it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from .messages import Request, Response

__all__ = ["Router"]

Handler = Callable[..., Response]

# What may follow the id of a repository: without it, `gpt2/refs` could be read as such an id.
_VERBS = "auth-check|branch|commit|commits|discussions|paths-info|preupload|refs|resolve|revision|settings|tag|tree"
_PLACEHOLDERS = {
    "{repo}": rf"(?P<repo>(?!api/)[^/]+(?:/(?!(?:{_VERBS})(?:/|$))[^/]+)?)",
    "{revision}": r"(?P<revision>[^/]+)",
    "{path}": r"(?P<path>.+)",
    "{oid}": r"(?P<oid>[0-9a-f]{64})",
}


@dataclass(frozen=True)
class _Route:
    origin: str
    methods: tuple[str, ...]
    pattern: re.Pattern[str]
    handler: Handler


class Router:
    """A table of endpoints, filled by the modules that implement them."""

    def __init__(self) -> None:
        self._routes: list[_Route] = []

    def add(self, methods: str, template: str, *, origin: str = "hub") -> Callable[[Handler], Handler]:
        """Decorator: answer these methods on paths of this shape with the decorated function.

        Args:
            methods: One or more methods, separated by spaces. `GET` also answers `HEAD`.
            template: The path, with `{repo}`, `{revision}`, `{path}` and `{oid}` as placeholders; the
                function gets their values, percent-decoded, as keyword arguments.
            origin: The port it lives on.
        """
        pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
        for placeholder, expression in _PLACEHOLDERS.items():
            pattern = pattern.replace(placeholder, expression)
        names = tuple(methods.split())
        if "GET" in names:
            names += ("HEAD",)

        def register(handler: Handler) -> Handler:
            self._routes.append(_Route(origin, names, re.compile(pattern), handler))
            return handler

        return register

    def include(self, other: Router) -> None:
        """Add all endpoints of another table."""
        self._routes += other._routes

    def find(self, request: Request) -> tuple[Handler, dict[str, str]] | None:
        """The function that answers a request, with its keyword arguments; None if nothing answers it."""
        for route in self._routes:
            # A revision may hold an encoded slash, so decoding has to come after matching.
            match = route.pattern.fullmatch(request.raw_path) if route.origin == request.origin else None
            if match is not None and request.method in route.methods:
                return route.handler, {name: unquote(value) for name, value in match.groupdict().items()}
        return None

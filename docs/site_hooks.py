"""What `mkdocs build` adds to the pages in docs/: files of the repository, notebooks, and the help of each command.

Links stand in the Markdown files as they are in the repository. On the site, those to a file that is a page there lead
to the page; those to other files of the repository become the file's name, because the site does not have it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

# Files of the repository that are pages of the site too, by the page's name.
PAGES = {
    "overview.md": "README.md",
    "benchmarks.md": "benchmarks/README.md",
    "app.md": "examples/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security_policy.md": "SECURITY.md",
}

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_ELSEWHERE = re.compile(r"[a-z][a-z+.-]*:")
_FENCE = re.compile(r"^ *```")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/."""
    for page, path in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        content = notebook_page(json.loads(notebook.read_text(encoding="utf-8")))
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=content))
    files.append(File.generated(config, "command_line.md", content=command_line_page()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let the links of a page lead to pages of the site."""
    name = page.file.src_uri
    path = PAGES.get(name, f"docs/{name}")
    return "".join(
        line if is_code else _LINK.sub(lambda link: _relinked(link, name, path), line)
        for line, is_code in lines_of(markdown)
    )


def lines_of(markdown: str) -> Iterator[tuple[str, bool]]:
    """Return each line, and whether it is part of a block of code."""
    inside = False
    for line in markdown.splitlines(keepends=True):
        fence = bool(_FENCE.match(line))
        yield line, inside or fence
        inside ^= fence


def _relinked(link: re.Match[str], page: str, path: str) -> str:
    """Return a link of a page that stands at `path` in the repository, as it has to be on the site."""
    target, anchor = link["target"], link["anchor"] or ""
    if _ELSEWHERE.match(target):
        return link[0]
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    on_site = page_of(wanted)
    if on_site:
        start = posixpath.dirname(page)
        return f"{link['image']}[{link['text']}]({posixpath.relpath(on_site, start or '.')}{anchor})"
    if not wanted.startswith("../") and (ROOT / wanted).exists():
        name = link["text"].strip("`")
        return f"`{name}`" if name == wanted else f"{link['text']} (`{wanted}`)"
    return link[0]  # broken: mkdocs says so


def page_of(path: str) -> str | None:
    """Return the page of the site that shows a file of the repository."""
    shown = {source: page for page, source in PAGES.items()}
    if path in shown:
        return shown[path]
    if not path.startswith("docs/") or not (ROOT / path).is_file():
        return None
    inside = path.removeprefix("docs/")
    return inside.removesuffix(".ipynb") + ".md" if inside.endswith(".ipynb") else inside


def notebook_page(notebook: dict[str, Any]) -> str:
    """Return a notebook's text and code as Markdown; outputs are not kept in the repository."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source:
            parts.append(f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"


def command_line_page() -> str:
    """Return the help of each command as Markdown."""
    listed = help_of()
    commands = re.findall(r"^    ([a-z][a-z-]*) ", listed, re.MULTILINE)
    assert commands, listed
    parts = [
        "# Command line",
        "Each command prints its result on standard output, as text or with `--json` as JSON, and its progress on "
        "standard error.",
        f"```text\n{listed}```",
        *(f"## {command}\n\n```text\n{help_of(command)}```" for command in commands),
    ]
    return "\n\n".join(parts) + "\n"


def help_of(*command: str) -> str:
    """Return what `transplant-hf COMMAND --help` prints."""
    from transplant_hf.cli import main

    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="100"),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main([*command, "--help"])
    return printed.getvalue()

"""One way to say a thing in every command, and old spellings that still work for one release."""

from __future__ import annotations

import argparse
import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import transplant_hf
from tests.cli.conftest import Run
from transplant_hf import DonorSpec
from transplant_hf.cli import _parser
from transplant_hf.cli.parser import layer_range
from transplant_hf.comparison import METHODS
from transplant_hf.config import donor_specs
from transplant_hf.errors import ConfigurationError


class Called(Exception):  # noqa: N818 - not an error: it ends a command where its work would begin
    """A verb was called with these arguments."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options


@pytest.fixture
def called(run: Run, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command up to the call of its verb; returns the call and what was written on standard error."""

    def call(*words: object) -> SimpleNamespace:
        @functools.wraps(getattr(transplant_hf, str(words[0])))  # options are passed by the names of its parameters
        def verb(*arguments: Any, **options: Any) -> None:
            raise Called(*arguments, **options)

        monkeypatch.setattr(f"transplant_hf.{words[0]}", verb)
        with pytest.raises(Called) as ended:
            run(*words)
        return SimpleNamespace(arguments=ended.value.arguments, **ended.value.options)

    return call


# -- DONOR@POSITION --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "donor", "position"),
    [
        ("user/law", "user/law", None),
        ("user/law@0", "user/law", 0),
        ("folder@home", "folder@home", None),
        ("folder@home@3", "folder@home", 3),
        ("law@3", "law@3", None),  # there is a folder of this name
        ("./law@2", "./law", 2),
    ],
)
def test_a_donor_and_its_position(
    text: str, donor: str, position: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("folder@home", "law@3", "law"):
        (tmp_path / folder).mkdir()
    assert DonorSpec.parse(text) == DonorSpec(donor, position)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["user/law@", "user/law@x", "user/law@-1", "@3", "user/law@1.5", "user/law@²"])
def test_what_is_no_donor_at_a_position(text: str) -> None:
    with pytest.raises(ConfigurationError, match="DONOR@POSITION, such as user/gpt2-law@10"):
        DonorSpec.parse(text)


def test_every_command_reads_a_donor_the_same_way(called: Any) -> None:
    found = called("check", "r", "d@3")
    assert (found.donor, found.position) == ("d", 3)
    assert not hasattr(called("check", "r", "d"), "position")
    assert called("sweep", "r", "d@3", "e", "--text", "t.txt").arguments[1] == {"d": 3, "e": None}
    found = called("inspect", "d@3", "--recipient", "r")
    assert (found.what, found.position) == ("d", 3)
    wanted = [DonorSpec("d", 3), DonorSpec("e")]
    for command, *words in (
        ("export", "r", "out"),
        ("plan", "r"),
        ("evaluate", "r", "--text", "t.txt"),
        ("compare", "r", "t.txt", "--general", "t.txt"),
    ):
        assert donor_specs(called(command, *words, "--donor", "d@3", "--donor", "e").donors) == wanted


def test_a_donor_in_a_recipient_is_measured(family: Path, text: Path, run: Run) -> None:
    words = ("--text", text, "--block-length", 16, "--json")
    _, alone, _ = run("evaluate", family / "donor", *words)
    status, placed, _ = run("evaluate", family / "recipient", "--donor", family / "donor", *words)
    assert status == 0
    rows = [[(row["model"], row["perplexity"]) for row in json.loads(out)["rows"]] for out in (alone, placed)]
    assert rows[0] == rows[1]
    status, swept, _ = run("sweep", family / "recipient", f"{family / 'donor'}@1", *words)
    (row,) = json.loads(swept)["rows"]
    assert status == 0 and row["position"] == 1
    assert row["perplexity"] == pytest.approx(rows[0][1][1], rel=1e-5)


def test_a_donor_is_swept_once(run: Run) -> None:
    status, _, err = run("sweep", "r", "d@1", "d@2", "--text", "t.txt")
    assert status == 2 and "--positions" in err


# -- Which layers, and how many ----------------------------------------------------------------------------------------


def test_layers_are_numbers_or_ranges(called: Any) -> None:
    convert = ("convert", "layers.pt", "out", "--recipient", "r", "--layers")
    for words in (("4", "5", "6"), ("4-6",), ("4", "5-6")):
        assert called(*convert, *words).layers == [4, 5, 6]
        assert called("extract", "m", "out", "--layers", *words).layers == [4, 5, 6]
        assert called("train", "m", "t.txt", "out", "--start-layers", *words).start_layers == [4, 5, 6]
    assert called("train", "m", "t.txt", "out", "--count", 2).donor_layers == 2
    assert called("extract", "m", "out", "--count", 2).count == 2


@pytest.mark.parametrize("text", ["6-4", "x", "4-", "-4", "4..6", ""])
def test_what_is_no_range_of_layers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="such as 4 5 6 or 4-6"):
        layer_range(text)


def test_options_reach_the_arguments_of_training(called: Any) -> None:
    words = ("--loss-chunk", 0, "--steps", 3, "--batch-size", 2, "--no-stream-prefix")
    found = called("train", "m", "t.txt", "out", *words)
    assert (found.loss_chunk, found.max_steps, found.per_device_train_batch_size) == (0, 3, 2)
    assert found.stream_prefix is False and not hasattr(found, "strength")


def test_the_donors_of_a_recovery_are_names_of_donors(called: Any) -> None:
    found = called("recover", "m", "t.txt", "out", "--donors", "law", "code")
    assert found.donors == ["law", "code"] and "donors" not in found.model_kwargs


def test_the_license_of_a_donor(called: Any) -> None:
    for words in (
        ["train", "m", "t.txt", "out"],
        ["extract", "m", "out"],
        ["convert", "l.pt", "out", "--recipient", "m"],
    ):
        assert called(*words, "--license", "mit").license == "mit"


def test_the_methods_of_compare(called: Any, run: Run) -> None:
    words = ("compare", "m", "t.txt", "--general", "t.txt", "--methods")
    assert called(*words, *METHODS).methods == list(METHODS)
    assert run(*words, "prompt")[0] == 2
    shown = "".join(commands()["compare"].format_help().split()).split("(default:all):")[1]  # lines may end anywhere
    assert re.findall(r"([a-z-]+)\(", shown.split("--learning-rates")[0]) == list(METHODS)


# -- Old spellings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "old", "new", "found"),
    [
        (["check", "r", "d"], ["--position", "3"], "DONOR@POSITION", {"donor": "d", "position": 3}),
        (["inspect", "d"], ["--position", "3"], "WHAT@POSITION", {"position": 3}),
        (
            ["export", "r", "out", "--donor", "d"],
            ["--position", "3"],
            "--donor DONOR@POSITION",
            {"donors": [DonorSpec("d", 3)]},
        ),
        (["plan", "r"], ["--layers", "3"], "--count", {"count": 3}),
        (["plan", "r"], ["--batch", "3"], "--batch-size", {"batch_size": 3}),
        (["push", "f", "user/x"], ["--revision", "b"], "--to-revision", {"to_revision": "b"}),
        (
            ["convert", "l.pt", "--recipient", "r", "--push-to-hub", "user/x"],
            ["--revision", "b"],
            "--to-revision",
            {"revision": "b"},
        ),
        (["train", "r", "t.txt", "out"], ["--layers", "2"], "--count", {"donor_layers": 2}),
        (["compare", "r", "t.txt", "--general", "t.txt"], ["--layers", "2"], "--count", {"layers": 2}),
    ],
)
def test_an_old_spelling_works_and_warns(
    words: list[str],
    old: list[str],
    new: str,
    found: dict[str, Any],
    called: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = called(*words, *old)
    assert {name: getattr(call, name) for name in found} == found
    assert f"transplant-hf {words[0]}: {old[0]} is deprecated; use {new}\n" in capsys.readouterr().err


def test_positions_of_several_donors(called: Any, run: Run) -> None:
    words = ("export", "r", "out", "--donor", "d", "--position", "3", "--donor", "e", "--position", "4")
    assert called(*words).donors == [DonorSpec("d", 3), DonorSpec("e", 4)]
    status, _, err = run("export", "r", "out", "--donor", "d", "--donor", "e", "--position", "3")
    assert status == 2 and "1 --position for 2 --donor" in err
    for words in (("check", "r", "d@3"), ("inspect", "d@3")):
        status, _, err = run(*words, "--position", "3")
        assert status == 2 and "given twice" in err


# -- Every command -----------------------------------------------------------------------------------------------------


def commands() -> dict[str, argparse.ArgumentParser]:
    return next(action.choices for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))


@pytest.mark.parametrize("name", commands())
def test_the_help_of_a_command(name: str) -> None:
    text = commands()[name].format_help()
    assert f"example:\n  transplant-hf {name}" in text
    assert "0 success, 1 error, 2 usage error" in text and "--json" in text


def test_options_of_one_name_mean_the_same_in_every_command() -> None:
    seen: dict[str, set[tuple[Any, ...]]] = {}
    for parser in commands().values():
        for action in parser._actions:
            if action.option_strings and action.help != argparse.SUPPRESS:
                metavar = action.metavar if not action.choices else None
                seen.setdefault(action.option_strings[0], set()).add((metavar, str(action.nargs)))
    different = {option: found for option, found in seen.items() if len(found) > 1}
    assert not different
    seeds = {parser.get_default("seed") for parser in commands().values()} - {None}
    assert seeds == {42}


# -- Messages --------------------------------------------------------------------------------------------------------

# Their messages are for calls that no command makes.
ONLY_IN_PYTHON = {
    **dict.fromkeys(["architecture/recipient.py", "evaluation/windows.py", "model/active_donors.py", "model/load.py"]),
    **dict.fromkeys(["model/save.py", "model/using.py", "training/arguments.py", "training/part_trainer.py"]),
}


def test_a_message_that_names_an_argument_names_the_option() -> None:
    """As in `dtype=float32 (--dtype float32)`: errors of a call are those of the command, too."""
    options = [option for parser in commands().values() for option in parser._actions if option.option_strings]
    names = {option.dest for option in options} | {option.option_strings[-1].lstrip("-") for option in options}
    root, named = Path(transplant_hf.__file__).parent, 0
    for path in sorted(root.rglob("*.py")):
        for text in messages(ast.parse(path.read_text(encoding="utf-8"))):
            shown = re.sub(r"\w+\([^)]*\)", "", text)  # what is written as a call is Python to every reader
            found = set(re.findall(r"(?<![\w.])([a-z_]+)=(?!=)", shown)) & (names - {"donors"})
            if found and path.relative_to(root).as_posix() not in ONLY_IN_PYTHON:
                named += 1
                assert "--" in text or "DONOR@POSITION" in text, f"{path}: {found} in {text!r}"
    assert named > 20


def messages(tree: ast.AST) -> Iterator[str]:
    """The texts of errors and warnings, each whole."""
    parts: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr | ast.JoinedStr):  # a docstring, or the parts of a text
            parts.update(ast.iter_child_nodes(node))
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            yield "" if "\n" in node.value else node.value  # several lines are a file that is written

"""How commands end: with one sentence and a status, before long work where that is possible."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from transplant_hf.cli import main

LONG_WORK = ("evaluate", "evaluation.strength_curve", "sweep")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes long fails the test."""
    for name in LONG_WORK:
        monkeypatch.setattr(f"transplant_hf.{name}", lambda *args, _name=name, **kwargs: pytest.fail(f"{_name} ran"))


# -- One sentence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (KeyboardInterrupt(), 130, "interrupted."),
        (KeyboardInterrupt("interrupted; continue with --resume."), 130, "interrupted; continue with --resume."),
        (PermissionError(13, "Permission denied", "/out"), 1, "[Errno 13] Permission denied: '/out'"),
        (BrokenPipeError(), 1, None),
    ],
)
def test_what_ends_a_command_is_one_sentence(
    error: BaseException,
    status: int,
    sentence: str | None,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("transplant_hf.check", failing)
    told = "" if sentence is None else f"transplant-hf: {sentence}\n"
    assert run("check", "recipient", "donor") == (status, "", told)
    _, out, _ = run("check", "recipient", "donor", "--json")
    assert out == "" if sentence is None else json.loads(out)["message"] == sentence


def test_an_error_in_the_program_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transplant_hf.check", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("check", "recipient", "donor")


def test_after_a_result_no_error_is_printed_as_json(
    tiny_gpt2: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", full := Full())
    assert main(["check", str(tiny_gpt2 / "recipient"), str(tiny_gpt2 / "donor"), "--json"]) == 1
    assert "error" not in json.loads(full.getvalue())
    assert "the disk is full" in capsys.readouterr().err


# -- Wrong usage -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--dtype", "bf61"], "bf16"),
        (["--plot", "curve.png"], "--plot goes with --strengths"),
        (["--strengths", "1", "--recipient", "r"], "--recipient does not go with --strengths"),
        (["--strengths", "1", "nan"], "must be a finite number, got nan"),
        (["--max-tokens", "1"], "must be at least 2, got 1"),
        (["--stride", "0"], "must be at least 1, got 0"),
        (["--batch-size", "x"], "invalid whole number value: 'x'"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_measured(
    words: list[str], told: str, text: Path, run: Run
) -> None:
    status, out, err = run("evaluate", "model", "--text", text, *words)
    assert (status, out) == (2, "")
    assert told in err


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("FP32", "float32"), ("bfloat16", "bfloat16")]
)
def test_common_names_of_dtypes_are_known(
    name: str, dtype: str, tiny_gpt2: Path, text: Path, run: Run, monkeypatch: Any
) -> None:
    asked = []
    monkeypatch.setattr("transplant_hf.sweep", lambda *args, dtype, **kwargs: asked.append(dtype))
    with pytest.raises(AttributeError, match="to_dict"):  # of the result that is not there
        run("sweep", "recipient", "donor", "--text", text, "--dtype", name, "--json")
    assert asked == [dtype]


def test_plan_knows_the_common_names_too(tiny_gpt2: Path, run: Run) -> None:
    short, full = (run("plan", tiny_gpt2 / "donor", "--dtype", name)[1] for name in ("bf16", "bfloat16"))
    assert short == full != ""


@pytest.mark.parametrize("command", ["extract", "convert"])
def test_private_without_a_repository_is_refused(command: str, run: Run) -> None:
    recipient = ["--recipient", "r"] if command == "convert" else []
    status, _, err = run(command, "in", "out", "--private", *recipient)
    assert status == 2 and "--private goes with --push-to-hub" in err


@pytest.mark.parametrize("where", ["cuda:99", "gpu", "cdua"])
def test_a_device_that_is_not_there_is_one_sentence(where: str, tiny_gpt2: Path, text: Path, run: Run) -> None:
    words = ("--text", text, "--device-map", where)
    for command in ("evaluate", "sweep"):
        status, _, err = run(command, tiny_gpt2 / "donor", *words)
        assert status == 1
        assert f"device_map={where!r} (--device-map) is not a device of this machine, which has cpu" in err


# -- Pictures --------------------------------------------------------------------------------------------------------


def _drawing(text: Path, picture: Path) -> list[tuple[Any, ...]]:
    sweep = ("sweep", "recipient", "donor", "--text", text, "--plot", picture)
    curve = ("evaluate", "donor", "--text", text, "--text", f"b={text}", "--strengths", 0, 1, "--plot", picture)
    return [sweep, curve]


@pytest.mark.usefixtures("no_work")
def test_a_picture_that_cannot_be_drawn_is_refused_first(
    text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in _drawing(text, tmp_path / "picture.xyz"):
        status, out, err = run(*words)
        assert (status, out) == (1, "")
        assert ".png" in err and "picture.xyz" in err
    status, _, err = run(*_drawing(text, tmp_path / "curve.png")[1], "--text", f"c={text}")
    assert status == 1 and "a curve is drawn on two texts" in err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for words in _drawing(text, tmp_path / "picture.png"):
        status, out, err = run(*words)
        assert (status, out) == (1, "")
        assert "drawing needs matplotlib" in err


def test_results_are_printed_before_they_are_drawn(
    tiny_gpt2: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transplant_hf.plots.plot_sweep", full)
    monkeypatch.setattr("transplant_hf.plots.plot_strengths", full)
    for words in _drawing(text, tmp_path / "picture.png"):
        named = [tiny_gpt2 / word if word in ("recipient", "donor") else word for word in words]
        status, out, err = run(*named, "--block-length", 16)
        assert status == 1
        assert len(out.splitlines()) > 2
        assert "No space left on device" in err


# -- No model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "sweep", "compare", "train", "recover", "extract"])
def test_a_folder_without_a_model_is_one_sentence(command: str, text: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    rest = {
        "evaluate": ("--text", text),
        "sweep": (folder, "--text", text),
        "compare": (text, "--general", text, "--methods", "donor", "--no-equal-time"),
        "train": (text, tmp_path / "out"),
        "recover": (text, tmp_path / "out"),
        "extract": (tmp_path / "out",),
    }[command]
    for content, told in (
        (None, f"cannot load model {folder}: there is no config.json in {folder}."),
        ("model.gguf", f"there is no config.json in {folder}. To read its GGUF file, pass gguf_file='model.gguf'"),
        ("config.json", f"cannot load model {folder}: Unrecognized model"),
    ):
        if content is not None:
            (folder / content).write_text("{}")
        status, out, err = run(command, folder, *rest)
        assert (status, out) == (1, "")
        assert told in err and err.count("\n") == 1, err
    (folder / "config.json").write_text('{"model_type": "t5"}')
    _, _, err = run(command, folder, *rest)
    assert "cannot load model" in err and "T5Config" in err and err.count("\n") == 1, err
    status, _, err = run(command, tmp_path / "missing", *rest)
    assert status == 1 and "missing' is neither a folder" in err


def test_a_model_without_a_tokenizer_is_one_sentence(tiny_llama: Path, text: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_llama / "recipient", folder)
    for path in folder.glob("*token*"):
        path.unlink()
    for words in (
        ("evaluate", folder, "--text", text),
        ("train", folder, text, tmp_path / "out"),
        ("compare", folder, text, "--general", text, "--methods", "donor", "--no-equal-time"),
    ):
        status, _, err = run(*words)
        assert status == 1 and f"there is no tokenizer in {folder}" in err

"""Where may be written: new and empty places, and others when that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import refused
from transplant_hf import ConfigurationError
from transplant_hf.storage import check_output_file, check_output_folder


def test_new_and_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new", tmp_path / "new" / "deep"):
        check_output_folder(folder, overwrite=False)
        assert not list((tmp_path / "empty").iterdir()) and not (tmp_path / "new").exists()


def test_a_folder_that_is_not_empty_is_refused_and_some_names_are_told(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / name).write_text("")
    with refused(ConfigurationError, str(tmp_path), "is not empty", "a, b, c and 2 more", "--overwrite"):
        check_output_folder(tmp_path, overwrite=False)
    check_output_folder(tmp_path, overwrite=True)
    with refused(ConfigurationError, "holds a, e,", "no record of writing"):
        check_output_folder(tmp_path, overwrite=True, unrecorded=lambda folder: {"e", "a"})


def test_a_hidden_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SECRET=1")
    with refused(ConfigurationError, "is not empty", ".env"):
        check_output_folder(tmp_path, overwrite=False)


@pytest.mark.parametrize("overwrite", [True, False])
def test_files_and_folders_are_told_apart(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("")
    with refused(ConfigurationError, "is a file"):
        check_output_folder(tmp_path / "file", overwrite)
    with refused(ConfigurationError, "cannot write", "is a file"):
        check_output_folder(tmp_path / "file" / "inside", overwrite)
    with refused(ConfigurationError, "is a folder"):
        check_output_file(tmp_path, overwrite)


def test_a_file_that_exists(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    check_output_file(path, overwrite=False)
    path.write_text("")
    with refused(ConfigurationError, "plot.png exists", "--overwrite"):
        check_output_file(path, overwrite=False)
    check_output_file(path, overwrite=True)


def test_a_place_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by chmod: tests may run as a user to whom it means nothing.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    for check in (check_output_folder, check_output_file):
        with refused(ConfigurationError, str(tmp_path), "read-only"):
            check(tmp_path / "new" / "deep", False)

"""What a name refers to: folders and Hub ids, relative names, and names that lead out."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.helpers import refused
from transplant_hf import AutoModelWithTransplant, ConfigurationError, Donor, HubError, sources
from transplant_hf.inspection import inspect
from transplant_hf.sources import HubOptions, Source, locate, points_to_folder

COMMIT = "a" * 40


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a transplant and its recipient side by side; the working directory is another."""
    for name in ("set/thin/inner", "set/recipient", "elsewhere/models/base"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


@pytest.mark.parametrize("reference", ["user/base", "base", "gpt2"])
def test_hub_ids(tree: Path, reference: str) -> None:
    assert points_to_folder(reference) is None
    assert points_to_folder(reference, Source("x", tree / "set" / "thin")) is None
    assert points_to_folder(reference, Source("x/y", tree / "set" / "thin", COMMIT)) is None


def test_relative_names_stand_beside_the_configuration(tree: Path) -> None:
    thin = Source("thin", tree / "set" / "thin")
    assert points_to_folder("../recipient", thin) == tree / "set" / "recipient"
    assert points_to_folder(".", thin) == tree / "set" / "thin"
    assert points_to_folder("inner", thin) == tree / "set" / "thin" / "inner"
    found = locate("../recipient", files=("config.json",), relative_to=thin)
    assert found.folder == tree / "set" / "recipient"
    assert found.revision is None
    assert not found.from_hub


def test_then_in_the_working_directory(tree: Path) -> None:
    thin = Source("thin", tree / "set" / "thin")
    assert points_to_folder("models/base", thin) == Path("models/base")
    assert points_to_folder("models/base") == Path("models/base")


def test_a_home_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree / "set"))
    assert points_to_folder("~/thin") == tree / "set" / "thin"


def test_a_folder_that_is_not_there(tree: Path) -> None:
    with refused(ConfigurationError, "'./nowhere'", "neither a folder", "nor a Hub id"):
        locate("./nowhere", files=("config.json",))
    with refused(ConfigurationError, "'../nowhere'", str(tree / "set" / "nowhere")):
        locate("../nowhere", files=("config.json",), relative_to=Source("thin", tree / "set" / "thin"))


@pytest.mark.parametrize("reference", ["/etc", "..", "../other", "~", "./../../x", "a/b/../../../.."])
def test_a_repository_points_only_into_itself(tree: Path, reference: str) -> None:
    source = Source("user/thin", tree / "set" / "thin", COMMIT)
    with refused(ConfigurationError, f"user/thin@{COMMIT}", repr(reference), "outside that repository"):
        points_to_folder(reference, source)
    assert points_to_folder("./inner", source) == tree / "set" / "thin" / "inner"


@pytest.mark.parametrize("subfolder", ["..", "../other", "inner/../..", "/etc"])
def test_a_subfolder_stays_inside(tree: Path, subfolder: str) -> None:
    with refused(ConfigurationError, f"subfolder {subfolder!r}", "leads out of", str(tree / "set" / "thin")):
        locate(str(tree / "set" / "thin"), files=("config.json",), subfolder=subfolder)


def test_a_link_out_of_a_folder_is_no_subfolder(tree: Path) -> None:
    (tree / "set" / "thin" / "way").symlink_to(tree / "elsewhere")
    with refused(ConfigurationError, "'way'", "leads out of"):
        locate(str(tree / "set" / "thin"), files=("config.json",), subfolder="way")


@pytest.mark.parametrize("reference", ["user/with space", "-bad-/x", "a--b/..c"])
def test_neither_a_folder_nor_a_hub_id(tree: Path, reference: str) -> None:
    with refused(ConfigurationError, repr(reference), "neither a folder nor a Hub id"):
        locate(reference, files=("config.json",))


def test_a_position_with_a_model_says_where_it_belongs() -> None:
    with refused(ConfigurationError, "'user/law@3'", "--donor DONOR@POSITION"):
        locate("user/law@3", files=("config.json",))


def test_hub_options_are_picked_out_of_a_call() -> None:
    options = HubOptions.from_kwargs({"token": "hf_x", "local_files_only": True, "dtype": "auto", "cache_dir": None})
    assert options == HubOptions(token="hf_x", local_files_only=True)
    assert options.as_kwargs() == {
        "token": "hf_x", "cache_dir": None, "local_files_only": True, "force_download": False,
    }  # fmt: skip
    assert HubOptions.from_kwargs({"token": False}).token is False


def test_sources_print_what_the_user_wrote() -> None:
    assert str(Source("user/thin", Path("/cache/x"), COMMIT)) == f"user/thin@{COMMIT}"
    assert str(Source("../thin", Path("/data/thin"))) == "../thin"


@pytest.mark.parametrize("call", [inspect, Donor.from_pretrained, AutoModelWithTransplant.from_pretrained])
def test_a_misspelled_folder_is_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[str], Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refused(HubError, "there is no folder 'shak' here, and shak is not in the local cache"):
        call("shak")


def test_a_repository_with_a_revision_is_no_missing_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refused(HubError, "user/law@v1 is not in the local cache") as caught:
        Donor.from_pretrained("user/law", revision="v1")
    assert "no folder" not in str(caught.value)


@pytest.mark.parametrize(("total", "delay", "shown"), [(0, 0.0, False), (5, 60.0, False), (5, 0.0, True)])
def test_a_download_bar_is_shown_where_something_takes_a_while(
    monkeypatch: pytest.MonkeyPatch, total: int, delay: float, shown: bool
) -> None:
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "are_progress_bars_disabled", lambda name: False)
    drawn = io.StringIO()
    bar = sources._Bar(total=total, delay=delay, file=drawn, disable=False, mininterval=0)
    bar.update(total)
    bar.set_description_str("Download complete")
    bar.close()
    assert ("Download complete" in drawn.getvalue()) is shown
    assert shown or not drawn.getvalue().strip()

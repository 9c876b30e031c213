"""Pushed again: only what changed is sent, in one commit, or none; and nobody else's commit is undone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging as transformers_logging

from tests.helpers import Shelf, copied, edit_json, refused, refused_by_hub
from tests.hub_server import ALICE, ALICE_READ_ONLY, EXPIRED, HubServer, run_with_hub
from transplant_hf import AutoModelWithTransplant, ConfigurationError, Donor, HubError
from transplant_hf.hub import push_folder

pytestmark = pytest.mark.hub


def push(folder: Path, repo: str, **options: Any) -> Any:
    return push_folder(folder, repo, commit_message="again", **options)


def sent(hub: HubServer) -> list[str]:
    """Everything that changes a repository or carries a file, and how many bytes of files were asked about."""
    kept = ("*/commit/*", "*/preupload/*", "*/lfs/objects/*", "*/branch/*", "/api/validate-yaml")
    return [str(record) for pattern in kept for record in hub.requests.matching("POST", pattern)] + [
        str(record) for record in hub.requests.uploads()
    ]


@pytest.fixture
def target(both: Shelf, as_user: Any) -> str:
    """A donor repo that Alice has pushed."""
    as_user(ALICE)
    repo = f"{both.law}-pushed"
    push(both.family / "donor", repo)
    both.hub.requests.clear()
    return repo


def test_nothing_changed(both: Shelf, target: str) -> None:
    head = both.hub.head(target)
    info = push(both.family / "donor", target)
    assert info.oid == both.hub.head(target) == head
    assert info.commit_url.endswith(f"{target}/commit/{head}")
    assert info.repo_url.repo_id == target
    assert sent(both.hub) == []
    assert both.hub.is_lfs(target, "donor.safetensors")
    assert not both.hub.is_lfs(target, "config.json")


@pytest.mark.parametrize("how", ["donor", "thin", "full"])
def test_nothing_changed_by_the_public_calls(both: Shelf, as_user: Any, how: str) -> None:
    as_user(ALICE)
    repo = f"{both.law}-{how}"

    def again() -> Any:
        if how == "donor":
            return Donor.from_pretrained(both.law).push_to_hub(repo, position=1, recipient=both.base)
        return AutoModelWithTransplant.from_pretrained(both.law).push_to_hub(repo, thin=how == "thin")

    first = again()
    both.hub.requests.clear()
    second = again()
    assert second.oid == first.oid == both.hub.head(repo)
    assert sent(both.hub) == []


def test_one_small_file_changed(both: Shelf, target: str) -> None:
    edit_json(both.family / "donor" / "config.json", use_cache=False)
    before, files = both.hub.head(target), both.hub.paths(target)
    info = push(both.family / "donor", target)
    assert info.oid == both.hub.head(target) != before
    assert both.hub.paths(target) == files
    assert both.hub.read(target, "config.json") == (both.family / "donor" / "config.json").read_bytes()
    assert len(both.hub.requests.commits()) == 1
    assert both.hub.requests.uploads() == []
    assert both.hub.requests.matching("POST", "*/lfs/objects/*") == []
    size = (both.family / "donor" / "config.json").stat().st_size
    assert both.hub.requests.commits()[0].bytes_received < 2 * size + 500


def test_one_byte_of_the_weights_changed(both: Shelf, target: str) -> None:
    path = both.family / "donor" / "donor.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    push(both.family / "donor", target)
    assert both.hub.read(target, "donor.safetensors") == bytes(data)
    assert len(both.hub.requests.uploads()) == len(both.hub.requests.commits()) == 1
    assert both.hub.requests.commits()[0].bytes_received < 1000  # the weights' name and hash, and no other file


def test_what_goes_goes_in_the_same_commit(both: Shelf, target: str) -> None:
    (both.family / "donor" / "generation_config.json").unlink(missing_ok=True)
    both.hub.commit(target, {"donor-00001-of-00002.safetensors": b"old"})
    gone = {"donor-00001-of-00002.safetensors"}
    push(both.family / "donor", target, replaced=lambda names: gone & set(names))
    assert not gone & set(both.hub.paths(target))
    assert len(both.hub.requests.commits()) == 1
    both.hub.requests.clear()
    push(both.family / "donor", target, replaced=lambda names: gone & set(names))
    assert sent(both.hub) == []


def test_on_a_branch(both: Shelf, target: str) -> None:
    """The branch is made from main, which holds all of it; then main stays as it is."""
    head = both.hub.head(target)
    assert push(both.family / "donor", target, revision="next").oid == head
    assert both.hub.requests.commits() == []
    edit_json(both.family / "donor" / "config.json", use_cache=False)
    assert push(both.family / "donor", target, revision="next").oid == both.hub.head(target, "next") != head
    assert both.hub.head(target) == head
    both.hub.requests.clear()
    assert push(both.family / "donor", target, revision="next").oid == both.hub.head(target, "next")
    assert both.hub.requests.commits() == both.hub.requests.uploads() == []


def test_a_pull_request(both: Shelf, target: str) -> None:
    head = both.hub.head(target)
    assert push(both.family / "donor", target, create_pr=True).oid == head
    assert both.hub.requests.commits() == []
    edit_json(both.family / "donor" / "config.json", use_cache=False)
    info = push(both.family / "donor", target, create_pr=True)
    assert info.pr_num == 1
    assert both.hub.head(target) == head


def test_someone_elses_commit_in_between(both: Shelf, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading the repository and committing; nothing of the push is on the branch."""
    from huggingface_hub import HfApi

    edit_json(both.family / "donor" / "config.json", use_cache=False)
    upload = HfApi.preupload_lfs_files

    def late(self: HfApi, *args: Any, **kwargs: Any) -> None:
        upload(self, *args, **kwargs)
        if not both.hub.requests.commits():
            both.hub.commit(target, {"notes.txt": b"mine"})

    monkeypatch.setattr(HfApi, "preupload_lfs_files", late)
    before = both.hub.read(target, "config.json")
    with refused_by_hub(target, "someone else", "push again", "nothing was committed", cause=HfHubHTTPError):
        push(both.family / "donor", target)
    assert both.hub.read(target, "config.json") == before
    assert both.hub.read(target, "notes.txt") == b"mine"
    push(both.family / "donor", target)
    assert both.hub.read(target, "notes.txt") == b"mine"
    assert b"use_cache" in both.hub.read(target, "config.json")


def test_an_answer_that_was_lost(both: Shelf, target: str) -> None:
    """The commit was made; that the client did not hear of it is no reason to say it was not."""
    edit_json(both.family / "donor" / "config.json", use_cache=False)
    both.hub.fail("POST", "*/commit/*", drop_connection="after")
    try:
        oid = push(both.family / "donor", target).oid
    except HubError as error:
        assert "try again" in str(error)
        oid = push(both.family / "donor", target).oid
    assert oid == both.hub.head(target)
    assert b"use_cache" in both.hub.read(target, "config.json")
    assert len(both.hub.requests.commits()) <= 2


def test_a_large_file_that_cannot_be_sent(both: Shelf, target: str) -> None:
    path, head = both.family / "donor" / "donor.safetensors", both.hub.head(target)
    path.write_bytes(path.read_bytes() + b" ")
    both.hub.fail("PUT", "*", status=403, times=None)
    with refused(HubError, target, "push again"):
        push(both.family / "donor", target)
    assert both.hub.head(target) == head
    both.hub.clear_faults()
    push(both.family / "donor", target)
    assert both.hub.read(target, "donor.safetensors") == path.read_bytes()


# -- What is not uploaded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder", "nowhere"])
def test_a_link_is_refused(both: Shelf, as_user: Any, tmp_path: Path, kind: str) -> None:
    as_user(ALICE)
    folder = copied(both.family / "donor", tmp_path / "copy")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("secret")
    aim = {"file": secret / "key", "folder": secret, "nowhere": tmp_path / "none"}[kind]
    (folder / "link").symlink_to(aim)
    both.hub.requests.clear()
    with refused(ConfigurationError, str(folder / "link"), str(aim), "not uploaded"):
        push(folder, f"{both.law}-links")
    assert not both.hub.exists(f"{both.law}-links")
    assert len(both.hub.requests) == 0


def test_a_link_to_a_folder_of_what_is_meant_is_refused(both: Shelf, as_user: Any, tmp_path: Path) -> None:
    """Other links stay here without a word."""
    as_user(ALICE)
    folder = copied(both.family / "donor", tmp_path / "copy")
    (tmp_path / "elsewhere").mkdir()
    (folder / "recipient").symlink_to(tmp_path / "elsewhere")
    with refused(ConfigurationError, str(folder / "recipient"), "is a link"):
        push(folder, f"{both.law}-links", only={"config.json", "recipient/config.json"})
    push(folder, f"{both.law}-links", only={"config.json"})
    assert set(both.hub.paths(f"{both.law}-links")) - {".gitattributes"} == {"config.json"}


def test_hidden_files_stay_here(both: Shelf, target: str) -> None:
    folder = both.family / "donor"
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("token")
    (folder / ".env").write_text("token")
    (folder / ".link").symlink_to("/etc/passwd")
    push(folder, target)
    assert sent(both.hub) == []


def test_a_gitignore_on_the_hub_hides_no_weights(both: Shelf, as_user: Any) -> None:
    as_user(ALICE)
    repo = f"{both.law}-ignoring"
    both.hub.add_repo(repo, {".gitignore": b"*.safetensors\n*.json\n", ".gitattributes": b""})
    push(both.family / "donor", repo)
    assert {"donor.safetensors", "config.json", "donor_config.json"} <= set(both.hub.paths(repo))
    Donor.from_pretrained(repo).verify()


def test_private_does_not_mean_public(both: Shelf, target: str) -> None:
    edit_json(both.family / "donor" / "config.json", use_cache=False)
    with refused(HubError, target, "public", "Nothing was uploaded"):
        push(both.family / "donor", target, private=True)
    assert sent(both.hub) == []
    push(both.family / "donor", f"{target}-2", private=True)
    push(both.family / "donor", f"{target}-2", private=True)
    with refused(HubError, f"{target}-2", "not found"):
        Donor.from_pretrained(f"{target}-2", token=False)


# -- Who may, and what is said ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "facts"),
    [(EXPIRED, ("401", "hf auth login")), (ALICE_READ_ONLY, ("write",)), (False, ("401",))],
)
def test_who_may_not_push(both: Shelf, as_user: Any, token: Any, facts: tuple[str, ...]) -> None:
    both.hub.add_repo("alice/hers", {"notes.txt": b"mine"})
    for repo in ("alice/hers", "alice/new"):
        with refused(HubError, repo, *facts):
            Donor.from_pretrained(both.law).push_to_hub(repo, position=1, recipient=both.base, token=token)
    assert both.hub.paths("alice/hers") == ["notes.txt"]
    assert not both.hub.exists("alice/new")


def test_too_many_requests(both: Shelf, target: str) -> None:
    edit_json(both.family / "donor" / "config.json", use_cache=False)
    both.hub.fail("GET", f"/api/models/{target}*", status=429, headers={"Retry-After": "17"}, times=None)
    with refused_by_hub(target, "429", "17 seconds", cause=HfHubHTTPError):
        push(both.family / "donor", target)
    both.hub.clear_faults()
    push(both.family / "donor", target)


def test_progress_is_shown(both: Shelf, target: str) -> None:
    """Of the large file that is sent, on standard error; and of nothing when nothing is."""
    code = f"""
        import sys
        from pathlib import Path
        from transplant_hf.hub import push_folder
        for _ in range(2):
            push_folder(Path({str(both.family / "donor")!r}), {target + "-shown"!r}, commit_message="x")
            print("pushed", file=sys.stderr)
    """
    run = run_with_hub(both.hub, code, token=ALICE, env={"HF_HUB_DISABLE_PROGRESS_BARS": "0"})
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    first, again, _ = run.stderr.split("pushed\n")
    assert "donor.safetensors" in first or "Processing Files" in first, first
    assert "donor.safetensors" not in again


def test_what_is_said_when_nothing_changed(both: Shelf, target: str) -> None:
    seen: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger, level = logging.getLogger("transplant_hf.hub"), transformers_logging.get_verbosity()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        push(both.family / "donor", target)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        transformers_logging.set_verbosity(level)
    assert seen == [f"{target} holds all of this already, at {both.hub.head(target)}; nothing was uploaded."]

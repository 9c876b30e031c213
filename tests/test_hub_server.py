"""The test Hub, seen through the real client: if these pass, tests that build on it test the project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import _CACHED_NO_EXIST

from tests.hub_server import ALICE, ALICE_READ_ONLY, BOB, EXPIRED, Fault, HubServer, client, start_session_server
from tests.hub_server.store import folder_ids

pytestmark = pytest.mark.hub

WEIGHTS = bytes(range(256)) * 40


def outcome(call: Any, *args: Any, **kwargs: Any) -> Any:
    """What a call returns, or the name, the status and the message of the client's error."""
    try:
        return call(*args, **kwargs)
    except HfHubHTTPError as error:
        return [type(error).__name__, error.response.status_code, str(error)]


def content(*args: Any, **kwargs: Any) -> bytes:
    return Path(hf_hub_download(*args, **kwargs)).read_bytes()


def test_push_and_push_again(hub: HubServer, as_user: Any) -> None:
    """Small and large files arrive; a second identical push sends none of them."""
    as_user(ALICE)
    api = HfApi()
    api.create_repo("alice/pushed")
    assert outcome(api.create_repo, "alice/pushed")[:2] == ["HfHubHTTPError", 409]
    assert api.create_repo("alice/pushed", exist_ok=True).repo_id == "alice/pushed"
    files = {"config.json": b"{}", "README.md": b"text", "empty.bin": b"", "model.safetensors": WEIGHTS}

    def push() -> str:
        operations = [CommitOperationAdd(path, data) for path, data in files.items()]
        return str(api.create_commit("alice/pushed", operations, commit_message="push").oid)

    first = push()
    (upload,) = hub.requests.uploads()
    assert upload.bytes_received == len(WEIGHTS) and not upload.has_token
    hub.requests.clear()
    assert push() == first == hub.head("alice/pushed")
    assert not hub.requests.uploads() and not hub.requests.commits()
    assert {path: hub.read("alice/pushed", path) for path in files} == files
    assert [path for path in hub.paths("alice/pushed") if hub.is_lfs("alice/pushed", path)] == ["model.safetensors"]


def test_download_by_branch_tag_and_commit(hub: HubServer, tmp_path: Path) -> None:
    """One revision under three names; a commit id needs no look at the branches."""
    files = {"config.json": b'{"v": 1}', "a/b.txt": b"deep", "model.safetensors": WEIGHTS, "empty": b""}
    first = hub.add_repo("alice/open", files)
    hub.tag("alice/open", "v1")
    HfApi().create_branch("alice/open", branch="old/line", token=ALICE)
    second = hub.commit("alice/open", {"config.json": b'{"v": 2}'}, delete=["a/b.txt"])
    now = {"config.json": b'{"v": 2}', "model.safetensors": WEIGHTS, "empty": b""}
    hub.requests.clear()
    for number, revision in enumerate((None, "v1", "old/line", first)):
        folder = Path(snapshot_download("alice/open", revision=revision, cache_dir=tmp_path / str(number)))
        wanted = now if revision is None else files
        found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert (folder.name, found) == (second if revision is None else first, wanted)
    assert not hub.requests.matching("GET", f"*/revision/{first}")
    weights = hub.requests.downloads("*.safetensors")
    assert {(record.origin, record.bytes_sent) for record in weights} == {("cdn", len(WEIGHTS))}
    assert not hub.requests.matching("PUT") + hub.requests.matching("POST")


@pytest.mark.parametrize("kind", ["private", "gated"])
def test_who_gets_in(hub: HubServer, kind: str, tmp_path: Path) -> None:
    """A private repository does not exist for strangers; a gated one shows itself but not its files."""
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    hub.add_repo("alice/guarded", files, private=kind == "private", gated=kind == "gated")

    def access(token: str | bool) -> list[Any]:
        how = {"token": token, "cache_dir": tmp_path / str(token)}
        found = [outcome(content, "alice/guarded", name, **how) for name in files]
        return [*found, outcome(lambda: HfApi().model_info("alice/guarded", token=token).id)]

    name = "RepositoryNotFoundError" if kind == "private" else "GatedRepoError"
    for token, status in ((False, 401), (BOB, 404 if kind == "private" else 403)):
        small, large, info = access(token)
        assert small[:2] == large[:2] == [name, status]
        assert info[:2] == [name, status] if kind == "private" else info == "alice/guarded"
        if kind == "gated":
            assert ("not in the authorized list" if token else "Please log in") in small[2]
    assert not hub.requests.downloads()
    allowed = [*files.values(), "alice/guarded"]
    assert access(ALICE) == allowed
    hub.grant("alice/guarded", "bob")
    assert access(BOB) == allowed


def test_missing_things(hub: HubServer, tmp_path: Path) -> None:
    """Repository, revision and file each have an error of their own, with and without a token."""
    hub.add_repo("alice/open", {"config.json": b"{}"})
    for token, status in ((False, 401), (BOB, 404)):
        how: dict[str, Any] = {"token": token, "cache_dir": tmp_path}
        for missing in (
            outcome(hf_hub_download, "alice/none", "config.json", **how),
            outcome(snapshot_download, "alice/none", **how),
            outcome(HfApi().model_info, "single-name", token=token),
        ):
            assert missing[:2] == ["RepositoryNotFoundError", status]
        for missing in (
            outcome(hf_hub_download, "alice/open", "config.json", revision="v9", **how),
            outcome(snapshot_download, "alice/open", revision="0" * 40, **how),
        ):
            assert missing[:2] == ["RevisionNotFoundError", 404]
        for missing in (
            outcome(hf_hub_download, "alice/open", "none.json", **how),
            outcome(lambda: list(HfApi().list_repo_tree("alice/open", "folder", token=token))),  # noqa: B023
        ):
            assert missing[:2] == ["RemoteEntryNotFoundError", 404]
    assert try_to_load_from_cache("alice/open", "none.json", cache_dir=tmp_path) is _CACHED_NO_EXIST


def test_tokens_and_rights(hub: HubServer, tmp_path: Path) -> None:
    """An expired token fails even where none is needed; reading rights do not allow pushing."""
    hub.add_repo("alice/open", {"config.json": b"{}"})
    api = HfApi()
    assert outcome(api.whoami, token=EXPIRED)[:2] == ["HfHubHTTPError", 401]
    expired = outcome(hf_hub_download, "alice/open", "config.json", token=EXPIRED, cache_dir=tmp_path)
    assert expired[:2] == ["HfHubHTTPError", 401] and "Invalid credentials in Authorization header" in expired[2]
    for token, status in ((BOB, 403), (ALICE_READ_ONLY, 403), (False, 401)):
        operations = [CommitOperationAdd("new.txt", b"new")]
        pushed = outcome(api.create_commit, "alice/open", operations, commit_message="m", token=token)
        assert pushed[:2] == ["HfHubHTTPError", status]
    assert outcome(api.create_repo, "alice/other", token=BOB)[:2] == ["HfHubHTTPError", 403]
    assert hub.paths("alice/open") == ["config.json"]


def test_commits_and_branches(hub: HubServer, as_user: Any) -> None:
    """Stale parents, branches, pull requests, deletions, lists and histories."""
    as_user(ALICE)
    api, repo = HfApi(), "alice/line"
    first = hub.add_repo(repo, {f"dir/{name}.txt": name.encode() for name in "abc"})
    hub.commit(repo, {"model.safetensors": WEIGHTS})

    def commit(*operations: Any, **kwargs: Any) -> Any:
        return api.create_commit(repo, list(operations), commit_message="change", **kwargs)

    add = CommitOperationAdd("x", b"x")
    stale = outcome(commit, add, parent_commit=first)
    assert stale[:2] == ["HfHubHTTPError", 412] and "A commit has happened since" in stale[2]
    api.create_branch(repo, branch="side/one", revision=first)
    assert outcome(api.create_branch, repo, branch="side/one")[:2] == ["HfHubHTTPError", 409]
    commit(add, parent_commit=first, revision="side/one")
    assert hub.paths(repo, "side/one") == ["dir/a.txt", "dir/b.txt", "dir/c.txt", "x"]
    assert commit(CommitOperationDelete("dir/a.txt"), create_pr=True).pr_revision == "refs/pr/1"
    listed = [entry.path for entry in api.list_repo_tree(repo, revision="refs/pr/1", recursive=True)]
    assert listed == ["dir", "dir/b.txt", "dir/c.txt", "model.safetensors"]
    commit(CommitOperationDelete("dir/a.txt"))
    assert len(api.list_repo_commits(repo)) == 3
    siblings = api.model_info(repo, files_metadata=True).siblings or ()
    assert {file.rfilename: file.lfs.size for file in siblings if file.lfs} == {"model.safetensors": len(WEIGHTS)}
    api.delete_repo(repo)
    assert not hub.exists(repo)


def test_faults(hub: HubServer, as_user: Any, tmp_path: Path) -> None:
    """The client waits out a rate limit, resumes a cut download, and believes bytes that are wrong."""
    as_user(ALICE)
    # The client writes, and can resume, in steps of 10 MiB.
    step = 10 << 20
    large, repo = bytes(step + 5000), "alice/faulty"
    hub.add_repo(repo, {"config.json": b"{}", "model.safetensors": large, "other.bin": WEIGHTS})
    faults = [
        hub.fail("GET", "*/config.json", status=429, headers={"Retry-After": "0"}),
        hub.fail("GET", "/blobs/*/model.safetensors", truncate_to=step + 1000),
        hub.fail("GET", "/blobs/*/other.bin", wrong_bytes=True),
        hub.fail("POST", "*/preupload/*", drop_connection=True),
        hub.fail("POST", "*/commit/main", drop_connection="after"),
    ]
    assert content(repo, "config.json", cache_dir=tmp_path) == b"{}"
    spoiled = content(repo, "other.bin", cache_dir=tmp_path)
    assert len(spoiled) == len(WEIGHTS) and all(a != b for a, b in zip(spoiled, WEIGHTS, strict=True))
    assert content(repo, "model.safetensors", cache_dir=tmp_path) == large
    with pytest.raises(Exception, match="disconnected"):
        HfApi().create_commit(repo, [CommitOperationAdd("new.txt", b"n")], commit_message="m")
    assert [fault.hits for fault in faults] == [1] * 5
    # The commit was made although its answer never came.
    assert hub.read(repo, "new.txt") == b"n"
    pieces = [(r.range, r.bytes_sent) for r in hub.requests.downloads("*/model.safetensors")]
    assert pieces == [(None, step + 1000), (f"bytes={step}-", 5000)]
    with pytest.raises(ValueError, match="needs an effect"):
        Fault("GET", "*")


def test_a_session_starts_before_the_client_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_session_server", None)
    with pytest.raises(RuntimeError, match="before anything imports huggingface_hub"):
        start_session_server()


def test_git_ids_are_real(hub: HubServer) -> None:
    """Blob and tree ids are those that git itself computes."""
    hub.add_repo("alice/git", {"a": b"", "lib/x.py": b"x\n", "lib.py": b"hello\n"})
    repo = hub.state.store.get("alice/git")
    assert repo is not None
    commit = repo.resolve("main")
    assert commit.files["a"].oid == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert commit.files["lib.py"].oid == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert folder_ids({})[""] == "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
    assert folder_ids(commit.files)[""] == "8b459d22c8f21e956150774ec8b702538fdce195"

"""The test Hub, seen through the real client: if these pass, tests that build on it test the project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import NUM_LAYERS, tiny_llama_model
from tests.hub_server import (
    ALICE,
    ALICE_READ_ONLY,
    BOB,
    EXPIRED,
    Fault,
    HubServer,
    run_script,
    run_with_hub,
)
from tests.hub_server.store import folder_ids

pytestmark = pytest.mark.hub
pytest_plugins = ("tests.hub_server.fixtures",)

WEIGHTS = bytes(range(256)) * 40


def test_push_and_push_again(small_hub: HubServer) -> None:
    """Small, large and very large files arrive; a second identical push sends none of them."""
    code = """
        from pathlib import Path

        api.create_repo("alice/pushed")
        Path("weights.safetensors").write_bytes(bytes(range(256)) * 40)

        def push():
            return api.create_commit("alice/pushed", [
                CommitOperationAdd("config.json", b"{}"),
                CommitOperationAdd("README.md", b"---\\nlicense: mit\\n---\\ntext"),
                CommitOperationAdd("nested/table.txt", b"t" * 1500),
                CommitOperationAdd("empty.bin", b""),
                CommitOperationAdd("model.safetensors", "weights.safetensors"),
            ], commit_message="push", commit_description="all files").oid

        first = push()
        api.whoami()
        finish(again=outcome(api.create_repo, "alice/pushed"), first=first, second=push(),
               kept=api.create_repo("alice/pushed", exist_ok=True).repo_id)
    """
    result = run_script(small_hub, code, token=ALICE)
    assert result["again"][:2] == ["HfHubHTTPError", 409]
    assert result["kept"] == "alice/pushed"
    assert result["first"] == result["second"] == small_hub.head("alice/pushed")
    assert small_hub.read("alice/pushed", "model.safetensors") == WEIGHTS
    assert small_hub.read("alice/pushed", "nested/table.txt") == b"t" * 1500
    large = [path for path in small_hub.paths("alice/pushed") if small_hub.is_lfs("alice/pushed", path)]
    assert large == ["model.safetensors", "nested/table.txt"]

    order = [record.path for record in small_hub.requests]
    between = order.index("/api/whoami-v2")
    uploads = [record.bytes_received for record in small_hub.requests.uploads()]
    assert sorted(uploads) == [240, 1500, *[2500] * 4]
    assert all(not record.has_token for record in small_hub.requests.uploads())
    assert not [path for path in order[between:] if "/storage/" in path or "/commit/" in path]


def test_download_by_branch_tag_and_commit(small_hub: HubServer) -> None:
    """One revision under three names; a commit id needs no look at the branches."""
    files = {"config.json": b'{"v": 1}', "a/b.txt": b"deep", "model.safetensors": WEIGHTS, "empty": b""}
    first = small_hub.add_repo("alice/open", files)
    small_hub.tag("alice/open", "v1")
    small_hub.branch("alice/open", "old/line")
    second = small_hub.commit("alice/open", {"config.json": b'{"v": 2}'}, delete=["a/b.txt"])
    code = f"""
        def snapshot(revision=None):
            from pathlib import Path
            folder = Path(snapshot_download("alice/open", revision=revision, cache_dir=f"cache-{{revision}}"))
            return [folder.name, sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())]

        finish(main=snapshot(), tag=snapshot("v1"), branch=snapshot("old/line"), commit=snapshot("{first}"),
               config=content("alice/open", "config.json"),
               old=content("alice/open", "config.json", revision="v1"),
               weights=content("alice/open", "model.safetensors"), empty=content("alice/open", "empty"))
    """
    result = run_script(small_hub, code)
    assert result["main"] == [second, ["config.json", "empty", "model.safetensors"]]
    everything = [first, ["a/b.txt", "config.json", "empty", "model.safetensors"]]
    assert result["tag"] == result["commit"] == [first, sorted(files)] == everything
    assert result["branch"] == everything
    assert (result["config"], result["old"]) == ('{"v": 2}', '{"v": 1}')
    assert result["weights"].encode("latin-1") == WEIGHTS
    assert result["empty"] == ""

    assert not small_hub.requests.matching("GET", f"*/revision/{first}")
    weights = small_hub.requests.downloads("*.safetensors")
    assert {record.origin for record in weights} == {"cdn"}
    assert {record.bytes_sent for record in weights} == {len(WEIGHTS)}
    assert all(record.download_call for record in weights)
    assert not small_hub.requests.matching("PUT") + small_hub.requests.matching("POST")


ACCESS = """
def access(token):
    return {
        "file": outcome(content, "alice/guarded", "config.json", token=token, force_download=False),
        "large": outcome(content, "alice/guarded", "model.safetensors", token=token),
        "info": outcome(lambda: api.model_info("alice/guarded", token=token).id),
        "check": outcome(api.auth_check, "alice/guarded", token=token),
    }
"""


@pytest.mark.parametrize("kind", ["private", "gated"])
def test_who_gets_in(hub_server: HubServer, kind: str) -> None:
    """A private repository does not exist for strangers; a gated one shows itself but not its files."""
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    hub_server.add_repo("alice/guarded", files, private=kind == "private", gated=kind == "gated")
    code = ACCESS + f'finish(nobody=access(False), bob=access("{BOB}"), alice=access("{ALICE}"))'
    result = run_script(hub_server, code)
    allowed = {"file": "{}", "large": "weights", "info": "alice/guarded", "check": None}
    assert result["alice"] == allowed
    name = "RepositoryNotFoundError" if kind == "private" else "GatedRepoError"
    codes = (401, 404) if kind == "private" else (401, 403)
    for who, status in zip(("nobody", "bob"), codes, strict=True):
        for what in ("file", "large", "check"):
            assert result[who][what][:2] == [name, status], (who, what)
        if kind == "private":
            assert result[who]["info"][:2] == [name, status]
        else:
            assert result[who]["info"] == "alice/guarded"
    if kind == "gated":
        assert "Please log in" in result["nobody"]["file"][2]
        assert "not in the authorized list" in result["bob"]["file"][2]
    assert not [record for record in hub_server.requests.downloads() if record.user == "bob"]

    hub_server.grant("alice/guarded", "bob")
    assert run_script(hub_server, ACCESS + f'finish(bob=access("{BOB}"))')["bob"] == allowed


def test_missing_things(hub_server: HubServer) -> None:
    """Repository, revision and file each have an error of their own, with and without a token."""
    hub_server.add_repo("alice/open", {"config.json": b"{}"})
    code = """
        def errors(token):
            return [outcome(*call, token=token)[:2] for call in (
                (hf_hub_download, "alice/none", "config.json"),
                (snapshot_download, "alice/none"),
                (api.model_info, "single-name"),
                (lambda token: hf_hub_download("alice/open", "config.json", revision="v9", token=token),),
                (lambda token: snapshot_download("alice/open", revision="0" * 40, token=token),),
                (hf_hub_download, "alice/open", "none.json"),
                (lambda token: list(api.list_repo_tree("alice/open", "folder", token=token)),),
            )]
        from huggingface_hub import file_exists, repo_exists, revision_exists, try_to_load_from_cache
        from huggingface_hub.file_download import _CACHED_NO_EXIST
        finish(nobody=errors(False), bob=errors("hf_test_bob"),
               absent=try_to_load_from_cache("alice/open", "none.json") is _CACHED_NO_EXIST,
               exist=[repo_exists("alice/none"), repo_exists("alice/open"),
                      revision_exists("alice/open", "v9"), file_exists("alice/open", "none.json"),
                      file_exists("alice/open", "config.json")])
    """
    result = run_script(hub_server, code)
    rest = [["RevisionNotFoundError", 404]] * 2 + [["RemoteEntryNotFoundError", 404]] * 2
    assert result["nobody"] == [["RepositoryNotFoundError", 401]] * 3 + rest
    assert result["bob"] == [["RepositoryNotFoundError", 404]] * 3 + rest
    assert result["absent"]
    assert result["exist"] == [False, True, False, False, True]
    assert hub_server.requests.matching("HEAD", "*/none.json", status=404)


def test_tokens_and_rights(hub_server: HubServer) -> None:
    """An expired token fails even where none is needed; reading rights do not allow pushing."""
    hub_server.add_repo("alice/open", {"config.json": b"{}"})
    hub_server.users.add_organization("team", {"alice"})
    code = f"""
        def push(repo, token):
            operation = CommitOperationAdd("new.txt", b"new")
            return outcome(lambda: api.create_commit(repo, [operation], commit_message="m", token=token).oid)
        finish(expired=[outcome(api.whoami, token="{EXPIRED}"),
                        outcome(hf_hub_download, "alice/open", "config.json", token="{EXPIRED}")],
               pushes=[push("alice/open", t)[:2] for t in ("{BOB}", "{ALICE_READ_ONLY}", False)],
               created=outcome(api.create_repo, "alice/other", token="{BOB}"),
               team=[api.create_repo("team/model", token="{ALICE}").repo_id,
                     len(push("team/model", "{ALICE}"))],
               role=api.whoami(token="{ALICE_READ_ONLY}")["auth"]["accessToken"]["role"])
    """
    result = run_script(hub_server, code)
    assert [error[:2] for error in result["expired"]] == [["HfHubHTTPError", 401]] * 2
    assert "Invalid credentials in Authorization header" in result["expired"][1][2]
    assert result["pushes"] == [["HfHubHTTPError", 403]] * 2 + [["HfHubHTTPError", 401]]
    assert result["created"][:2] == ["HfHubHTTPError", 403]
    assert result["team"] == ["team/model", 40]
    assert result["role"] == "read"
    assert hub_server.paths("alice/open") == ["config.json"]


def test_commits_refs_and_settings(small_hub: HubServer) -> None:
    """Stale parents, branches, tags, pull requests, copies, deletions, pages and settings."""
    first = small_hub.add_repo("alice/line", {f"dir/{name}.txt": name.encode() for name in "abcdefg"})
    small_hub.commit("alice/line", {"model.safetensors": WEIGHTS})
    code = f"""
        repo = "alice/line"

        def commit(*operations, **kwargs):
            return api.create_commit(repo, list(operations), commit_message="change", **kwargs)

        stale = outcome(commit, CommitOperationAdd("x", b"x"), parent_commit="{first}")
        api.create_branch(repo, branch="side/one", revision="{first}")
        api.create_tag(repo, tag="v1", revision="side/one", tag_message="first")
        double = [outcome(api.create_branch, repo, branch="side/one")]
        double.append(outcome(api.create_tag, repo, tag="v1"))
        moved = commit(CommitOperationAdd("x", b"x"), parent_commit="{first}", revision="side/one").oid
        pull = commit(CommitOperationDelete("dir/"), create_pr=True).pr_revision
        copy = CommitOperationCopy("model.safetensors", "copy.safetensors")
        commit(copy, CommitOperationDelete("dir/a.txt"))

        refs = api.list_repo_refs(repo, include_pull_requests=True)
        listed = [entry.path for entry in api.list_repo_tree(repo, revision="refs/pr/1", recursive=True)]
        pages = [entry.path for entry in api.list_repo_tree(repo, recursive=True, revision="side/one")]
        details = api.get_paths_info(repo, ["dir", "x", "none"], revision="side/one", expand=True)
        api.delete_branch(repo, branch="side/one")
        api.delete_tag(repo, tag="v1")
        gone = outcome(api.delete_tag, repo, tag="v1")[:2]
        api.update_repo_settings(repo, gated="manual", private=True)
        described = api.model_info(repo, files_metadata=True)
        history = len(api.list_repo_commits(repo))
        api.delete_repo(repo)
        finish(stale=stale, double=double, moved=moved, pull=pull, listed=listed, pages=pages, gone=gone,
               info={{entry.path: entry.last_commit.oid for entry in details}}, history=history,
               tags=[(t.name, t.target_commit) for t in refs.tags],
               branches=sorted(b.name for b in refs.branches),
               settings=[described.gated, described.private],
               sizes={{s.rfilename: s.lfs.size for s in described.siblings if s.lfs}})
    """
    result = run_script(small_hub, code, token=ALICE)
    assert result["stale"][:2] == ["HfHubHTTPError", 412]
    assert "A commit has happened since" in result["stale"][2]
    assert [error[:2] for error in result["double"]] == [["HfHubHTTPError", 409]] * 2
    assert (result["tags"], result["branches"]) == ([["v1", first]], ["main", "side/one"])
    assert (result["pull"], result["listed"]) == ("refs/pr/1", ["model.safetensors"])
    assert result["pages"] == ["dir", *(f"dir/{name}.txt" for name in "abcdefg"), "x"]
    assert result["info"] == {"dir": first, "x": result["moved"]}
    assert result["gone"] == ["RevisionNotFoundError", 404]
    assert result["settings"] == ["manual", True]
    assert result["history"] == 3
    assert result["sizes"] == {"model.safetensors": len(WEIGHTS), "copy.safetensors": len(WEIGHTS)}
    assert not small_hub.exists("alice/line")


def test_faults(hub_server: HubServer) -> None:
    """The client waits out a rate limit, resumes a cut download, and believes bytes that are wrong."""
    # The client writes, and can resume, in steps of 10 MiB.
    step = 10 << 20
    large = bytes(step + 5000)
    files = {"config.json": b"{}", "model.safetensors": large, "other.bin": WEIGHTS}
    hub_server.add_repo("alice/faulty", files)
    limited = hub_server.fail("GET", "*/config.json", status=429, headers={"Retry-After": "0"})
    cut = hub_server.fail("GET", "/blobs/*/model.safetensors", truncate_to=step + 1000)
    wrong = hub_server.fail("GET", "/blobs/*/other.bin", wrong_bytes=True)
    dropped = hub_server.fail("POST", "*/preupload/*", drop_connection=True)
    lost = hub_server.fail("POST", "*/commit/main", drop_connection="after")
    code = """
        import httpx2
        values = [content("alice/faulty", "config.json"), content("alice/faulty", "other.bin")]
        values.append(content("alice/faulty", "model.safetensors") == "\\0" * ((10 << 20) + 5000))
        try:
            api.create_commit("alice/faulty", [CommitOperationAdd("new.txt", b"n")], commit_message="m")
        except httpx2.RemoteProtocolError as error:
            values.append(str(error))
        finish(values=values)
    """
    config, spoiled, whole, error = run_script(hub_server, code, token=ALICE)["values"]
    assert (config, whole) == ("{}", True)
    assert len(spoiled) == len(WEIGHTS)
    assert all(a != b for a, b in zip(spoiled.encode("latin-1"), WEIGHTS, strict=True))
    assert "disconnected" in error
    assert [fault.hits for fault in (limited, cut, wrong, dropped, lost)] == [1] * 5
    # The commit was made although its answer never came.
    assert hub_server.read("alice/faulty", "new.txt") == b"n"
    pieces = [(r.range, r.bytes_sent) for r in hub_server.requests.downloads("*/model.safetensors")]
    assert pieces == [(None, step + 1000), (f"bytes={step}-", 5000)]
    with pytest.raises(ValueError, match="needs an effect"):
        Fault("GET", "*")


def test_cache_without_hub(hub_server: HubServer, hub_cache: Path) -> None:
    """What is cached stays usable offline, and when the server is gone."""
    sha = hub_server.add_repo("alice/open", {"config.json": b"{}", "extra.json": b"[]"})
    read = 'finish(cached=content("alice/open", "config.json"), missing={missing})'
    cached = read.format(missing="None")
    assert run_script(hub_server, cached, cache=hub_cache)["cached"] == "{}"
    hub_server.requests.clear()
    both = read.format(missing='outcome(content, "alice/open", "extra.json")')
    offline = run_script(hub_server, both, cache=hub_cache, offline=True)
    assert (offline["cached"], offline["missing"][0]) == ("{}", "LocalEntryNotFoundError")
    hub_server.stop()
    # Only the cached file: for another one the client would try to connect for half a minute.
    assert run_script(hub_server, cached, cache=hub_cache)["cached"] == "{}"
    assert len(hub_server.requests) == 0
    assert (hub_cache / "hub" / "models--alice--open" / "refs" / "main").read_text() == sha


def test_transformers(hub: HubServer, as_user: Any) -> None:
    """A tiny Llama goes up and comes down again; its tensors can be listed without its weights."""
    as_user(ALICE)
    model = tiny_llama_model(seed=1, hidden_size=64)
    model.push_to_hub("alice/tiny")
    config = AutoConfig.from_pretrained("alice/tiny")
    metadata = HfApi().parse_safetensors_file_metadata("alice/tiny", "model.safetensors")
    HfApi().whoami()
    loaded = AutoModelForCausalLM.from_pretrained("alice/tiny", revision="main")
    assert config.num_hidden_layers == NUM_LAYERS and len(metadata.tensors) == len(model.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert sum(metadata.parameter_count.values()) == loaded.num_parameters()
    size = len(hub.read("alice/tiny", "model.safetensors"))
    ranged, full = hub.requests.downloads("*/model.safetensors")
    assert (ranged.range, ranged.status, ranged.bytes_sent) == ("bytes=0-100000", 206, 100001)
    assert (full.range, full.status, full.bytes_sent) == (None, 200, size)
    assert size > 200_000
    records = list(hub.requests)
    (mark,) = [index for index, record in enumerate(records) if record.path == "/api/whoami-v2"]
    # Before it only the header was read: neither `AutoConfig` nor the push brought any weights down.
    assert records.index(ranged) < mark < records.index(full)
    assert not hub.requests.unrouted()


SESSION = """
import sys
from tests.hub_server import ALICE, start_session_server

server = start_session_server(lfs_threshold=100)
assert start_session_server() is server
import os
from pathlib import Path
from huggingface_hub import HfApi, constants, get_token, hf_hub_download

sha = server.add_repo("alice/here", {"config.json": b"{}"}, private=True)
assert constants.ENDPOINT == server.url
assert constants.HF_HUB_DISABLE_XET
assert get_token() is None
os.environ["HF_TOKEN"] = ALICE
assert Path(hf_hub_download("alice/here", "config.json", cache_dir="cache")).parent.name == sha
assert HfApi().whoami()["name"] == "alice"
server.reset()
assert not server.exists("alice/here")
assert len(server.requests) == 0
print("in process")
"""

LATE = """
import huggingface_hub.constants
from tests.hub_server import HubServer, start_session_server
try:
    start_session_server()
except RuntimeError as error:
    print(error)

# Without the environment, `endpoint=` reaches the functions that take it.
from huggingface_hub import HfApi, hf_hub_download
with HubServer() as server:
    server.add_repo("alice/open", {"config.json": b"{}", "model.safetensors": b"weights"})
    hf_hub_download("alice/open", "model.safetensors", cache_dir="cache", endpoint=server.url, token=False)
    assert HfApi(endpoint=server.url, token=False).model_info("alice/open").id == "alice/open"
    assert server.requests.downloads("*.safetensors")
"""


def test_in_process(hub_server: HubServer) -> None:
    """A session server works if it starts before the client is imported, and refuses to start after."""
    started = run_with_hub(hub_server, SESSION)
    assert started.stdout == "in process\n", started.stderr
    late = run_with_hub(hub_server, LATE)
    assert late.returncode == 0, late.stderr
    assert "before anything imports huggingface_hub" in late.stdout
    assert not hub_server.requests.downloads()


def test_git_ids_are_real(hub_server: HubServer) -> None:
    """Blob and tree ids are those that git itself computes."""
    hub_server.add_repo("alice/git", {"a": b"", "lib/x.py": b"x\n", "lib.py": b"hello\n"})
    repo = hub_server.state.store.get("alice/git")
    assert repo is not None
    commit = repo.resolve("main")
    assert commit.files["a"].oid == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert commit.files["lib.py"].oid == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert folder_ids({})[""] == "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
    assert folder_ids(commit.files)[""] == "8b459d22c8f21e956150774ec8b702538fdce195"

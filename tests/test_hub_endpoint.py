"""Push and pull against any Hub: the stand-in, or the one that TRANSPLANT_HF_TEST_ENDPOINT names."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from tests.conftest import HUB
from tests.helpers import edit_json, logits_of
from tests.hub_server import ALICE, ENDPOINT
from transplant_hf import AutoModelWithTransplant, Donor, HubError
from transplant_hf.donor.saved_files import replaced_among
from transplant_hf.hub import push_folder

pytestmark = pytest.mark.hub


@pytest.fixture
def repo(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a private repository that is deleted afterwards, as is the one of its recipient."""
    if ENDPOINT and not os.environ.get("HF_TOKEN"):
        pytest.skip(f"pushing to {ENDPOINT} needs a token in HF_TOKEN")
    if not ENDPOINT:
        HUB.reset()
        monkeypatch.setenv("HF_TOKEN", ALICE)
    name = f"{HfApi().whoami()['name']}/transplant-hf-test-{secrets.token_hex(4)}"
    yield name
    for made in (name, f"{name}-recipient"):
        HfApi().delete_repo(made, missing_ok=True)


def push(folder: Path, repo: str, revision: str | None = None) -> str:
    """Push a folder and return the commit's id."""
    options = {"private": True, "commit_message": "test", "revision": revision}
    return str(push_folder(folder, repo, replaced=replaced_among, **options).oid)  # type: ignore[arg-type]


def commits(repo: str, revision: str = "main") -> list[str]:
    """The branch's commits, newest first."""
    return [commit.commit_id for commit in HfApi().list_repo_commits(repo, revision=revision)]


def test_push_and_pull(family: Path, repo: str, tmp_path: Path) -> None:
    """A donor goes up in one commit and comes back with the same bytes, pinned, also offline."""
    donor = Donor.from_pretrained(family / "donor")
    HfApi().create_repo(f"{repo}-recipient", private=True)
    HfApi().upload_folder(repo_id=f"{repo}-recipient", folder_path=family / "recipient")
    info = donor.push_to_hub(repo, position=2, recipient=f"{repo}-recipient", private=True)
    assert commits(repo)[0] == info.oid
    assert len(commits(repo)) == 2  # the repository's own first one
    back = Donor.from_pretrained(repo)
    assert back.source is not None
    assert back.source.revision == info.oid
    known = donor.tensors()
    assert all(torch.equal(tensor, known[name]) for name, tensor in back.tensors().items())
    model = AutoModelWithTransplant.from_pretrained(family / "recipient", donors={repo: 2})
    assert model.transplant_config.donors[0].revision == info.oid
    again = AutoModelWithTransplant.from_pretrained(family / "recipient", donors={repo: 2}, local_files_only=True)
    assert torch.equal(logits_of(again), logits_of(model))


def test_a_push_that_changes_nothing(family: Path, repo: str) -> None:
    first = push(family / "donor", repo)
    before = commits(repo)
    assert push(family / "donor", repo) == first
    assert commits(repo) == before


def test_a_push_that_changes_one_file(family: Path, repo: str) -> None:
    push(family / "donor", repo)
    before = {file.rfilename: file.blob_id for file in HfApi().model_info(repo, files_metadata=True).siblings or ()}
    edit_json(family / "donor" / "config.json", use_cache=False)
    oid = push(family / "donor", repo)
    assert commits(repo)[0] == oid
    now = {file.rfilename: file.blob_id for file in HfApi().model_info(repo, files_metadata=True).siblings or ()}
    assert {name for name in now if now[name] != before.get(name)} == {"config.json"}
    path = HfApi().hf_hub_download(repo, "config.json", revision=oid)
    assert json.loads(Path(path).read_text())["use_cache"] is False


def test_a_push_to_a_branch(family: Path, repo: str) -> None:
    first = push(family / "donor", repo)
    edit_json(family / "donor" / "config.json", use_cache=False)
    second = push(family / "donor", repo, "next")
    assert (commits(repo)[0], commits(repo, "next")[0]) == (first, second)


def test_a_private_repository_is_not_for_all(family: Path, repo: str) -> None:
    push(family / "donor", repo)
    with pytest.raises(HubError, match=repo):
        Donor.from_pretrained(repo, token=False)

"""A conversion that is pushed: the donor's files, and none of the user's that lie beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import tiny_llama_model
from tests.hub_server import ALICE, HubServer
from transplant_hf import AutoModelWithTransplant
from transplant_hf.conversion import convert

pytestmark = pytest.mark.hub


def test_files_beside_the_donor_stay_at_home(hub: HubServer, as_user: Any, tiny_llama: Path, tmp_path: Path) -> None:
    as_user(ALICE)
    hub.add_repo("alice/base-converted", tiny_llama / "recipient")
    source = tiny_llama_model(seed=3)
    torch.save([layer.state_dict() for layer in source.model.layers[1:3]], tmp_path / "law.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    (tmp_path / "out" / "linked").symlink_to("/etc/hostname")

    options: dict[str, Any] = {"layers": [1, 2], "push_to": "alice/law-converted"}
    done = convert(tmp_path / "law.pt", "alice/base-converted", tmp_path / "out", overwrite=True, **options)

    assert done.commit and done.folder == str(tmp_path / "out")
    assert (tmp_path / "out" / "diary.txt").read_text() == "mine"
    paths = set(hub.paths("alice/law-converted"))
    assert {"config.json", "donor_config.json", "donor.safetensors", "README.md", "tokenizer.json"} <= paths
    assert not paths & {"diary.txt", "linked"}
    assert json.loads(hub.read("alice/law-converted", "donor_config.json"))["name"] == "out"
    model = AutoModelWithTransplant.from_pretrained("alice/law-converted")
    assert torch.equal(model.model.layers[2].mlp.up_proj.weight, source.model.layers[2].mlp.up_proj.weight)


def test_a_push_without_a_folder_leaves_none(hub: HubServer, as_user: Any, tiny_llama: Path, tmp_path: Path) -> None:
    as_user(ALICE)
    hub.add_repo("alice/base-converted", tiny_llama / "recipient")
    torch.save([layer.state_dict() for layer in tiny_llama_model(seed=3).model.layers[1:3]], tmp_path / "law.pt")
    options: dict[str, Any] = {"layers": [1, 2], "push_to": "alice/law-pushed"}
    first = convert(tmp_path / "law.pt", "alice/base-converted", **options)
    assert first.folder is None
    assert [path.name for path in tmp_path.iterdir()] == ["law.pt"]
    commits = len(hub.requests.commits())
    again = convert(tmp_path / "law.pt", "alice/base-converted", **options)
    assert (len(hub.requests.commits()), again.commit) == (commits, first.commit)

"""Repositories are inspected by their headers: what is fetched, what is compared, and who may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.helpers import (
    BUILDERS,
    Shelf,
    copied,
    edit_json,
    loaded,
    make_family,
    refused,
    refused_by_hub,
)
from tests.hub_server import ALICE, BOB, EXPIRED
from tests.inspection.helpers import count_of, same_as_json, size_of
from tests.inspection.test_headers import HOSTILE
from transplant_hf import CheckpointError, ConfigurationError, Donor, check_compatibility
from transplant_hf.inspection import DonorInspection, ModelInspection, TransplantInspection, inspect

pytestmark = pytest.mark.hub


def of_donor(*args: Any, **kwargs: Any) -> DonorInspection:
    found = inspect(*args, **kwargs)
    assert isinstance(found, DonorInspection)
    return found


def weights_in_cache(*repos: str) -> list[Path]:
    """Weight files that the cache holds of repositories."""
    cache = Path(constants.HF_HUB_CACHE)
    folders = [cache / f"models--{repo.replace('/', '--')}" for repo in repos]
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert found, "nothing of these repositories is in the cache: the test looks in the wrong place"
    return [path for path in found if path.suffix in (".safetensors", ".bin") or path.stat().st_size > 100_000]


# -- What is found ---------------------------------------------------------------------------------------------------


def test_a_donor(both: Shelf) -> None:
    found = of_donor(both.law)
    here = of_donor(both.family / "donor", recipient=both.family / "recipient")
    assert found.revision == both.law_commit
    assert (found.recipient, found.recipient_revision) == (both.base, None)
    assert found.weights.sha256 == "same on the Hub"
    for field in ("tensors", "parameters", "size", "dtypes", "per_layer"):
        assert getattr(found.weights, field) == getattr(here.weights, field)
    assert found.layer_map == here.layer_map
    assert same_as_json(found)["weights"]["files"][0]["hub_sha256"] == found.weights.files[0].sha256
    assert f"{both.law}@{both.law_commit}: donor" in str(found)
    assert both.weights(both.base) == 0


def test_small_weights_outside_large_file_storage(both: Shelf) -> None:
    """The Hub lists no sha256 for them."""
    both.hub.add_repo(f"{both.law}-2", {".gitattributes": b"# nothing\n", **_files(both.family / "donor")})
    found = of_donor(f"{both.law}-2")
    assert found.weights.sha256 == "recorded"
    assert found.weights.parameters == count_of(both.family / "donor" / "donor.safetensors")
    assert [record.status for record in both.hub.requests.downloads("*donor.safetensors")] == [206]


def _files(folder: Path) -> dict[str, bytes | Path]:
    return {path.name: path for path in folder.iterdir()}


def test_other_bytes_than_recorded(both: Shelf) -> None:
    path = both.family / "donor" / "donor.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    both.hub.commit(both.law, {"donor.safetensors": bytes(data)})
    found = of_donor(both.law)
    assert not found
    assert found.weights.sha256 == "differs"
    assert "the Hub lists sha256" in found.problems[0]
    assert of_donor(both.law, revision=both.law_commit)


def test_no_sha256_recorded(both: Shelf) -> None:
    """Such a donor is refused on loading."""
    edit_json(both.family / "donor" / "donor_config.json", files={})
    both.hub.commit(both.law, {"donor_config.json": both.family / "donor" / "donor_config.json"})
    found = of_donor(both.law)
    assert found.weights.sha256 == "not recorded"
    assert "no sha256 is recorded" in found.problems[0]


def test_a_model(both: Shelf) -> None:
    found = inspect(both.base)
    assert isinstance(found, ModelInspection)
    assert found.revision == both.base_commit
    assert (found.num_layers, found.movable) == (4, True)
    assert found.weights is not None
    assert found.weights.parameters == count_of(both.family / "recipient" / "model.safetensors")
    assert weights_in_cache(both.base) == []


def test_a_sharded_model(shelf: Shelf, tmp_path: Path) -> None:
    BUILDERS["llama"](seed=1).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    shelf.hub.add_repo(shelf.base, tmp_path / "shards")
    found = inspect(shelf.base)
    assert isinstance(found, ModelInspection)
    assert found.weights is not None
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(found.weights.files) == len(files) > 1
    assert (found.weights.parameters, found.weights.size) == (count_of(*files), size_of(*files))
    assert weights_in_cache(shelf.base) == []


def test_pickled_weights(shelf: Shelf) -> None:
    config = shelf.family / "recipient" / "config.json"
    shelf.hub.add_repo(shelf.base, {"config.json": config, "pytorch_model.bin": b"x" * 1000})
    found = inspect(shelf.base)
    assert "pytorch_model.bin" in found.notes[0]
    assert shelf.weights(shelf.base) == 0


def test_a_transplant(both: Shelf, tmp_path: Path) -> None:
    donors = [{"donor": both.law, "position": 2, "revision": both.law_commit, "strength": 0.5}]
    config = {"model_type": "transplant", "recipient": both.base, "donors": donors}
    name = f"{both.law}-thin"
    commit = both.hub.add_repo(name, {"config.json": json.dumps(config).encode()})
    found = inspect(name)
    assert isinstance(found, TransplantInspection)
    assert (found.revision, found.full) == (commit, False)
    assert (found.donors[0].donor, found.donors[0].revision) == (both.law, both.law_commit)
    assert found.layer_map[2] == (both.law.partition("/")[2], 1)
    assert "\n      strength: 0.5\n" in str(found)


def test_a_repository_that_carries_its_recipient(shelf: Shelf, inverse_gpt2: Path, tmp_path: Path) -> None:
    model = loaded(inverse_gpt2)
    model.save_pretrained(tmp_path / "full")
    shelf.hub.add_repo(shelf.law, tmp_path / "full")
    found = inspect(shelf.law)
    assert isinstance(found, TransplantInspection)
    assert found.full
    assert found.layer_map == model.layer_map
    assert weights_in_cache(shelf.law) == []


def test_a_subfolder(shelf: Shelf) -> None:
    shelf.put_base()
    edit_json(shelf.family / "donor" / "config.json", recipient=shelf.base)
    files = {f"deep/law/{path.name}": path for path in (shelf.family / "donor").iterdir()}
    shelf.hub.add_repo(shelf.law, files)
    found = of_donor(shelf.law, subfolder="deep/law")
    assert found.weights.sha256 == "same on the Hub"
    assert len(found.layer_map) == 6


# -- What is fetched -------------------------------------------------------------------------------------------------


def test_only_headers_are_fetched(shelf: Shelf, tmp_path: Path) -> None:
    """Also for the check against a recipient, and for the layer map."""
    family = make_family(tmp_path / "large", BUILDERS["llama"], hidden_size=256, intermediate_size=1024)
    edit_json(family / "donor" / "config.json", recipient=shelf.base)
    shelf.hub.add_repo(shelf.base, family / "recipient")
    shelf.hub.add_repo(shelf.law, family / "donor")
    file = family / "donor" / "donor.safetensors"
    assert size_of(file) > 5_000_000
    shelf.hub.requests.clear()
    assert of_donor(shelf.law).layer_map
    assert of_donor(shelf.law, recipient=shelf.base, position=3, verify=True).compatibility
    assert inspect(shelf.base)
    sent = sum(record.bytes_sent for record in shelf.hub.requests)
    assert sent < size_of(file) / 20, shelf.hub.requests
    weights = shelf.hub.requests.downloads("*.safetensors")
    assert weights
    assert all(record.range and record.status == 206 and record.bytes_sent <= 1 << 15 for record in weights)
    assert weights_in_cache(shelf.base, shelf.law) == []
    assert not shelf.hub.requests.unrouted()


def test_checking_the_usual_way_would_download_the_donor(both: Shelf) -> None:
    """What the headers say is what the whole donor says."""
    by_headers = of_donor(both.law, recipient=both.base).compatibility
    assert both.weights(both.law) == len(both.hub.requests.downloads("*donor.safetensors")) == 1
    report = check_compatibility(both.base, both.law)
    assert by_headers == report


# -- Who may ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "cause"), [("private", RepositoryNotFoundError), ("gated", GatedRepoError)])
@pytest.mark.parametrize("which", ["base", "law"])
def test_repositories_that_are_not_open(shelf: Shelf, as_user: Any, how: str, cause: Any, which: str) -> None:
    shelf.put_base(**{how: which == "base"}).put_law(**{how: which == "law"})
    name = getattr(shelf, which)
    for token in (None, BOB):
        with refused_by_hub(name, how, "token=", cause=cause):
            inspect(name, token=token)
    found = inspect(name, token=ALICE)
    assert found
    as_user(ALICE)
    assert inspect(name).to_dict() == found.to_dict()


def test_an_open_donor_of_a_gated_recipient(shelf: Shelf, as_user: Any) -> None:
    shelf.put_base(gated=True).put_law()
    found = of_donor(shelf.law)
    assert found
    assert found.layer_map == ()
    assert "gated" in found.notes[0]
    with refused_by_hub(shelf.base, "gated", cause=GatedRepoError):
        inspect(shelf.law, recipient=shelf.base)
    assert of_donor(shelf.law, token=ALICE).layer_map


def test_what_is_not_there(both: Shelf, as_user: Any) -> None:
    with refused_by_hub("alice/nowhere", "not found", cause=RepositoryNotFoundError):
        inspect("alice/nowhere")
    with refused_by_hub(both.law, "'v9'", cause=RevisionNotFoundError):
        inspect(both.law, revision="v9")
    with refused_by_hub(both.law, "401", cause=HfHubHTTPError):
        inspect(both.law, token=EXPIRED)
    both.hub.commit(both.law, delete=["donor.safetensors"])
    with refused(CheckpointError, "no donor.safetensors", both.law):
        inspect(both.law)
    both.hub.add_repo(f"{both.law}-empty", {"notes.txt": b"hello"})
    with pytest.raises(Exception, match="neither a model, a donor nor a transplant"):
        inspect(f"{both.law}-empty")


# -- Without the Hub, or with a bad one ------------------------------------------------------------------------------


def test_local_files_only(both: Shelf) -> None:
    with refused_by_hub(both.law, "local_files_only", cause=LocalEntryNotFoundError):
        inspect(both.law, local_files_only=True)
    inspect(both.law)
    with refused_by_hub(both.law, "local cache", cause=LocalEntryNotFoundError):
        inspect(both.law, local_files_only=True)
    Donor.from_pretrained(both.law)
    both.hub.requests.clear()
    found = of_donor(both.law, local_files_only=True)
    assert found.weights.sha256 == "recorded"
    assert found.layer_map
    assert of_donor(both.law, local_files_only=True, verify=True).weights.sha256 == "verified"
    assert len(both.hub.requests) == 0


def test_cached_weights_are_hashed_when_told_so(both: Shelf) -> None:
    Donor.from_pretrained(both.law)
    assert of_donor(both.law).weights.sha256 == "same on the Hub"
    assert of_donor(both.law, verify=True).weights.sha256 == "verified"


def test_a_cached_model_is_compared_with_the_hub(both: Shelf) -> None:
    path = Path(hf_hub_download(both.base, "model.safetensors")).resolve()
    found = inspect(both.base, verify=True)
    assert isinstance(found, ModelInspection)
    assert found.weights is not None
    assert found.weights.sha256 == "verified"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "the Hub lists" in inspect(both.base, verify=True).problems[0]


@pytest.mark.parametrize("how", [{"drop_connection": True}, {"truncate_to": 100}, {"status": 400}])
@pytest.mark.parametrize("path", ["*donor.safetensors", "*/revision/*"])
def test_a_hub_that_fails(both: Shelf, how: dict[str, Any], path: str) -> None:
    inspect(both.law)  # what is small is in the cache
    both.hub.fail("GET", path, times=None, **how)
    with pytest.raises(Exception, match=both.law) as caught:
        inspect(both.law)
    assert type(caught.value).__module__ == "transplant_hf.errors", repr(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header(both: Shelf, name: str) -> None:
    both.hub.commit(both.law, {"donor.safetensors": HOSTILE[name]})
    with refused(CheckpointError, both.law, "donor.safetensors"):
        inspect(both.law)


def test_a_hostile_index(both: Shelf) -> None:
    index = json.dumps({"weight_map": {"layers.0.x": "../../../blobs/x.safetensors"}}).encode()
    both.hub.commit(both.law, {"donor.safetensors.index.json": index})
    with refused(CheckpointError, "'../../../blobs/x.safetensors'", "plain .safetensors file name", both.law):
        inspect(both.law)


@pytest.mark.parametrize("reference", ["../secret", "/etc", "~/models"])
def test_a_recipient_outside_the_repository(shelf: Shelf, reference: str) -> None:
    shelf.put_law(recipient=reference)
    with refused(ConfigurationError, shelf.law, repr(reference), "outside that repository"):
        inspect(shelf.law)


def test_a_configuration_that_is_not_json(both: Shelf) -> None:
    both.hub.commit(both.law, {"config.json": b"<html>"})
    with refused(CheckpointError, "config.json", "cannot be read as JSON"):
        inspect(both.law)


def test_copies_of_one_repository(both: Shelf, tmp_path: Path) -> None:
    """A folder says what the repository says, but for where it lies."""
    folder = copied(both.family / "donor", tmp_path / "copy")
    here, there = of_donor(folder), of_donor(both.law)
    assert here.layer_map == there.layer_map
    assert (here.metadata, here.source, here.position) == (there.metadata, there.source, there.position)

"""What comes from the Hub is what its manifest says, and stays inside the cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import Shelf, digest_of, refused
from transplant_hf import (
    AutoModelWithTransplant,
    CheckpointError,
    Donor,
    DonorSpec,
    HubError,
    IntegrityError,
    TransplantError,
    check_compatibility,
    transplant,
)

pytestmark = pytest.mark.hub

load = AutoModelWithTransplant.from_pretrained
HOSTILE = ["../evil.safetensors", "donor-/../../../../evil.safetensors", "/abs/evil.safetensors"]
BACKWARDS = "donor\\..\\..\\evil.safetensors"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with room around it to see what is written there."""
    return tmp_path / "around" / "a" / "b" / "hub"


def outside(cache: Path) -> list[str]:
    """Files beside the cache."""
    return [name for name in digest_of(cache.parents[2]) if not (cache.parents[2] / name).is_relative_to(cache)]


def cached(donor: Donor) -> Path:
    """The blob that holds a donor's weights, made writable."""
    path = (donor.source.folder / next(iter(donor.record.files))).resolve()
    path.chmod(0o644)
    return path


# -- Bytes -----------------------------------------------------------------------------------------------------------


def flip_last(data: bytearray) -> None:
    data[-1] ^= 1


def make_nan(data: bytearray) -> None:
    data[-4:] = b"\xff\xff\xff\xff"


def break_header(data: bytearray) -> None:
    data[9:12] = b"\0\0\0"


@pytest.mark.parametrize("change", [flip_last, make_nan, break_header])
def test_bytes_of_the_right_size_that_were_changed(both: Shelf, change: Callable[[bytearray], None]) -> None:
    """Whatever they look like: a weight, something not finite, or no safetensors file at all."""
    recipient = load(both.law)
    with recipient.disable_transplants():
        pass
    path = cached(Donor.from_pretrained(both.law))
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    facts = ("donor.safetensors", f"{both.law}@{both.law_commit}", "sha256", "force_download=True")
    uses: list[Callable[[], Any]] = [
        lambda: load(both.law),
        lambda: load(both.base, donors={both.law: 1}),
        lambda: load(both.base, donors=[DonorSpec(both.law, 1, layers=[1])]),
        lambda: Donor.from_pretrained(both.law).tensors(),
        lambda: Donor.from_pretrained(both.law).part([1]).tensors(),
        lambda: Donor.from_pretrained(both.law).verify(),
        lambda: transplant(AutoModelWithTransplant.from_pretrained(both.law), both.law, 0),
    ]
    for use in uses:
        with refused(IntegrityError, *facts):
            use()
    load(both.law, force_download=True)
    assert Donor.from_pretrained(both.law).tensors()


def test_changed_bytes_get_no_new_sha256(both: Shelf, tmp_path: Path, as_user: Any) -> None:
    """Saving or pushing the donor anew would make them pass for right."""
    donor = Donor.from_pretrained(both.law)
    path = cached(donor)
    data = bytearray(path.read_bytes())
    flip_last(data)
    path.write_bytes(data)
    with refused(IntegrityError, f"{both.law}@{both.law_commit}", "sha256"):
        donor.save_pretrained(tmp_path / "again", position=1, recipient=both.base)
    assert not (tmp_path / "again").exists()
    both.hub.requests.clear()
    with refused(IntegrityError, f"{both.law}@{both.law_commit}", "sha256"):
        donor.push_to_hub("alice/laundered", position=1, recipient=both.base)
    assert not both.hub.requests.commits()


def test_a_blob_that_was_cut_short(both: Shelf) -> None:
    path = cached(Donor.from_pretrained(both.law))
    path.write_bytes(path.read_bytes()[:-100])
    facts = (f"{both.law}@{both.law_commit}", "donor.safetensors", "bytes", "force_download=True")
    for use in (lambda: load(both.law), lambda: Donor.from_pretrained(both.law)):
        with refused(IntegrityError, *facts):
            use()
    Donor.from_pretrained(both.law, force_download=True).verify()


def test_a_blob_that_is_cut_short_after_it_was_opened(both: Shelf) -> None:
    donor = Donor.from_pretrained(both.law)
    path = cached(donor)
    path.write_bytes(path.read_bytes()[:-100])
    with refused(IntegrityError, f"{both.law}@{both.law_commit}", "bytes"):
        donor.tensors()


def test_a_server_that_sends_other_bytes(both: Shelf) -> None:
    both.hub.fail("GET", "*donor.safetensors", wrong_bytes=True, times=None)
    for use in (lambda: load(both.law), lambda: Donor.from_pretrained(both.law).tensors()):
        with refused(IntegrityError, f"{both.law}@{both.law_commit}", "donor.safetensors", "sha256"):
            use()
    both.hub.clear_faults()
    load(both.law, force_download=True)


def test_weights_that_the_manifest_does_not_name(both: Shelf) -> None:
    record = json.loads((both.family / "donor" / "donor_config.json").read_text())
    record["files"] = {}
    both.hub.commit(both.law, {"donor_config.json": json.dumps(record).encode()})
    for use in (lambda: load(both.law), lambda: Donor.from_pretrained(both.law)):
        with refused(IntegrityError, both.law, "donor.safetensors", "no sha256", "donor_config.json"):
            use()


def test_a_branch_name_is_pinned(both: Shelf) -> None:
    """Also for donors, and although the branch moves on."""
    model = load(both.base, donors=[DonorSpec(both.law, 1, revision="main")], revision="main")
    both.hub.commit(both.law, {"notes.txt": b"later"})
    both.hub.commit(both.base, {"notes.txt": b"later"})
    config = model.transplant_config
    assert (config.recipient_revision, config.donors[0].revision) == (both.base_commit, both.law_commit)
    assert len(both.law_commit) == len(both.base_commit) == 40
    opened = Donor.from_pretrained(both.law, revision="main")
    assert opened.source is not None
    assert opened.source.revision == both.hub.head(both.law) != both.law_commit
    again = load(both.base, config=config)
    assert again.transplant_config.donors[0].revision == both.law_commit


# -- A cache that is only partly there -------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [True, False], ids=["with the listing", "without"])
@pytest.mark.parametrize("gone", ["donor.safetensors", "donor_config.json", "config.json"])
def test_a_cache_with_holes(both: Shelf, cache: Path, gone: str, listed: bool) -> None:
    """Once the client knows what belongs there, once it takes what is there for all."""
    donor = Donor.from_pretrained(both.law, cache_dir=str(cache))
    load(both.law, cache_dir=str(cache))
    assert donor.source is not None
    (donor.source.folder / gone).unlink()
    if not listed:
        # In another place, as the client also remembers listings in memory.
        cache = Path(shutil.copytree(cache, cache.with_name("copy"), symlinks=True))
        for path in cache.glob("models--*/*"):
            if path.name not in ("blobs", "refs", "snapshots"):
                shutil.rmtree(path)
    with pytest.raises(TransplantError, match=both.law) as caught:
        load(both.law, cache_dir=str(cache), local_files_only=True)
    said = str(caught.value)
    assert gone in said, said
    assert "local cache" in said or "force_download=True" in said, said
    assert load(both.law, cache_dir=str(cache))


def test_a_recipient_with_holes(both: Shelf, cache: Path) -> None:
    load(both.law, cache_dir=str(cache))
    for path in cache.rglob("model.safetensors"):
        path.unlink()
    with pytest.raises(TransplantError, match=both.base):
        load(both.law, cache_dir=str(cache), local_files_only=True)


# -- Names that lead out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*HOSTILE, BACKWARDS])
def test_a_hostile_listing(both: Shelf, cache: Path, name: str) -> None:
    """What is not asked for is left alone; what looks like a donor's file is refused."""
    both.hub.commit(both.law, {name: b"evil"})
    matches = name.startswith("donor")
    for use in (
        lambda: Donor.from_pretrained(both.law, cache_dir=str(cache)),
        lambda: load(both.law, cache_dir=str(cache)),
        lambda: check_compatibility(both.base, both.law, cache_dir=str(cache)),
    ):
        if matches:
            with refused(CheckpointError, both.law, name, "refused"):
                use()
        else:
            use()
    assert outside(cache) == []
    assert not list(cache.rglob("*evil*"))


@pytest.mark.parametrize("name", [*HOSTILE, BACKWARDS, "..", "a/b.safetensors", "C:evil.safetensors"])
@pytest.mark.parametrize("place", ["manifest", "index"])
def test_a_hostile_manifest_or_index(both: Shelf, cache: Path, place: str, name: str) -> None:
    folder = both.family / "donor"
    record = json.loads((folder / "donor_config.json").read_text())
    if place == "manifest":
        record["files"][name] = {"sha256": "0" * 64, "size": 4}
        both.hub.commit(both.law, {"donor_config.json": json.dumps(record).encode()})
    else:
        index = {"metadata": {}, "weight_map": {"layers.0.weight": name}}
        both.hub.commit(both.law, {"donor.safetensors.index.json": json.dumps(index).encode()})
    for use in (
        lambda: Donor.from_pretrained(both.law, cache_dir=str(cache)),
        lambda: load(both.law, cache_dir=str(cache)),
    ):
        with refused(CheckpointError, repr(name), "plain"):
            use()
    assert outside(cache) == []


@pytest.mark.parametrize("name", [*HOSTILE, BACKWARDS])
def test_a_hostile_index_of_the_recipient(both: Shelf, cache: Path, name: str) -> None:
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    files = {"model.safetensors.index.json": json.dumps(index).encode(), name: b"evil"}
    both.hub.commit(both.base, files, delete=["model.safetensors"])
    with refused(CheckpointError, both.base, name, "refused"):
        load(both.base, donors={both.law: 1}, cache_dir=str(cache))
    assert outside(cache) == []
    assert not list(cache.rglob("*evil*"))


@pytest.mark.parametrize("subfolder", ["..", "../..", "/etc", "a/../../.."])
def test_a_subfolder_that_leads_out(both: Shelf, cache: Path, subfolder: str) -> None:
    with pytest.raises(TransplantError):
        Donor.from_pretrained(both.law, subfolder=subfolder, cache_dir=str(cache))
    assert outside(cache) == []


def test_what_is_loaded_is_what_was_published(both: Shelf) -> None:
    """The reference of all of the above."""
    tensors = Donor.from_pretrained(both.law).tensors()
    known = Donor.from_pretrained(both.family / "donor").tensors()
    assert all(torch.equal(tensors[name], known[name]) for name in known)
    with refused(HubError, "alice/none"):
        Donor.from_pretrained("alice/none")

"""A converted donor runs as the layers did in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import (
    BUILDERS,
    Graft,
    digest_of,
    edit_json,
    layers_of,
    logits_of,
    plain,
    reference_logits,
    refused,
    write_tokenizer,
)
from tests.pt_files.crafted import saved
from tests.pt_files.test_layouts import packable, packed
from tests.pt_files.trees import CHOSEN, TREES, states_of
from transplant_hf import (
    AutoModelWithTransplant,
    CheckpointError,
    ConfigurationError,
    Donor,
    transplant,
)
from transplant_hf.conversion import convert

POSITION = 2
SOME_TREES = [
    "a module list, from 0",
    "pickled blocks, from 0",
    "turned, from 0",
    "beside an optimizer, from 0",
    "whole",
    "adapted",
]


@pytest.mark.parametrize("tree", SOME_TREES)
def test_a_converted_donor_runs_as_in_memory(tree: str, tiny: Path, tmp_path: Path) -> None:
    source = plain(tiny / "source")
    path = saved(tmp_path / "layers.pt", TREES[tree](source), legacy=tree == "adapted")
    done = convert(path, tiny / "source", tmp_path / "donor", layers=CHOSEN, position=POSITION, verify=True)
    assert (done.layer_indices, done.position, done.verified) == (CHOSEN, POSITION, True)
    found = logits_of(AutoModelWithTransplant.from_pretrained(tmp_path / "donor"))
    in_memory = transplant(plain(tiny / "source"), Donor.from_model(source, list(CHOSEN)), POSITION)
    assert torch.equal(found, logits_of(in_memory))
    wanted = reference_logits(plain(tiny / "source"), [Graft(source, CHOSEN, POSITION)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits_of(source), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_donor_in_half_precision_runs_as_in_memory(dtype: torch.dtype, tiny: Path, tmp_path: Path) -> None:
    source = plain(tiny / "source", dtype=dtype)
    path = saved(tmp_path / "layers.pt", list(states_of(source).values()))
    convert(path, tiny / "source", tmp_path / "donor", layers=CHOSEN, position=1, verify=True)
    found = AutoModelWithTransplant.from_pretrained(tmp_path / "donor", dtype=dtype)
    in_memory = transplant(plain(tiny / "source", dtype=dtype), Donor.from_model(source, list(CHOSEN)), 1)
    assert torch.equal(logits_of(found), logits_of(in_memory))


def test_packed_experts_run_as_in_memory(tmp_path: Path) -> None:
    source = packable(tmp_path / "source")
    source.save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    content, meant = packed(source)
    convert(saved(tmp_path / "layers.pt", content), tmp_path / "source", tmp_path / "donor", position=1)
    changed = plain(tmp_path / "source")
    for place, number in enumerate(CHOSEN):
        start = f"layers.{place}."
        state = {name.removeprefix(start): t.float() for name, t in meant.items() if name.startswith(start)}
        layers_of(changed)[number].load_state_dict(state)
    in_memory = transplant(plain(tmp_path / "source"), Donor.from_model(changed, list(CHOSEN)), 1)
    assert torch.equal(logits_of(AutoModelWithTransplant.from_pretrained(tmp_path / "donor")), logits_of(in_memory))


# -- Which layers, and where ---------------------------------------------------------------------------------------


@pytest.fixture
def author(tmp_path: Path) -> Path:
    """A list of two layers of a Llama of eight, whose configuration and tokenizer lie in `source/`."""
    model = BUILDERS["llama"](seed=2, num_hidden_layers=8)
    model.config.save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    saved(tmp_path / "donor_layers.pt", list(states_of(model).values()))
    saved(tmp_path / "whole.pt", model.state_dict())
    saved(tmp_path / "numbered.pt", states_of(model))
    return tmp_path


def opened(author: Path, file: str = "donor_layers.pt", **options: Any) -> Donor:
    return Donor.from_pt(author / file, author / "source", **options)


RECORDED = {"layer_indices": [5, 6], "perplexity": 3.5, "note": {"a": None}}


def test_metadata_says_which_layers(author: Path) -> None:
    assert opened(author, metadata=RECORDED).layer_indices == [5, 6]
    (author / "other.json").write_text(json.dumps(RECORDED))
    assert opened(author, metadata=author / "other.json").layer_indices == [5, 6]
    (author / "donor_metadata.json").write_text(json.dumps({**RECORDED, "layer_indices": [3, 4]}))
    assert opened(author).layer_indices == [3, 4]
    assert opened(author, metadata=RECORDED).metadata == RECORDED
    assert opened(author, layers=[3, 4]).layer_indices == [3, 4]
    assert opened(author, layers=[4]).layer_indices == [4]


def test_the_file_itself_may_say_which_layers(author: Path) -> None:
    layers = torch.load(author / "donor_layers.pt", weights_only=True)
    saved(author / "a.pt", {"layers": layers, "metadata": {"layer_indices": (4, 5)}})
    assert opened(author, "a.pt").layer_indices == [4, 5]
    assert opened(author, "a.pt", metadata=RECORDED).layer_indices == [5, 6]
    saved(author / "a.pt", {"layers": layers, "layer_indices": [5, 4]})
    assert opened(author, "a.pt").layer_indices == [4, 5]
    saved(author / "a.pt", {"layers": layers, "layer_indices": "4-5"})
    with refused(CheckpointError, str(author / "a.pt"), "layer_indices must be a list of whole numbers", "'4-5'"):
        opened(author, "a.pt")


@pytest.mark.parametrize(
    ("recorded", "position"),
    [
        ({}, 2),
        ({"position": 5}, 5),
        ({"best_position": 0, "position": 5}, 0),
        ({"best_position": None, "position": 8}, 8),
    ],
)
def test_the_position_is_the_best_known_else_the_first_quarter(
    recorded: dict[str, Any], position: int, author: Path
) -> None:
    assert opened(author, metadata={**RECORDED, **recorded}).position == position
    done = convert(
        author / "donor_layers.pt", author / "source", author / "donor", metadata={**RECORDED, **recorded}, verify=False
    )
    assert done.position == position
    assert Donor.from_pretrained(author / "donor").position == position
    record = json.loads((author / "donor" / "donor_config.json").read_text())
    assert record["metadata"] == {**RECORDED, **recorded}


@pytest.mark.parametrize("position", [9, -1, 1.5, "2", True])
def test_a_position_that_does_not_exist_is_refused(position: Any, author: Path) -> None:
    with refused(ConfigurationError, "donor_layers.pt", repr(position)):
        opened(author, metadata={**RECORDED, "position": position})
    if isinstance(position, int) and position is not True:
        with refused(ConfigurationError, str(position)):
            convert(
                author / "donor_layers.pt", author / "source", author / "donor", metadata=RECORDED, position=position
            )
    assert not (author / "donor").exists()


WRONG_CHOICES: list[tuple[str, dict[str, Any], type[Any], tuple[str, ...]]] = [
    ("donor_layers.pt", {}, ConfigurationError, ("numbers its 2 layers from 0", "pass layers=")),
    ("donor_layers.pt", {"layers": [4]}, ConfigurationError, ("numbers its 2 layers from 0",)),
    ("donor_layers.pt", {"layers": [4, 6]}, ConfigurationError, ("layers must be consecutive", "[4, 6]")),
    ("donor_layers.pt", {"layers": [5, 4]}, ConfigurationError, ("layers must be consecutive", "[5, 4]")),
    ("donor_layers.pt", {"layers": []}, ConfigurationError, ("layers must be consecutive", "[]")),
    ("donor_layers.pt", {"layers": ["4", "5"]}, ConfigurationError, ("layers must be whole numbers", "['4', '5']")),
    ("donor_layers.pt", {"layers": [7, 8]}, ConfigurationError, ("layers must be in 0..7", "8 layers", "[7, 8]")),
    ("donor_layers.pt", {"layers": [-1, 0]}, ConfigurationError, ("layers must be in 0..7", "[-1, 0]")),
    (
        "donor_layers.pt",
        {"metadata": {"layer_indices": [4, 6]}},
        ConfigurationError,
        ("the metadata's layer_indices must be consecutive",),
    ),
    (
        "donor_layers.pt",
        {"metadata": {"layer_indices": [4, 5, 6]}},
        CheckpointError,
        ("holds 2 layers numbered [0, 1]", "the metadata records 3: [4, 5, 6]"),
    ),
    (
        "donor_layers.pt",
        {"metadata": {"layer_indices": [4, 5]}, "layers": [5, 6]},
        CheckpointError,
        ("holds layers [4, 5]", "asked for [5, 6]", "[6] are missing"),
    ),
    (
        "donor_layers.pt",
        {"metadata": {"layer_indices": [4, True]}},
        CheckpointError,
        ("layer_indices must be a list of whole numbers",),
    ),
    ("numbered.pt", {"layers": [2, 3]}, CheckpointError, ("holds layers [1, 2]", "[3] are missing")),
    ("numbered.pt", {"metadata": RECORDED}, CheckpointError, ("numbered [1, 2]", "the metadata records 2: [5, 6]")),
    ("whole.pt", {}, ConfigurationError, ("holds all 8 layers", "say which")),
]


@pytest.mark.parametrize(("file", "options", "kind", "facts"), WRONG_CHOICES)
def test_an_impossible_choice_of_layers_is_refused(
    file: str, options: dict[str, Any], kind: Any, facts: tuple[str, ...], author: Path
) -> None:
    with refused(kind, str(author / file), *facts):
        opened(author, file, **options)


def test_layers_with_a_gap_in_the_file_are_refused(author: Path) -> None:
    whole = torch.load(author / "whole.pt", weights_only=True)
    saved(author / "gap.pt", {name: t for name, t in whole.items() if ".2." in name or ".4." in name})
    with refused(ConfigurationError, "gap.pt", "the file's layer numbers must be consecutive", "[2, 4]"):
        opened(author, "gap.pt")


def test_of_a_whole_model_the_recorded_layers_are_taken(author: Path) -> None:
    donor, wanted = opened(author, "whole.pt", metadata=RECORDED), opened(author, "whole.pt", layers=[5, 6])
    assert donor.layer_indices == wanted.layer_indices == [5, 6]
    assert all(torch.equal(tensor, wanted.tensors()[name]) for name, tensor in donor.tensors().items())


def test_metadata_that_is_missing_or_no_object_is_refused(author: Path) -> None:
    with refused(CheckpointError, "the donor's metadata is missing", "none.json"):
        opened(author, metadata=author / "none.json")
    (author / "donor_metadata.json").write_text("[1]")
    with refused(CheckpointError, "donor_metadata.json", "JSON object"):
        opened(author)


def test_the_recipient_may_be_a_config_file_but_no_transplant(author: Path) -> None:
    donor = Donor.from_pt(author / "donor_layers.pt", author / "source" / "config.json", metadata=RECORDED)
    assert donor.record.source_id == str(author / "source")
    convert(author / "donor_layers.pt", author / "source", author / "donor", metadata=RECORDED)
    with refused(ConfigurationError, str(author / "donor"), "itself a transplant"):
        Donor.from_pt(author / "donor_layers.pt", author / "donor", metadata=RECORDED)


# -- Whole or not at all -------------------------------------------------------------------------------------------


def test_a_refused_file_leaves_what_was_there(author: Path) -> None:
    convert(author / "donor_layers.pt", author / "source", author / "donor", metadata=RECORDED)
    before = digest_of(author)
    layers = torch.load(author / "donor_layers.pt", weights_only=True)
    layers[1]["mlp.down_proj.weight"][3, 4] = float("nan")
    (author / "bad").mkdir()
    bad = saved(author / "bad" / "nan.pt", layers)
    for output in (author / "donor", author / "new"):
        with refused(CheckpointError, "layers.1.mlp.down_proj.weight", "NaN or infinity"):
            convert(bad, author / "source", output, overwrite=True, metadata=RECORDED)
    bad.unlink()
    bad.parent.rmdir()
    assert digest_of(author) == before
    assert not [path for path in author.iterdir() if path.name.endswith(".tmp")]


def test_an_old_donor_is_replaced_by_a_new_one(author: Path) -> None:
    for metadata, layers in ((RECORDED, [5, 6]), ({"layer_indices": [1, 2]}, [1, 2])):
        convert(author / "donor_layers.pt", author / "source", author / "donor", overwrite=True, metadata=metadata)
        assert Donor.from_pretrained(author / "donor").layer_indices == layers


def test_bytes_that_change_on_the_way_are_found(author: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transplant_hf.donor import save

    def spoiled(tensors: Any, path: Path, **options: Any) -> None:
        save_file(tensors, path, **options)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    save_file = save.save_file
    monkeypatch.setattr(save, "save_file", spoiled)
    with refused(CheckpointError, "differs from that of", "donor_layers.pt"):
        convert(author / "donor_layers.pt", author / "source", author / "donor", metadata=RECORDED)
    assert not (author / "donor").exists()


def test_a_recipient_that_cannot_be_read_is_refused(author: Path) -> None:
    edit_json(author / "source" / "config.json", model_type="no_such_model")
    with refused(ConfigurationError, str(author / "source"), "no_such_model"):
        opened(author, metadata=RECORDED)

"""What an inspection of folders finds, held against what the libraries read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from tests.helpers import (
    BUILDERS,
    DONOR_POSITION,
    NUM_LAYERS,
    edit_json,
    edit_weights,
    loaded,
    refused,
    two_donors,
)
from tests.inspection.helpers import count_of, same_as_json, size_of
from transplant_hf import AutoModelWithTransplant, CheckpointError, ConfigurationError, Donor, check
from transplant_hf.cli import main
from transplant_hf.inspection import DonorInspection, ModelInspection, TransplantInspection, inspect


def of_donor(*args: Any, **kwargs: Any) -> DonorInspection:
    found = inspect(*args, **kwargs)
    assert isinstance(found, DonorInspection)
    return found


def of_model(*args: Any, **kwargs: Any) -> ModelInspection:
    found = inspect(*args, **kwargs)
    assert isinstance(found, ModelInspection)
    return found


def of_transplant(*args: Any, **kwargs: Any) -> TransplantInspection:
    found = inspect(*args, **kwargs)
    assert isinstance(found, TransplantInspection)
    return found


# -- Donors ----------------------------------------------------------------------------------------------------------


def test_a_donor(tiny: Path) -> None:
    found = of_donor(tiny / "donor")
    file = tiny / "donor" / "donor.safetensors"
    assert found
    assert found.layer_indices == (1, 2)
    assert (found.position, found.placed_at) == (DONOR_POSITION, DONOR_POSITION)
    assert found.weights.parameters == count_of(file)
    assert sum(found.weights.per_layer) == count_of(file)
    assert found.weights.size == size_of(file)
    assert found.weights.dtypes == {"F32": count_of(file)}
    assert found.weights.tensors == len(load_file(file))
    assert found.weights.sha256 == "recorded"
    assert found.layer_map == AutoModelWithTransplant.from_pretrained(tiny / "donor").layer_map
    fields = same_as_json(found)
    assert (fields["kind"], fields["ok"], fields["layer_map"][1]) == ("donor", True, ["donor", 1])


def test_the_text_of_a_donor(family: Path) -> None:
    edit_json(family / "donor" / "donor_config.json", metadata={"perplexity": 12.5, "method": "in place"})
    text = str(inspect(family / "donor", verify=True))
    count = count_of(family / "donor" / "donor.safetensors")
    assert f"{family / 'donor'}: donor" in text
    for line in (
        "  layer_indices: 1, 2\n",
        "  metadata: perplexity: 12.5; method: in place\n",
        "    tensors: 18\n",
        f"    parameters: {count:,}\n",
        f"    per_layer: {count // 2}, {count // 2}\n",
        f"    dtypes: F32: {count:,}\n",
        "    sha256: verified\n",
        "  position: 1\n",
        "    1  |  donor 1\n",
        "6 layers run: 4 recipient, 2 donor",
    ):
        assert line in text


def test_text_and_json_hold_the_same(tiny: Path) -> None:
    """Every field that is not empty is in the text by its name."""
    for part in ("donor", "recipient"):
        found = inspect(tiny / part)
        apart = {"kind", "what", "ok", "notes", "problems", "layer_map", "recipient_revision", "source_revision"}
        names = [name for name, value in found.to_dict().items() if value not in (None, [], {}, "")]
        assert [name for name in names if name not in apart and f"\n  {name}:" not in str(found)] == []


def test_a_sharded_donor(family: Path, tmp_path: Path) -> None:
    Donor.from_pretrained(family / "donor").save_pretrained(
        tmp_path / "shards", recipient=str(family / "recipient"), max_shard_size="20KB"
    )
    files = sorted((tmp_path / "shards").glob("donor-*.safetensors"))
    found = of_donor(tmp_path / "shards", verify=True)
    assert len(found.weights.files) == len(files) > 1
    assert found.weights.parameters == count_of(*files)
    assert found.weights.size == size_of(*files)
    assert {file.state for file in found.weights.files} == {"verified"}
    assert all(f"\n      {path.name}:" in str(found) for path in files)


def test_a_donor_whose_recipient_is_not_there(family: Path) -> None:
    edit_json(family / "donor" / "config.json", recipient="../nowhere")
    found = of_donor(family / "donor")
    assert found
    assert found.layer_map == ()
    assert "nowhere" in found.notes[0]
    assert "no layer map" in str(found)


def test_a_donor_without_a_position(family: Path) -> None:
    (family / "donor" / "config.json").unlink()
    found = of_donor(family / "donor")
    assert (found.position, found.placed_at, found.layer_map) == (None, None, ())
    assert "no recipient and no position is recorded" in found.notes[0]
    with refused(ConfigurationError, "recommends no position"):
        inspect(family / "donor", recipient=family / "recipient")
    placed = of_donor(family / "donor", recipient=family / "recipient", position=2)
    assert placed.layer_map[2] == ("donor", 1)
    assert "placed_at: 2" in str(placed)


def test_a_position_means_the_same_as_for_check(family: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A position of one's own means that the donor is inserted there; without one, what it recommends."""
    donor, recipient = family / "donor", family / "recipient"
    Donor.from_pretrained(donor).save_pretrained(donor, 1, mode="replace", recipient=str(recipient))
    for position, mode in ((None, "replace"), (2, "insert"), (1, "insert")):
        maps = [of_donor(donor, position=position, recipient=other).layer_map for other in (None, recipient)]
        assert maps == [check(recipient, donor, position).layer_map] * 2
        assert maps[0] == check(recipient, donor, position or 1, mode).layer_map
        named = [record for record in caplog.records if "recommends mode replace" in record.getMessage()]
        assert len(named) == (0 if position is None else 3)
        caplog.clear()


def test_a_donor_against_a_recipient(family: Path, tiny_gpt2: Path) -> None:
    found = of_donor(family / "donor", recipient=family / "recipient", position=3)
    assert found
    assert found.compatibility
    assert found.layer_map[3] == ("donor", 1)
    assert "compatible: yes" in str(found)
    other = of_donor(family / "donor", recipient=tiny_gpt2 / "recipient")
    assert not other
    assert "model_type: donor 'llama', recipient 'gpt2'" in other.problems[0]
    assert same_as_json(other)["compatibility"]["compatible"] is False


def test_a_position_outside(family: Path) -> None:
    with refused(ConfigurationError, "position 9", f"0..{NUM_LAYERS}"):
        inspect(family / "donor", position=9)
    found = inspect(family / "donor", recipient=family / "recipient", position=9)
    assert "position 9" in found.problems[0]


def test_changed_bytes(family: Path) -> None:
    path = family / "donor" / "donor.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert inspect(family / "donor")
    found = of_donor(family / "donor", verify=True)
    assert not found
    assert found.weights.sha256 == "differs"
    assert "donor.safetensors: its bytes have sha256" in found.problems[0]


def test_another_size_than_recorded(family: Path) -> None:
    edit_weights(family / "donor", lambda tensors: tensors.pop("layers.0.mlp.up_proj.weight"), stamp=False)
    found = of_donor(family / "donor")
    assert "bytes, " in found.problems[0]
    assert found.weights.sha256 == "differs"


def test_nothing_recorded(family: Path) -> None:
    edit_json(family / "donor" / "donor_config.json", files={})
    found = of_donor(family / "donor", verify=True)
    assert found
    assert found.weights.sha256 == "not recorded"


def test_no_weights_are_read(family: Path) -> None:
    """Zeros of the right length where the tensors are."""
    path = family / "donor" / "donor.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:end] + bytes(len(data) - end))
    assert of_donor(family / "donor").weights.parameters > 0


def test_control_characters_are_escaped(family: Path) -> None:
    edit_json(
        family / "donor" / "donor_config.json", metadata={"note\x1b[2J": "\x1b]0;x\x07\nname  forged", "n": [1] * 99}
    )
    text = str(inspect(family / "donor"))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\\x1b[2J" in text
    assert "\nname  forged" not in text


def test_a_name_draws_no_layers(family: Path) -> None:
    donors = [{"donor": ".", "position": 1, "name": "law 1\n   99  recipient"}]
    edit_json(family / "donor" / "config.json", donors=donors)
    with refused(ConfigurationError, "valid name of a folder"):
        inspect(family / "donor")


def test_a_recipient_with_code_of_its_own(family: Path, tmp_path: Path) -> None:
    T5Config(auto_map={"AutoModelForCausalLM": "evil.Evil"}).save_pretrained(tmp_path / "custom")
    with refused(ConfigurationError, str(tmp_path / "custom"), "evil.Evil", "trust_remote_code=True"):
        inspect(family / "donor", recipient=tmp_path / "custom")


def test_metadata_that_json_has_no_words_for(family: Path) -> None:
    path = family / "donor" / "donor_config.json"
    edit_json(path, metadata={"perplexity": "X", "deep": "Y"})
    path.write_text(path.read_text().replace('"X"', "NaN").replace('"Y"', "[" * 100 + "]" * 100))
    assert same_as_json(inspect(family / "donor"))["metadata"]["perplexity"] == "nan"


# -- Transplants -----------------------------------------------------------------------------------------------------


def test_a_thin_transplant_of_two_donors(family: Path, tmp_path: Path) -> None:
    model = two_donors(family, second="replace")
    model.save_pretrained(tmp_path / "thin", thin=True)
    found = of_transplant(tmp_path / "thin", verify=True)
    assert found.layer_map == model.layer_map
    assert [(d.name, d.position, d.mode, d.layer_indices) for d in found.donors] == [
        ("a", 0, "insert", (2,)),
        ("b", 2, "replace", (1, 2)),
    ]
    files = [tmp_path / "thin" / name / "donor.safetensors" for name in "ab"]
    assert (found.parameters, found.size) == (count_of(*files), size_of(*files))
    assert {donor.weights.sha256 for donor in found.donors} == {"verified"}
    assert not found.full
    assert same_as_json(found)["donors"][1]["subfolder"] == "b"
    text = str(found)
    assert ": transplant\n" in text
    assert "    b:\n" in text and "      mode: replace\n" in text


def test_a_transplant_that_refers_to_its_donors(family: Path, tmp_path: Path) -> None:
    donor = str(family / "donor")
    donors = [{"donor": donor, "position": 0, "name": "a", "layers": [1]}, {"donor": donor, "position": 4, "name": "b"}]
    (tmp_path / "t").mkdir()
    config = {"model_type": "transplant", "recipient": str(family / "recipient"), "donors": donors}
    (tmp_path / "t" / "config.json").write_text(json.dumps(config))
    found = of_transplant(tmp_path / "t")
    assert found.parameters == count_of(family / "donor" / "donor.safetensors")
    assert [tuple(slot) for slot in found.layer_map if slot.source == "a"] == [("a", 2)]
    assert len(found.layer_map) == NUM_LAYERS + 3
    with refused(ConfigurationError, "2 donors", "position"):
        inspect(tmp_path / "t", position=1)


def test_a_transplant_against_another_recipient(family: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    two_donors(family).save_pretrained(tmp_path / "thin", thin=True)
    found = of_transplant(tmp_path / "thin", recipient=family / "source")
    assert found
    assert len(found.compatibility) == 2
    assert len(found.layer_map) == NUM_LAYERS + 3
    other = of_transplant(tmp_path / "thin", recipient=tiny_gpt2 / "recipient")
    assert len(other.problems) == 2


def test_a_full_transplant_that_no_native_configuration_can_say(inverse_gpt2: Path, tmp_path: Path) -> None:
    model = loaded(inverse_gpt2)
    model.save_pretrained(tmp_path / "full")
    found = of_transplant(tmp_path / "full")
    assert found.full
    assert found.layer_map == model.layer_map
    assert "full: yes" in str(found)


def test_a_full_transplant_that_is_a_native_model(family: Path, tmp_path: Path) -> None:
    loaded(family).save_pretrained(tmp_path / "full")
    found = of_model(tmp_path / "full")
    assert found.num_layers == NUM_LAYERS + 2


# -- Models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(BUILDERS))
def test_a_model(request: pytest.FixtureRequest, kind: str) -> None:
    folder = request.getfixturevalue(f"tiny_{kind}") / "recipient"
    found = of_model(folder)
    model = AutoModelWithTransplant.from_pretrained(folder.parent / "donor")
    assert found
    assert (found.model_type, found.num_layers, found.positions) == (model.config.model_type, NUM_LAYERS, (0, 4))
    assert found.architecture == type(model).__name__
    assert found.hidden_size == model.config.hidden_size
    assert found.movable
    assert found.weights is not None
    assert found.weights.parameters == count_of(folder / "model.safetensors")
    assert len(found.weights.per_layer) == NUM_LAYERS
    # Layers of one shape: by the checkpoint's names here, by a donor's there.
    assert found.weights.per_layer[1:3] == of_donor(folder.parent / "donor").weights.per_layer
    assert same_as_json(found)["positions"] == [0, 4]
    assert "positions: 0, 4" in str(found)


def test_a_sharded_model_in_half_precision(tmp_path: Path) -> None:
    model = BUILDERS["llama"](seed=1).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    found = of_model(tmp_path)
    assert found.weights is not None
    assert len(found.weights.files) == len(files) > 1
    assert found.weights.parameters == count_of(*files)
    assert list(found.weights.dtypes) == ["BF16"]


def test_pickled_weights_have_no_headers(family: Path) -> None:
    folder = family / "recipient"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    found = of_model(folder)
    assert found.weights is None
    assert found.movable
    assert "pytorch_model.bin" in found.notes[0]
    assert "no headers" in found.notes[0]
    (folder / "pytorch_model.bin").unlink()
    assert "no weights were found" in of_model(folder).notes[0]


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        (T5Config(num_layers=2, d_model=8, d_kv=4, d_ff=8, num_heads=2, vocab_size=16), ["not a decoder-only model"]),
        (BertConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=16), [
            "not a decoder-only model", "encoder",
        ]),
    ],
)  # fmt: skip
def test_models_whose_layers_cannot_be_moved(config: Any, facts: list[str], tmp_path: Path) -> None:
    class_ = T5ForConditionalGeneration if config.model_type == "t5" else BertLMHeadModel
    class_(config).save_pretrained(tmp_path)
    found = of_model(tmp_path)
    assert found
    assert not found.movable
    assert found.num_layers is None
    assert all(fact in str(found) for fact in facts)
    assert found.weights is not None
    assert found.weights.parameters == count_of(tmp_path / "model.safetensors")


def test_a_type_that_is_not_known(family: Path) -> None:
    edit_json(family / "recipient" / "config.json", model_type="from_the_future")
    found = of_model(family / "recipient")
    assert not found.movable
    assert "from_the_future" in str(found.reason)
    assert found.weights is not None


def test_a_model_is_not_compared_with_a_recipient(family: Path) -> None:
    with refused(ConfigurationError, "model of type 'llama'", "not a donor"):
        inspect(family / "recipient", recipient=family / "recipient")


# -- Neither ---------------------------------------------------------------------------------------------------------


def test_a_folder_where_a_file_should_be(family: Path) -> None:
    for name, folder in (("config.json", "recipient"), ("donor_config.json", "donor")):
        (family / folder / name).unlink()
        (family / folder / name).mkdir()
        with refused(CheckpointError, name):
            inspect(family / folder)


def test_neither_a_model_nor_a_donor(tmp_path: Path, family: Path) -> None:
    with refused(ConfigurationError, "neither a folder"):
        inspect("./nowhere")
    with refused(ConfigurationError, "neither a model, a donor nor a transplant"):
        inspect(tmp_path)
    edit_json(family / "recipient" / "config.json", model_type=None)
    with refused(ConfigurationError, "not a model", "model_type None"):
        inspect(family / "recipient")
    with refused(CheckpointError, "safetensors"):
        inspect(family / "donor" / "donor.safetensors")


# -- The command -----------------------------------------------------------------------------------------------------


def test_the_command(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    donor = str(family / "donor")
    assert main(["inspect", donor, "--verify"]) == 0
    out, err = capsys.readouterr()
    assert ": donor\n" in out
    assert err == ""
    assert main(["inspect", donor, "--recipient", str(family / "recipient"), "--position", "2", "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert (fields["kind"], fields["placed_at"], fields["compatibility"]["compatible"]) == ("donor", 2, True)


def test_the_command_when_it_refuses(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    donor = str(family / "donor")
    assert main(["inspect", donor, "--recipient", str(family / "recipient"), "--position", "9", "--json"]) == 1
    assert "position 9" in json.loads(capsys.readouterr().out)["problems"][0]
    (family / "donor" / "donor_config.json").write_text("{")
    assert main(["inspect", donor, "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == "CheckpointError"
    assert "donor_config.json" in err
    with pytest.raises(SystemExit, match="2"):
        main(["inspect"])
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", donor, "--position", "first"])

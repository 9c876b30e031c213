"""What an engine gets that builds models itself: the configuration and the weights of an export."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GptOssConfig

from tests.helpers import BUILDERS, Shelf, edit_json, edit_weights, make_family, refused
from transplant_hf import (
    AutoModelWithTransplant,
    CheckpointError,
    ConfigurationError,
    DonorSpec,
    IntegrityError,
)
from transplant_hf.exporting import export
from transplant_hf.serving.vllm import (
    NativeTransplant,
    open_native,
    parsed_config,
    planned,
    refuse_other_windows,
    register,
)
from transplant_hf.sources import HubOptions


def opened(model: Path | str, **kwargs: Any) -> NativeTransplant:
    return open_native(model, hub=HubOptions(), **kwargs)


def thin(recipient: Path, donors: Any, folder: Path, **kwargs: Any) -> Path:
    AutoModelWithTransplant.from_pretrained(recipient, donors=donors, **kwargs).save_pretrained(folder, thin=True)
    return folder


def test_weights_and_configuration_are_those_of_an_export(tiny: Path, tmp_path: Path) -> None:
    donor = str(tiny / "donor")
    donors = [DonorSpec(donor, 2, mode="replace", name="one"), DonorSpec(donor, (0, 4), name="two")]
    model = thin(tiny / "recipient", donors, tmp_path / "thin")
    native = opened(model)
    export(model, tmp_path / "full", verify=False)
    expected, found = load_file(tmp_path / "full" / "model.safetensors"), dict(native.weights())
    assert list(found) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    native.native_config().save_pretrained(tmp_path / "config")
    ours = type(native.native_config()).from_pretrained(tmp_path / "config").to_dict()
    theirs = type(native.native_config()).from_pretrained(tmp_path / "full").to_dict()
    assert ours == theirs | {"dtype": ours["dtype"]}


def test_shards_are_read(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelWithTransplant.from_pretrained(tiny_llama / "donor")
    with model.disable_transplants():
        model.save_pretrained(tmp_path / "recipient", max_shard_size="20KB")
    assert not (tmp_path / "recipient" / "model.safetensors").exists()
    sharded = thin(tmp_path / "recipient", {str(tiny_llama / "donor"): 1}, tmp_path / "thin")
    found, expected = dict(opened(sharded).weights()), dict(opened(tiny_llama / "donor").weights())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    next((tmp_path / "recipient").glob("model-00002*")).unlink()
    with refused(CheckpointError, "no complete set of weight files", str(tmp_path / "recipient")):
        opened(sharded).files()


def test_layers_past_the_end_are_left_out(family: Path) -> None:
    """As `from_pretrained` leaves them out: they are for multi-token prediction."""
    path = family / "recipient" / "model.safetensors"
    expected, tensors = dict(opened(family / "donor").weights()), load_file(path)
    more = {name.replace("layers.3.", "layers.4."): tensor.clone() for name, tensor in tensors.items()}
    save_file({**more, **tensors}, path, metadata={"format": "pt"})
    assert dict(opened(family / "donor").weights()).keys() == expected.keys()


def test_what_no_native_configuration_describes(tiny_gpt2: Path, inverse_gpt2: Path, tmp_path: Path) -> None:
    donor, recipient = str(tiny_gpt2 / "donor"), tiny_gpt2 / "recipient"
    with refused(ConfigurationError, "strength 0.5"):
        opened(thin(recipient, [DonorSpec(donor, 1, strength=0.5)], tmp_path / "half"))
    two = [DonorSpec(donor, 1, name="a"), DonorSpec(donor, 1, name="b")]
    with refused(ConfigurationError, "a, b run side by side"):
        opened(thin(recipient, two, tmp_path / "beside", composition="side_by_side"))
    with refused(ConfigurationError, "no configuration of gpt2 describes"):
        opened(inverse_gpt2 / "donor")
    with refused(ConfigurationError, "not a transplant"):
        opened(recipient)


def test_quantized_recipients(family: Path) -> None:
    edit_json(family / "donor" / "config.json", recipient_quantization={"config": {"quant_method": "x"}, "donors": []})
    with refused(ConfigurationError, "recipient_quantization asks for x"):
        opened(family / "donor")
    edit_json(family / "donor" / "config.json", recipient_quantization=None)
    edit_json(family / "recipient" / "config.json", quantization_config={"quant_method": "mxfp4"})
    with refused(ConfigurationError, str(family / "recipient"), "is quantized", "transplant-hf export"):
        opened(family / "donor")


def test_adapters(family: Path) -> None:
    (family / "donor" / "adapter_config.json").write_text("{}")
    with refused(ConfigurationError, "holds an adapter"):
        opened(family / "donor")


def test_changed_donors(family: Path) -> None:
    path = family / "donor" / "donor.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x3f")
    weights = opened(family / "donor").weights()
    with refused(IntegrityError, "sha256", str(path)):
        dict(weights)


def test_donors_that_are_not_finite(family: Path) -> None:
    edit_weights(family / "donor", lambda tensors: tensors["layers.1.mlp.up_proj.weight"].fill_(torch.nan))
    with refused(CheckpointError, "donor: layers.1.mlp.up_proj.weight", "NaN or infinity"):
        dict(opened(family / "donor").weights())


def test_windows() -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention", "linear_attention"]
    config = GptOssConfig(num_hidden_layers=4, layer_types=kinds)
    refuse_other_windows(config, {0: 4, 1: None, 2: None, 3: 7})
    refuse_other_windows(config, {2: None})  # a part of the layers, in a pipeline
    with refused(ConfigurationError, "layer 0 would not have a sliding window", "2 more", "gpt_oss", "vLLM"):
        refuse_other_windows(config, {0: None, 1: 4, 2: 4})
    with refused(ConfigurationError, "layer 2 would have a sliding window"):
        refuse_other_windows(config, {2: 4})


# -- What vLLM's plug-in does without vLLM ---------------------------------------------------------------------------


def vllm_configs(model: str, hf_config: Any, revision: str | None = None) -> tuple[Any, Any]:
    asked = {"model": model, "revision": revision, "trust_remote_code": False, "hf_token": None}
    return SimpleNamespace(**asked, hf_config=hf_config), SimpleNamespace(download_dir=None)


@pytest.mark.hub
def test_workers_read_what_the_first_process_pinned(shelf: Shelf, tmp_path: Path) -> None:
    """Recipient and donor move on the Hub between the first process and the workers."""
    shelf.put_base().put_law()
    config = parsed_config(shelf.law, False, None, None)
    assert config.model_type == "llama" and config.num_hidden_layers == 6
    expected = dict(opened(shelf.family / "donor").weights())
    changed = make_family(tmp_path / "changed", lambda seed: BUILDERS["llama"](seed + 2))
    shelf.hub.commit(shelf.base, changed / "recipient")
    shelf.hub.commit(shelf.law, changed / "donor")
    native = planned(*vllm_configs(shelf.law, type(config).from_dict(config.to_dict())))
    assert native.config.recipient_revision == shelf.base_commit
    assert native.config.donors[0].revision == shelf.law_commit
    assert native.recipient.reference == shelf.base
    found = dict(native.weights())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert shelf.weights(shelf.base) == 1


def test_a_model_that_was_not_opened_as_a_transplant(tiny_llama: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llama / "recipient")
    with refused(ConfigurationError, "--config-format transplant --load-format transplant"):
        planned(*vllm_configs(str(tiny_llama / "recipient"), config))


def test_the_plugin_is_declared() -> None:
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'[project.entry-points."vllm.general_plugins"]\ntransplant = "{register.__module__}:register"' in declared

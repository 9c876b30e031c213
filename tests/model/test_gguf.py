"""Recipients that are read from a GGUF file, which may be all that their folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import Graft, logits_of, reference_logits, refused, tiny_llama_model
from tests.hub_server import HubServer
from transplant_hf import AutoModelWithTransplant, CheckpointError, ConfigurationError, Donor, DonorSpec, transplant
from transplant_hf.architecture import quantized as reader
from transplant_hf.evaluation.models_and_texts import find_tokenizer, model_to_measure
from transplant_hf.inspection import inspect
from transplant_hf.model.in_memory import remove_transplants
from transplant_hf.model.load_any_model import load_model, pinned_commit

NAME = "tiny.gguf"
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(folder: Path) -> None:
    """Write a tiny Llama in full precision, as llama.cpp would but for the order of rows in its attention."""
    gguf: Any = pytest.importorskip("gguf")
    model = tiny_llama_model(1)
    writer = gguf.GGUFWriter(folder / NAME, "llama")
    writer.add_block_count(4)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(model.config.vocab_size)
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        number, _, inner = module.removeprefix("model.layers.").partition(".")
        writer.add_tensor(f"{OUTER.get(module) or f'blk.{number}.{INNER[inner]}'}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def family(tmp_path: Path) -> Path:
    (tmp_path / "recipient").mkdir()
    write_gguf(tmp_path / "recipient")
    donor = Donor.from_model(tiny_llama_model(2), [1, 2], name="law")
    donor.save_pretrained(tmp_path / "donor", position=1, recipient=str(tmp_path / "recipient"))
    return tmp_path


def plain(family: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(family / "recipient", gguf_file=NAME)


def expected(family: Path) -> torch.Tensor:
    return reference_logits(plain(family), [Graft(tiny_llama_model(2), [1, 2], 1)])


@pytest.mark.parametrize("named", ["recipient", "donor"])
def test_a_folder_that_holds_nothing_else(family: Path, named: str) -> None:
    """Its numbers are rounded to float32, as the epsilon of its norms: the donor fits all the same."""
    donors = {"donors": {family / "donor": 1}} if named == "recipient" else {}
    model = AutoModelWithTransplant.from_pretrained(family / named, gguf_file=NAME, **donors)
    torch.testing.assert_close(logits_of(model), expected(family))
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain(family)))


@pytest.mark.hub
def test_a_repository_that_holds_nothing_else_is_pinned(hub: HubServer, family: Path) -> None:
    commit = hub.add_repo("alice/only-gguf", family / "recipient")
    assert pinned_commit("alice/only-gguf", None, {"gguf_file": NAME}) == commit


def loaded(family: Path) -> Any:
    return AutoModelWithTransplant.from_pretrained(
        family / "recipient", gguf_file=NAME, donors=[DonorSpec(str(family / "donor"), 1)]
    )


@pytest.mark.parametrize("how", ["loaded", "in memory", "in place"])
def test_weights_that_were_unpacked_are_not_quantized(family: Path, how: str) -> None:
    donor = Donor.from_pretrained(family / "donor")
    model = loaded(family) if how == "loaded" else transplant(plain(family), donor, 1, in_place=how == "in place")
    torch.testing.assert_close(logits_of(model), expected(family))
    model.save_pretrained(family / "full")
    assert "quant" not in (family / "full" / "config.json").read_text()
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(family / "full")), logits_of(model))
    if how == "loaded":
        return
    with refused(ConfigurationError, "thin", "GGUF", str(family / "recipient"), "gguf_file=", "save in full"):
        model.save_pretrained(family / "thin", thin=True)


def test_a_thin_save_names_the_file(family: Path) -> None:
    model = loaded(family)
    model.save_pretrained(family / "thin", thin=True)
    config = json.loads((family / "thin" / "config.json").read_text())
    assert config["recipient_quantization"] == {"config": {"quant_method": "gguf", "gguf_file": NAME}, "donors": []}
    for load in (AutoModelWithTransplant.from_pretrained, AutoModelForCausalLM.from_pretrained, load_model):
        assert torch.equal(logits_of(load(family / "thin")), logits_of(model))
    again = AutoModelWithTransplant.from_pretrained(family / "thin", dtype=torch.bfloat16)
    again.save_pretrained(family / "again", thin=True)
    assert json.loads((family / "again" / "config.json").read_text())["recipient_quantization"]
    random = AutoModelWithTransplant.from_config(AutoConfig.from_pretrained(family / "thin"))
    assert logits_of(random).shape == logits_of(model).shape
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1e-3)
    with refused(ConfigurationError, "changed recipient weights", "model.layers.0.mlp.up_proj.weight"):
        model.save_pretrained(family / "changed", thin=True)


def test_the_way_to_a_plain_folder(family: Path) -> None:
    remove_transplants(loaded(family)).save_pretrained(family / "plain")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(family / "plain")), logits_of(plain(family)))
    model = AutoModelWithTransplant.from_pretrained(family / "plain", donors={family / "donor": 1})
    model.save_pretrained(family / "thin", thin=True)
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(family / "thin")), expected(family))


def test_donors_out_of_it(family: Path) -> None:
    model = plain(family)
    for init in ("copy", "identity"):
        donor = Donor.from_model(model, [1], name="own", init=init)
        assert "quantization_config" not in donor.record.source_config
        assert transplant(model, donor, 1).layer_map[1].source == "own"


def test_what_measures_and_trains_reads_it_too(family: Path) -> None:
    loaded = model_to_measure(family / "recipient", kwargs={"gguf_file": NAME})
    assert torch.equal(logits_of(loaded.model), logits_of(plain(family)))
    assert loaded.gguf_file == NAME
    with pytest.raises(Exception, match="token"):  # this tiny file holds no tokenizer
        find_tokenizer(loaded)


def test_without_the_library(tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader.importlib.util, "find_spec", lambda name: None)
    with refused(ConfigurationError, "x.gguf", "pip install gguf"):
        AutoModelWithTransplant.from_pretrained(
            tiny_gpt2 / "recipient", donors={tiny_gpt2 / "donor": 1}, gguf_file="x.gguf"
        )
    with refused(ConfigurationError, "x.gguf", "pip install gguf"):
        model_to_measure(tiny_gpt2 / "recipient", kwargs={"gguf_file": "x.gguf"})


def test_a_folder_with_a_gguf_file_says_how(tiny_gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"GGUF\x03\x00\x00\x00")
    donor = Donor.from_pretrained(tiny_gpt2 / "donor")
    donor.save_pretrained(tmp_path / "donor", position=1, recipient=str(tmp_path))
    with refused(ConfigurationError, "no config.json", f"gguf_file='{NAME}'"):
        AutoModelWithTransplant.from_pretrained(tmp_path / "donor")
    with refused(CheckpointError, NAME, "it is a GGUF file", "gguf_file", "--gguf-file"):
        inspect(tmp_path / NAME)

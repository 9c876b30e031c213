"""Donors for quantized recipients: trained in full precision, from full-precision copies."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from tests.helpers import BUILDERS, layers_of, logits_of, refused, write_tokenizer
from tests.model.test_gguf import NAME, write_gguf
from tests.splice.test_quantized import mxfp4  # noqa: F401 - a fixture
from tests.training.helpers import arguments, losses, noise, trainer
from transplant_hf import (
    AutoModelWithTransplant,
    CompatibilityError,
    ConfigurationError,
    Donor,
    sweep,
    train,
    transplant,
)
from transplant_hf.architecture import output_weights, quantization_method
from transplant_hf.architecture.quantized import dequantized_layer
from transplant_hf.errors import CheckpointError
from transplant_hf.evaluation import perplexity
from transplant_hf.model.load_any_model import load_model
from transplant_hf.model.starting_copies import FROM_CHECKPOINT, FROM_DEQUANTIZED
from transplant_hf.training import DonorTrainer, recover


def torchao(name: str, **fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        quantization = pytest.importorskip("torchao.quantization")
        given = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32)} if fields else {}
        return TorchAoConfig(getattr(quantization, name)(**given))

    return make


def bitsandbytes(**fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        pytest.importorskip("bitsandbytes")
        return BitsAndBytesConfig(**fields)

    return make


def quanto(weights: str) -> Callable[[], Any]:
    def make() -> Any:
        pytest.importorskip("optimum.quanto")
        return QuantoConfig(weights=weights)

    return make


METHODS: dict[str, Callable[[], Any]] = {
    "torchao-int8": torchao("Int8WeightOnlyConfig"),
    "torchao-int4": torchao("IntxWeightOnlyConfig", int4=True),
    "bitsandbytes-4bit": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes-8bit": bitsandbytes(load_in_8bit=True),
    "quanto-int8": quanto("int8"),
    "quanto-int4": quanto("int4"),
}
# One method of each library by default.
MORE = ("torchao-int4", "bitsandbytes-8bit", "quanto-int4")
every_method = pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=name, marks=pytest.mark.slow if name in MORE else ()) for name, make in METHODS.items()],
)
int8 = pytest.mark.parametrize("make", [METHODS["torchao-int8"], METHODS["bitsandbytes-4bit"]], ids=["torchao", "bnb"])


def write_recipient(folder: Path, family: str = "llama") -> Path:
    sizes = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 64}
    BUILDERS[family](seed=1, **sizes).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@int8
def test_a_sweep_of_a_quantized_recipient(make: Callable[[], Any], tmp_path: Path) -> None:
    folder, config, text = write_recipient(tmp_path / "recipient"), make(), noise(4)
    donor = Donor.from_model(AutoModelForCausalLM.from_pretrained(folder), [1], name="law")
    model = load_model(folder, quantization_config=config)
    kind = type(model)
    report = sweep(model, donor, text, [1, 3], quiet=True)
    assert type(model) is kind and len(layers_of(model)) == 4  # as it was
    for row in report.rows:
        placed = transplant(load_model(folder, quantization_config=config), donor, row.position, in_place=True)
        assert row.perplexity is not None
        assert row.perplexity.nll == pytest.approx(perplexity(placed, text, quiet=True).nll, rel=1e-5)


@every_method
def test_a_donor_learns_in_a_quantized_recipient(make: Callable[[], Any], tmp_path: Path) -> None:
    folder, config = write_recipient(tmp_path / "recipient"), make()
    made = trainer(tmp_path / "run", load_model(folder, quantization_config=config), position=2)
    untouched = load_model(folder, quantization_config=config)
    assert torch.equal(logits_of(made.transplant), logits_of(untouched))  # it starts as the identity
    made.train()
    assert losses(made)[-1] < losses(made)[0]
    with made.transplant.disable_transplants():
        assert torch.equal(logits_of(made.transplant), logits_of(untouched))
    assert made.started_from == FROM_CHECKPOINT
    made.save(tmp_path / "donor")
    donor = Donor.from_pretrained(tmp_path / "donor")
    assert {info.dtype for info in donor.infos().values()} == {"F32"}
    assert "quantization_config" not in donor.record.source_config
    assert donor.metadata["recipient_quantization"]["quant_method"] == quantization_method(untouched)
    assert donor.metadata["started_from"] == FROM_CHECKPOINT
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "donor")  # an ordinary donor, for the full recipient too
    assert all(type(parameter) is nn.Parameter for parameter in full.parameters())


@int8
def test_the_gradient_is_that_of_the_dequantized_recipient(make: Callable[[], Any], tmp_path: Path) -> None:
    folder = write_recipient(tmp_path / "recipient")
    model = load_model(folder, quantization_config=make())
    logits_of(model)  # bitsandbytes arranges weights for a CPU kernel without gradients here
    plain = load_model(folder)
    for number, layer in enumerate(layers_of(plain)):
        layer.load_state_dict(dequantized_layer(layers_of(model)[number], layer, "layer", "some method"))
    given = [trainer(tmp_path / str(n), one, position=1) for n, one in enumerate((model, plain))]
    for one in given:
        with torch.no_grad():
            for own in one.transplant.layer_map.layers_of("law"):
                start = trainer_start(folder)
                layers_of(one.transplant)[own].load_state_dict(start)
        one.train()
    torch.testing.assert_close(losses(given[0]), losses(given[1]), rtol=0.02, atol=0.02)


def trainer_start(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in layers_of(load_model(folder))[0].state_dict().items()}


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("bitsandbytes-4bit", "llama"),
        ("bitsandbytes-8bit", "gpt2"),
        ("torchao-int8", "llama"),  # quantizes nn.Linear only, and GPT-2 has Conv1D
        pytest.param("bitsandbytes-4bit", "gpt2", marks=pytest.mark.slow),
        pytest.param("bitsandbytes-8bit", "llama", marks=pytest.mark.slow),
    ],
)
def test_a_recipient_that_is_saved_quantized_is_dequantized(
    method: str, family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_recipient(tmp_path / "recipient", family)
    load_model(folder, quantization_config=METHODS[method]()).save_pretrained(tmp_path / "quantized")
    recipient = load_model(tmp_path / "quantized")
    made = trainer(tmp_path / "run", recipient, position=2, init="copy")
    assert made.started_from == FROM_DEQUANTIZED
    own, start = made.transplant.layer_map.layers_of("law")[0], layers_of(load_model(folder))[0].state_dict()
    for name, tensor in layers_of(made.transplant)[own].state_dict().items():
        torch.testing.assert_close(tensor, start[name], rtol=0.2, atol=0.05)
    made.train()
    made.save(tmp_path / "donor")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "donor")
    made.finish()
    wanted = logits_of(made.transplant.eval())
    assert (logits_of(again) - wanted).norm() < 0.05 * wanted.norm()  # 4 bits: another kernel on some CPUs


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "recipient").mkdir()
    write_gguf(tmp_path / "recipient")
    made = trainer(tmp_path / "run", load_model(tmp_path / "recipient", gguf_file=NAME))
    assert made.started_from == FROM_DEQUANTIZED
    made.train()
    made.save(tmp_path / "donor")
    made.finish()
    assert Donor.from_pretrained(tmp_path / "donor").metadata["recipient_quantization"] == {"quant_method": "gguf"}
    again = AutoModelWithTransplant.from_pretrained(tmp_path / "donor", gguf_file=NAME)
    torch.testing.assert_close(logits_of(again), logits_of(made.transplant))


def test_weights_that_were_arranged_for_a_cpu_kernel_are_arranged_back() -> None:
    bnb: Any = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(192, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).eval()
    weight = torch.randn(64, 192) * torch.rand(64, 1)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to("cpu")
    wanted = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no such kernel")
    for _ in range(2):  # the scales are rounded to bfloat16 on the way
        layer.support_avx512bf16_for_cpu = True
        with torch.no_grad():
            layer(torch.randn(2, 192))
        found = dequantized_layer(layer, nn.Linear(192, 64, bias=False, device="meta"), "layer", "bitsandbytes")
        assert (found["weight"] - wanted).norm() < 0.004 * wanted.norm()


def test_a_kind_of_layer_without_gradients_is_refused(tmp_path: Path) -> None:
    config = torchao("Int8DynamicActivationInt8WeightConfig")()
    made = trainer(tmp_path / "run", load_model(write_recipient(tmp_path / "recipient"), quantization_config=config))
    with refused(CompatibilityError, "q_proj", "torchao", "no usable gradient", "Quantize weights only"):
        made.train()


def test_what_cannot_be_dequantized_is_named() -> None:
    model = BUILDERS["llama"](seed=1)
    layer = copy.deepcopy(layers_of(model)[1])
    layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with refused(CheckpointError, "layer 1.mlp.up_proj.weight", "quantized with gptq", "torch.int8", "bitsandbytes"):
        dequantized_layer(layer, layers_of(model)[1], "layer 1", "gptq")
    del layer.mlp.up_proj.weight
    with refused(CheckpointError, "layer 1.mlp.up_proj.weight", "gptq", "other tensors"):
        dequantized_layer(layer, layers_of(model)[1], "layer 1", "gptq")


def test_projections_of_quantized_layers_are_refused(tmp_path: Path) -> None:
    model = load_model(write_recipient(tmp_path), quantization_config=METHODS["torchao-int8"]())
    with refused(CheckpointError, "model.layers.1.self_attn.q_proj.weight", "quantized"):
        output_weights(model, "model.layers", [1])


def test_train_and_recover(tmp_path: Path) -> None:
    folder = write_recipient(tmp_path / "recipient")
    (tmp_path / "law.txt").write_text("The court may order the seizure of goods. " * 60)
    options: dict[str, Any] = {
        "model_kwargs": {"quantization_config": METHODS["torchao-int8"]()},
        "block_length": 16,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "disable_tqdm": True,
    }
    report = train(folder, tmp_path / "law.txt", tmp_path / "donor", donor_layers=1, held_out=noise(), **options)
    assert report.started_from == FROM_CHECKPOINT and FROM_CHECKPOINT in str(report)
    for parts in (["donor"], ["gate"]):
        output = tmp_path / f"recovered-{parts[0]}"
        recover(tmp_path / "donor", tmp_path / "law.txt", output, parts=parts, **options)
        record = json.loads((output / "donor_config.json").read_text())["metadata"]["recovered"]
        assert record["recipient_quantization"]["quant_method"] == "torchao"
    with refused(ConfigurationError, "quantized (torchao)", "neighbors", '"donor" and "gate"'):
        recover(tmp_path / "donor", tmp_path / "law.txt", tmp_path / "no", parts=["donor", "neighbors"], **options)


@every_method
def test_a_thin_save_gives_the_same_model(make: Callable[[], Any], tmp_path: Path) -> None:
    folder = write_recipient(tmp_path / "recipient")
    recipient, position = load_model(folder), 2
    Donor.from_model(recipient, [0, 1], name="law").save_pretrained(tmp_path / "law", position=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "law", quantization_config=make())  # the donor too
    model.add_donor(Donor.from_model(recipient, [3], name="code"), position)  # in full precision
    model.save_pretrained(tmp_path / "thin", thin=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "thin")
    assert torch.equal(logits_of(again), logits_of(model))
    assert quantization_method(again) == quantization_method(model)
    for (one, other), slot in zip(zip(layers_of(model), layers_of(again), strict=True), model.layer_map, strict=True):
        kinds = [[type(value.data) for value in layer.parameters()] for layer in (one, other)]
        assert kinds[0] == kinds[1], slot
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "thin", quantization_config=None)
    assert quantization_method(full) is None
    again.save_pretrained(tmp_path / "thin-again", thin=True)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("thin", "thin-again"))
    assert first["recipient_quantization"] == second["recipient_quantization"]
    assert first["format_version"] > 1


def test_a_changed_recipient_is_refused(tmp_path: Path) -> None:
    folder = write_recipient(tmp_path / "recipient")
    Donor.from_model(load_model(folder), [0], name="law").save_pretrained(tmp_path / "law", position=1)

    def loaded() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "law", quantization_config=METHODS["torchao-int8"]())

    def refuse(model: Any, *words: str) -> None:
        with refused(ConfigurationError, *words):
            model.save_pretrained(tmp_path / "thin", thin=True)

    model = loaded()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    refuse(model, "model.norm.weight", "changed in place")
    model = loaded()
    model.model.norm.weight = nn.Parameter(torch.ones(64))
    refuse(model, "model.norm.weight", "another tensor")
    model = loaded()
    layers_of(model)[-1].input_layernorm.weight.data = torch.ones(64)
    refuse(model, "model.layers.3.input_layernorm.weight", "other numbers")
    model = loaded()
    model.model.norm.weight.grad = torch.ones(64)
    refuse(model, "model.norm.weight", "gradient")
    refuse(copy.deepcopy(loaded()), "quantized", "copy", "AutoModelWithTransplant.from_pretrained")


@pytest.mark.parametrize("method", ["torchao-int8", pytest.param("bitsandbytes-8bit", marks=pytest.mark.slow)])
def test_layers_are_quantized_one_at_a_time(method: str, tmp_path: Path) -> None:
    folder, made = write_recipient(tmp_path / "recipient"), []
    cache = str(tmp_path / "cache")  # that has the hidden states of the recipient in full precision
    for quantized, stream in ((False, True), (True, True), (True, False)):
        args = arguments(tmp_path / "out", donor_layers=1, max_steps=3, stream_prefix=stream, prefix_cache_dir=cache)
        how = {"quantization_config": METHODS[method]()} if quantized else {}
        made.append(DonorTrainer(folder, args, noise(), model_kwargs=how))
        made[-1].train()
    del made[0]
    streamed, resident = (one.donor.tensors() for one in made)
    assert made[0].model._layers_in_files.absent == [0, 1, 2]
    assert all(torch.equal(streamed[name], tensor) for name, tensor in resident.items())


def test_experts_in_mxfp4(mxfp4: Path, tmp_path: Path) -> None:  # noqa: F811 - a fixture
    """Without a GPU, Transformers dequantizes them."""
    write_tokenizer(mxfp4 / "recipient")
    made = []
    for stream in (True, False):
        made.append(trainer(tmp_path / str(stream), mxfp4 / "recipient", donor_layers=1, stream_prefix=stream))
        made[-1].train()
    assert losses(made[0]) == losses(made[1]) and losses(made[1])[-1] < losses(made[1])[0]
    streamed, resident = (one.donor.tensors() for one in made)
    assert all(torch.equal(streamed[name], tensor) for name, tensor in resident.items())
    assert "layers.0.mlp.experts.gate_up_proj" in resident  # not in MXFP4, like the recipient's own
    made[1].save(tmp_path / "donor")
    made[1].finish()
    again = AutoModelWithTransplant.from_pretrained(tmp_path / "donor")
    assert torch.equal(logits_of(again), logits_of(made[1].transplant.eval()))

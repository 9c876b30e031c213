"""Rows of quantization: a transplant computes what the reference computes that was quantized in the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HqqConfig, QuantoConfig, TorchAoConfig

from tests.ecosystem import cases
from tests.ecosystem.cases import Case, make_case
from tests.ecosystem.steps import aligned, steps
from tests.helpers import copied, generated, layers_of, logits_of, pack_experts, randomised, refused
from transplant_hf import AutoModelWithTransplant, CheckpointError, ConfigurationError, Donor, transplant

SECTION = "Quantization (width 128)"
pytestmark = pytest.mark.slow
WIDTH = 128
PAGES = "https://huggingface.co/docs/transformers/quantization"


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """One way to quantize.

    Args:
        package: What it needs.
        make: Makes its `quantization_config`.
        linear_only: It leaves GPT-2's `Conv1D` as it is.
    """

    package: str
    make: Callable[[], Any]
    linear_only: bool = True

    def load(self, loader: Callable[..., Any]) -> Any:
        """Load a model and quantize it."""
        pytest.importorskip(self.package)
        return loader(quantization_config=self.make())


def _torchao(name: str, **fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        from torchao import quantization

        if "bits" in fields:
            given = {"weight_dtype": getattr(torch, fields["bits"]), "granularity": quantization.PerGroup(32)}
            return TorchAoConfig(getattr(quantization, name)(**given))
        return TorchAoConfig(getattr(quantization, name)())

    return make


AO8 = Quantizer("torchao", _torchao("Int8WeightOnlyConfig"))
AO8_DYNAMIC = Quantizer("torchao", _torchao("Int8DynamicActivationInt8WeightConfig"))
AO4 = Quantizer("torchao", _torchao("IntxWeightOnlyConfig", bits="int4"))
BNB8 = Quantizer("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True), linear_only=False)
BNB4 = Quantizer(
    "bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), linear_only=False
)
QUANTO8 = Quantizer("optimum.quanto", lambda: QuantoConfig(weights="int8"))
QUANTO4 = Quantizer("optimum.quanto", lambda: QuantoConfig(weights="int4"))


@pytest.fixture(scope="session")
def made_wide() -> dict[str, Case]:
    """Those that were made in this run."""
    return {}


@pytest.fixture
def wide(case: Case, made_wide: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A case whose matrices are large enough for blocks of 64."""
    model = case.recipient_model()
    sizes = ("n_embd",) if case.architecture == "gpt2" else ("hidden_size", "intermediate_size")

    def build(seed: int) -> Any:
        fields = {**model.config.to_dict(), **dict.fromkeys(sizes, WIDTH)}
        return randomised(type(model)(type(model.config).from_dict(fields)), seed)

    if case.architecture not in made_wide:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(cases.ARCHITECTURES, case.architecture, build)
            made_wide[case.architecture] = make_case(
                case.architecture, tmp_path_factory.mktemp(f"wide-{case.architecture}")
            )
    return made_wide[case.architecture]


def assert_as_the_reference(wide: Case, quantizer: Quantizer) -> None:
    """Compare logits, generated tokens, and the recipient that is left with donors switched off."""
    model, native = quantizer.load(wide.load), quantizer.load(wide.independent)
    assert torch.equal(logits_of(model, wide.ids), logits_of(native, wide.ids))
    assert torch.equal(generated(model, wide.ids), generated(native, wide.ids))
    with model.disable_transplants():
        untouched = quantizer.load(wide.recipient_model)
        assert torch.equal(logits_of(model, wide.ids), logits_of(untouched, wide.ids))
    quantized = not torch.equal(logits_of(native, wide.ids), logits_of(wide.independent(), wide.ids))
    if quantizer.linear_only and wide.architecture == "gpt2":
        assert not quantized
        package = quantizer.package
        page = f"{PAGES}/{package.removeprefix('optimum.').partition('.')[0]}"
        pytest.skip(f"not applicable: {package} quantizes nn.Linear only, and GPT-2 has Conv1D: {page}")
    assert quantized


def assert_comes_back(wide: Case, quantizer: Quantizer, folder: Path) -> None:
    """Save what was quantized while loading, and load it with Transformers alone."""
    model = quantizer.load(wide.load)
    model.save_pretrained(folder)  # before it ran: bitsandbytes packs weights anew for the CPU when they are first used
    after = logits_of(model, wide.ids)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(again, wide.ids), after)
    assert torch.equal(after, logits_of(quantizer.load(wide.independent), wide.ids))


def by_hand(wide: Case, untouched: Any, **kwargs: Any) -> Any:
    """Put the layers of a quantized recipient into the ordinary model of six layers, around the donor's two."""
    model = wide.independent(**kwargs)
    around = [place for place in range(len(layers_of(model))) if place not in (wide.position, wide.position + 1)]
    for place, layer in zip(around, layers_of(untouched), strict=True):
        layers_of(model)[place] = layer
    return aligned(model)


def assert_donor_in_full_precision(wide: Case, quantizer: Quantizer, folder: Path) -> None:
    """Put a donor into a recipient that was saved quantized."""
    quantizer.load(wide.recipient_model).save_pretrained(folder)
    model = aligned(AutoModelWithTransplant.from_pretrained(folder, donors={str(wide.donor): wide.position}))
    source = AutoModelForCausalLM.from_pretrained(wide.source)
    for number in (0, 1):
        wanted = dict(layers_of(source)[number + 1].named_parameters())
        for name, parameter in layers_of(model)[wide.position + number].named_parameters():
            assert type(parameter) is nn.Parameter
            assert torch.equal(parameter, wanted[name])
    untouched = aligned(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(logits_of(model, wide.ids), logits_of(by_hand(wide, untouched), wide.ids))
    with model.disable_transplants():
        assert torch.equal(logits_of(model, wide.ids), logits_of(untouched, wide.ids))
        assert torch.equal(generated(model, wide.ids), generated(untouched, wide.ids))


@pytest.mark.ecosystem(section=SECTION, feature="torchao, int8 weights")
def test_torchao_int8(wide: Case) -> None:
    assert_as_the_reference(wide, AO8)


@pytest.mark.ecosystem(section=SECTION, feature="torchao, int8 weights and activations")
def test_torchao_int8_dynamic(wide: Case) -> None:
    assert_as_the_reference(wide, AO8_DYNAMIC)


@pytest.mark.ecosystem(section=SECTION, feature="torchao, int4 weights (IntxWeightOnlyConfig)")
def test_torchao_int4(wide: Case) -> None:
    assert_as_the_reference(wide, AO4)


@pytest.mark.ecosystem(section=SECTION, feature="bitsandbytes, 8 bit")
def test_bitsandbytes_8bit(wide: Case) -> None:
    assert_as_the_reference(wide, BNB8)


@pytest.mark.ecosystem(section=SECTION, feature="bitsandbytes, 4 bit (nf4)")
def test_bitsandbytes_4bit(wide: Case) -> None:
    assert_as_the_reference(wide, BNB4)


@pytest.mark.ecosystem(section=SECTION, feature="optimum-quanto, int8 weights")
def test_quanto_int8(wide: Case) -> None:
    assert_as_the_reference(wide, QUANTO8)


@pytest.mark.ecosystem(section=SECTION, feature="optimum-quanto, int4 weights")
def test_quanto_int4(wide: Case) -> None:
    assert_as_the_reference(wide, QUANTO4)


@pytest.mark.ecosystem(section=SECTION, feature="HQQ")
def test_hqq(wide: Case) -> None:
    pytest.importorskip("hqq")
    config = {"quantization_config": HqqConfig(nbits=4, group_size=32)}
    if wide.architecture == "gpt2":
        assert torch.equal(logits_of(wide.load(**config), wide.ids), logits_of(wide.independent(), wide.ids))
        pytest.skip(
            "not applicable: hqq quantizes nn.Linear only, and GPT-2 has Conv1D: https://huggingface.co/docs/transformers/quantization/hqq"
        )
    for loader in (wide.independent, wide.load):
        with pytest.raises(NotImplementedError, match="HQQ is not available yet"):
            loader(**config)
    pytest.xfail(
        "Transformers 5.23 refuses to load any model with HQQ ('not available yet'): https://huggingface.co/docs/transformers/quantization/hqq"
    )


@pytest.mark.ecosystem(section=SECTION, feature="saved quantized and loaded again: torchao int8 and int4")
@pytest.mark.parametrize("quantizer", [AO8, AO4], ids=["int8", "int4"])
def test_torchao_saved(wide: Case, quantizer: Quantizer, tmp_path: Path) -> None:
    assert_comes_back(wide, quantizer, tmp_path)
    if wide.architecture == "gpt2":
        pytest.skip(
            "not applicable: torchao quantizes nn.Linear only, and GPT-2 has Conv1D: https://huggingface.co/docs/transformers/quantization/torchao"
        )


@pytest.mark.ecosystem(section=SECTION, feature="saved quantized and loaded again: bitsandbytes 8 and 4 bit")
@pytest.mark.parametrize("quantizer", [BNB8, BNB4], ids=["8bit", "4bit"])
def test_bitsandbytes_saved(wide: Case, quantizer: Quantizer, tmp_path: Path) -> None:
    assert_comes_back(wide, quantizer, tmp_path)


@pytest.mark.ecosystem(section=SECTION, feature="saved quantized and loaded again: optimum-quanto")
def test_quanto_saved(wide: Case, tmp_path: Path) -> None:
    for loader in (wide.independent, wide.load):
        with pytest.raises(ValueError, match="not serializable"):
            QUANTO8.load(loader).save_pretrained(tmp_path)
    pytest.xfail(
        "Transformers cannot save models that are quantized by quanto: https://huggingface.co/docs/transformers/quantization/quanto"
    )


@pytest.mark.ecosystem(section=SECTION, feature="a recipient saved quantized, its donor in full precision: torchao")
@pytest.mark.parametrize("quantizer", [AO8, AO4], ids=["int8", "int4"])
def test_torchao_recipient(wide: Case, quantizer: Quantizer, tmp_path: Path) -> None:
    assert_donor_in_full_precision(wide, quantizer, tmp_path)
    if wide.architecture == "gpt2":
        pytest.skip(
            "not applicable: torchao quantizes nn.Linear only, and GPT-2 has Conv1D: https://huggingface.co/docs/transformers/quantization/torchao"
        )


@pytest.mark.ecosystem(
    section=SECTION, feature="a recipient saved quantized, its donor in full precision: bitsandbytes"
)
@pytest.mark.parametrize("quantizer", [BNB8, BNB4], ids=["8bit", "4bit"])
def test_bitsandbytes_recipient(wide: Case, quantizer: Quantizer, tmp_path: Path) -> None:
    assert_donor_in_full_precision(wide, quantizer, tmp_path)


@pytest.mark.ecosystem(section=SECTION, feature="QLoRA: LoRA trained on 4 bit")
def test_qlora(wide: Case) -> None:
    peft = pytest.importorskip("peft")
    names = ["c_attn"] if wide.architecture == "gpt2" else ["q_proj", "v_proj"]
    found = []
    for loader in (wide.load, wide.independent):
        model = peft.prepare_model_for_kbit_training(BNB4.load(loader))
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=names)).eval()
        found.append((steps(model, [wide.ids] * 3), logits_of(model, wide.ids)))
    assert found[0][0][-1] < found[0][0][0]
    torch.testing.assert_close(torch.tensor(found[0][0]), torch.tensor(found[1][0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-3)


@pytest.mark.ecosystem(section=SECTION, feature="a thin save of a quantized model")
@pytest.mark.parametrize("quantizer", [AO8, BNB8, BNB4, QUANTO8], ids=["torchao", "8bit", "4bit", "quanto"])
def test_thin_save(wide: Case, quantizer: Quantizer, tmp_path: Path) -> None:
    model = quantizer.load(wide.load)
    wanted = logits_of(model, wide.ids)
    model.save_pretrained(tmp_path, thin=True)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), wide.ids), wanted)


@pytest.mark.ecosystem(section=SECTION, feature="a donor or an in-memory transplant of a quantized model")
def test_what_needs_full_precision(wide: Case) -> None:
    model = BNB8.load(wide.load)
    with refused(CheckpointError, "is quantized", "full precision"):
        Donor.from_model(model, [wide.position]).tensors()
    with refused(ConfigurationError, "it is quantized", "AutoModelWithTransplant.from_pretrained"):
        transplant(BNB8.load(wide.recipient_model), Donor.from_pretrained(wide.donor), wide.position)
    pytest.xfail("refused: donors hold full precision; load without quantization for these; see [loading](load.md)")


@pytest.mark.ecosystem(section=SECTION, feature="MXFP4 experts, the donor dequantized")
def test_mxfp4(wide: Case, tmp_path: Path) -> None:
    if wide.architecture != "gpt_oss":
        pytest.skip(
            "not applicable: the architecture has no MXFP4 checkpoints: https://huggingface.co/docs/transformers/quantization/mxfp4"
        )
    packed = copied(wide.recipient, tmp_path / "mxfp4")
    pack_experts(packed)
    donor = Donor.from_model(AutoModelForCausalLM.from_pretrained(wide.source, dtype=torch.bfloat16), [1, 2])
    donor.save_pretrained(tmp_path / "donor", position=wide.position, recipient=str(packed))
    model = aligned(AutoModelWithTransplant.from_pretrained(packed, donors={str(tmp_path / "donor"): wide.position}))
    untouched = aligned(AutoModelForCausalLM.from_pretrained(packed))
    wanted = logits_of(by_hand(wide, untouched, dtype=torch.bfloat16), wide.ids)
    assert torch.equal(logits_of(model, wide.ids), wanted)
    with model.disable_transplants():
        assert torch.equal(logits_of(model, wide.ids), logits_of(untouched, wide.ids))
    model.save_pretrained(tmp_path / "full")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(again, wide.ids), logits_of(model, wide.ids))

"""PEFT's adapters on top of transplants."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ecosystem.cases import Case
from tests.ecosystem.steps import aligned, steps
from tests.helpers import NUM_LAYERS, generated, logits_of, refused
from transplant_hf import AutoModelWithTransplant, CheckpointError, Donor, transplant

SECTION = "PEFT"
_LAYER = re.compile(r"(?<=\.(?:h)\.)\d+(?=\.)|(?<=\.layers\.)\d+(?=\.)")

peft = pytest.importorskip("peft")


def targets(model: Any) -> Any:
    """Modules to adapt: by default those that PEFT knows for the architecture; it knows none for GPT-OSS."""
    return ["q_proj", "v_proj"] if model.config.model_type == "gpt_oss" else None


def lora(model: Any, **fields: Any) -> Any:
    """A LoRA for this model."""
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets(model), **fields)


def drawn(model: Any) -> Any:
    """Give the adapter's weights seeded values, so that it changes the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(model: Any, **fields: Any) -> Any:
    """A model with a LoRA that changes the output."""
    return drawn(peft.get_peft_model(model, lora(model, **fields)))


def renumbered(adapter: Path, target: Path, places: dict[int, int]) -> Path:
    """Copy a saved adapter with other layer numbers; layers that have none are left out."""
    target.mkdir()
    tensors = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        found = _LAYER.search(name)
        assert found is not None, name
        if int(found[0]) in places:
            tensors[_LAYER.sub(str(places[int(found[0])]), name)] = tensor
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    return target


@pytest.mark.ecosystem(section=SECTION, feature="LoRA with default target modules: same losses as on a native model")
def test_lora_trains(case: Case) -> None:
    runs = {}
    if case.architecture == "gpt_oss":
        with pytest.raises(ValueError, match="specify `target_modules`"):
            peft.get_peft_model(case.recipient_model(), peft.LoraConfig(task_type="CAUSAL_LM"))
    for kind, base in (("transplant", aligned(case.load())), ("native", aligned(case.independent()))):
        torch.manual_seed(0)
        model = peft.get_peft_model(base, lora(base)).eval()
        runs[kind] = steps(model, [case.ids] * 4), logits_of(model, case.ids)
    assert runs["transplant"][0][-1] < runs["transplant"][0][0]
    assert runs["transplant"][0] == runs["native"][0]
    assert torch.equal(runs["transplant"][1], runs["native"][1])
    if case.architecture == "gpt_oss":
        pytest.xfail(
            "PEFT knows no default target modules for GPT-OSS, plain or not; with target_modules it passes: https://huggingface.co/docs/peft/package_reference/lora"
        )


@pytest.mark.ecosystem(section=SECTION, feature="LoRA saved, then put on a freshly loaded transplant")
@pytest.mark.parametrize("fresh", ["recipient and donor", "thin"])
def test_lora_comes_back(case: Case, fresh: str, tmp_path: Path) -> None:
    model = adapted(case.load())
    after = logits_of(model, case.ids)
    assert not torch.equal(after, logits_of(case.load(), case.ids))
    model.save_pretrained(tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    base = case.load() if fresh != "thin" else AutoModelWithTransplant.from_pretrained(case.thin)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits_of(again, case.ids), after)
    assert torch.equal(generated(again, case.ids), generated(model, case.ids, use_cache=False))


@pytest.mark.ecosystem(section=SECTION, feature="`AutoPeftModelForCausalLM`, adapter of a transplant with a name")
def test_lora_by_its_own_name(case: Case, tmp_path: Path) -> None:
    model = adapted(AutoModelWithTransplant.from_pretrained(case.thin))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert again.layer_map == model.layer_map
    assert torch.equal(logits_of(again, case.ids), logits_of(model, case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="`AutoPeftModelForCausalLM`, adapter of one put together by `donors=`")
def test_lora_without_a_name(case: Case, tmp_path: Path) -> None:
    adapted(case.load()).save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    if again.config.num_hidden_layers == NUM_LAYERS:
        pytest.xfail(
            "PEFT notes the recipient as the base; save the transplant (thin will do) and load it by its name: https://huggingface.co/docs/peft/package_reference/auto_class"
        )
    assert torch.equal(logits_of(again.eval(), case.ids), logits_of(adapted(case.load()), case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="`merge_and_unload`, saved as a plain checkpoint")
def test_merge(case: Case, tmp_path: Path) -> None:
    merged = adapted(case.load()).merge_and_unload()
    native = adapted(case.independent()).merge_and_unload()
    assert torch.equal(logits_of(merged, case.ids), logits_of(native, case.ids))
    torch.testing.assert_close(
        logits_of(merged, case.ids), logits_of(adapted(case.load()), case.ids), rtol=1e-4, atol=1e-4
    )
    merged.save_pretrained(tmp_path / "merged")
    again = type(case.recipient_model()).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(again, case.ids), logits_of(native, case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="`disable_adapter` and `unload`: exactly the transplant")
def test_disable_adapter(case: Case) -> None:
    model = adapted(case.load())
    with model.disable_adapter():
        assert torch.equal(logits_of(model, case.ids), logits_of(case.independent(), case.ids))
    unloaded = model.unload()
    assert torch.equal(logits_of(unloaded, case.ids), logits_of(case.independent(), case.ids))


@pytest.mark.ecosystem(
    section=SECTION, feature="`disable_transplants` with an adapter on: the recipient with the adapter of its layers"
)
def test_switch_with_an_adapter(case: Case, tmp_path: Path) -> None:
    model = adapted(case.load())
    on = logits_of(model, case.ids)
    model.save_pretrained(tmp_path / "adapter")
    own = {place: slot.index for place, slot in enumerate(model.layer_map) if slot.source == "recipient"}
    adapter = renumbered(tmp_path / "adapter", tmp_path / "own", own)
    untouched = peft.PeftModel.from_pretrained(case.recipient_model(), adapter).eval()
    with model.disable_transplants():
        assert torch.equal(logits_of(model, case.ids), logits_of(untouched, case.ids))
        assert torch.equal(generated(model, case.ids), generated(untouched, case.ids))
        with model.disable_adapter():
            assert torch.equal(logits_of(model, case.ids), logits_of(case.recipient_model(), case.ids))
    assert torch.equal(logits_of(model, case.ids), on)


@pytest.mark.ecosystem(section=SECTION, feature="an adapter of the recipient, put on inside `disable_transplants`")
def test_adapter_of_the_recipient(case: Case, tmp_path: Path) -> None:
    """Its layer numbers are the recipient's, so that it is put on while only the recipient's layers are there."""
    made = adapted(case.recipient_model())
    made.save_pretrained(tmp_path / "adapter")
    base = case.load()
    with base.disable_transplants():
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(logits_of(model, case.ids), logits_of(made, case.ids))
    places = {slot.index: place for place, slot in enumerate(model.layer_map) if slot.source == "recipient"}
    adapter = renumbered(tmp_path / "adapter", tmp_path / "moved", places)
    native = peft.PeftModel.from_pretrained(case.independent(), adapter).eval()
    assert torch.equal(logits_of(model, case.ids), logits_of(native, case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="LoRA on the donor's layers alone, merged and saved thin")
def test_lora_on_the_donor(case: Case, tmp_path: Path) -> None:
    layers = [case.position, case.position + 1]
    model = adapted(case.load(), layers_to_transform=layers)
    on = logits_of(model, case.ids)
    assert torch.equal(on, logits_of(adapted(case.independent(), layers_to_transform=layers), case.ids))
    with model.disable_transplants():
        assert torch.equal(logits_of(model, case.ids), logits_of(case.recipient_model(), case.ids))
    with refused(CheckpointError, "has an adapter"):
        model.get_base_model().save_pretrained(tmp_path / "thin", thin=True)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "thin", thin=True)
    again = AutoModelWithTransplant.from_pretrained(tmp_path / "thin").eval()
    assert torch.equal(logits_of(again, case.ids), logits_of(merged, case.ids))
    torch.testing.assert_close(logits_of(again, case.ids), on, rtol=1e-4, atol=1e-4)


@pytest.mark.ecosystem(section=SECTION, feature="`add_adapter`, `load_adapter`, `disable_adapters` of Transformers")
def test_adapters_of_transformers(case: Case, tmp_path: Path) -> None:
    model = case.load()
    model.add_adapter(lora(model))
    drawn(model)
    native = adapted(case.independent())
    assert torch.equal(logits_of(model.eval(), case.ids), logits_of(native, case.ids))
    model.save_pretrained(tmp_path / "adapter")
    again = case.load()
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits_of(again.eval(), case.ids), logits_of(native, case.ids))
    again.disable_adapters()
    assert torch.equal(logits_of(again, case.ids), logits_of(case.independent(), case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="`transplant` into a recipient with a merged LoRA")
def test_transplant_after_a_merge(case: Case) -> None:
    recipient = adapted(case.recipient_model()).merge_and_unload()
    untouched = logits_of(recipient, case.ids)
    model = transplant(recipient, Donor.from_pretrained(case.donor), case.position)
    with model.disable_transplants():
        assert torch.equal(logits_of(model, case.ids), untouched)
    assert len(model.layer_map) == NUM_LAYERS + 2
    assert not torch.equal(logits_of(model, case.ids), untouched)


@pytest.mark.ecosystem(section=SECTION, feature="other methods: DoRA, IA3, prompt tuning, prefix tuning")
@pytest.mark.parametrize("method", ["dora", "ia3", "prompt", "prefix"])
def test_other_methods(case: Case, method: str) -> None:
    configs = {
        "dora": lambda model: lora(model, use_dora=True),
        "ia3": lambda model: peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=targets(model),
            feedforward_modules=[] if targets(model) else None,
        ),
        "prompt": lambda model: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": lambda model: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    runs = []
    for base in (aligned(case.load()), aligned(case.independent())):
        torch.manual_seed(0)
        model = peft.get_peft_model(base, configs[method](base)).eval()
        runs.append((steps(model, [case.ids] * 4), model(input_ids=case.ids).logits.detach()))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])

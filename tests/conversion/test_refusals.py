"""Files whose layers are not the recipient's: refused, with what the file holds and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import BUILDERS, layers_of, refused, tiny_gpt2_model, tiny_gpt_oss_model, tiny_llama_model
from tests.pt_files.crafted import saved
from tests.pt_files.test_layouts import packable, packed
from tests.pt_files.trees import CHOSEN, named, states_of
from transplant_hf import CheckpointError, ConfigurationError, Donor
from transplant_hf.conversion import convert

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama."""
    return tiny_llama_model(seed=2)


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    """A folder with its configuration in `source/`."""
    model.config.save_pretrained(tmp_path / "source")
    return tmp_path


def refuse(folder: Path, content: Any, *facts: str, **options: Any) -> None:
    """Expect opening and converting to be refused with these facts and the file's path."""
    path = saved(folder / "layers.pt", content)
    with refused(CheckpointError, str(path), *facts):
        Donor.from_pt(path, folder / "source", **{"layers": CHOSEN, **options})
    with refused(CheckpointError, str(path), *facts):
        convert(path, folder / "source", folder / "donor", **{"layers": CHOSEN, **options})
    assert not (folder / "donor").exists()


def changed(model: Any, change: Callable[[Tensors], Any]) -> Tensors:
    """The chosen layers by full names, with something changed."""
    tensors = named(model)
    change(tensors)
    return tensors


Q = "model.layers.1.self_attn.q_proj.weight"


def test_an_adapter_that_was_not_merged_is_refused(model: Any, folder: Path) -> None:
    lora = {"lora_A.default.weight": torch.ones(4, 32), "lora_B.default.weight": torch.ones(32, 4)}
    start = "base_model.model.model.layers.1.self_attn.q_proj"
    tensors = {f"base_model.model.{name}": tensor for name, tensor in named(model).items()}
    tensors[f"{start}.base_layer.weight"] = tensors.pop(f"{start}.weight")
    tensors |= {f"{start}.{name}": tensor for name, tensor in lora.items()}
    refuse(folder, tensors, "adapter that was not merged", "2 tensors", f"{start}.lora_A", "merge_and_unload")


def test_a_real_adapter_is_refused_until_it_is_merged(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        tiny_llama_model(seed=2), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    for content in (adapted.state_dict(), adapted):
        refuse(folder, content, "adapter that was not merged", "lora_A", "merge_and_unload")
    merged = adapted.merge_and_unload()
    donor = Donor.from_pt(saved(folder / "merged.pt", merged.state_dict()), folder / "source", layers=CHOSEN)
    assert torch.equal(
        donor.tensors()["layers.0.self_attn.q_proj.weight"], merged.model.layers[1].self_attn.q_proj.weight
    )


def test_layers_in_two_places_with_different_weights_are_refused(model: Any, folder: Path) -> None:
    other = {number: {name: t + 1 for name, t in state.items()} for number, state in states_of(model).items()}
    refuse(folder, {"best": states_of(model), "last": other}, "layers in several places", "best (layers 1, 2)", "last")
    refuse(folder, {"a": states_of(model), "b": states_of(tiny_llama_model(seed=3))}, "a file of their own")


def test_a_missing_tensor_is_named(model: Any, folder: Path) -> None:
    refuse(
        folder,
        changed(model, lambda tensors: tensors.pop(Q)),
        "does not hold layers [1, 2] of this llama model",
        "layer 1: self_attn.q_proj.weight [32, 32] is missing",
    )


@pytest.mark.parametrize("extra", ["self_attn.q_proj.bias", "self_attn.q_norm.weight", "cross_attention.weight"])
def test_an_unknown_tensor_inside_a_layer_is_named(extra: str, model: Any, folder: Path) -> None:
    name = f"model.layers.2.{extra}"
    refuse(
        folder,
        changed(model, lambda tensors: tensors.update({name: torch.ones(32)})),
        "layers of a llama model have no such tensors",
        name,
    )
    alone = {**layers_of(model)[2].state_dict(), "self_attn.odd": torch.ones(2)}
    refuse(folder, alone, "have no such tensors", "self_attn.odd", layers=[2])


def test_a_wrong_shape_is_named_with_both(model: Any, folder: Path) -> None:
    refuse(
        folder,
        changed(model, lambda tensors: tensors.update({Q: torch.ones(32, 31)})),
        f"{Q}: found [32, 31], expected [32, 32]",
    )


def test_every_misfit_is_listed_at_once(model: Any, folder: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[Q] = torch.ones(3)
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(48, 32, dtype=torch.int8)
        del tensors["model.layers.2.input_layernorm.weight"]

    refuse(
        folder,
        changed(model, spoil),
        "found [3], expected [32, 32]",
        "found int8, expected floating-point numbers",
        "layer 2: input_layernorm.weight [32] is missing",
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype: torch.dtype, model: Any, folder: Path) -> None:
    refuse(
        folder,
        changed(model, lambda tensors: tensors.update({Q: torch.ones(32, 32).to(dtype)})),
        f"{Q}: found {str(dtype).removeprefix('torch.')}, expected floating-point numbers",
    )


def test_a_tensor_twice_in_one_layer_is_refused(model: Any, folder: Path) -> None:
    twice = Q.replace("q_proj", "q_proj.base_layer")
    refuse(
        folder,
        changed(model, lambda tensors: tensors.update({twice: torch.ones(32, 32)})),
        "layer 1: self_attn.q_proj.weight is there 2 times",
    )


@pytest.mark.parametrize(("kind", "seen"), [("gpt2", "transformer.h.1.ln_1.weight"), ("gpt_oss", "mlp.router")])
def test_another_architecture_is_refused(kind: str, seen: str, folder: Path) -> None:
    other = BUILDERS[kind](seed=2)
    refuse(folder, named(other), "llama model", "mlp.gate_proj.weight [48, 32]")
    path = saved(folder / "layers.pt", named(other))
    with refused(CheckpointError, seen) if kind == "gpt2" else refused(CheckpointError, "is missing"):
        Donor.from_pt(path, folder / "source", layers=CHOSEN)


def test_the_lists_of_tensors_stay_short(folder: Path) -> None:
    refuse(
        folder,
        tiny_gpt2_model(seed=2, n_layer=12).state_dict(),
        "holds no layers of a llama model",
        "In the file (149 tensors): transformer.wte.weight [260, 32], transformer.wpe.weight [64, 32]",
        "... and 137 more",
        "Expected for each layer: self_attn.q_proj.weight [32, 32]",
    )


def test_the_same_architecture_of_another_width_is_refused(folder: Path) -> None:
    other = tiny_llama_model(seed=2, hidden_size=64)
    refuse(folder, named(other), f"{Q}: found [64, 64], expected [32, 32]")


@pytest.mark.parametrize(
    "content",
    [{}, [], {"a": torch.ones(2)}, {"1": torch.ones(2)}, torch.ones(2), {"9" * 5000: torch.ones(2)}, nn.Linear(2, 2)],
    ids=["empty", "list", "tensor", "number", "alone", "digits", "module"],
)
def test_a_file_without_any_layer_is_refused(content: Any, folder: Path) -> None:
    path = saved(folder / "layers.pt", content)
    with refused(CheckpointError, str(path)):
        Donor.from_pt(path, folder / "source", layers=CHOSEN)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_weights_that_are_not_finite_are_not_saved(bad: float, dtype: torch.dtype, model: Any, folder: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in named(model).items()}
    tensors[Q][31, 31] = bad
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    path = saved(folder / "layers.pt", tensors)
    with refused(CheckpointError, "layers.0.self_attn.q_proj.weight", "NaN or infinity"):
        convert(path, folder / "source", folder / "donor")
    assert {entry.name for entry in folder.iterdir()} == {"source", "layers.pt"}


def test_types_that_no_layer_runs_in_are_not_verified(model: Any, folder: Path) -> None:
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in named(model).items()}
    with refused(ConfigurationError, "float8_e4m3fn", "without verifying"):
        convert(saved(folder / "layers.pt", tensors), folder / "source", folder / "donor", verify=True)
    assert not (folder / "donor").exists()


# -- Packed experts ------------------------------------------------------------------------------------------------

DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda t: t.pop(f"{DOWN}_scales"), "layer 1: mlp.experts.down_proj has only its blocks"),
        (lambda t: t.pop(f"{DOWN}_blocks"), "layer 1: mlp.experts.down_proj has only its scales"),
        (lambda t: t.update({DOWN: torch.ones(4, 64, 32)}), "mlp.experts.down_proj is there 3 times"),
        (
            lambda t: t.update({f"{DOWN}_scales": torch.ones(4, 32, 2)}),
            "down_proj_scales: found float32, expected uint8",
        ),
        (
            lambda t: t.update({f"{DOWN}_blocks": torch.ones(4, 32, 2, 8, dtype=torch.uint8)}),
            "down_proj_blocks: found [4, 32, 2, 8], expected [4, 32, 2, 16]",
        ),
    ],
)
def test_packed_experts_that_do_not_fit_are_refused(change: Callable[[Tensors], Any], fact: str, folder: Path) -> None:
    content, _ = packed(packable(folder / "source"))
    change(content)
    refuse(folder, content, fact)


def test_experts_too_narrow_to_be_packed_are_refused(folder: Path) -> None:
    content, _ = packed(packable(folder / "source"))
    tiny_gpt_oss_model(seed=2).config.save_pretrained(folder / "source")
    refuse(folder, content, f"{DOWN}_blocks: found a part of a tensor packed as MXFP4, expected all of [4, 24, 32]")


def test_packed_weights_of_other_layers_are_refused(model: Any, folder: Path) -> None:
    def pack(tensors: Tensors) -> None:
        del tensors[Q]
        tensors[f"{Q}_blocks"] = torch.ones(32, 1, 16, dtype=torch.uint8)
        tensors[f"{Q}_scales"] = torch.ones(32, 1, dtype=torch.uint8)

    refuse(folder, changed(model, pack), f"{Q}_blocks: found a part of a tensor packed as MXFP4", "[32, 32]")


# -- Damaged files -----------------------------------------------------------------------------------------------


def test_a_changed_byte_stops_the_conversion(model: Any, folder: Path) -> None:
    path = saved(folder / "layers.pt", named(model))
    data = bytearray(path.read_bytes())
    data[data.index(named(model)[Q].numpy().tobytes()[:64]) + 9] ^= 1
    path.write_bytes(data)
    with refused(CheckpointError, str(path), Q, "checksum"):
        convert(path, folder / "source", folder / "donor")
    assert {entry.name for entry in folder.iterdir()} == {"source", "layers.pt"}


def test_an_expanded_weight_is_refused(model: Any, folder: Path) -> None:
    refuse(
        folder,
        changed(model, lambda tensors: tensors.update({Q: torch.ones(1).expand(32, 32)})),
        Q,
        "claims 4096 bytes, its storage holds 4",
    )

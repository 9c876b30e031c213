"""Every way in which people save layers gives the model's own tensors, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import BUILDERS, layers_of, tiny_gpt_oss_model
from tests.pt_files.crafted import bits, saved
from tests.pt_files.trees import ALONE, CHOSEN, EXTRAS, TREES, stack_of, states_of
from transplant_hf import Donor
from transplant_hf.conversion import convert

KINDS = pytest.mark.parametrize("kind", sorted(BUILDERS))
FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
KINDS_AND_FORMATS = pytest.mark.parametrize(("kind", "legacy"), [("gpt2", False), ("gpt_oss", False), ("llama", True)])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """For each architecture a model, and a folder with its configuration alone."""
    made = {}
    for kind, build in BUILDERS.items():
        folder = tmp_path_factory.mktemp(kind)
        model = build(seed=2)
        model.config.save_pretrained(folder)
        made[kind] = (model, folder)
    return made


def tensors_of(model: Any, layers: tuple[int, ...]) -> dict[str, Any]:
    """What a donor of these layers must hold."""
    return {
        f"layers.{place}.{name}": bits(tensor)
        for place, number in enumerate(layers)
        for name, tensor in layers_of(model)[number].state_dict().items()
    }


def found(donor: Donor) -> dict[str, Any]:
    return {name: bits(tensor) for name, tensor in donor.tensors().items()}


@KINDS_AND_FORMATS
@pytest.mark.parametrize("tree", sorted(TREES))
def test_every_layout_gives_the_models_own_tensors(
    tree: str, kind: str, legacy: bool, sources: Mapping[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = sources[kind]
    path = saved(tmp_path / "layers.pt", TREES[tree](model), legacy)
    donor = Donor.from_pt(path, folder, layers=CHOSEN)
    assert donor.layer_indices == list(CHOSEN)
    assert donor.model_type == kind
    assert found(donor) == tensors_of(model, CHOSEN)
    assert {name: (info.shape, info.dtype) for name, info in donor.infos().items()} == {
        name: (info.shape, info.dtype) for name, info in Donor.from_model(model, list(CHOSEN)).infos().items()
    }


@KINDS_AND_FORMATS
@pytest.mark.parametrize("tree", sorted(ALONE))
def test_one_layer_needs_no_number(
    tree: str, kind: str, legacy: bool, sources: Mapping[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = sources[kind]
    donor = Donor.from_pt(saved(tmp_path / "layer.pt", ALONE[tree](model), legacy), folder, layers=[2])
    assert donor.layer_indices == [2]
    assert found(donor) == tensors_of(model, (2,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
@KINDS
def test_the_type_of_the_weights_stays(
    kind: str, dtype: torch.dtype, sources: Mapping[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = sources[kind]
    layers = [{name: t.to(dtype) for name, t in state.items()} for state in states_of(model).values()]
    path = saved(tmp_path / "layers.pt", layers)
    wanted = {f"layers.{n}.{name}": bits(tensor) for n, state in enumerate(layers) for name, tensor in state.items()}
    assert found(Donor.from_pt(path, folder, layers=CHOSEN)) == wanted
    convert(path, folder, tmp_path / "donor", layers=CHOSEN, max_shard_size="5KB")
    assert found(Donor.from_pretrained(tmp_path / "donor")) == wanted
    assert len([*(tmp_path / "donor").glob("donor-*.safetensors")]) > 1


@KINDS
@pytest.mark.parametrize("numbered", [True, False], ids=["numbered", "from 0"])
def test_what_is_not_part_of_the_layers_is_left_out_and_listed(
    kind: str, numbered: bool, sources: Mapping[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = sources[kind]
    content: dict[str, torch.Tensor] = {}
    for place, number in enumerate(CHOSEN):
        layer = f"{stack_of(model)}.{number}" if numbered else f"model_0.layers.{place}"
        content |= {f"{layer}.{name}": tensor for name, tensor in states_of(model)[number].items()}
        content |= {f"{layer}{name}": tensor for name, tensor in EXTRAS[kind].items() if name.startswith(".")}
    kept = {name for name in content if not any(name.endswith(extra) for extra in EXTRAS[kind])}
    content |= {name: tensor for name, tensor in EXTRAS[kind].items() if not name.startswith(".")}
    path = saved(tmp_path / "layers.pt", content)
    assert found(Donor.from_pt(path, folder, layers=CHOSEN)) == tensors_of(model, CHOSEN)
    done = convert(path, folder, tmp_path / "donor", layers=CHOSEN)
    assert set(done.dropped) == set(content) - kept
    assert done.prefix == (stack_of(model) if numbered else "model_0.layers")
    assert f"left out, not part of these layers: {len(done.dropped)} tensors" in str(done)


def test_two_layers_of_several_are_taken_by_their_numbers(
    sources: Mapping[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = sources["llama"]
    content = {number: layers_of(model)[number].state_dict() for number in (1, 2, 3)}
    path = saved(tmp_path / "layers.pt", content)
    done = convert(path, folder, tmp_path / "donor", layers=[2, 3])
    assert found(Donor.from_pretrained(tmp_path / "donor")) == tensors_of(model, (2, 3))
    assert len(done.dropped) == len(layers_of(model)[1].state_dict())
    assert found(Donor.from_pt(path, folder)) == tensors_of(model, (1, 2, 3))


@pytest.mark.parametrize("order", [(2, 1), (1, 2)])
def test_the_order_in_the_file_does_not_matter(
    order: tuple[int, ...], sources: Mapping[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = sources["gpt2"]
    states = states_of(model)
    path = saved(tmp_path / "layers.pt", {f"layer_{number}": states[number] for number in order})
    assert found(Donor.from_pt(path, folder)) == tensors_of(model, (1, 2))


def test_more_than_nine_layers_keep_their_order(tmp_path: Path) -> None:
    model = BUILDERS["llama"](seed=2, num_hidden_layers=14)
    model.config.save_pretrained(tmp_path)
    path = saved(tmp_path / "layers.pt", {f"h{n}": layers_of(model)[n].state_dict() for n in range(1, 13)})
    donor = Donor.from_pt(path, tmp_path)
    assert donor.layer_indices == list(range(1, 13))
    assert found(donor) == tensors_of(model, tuple(range(1, 13)))


# -- MXFP4 -------------------------------------------------------------------------------------------------------


def packed(model: Any, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Full names of the chosen layers with their experts packed, and what the packed ones mean."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(seed)
    content: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for place, (number, state) in enumerate(states_of(model).items()):
        for name, tensor in state.items():
            full = f"model.layers.{number}.{name}"
            if name not in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
                content[full] = meant[f"layers.{place}.{name}"] = tensor.to(torch.bfloat16)
                continue
            experts, inner, out = tensor.shape
            blocks = torch.randint(0, 256, (experts, out, inner // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(118, 126, (experts, out, inner // 32), dtype=torch.uint8, generator=generator)
            content[f"{full}_blocks"], content[f"{full}_scales"] = blocks, scales
            meant[f"layers.{place}.{name}"] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    return content, meant


def packable(folder: Path) -> Any:
    """A GPT-OSS model whose sizes can be packed: 32 values share a scale."""
    model = tiny_gpt_oss_model(seed=2, intermediate_size=64)
    model.config.save_pretrained(folder)
    return model


@FORMATS
def test_packed_experts_become_what_transformers_makes_of_them(legacy: bool, tmp_path: Path) -> None:
    content, meant = packed(packable(tmp_path))
    path = saved(tmp_path / "layers.pt", content, legacy)
    wanted = {name: bits(tensor) for name, tensor in meant.items()}
    donor = Donor.from_pt(path, tmp_path)
    assert found(donor) == wanted
    part = donor.store.slices()["layers.0.mlp.experts.down_proj"]
    assert bits(part[1:3]) == bits(meant["layers.0.mlp.experts.down_proj"][1:3])
    done = convert(path, tmp_path, tmp_path / "donor", verify=True)
    assert found(Donor.from_pretrained(tmp_path / "donor")) == wanted
    assert done.dropped == ()
    assert done.verified

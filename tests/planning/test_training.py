"""The memory of a training run: sums by hand, and tensors that a step on a CPU really keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import BUILDERS, NUM_LAYERS, plain, refused, tiny_llama_model
from transplant_hf import ConfigurationError, DonorTrainer, DonorTrainingArguments
from transplant_hf.planning import TrainingCost, plan
from transplant_hf.planning.training import LiveBytes, OrdinaryText
from transplant_hf.texts import Blocks

TOKENS = 16


def arguments(folder: Path, **changes: Any) -> DonorTrainingArguments:
    fields: dict[str, Any] = {
        "donor_layers": 1,
        "block_length": TOKENS,
        "per_device_train_batch_size": 2,
        "optim": "adamw_torch",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DonorTrainingArguments(str(folder / "run"), **{**fields, **changes})


def planned(family: Path, folder: Path, blocks: int | None = None, dtype: str = "auto", **changes: Any) -> TrainingCost:
    found = plan(family / "recipient", train=arguments(folder, **changes), blocks=blocks, dtype=dtype).training
    assert found is not None
    return found


def bytes_of(*modules: nn.Module) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def test_weights_gradients_and_hidden_states(tiny_llama: Path, tmp_path: Path) -> None:
    model = plain(tiny_llama / "recipient")
    layers = model.model.layers
    found = planned(tiny_llama, tmp_path, blocks=10)  # before the last layer
    assert (found.before, found.donor, found.after) == (
        bytes_of(*layers[:-1]),
        bytes_of(layers[0]),
        bytes_of(layers[-1]),
    )
    assert found.rest == model.get_memory_footprint() - bytes_of(*layers)
    assert (found.gradients, found.optimizer_state) == (found.donor, 2 * found.donor)
    assert found.states == 10 * TOKENS * model.config.hidden_size * 4
    assert (found.disk, found.streamed_disk) == (0, 2 * found.states)
    assert found.largest_layer == bytes_of(layers[0])
    assert found.resident is not None and found.streamed is not None
    assert found.resident > found.streamed
    assert planned(tiny_llama, tmp_path, max_steps=5).states == found.states


def test_half_precision_takes_half(tiny_llama: Path, tmp_path: Path) -> None:
    whole = planned(tiny_llama, tmp_path, blocks=10)
    half = planned(tiny_llama, tmp_path, blocks=10, dtype="bfloat16")
    for name in ("before", "donor", "after", "gradients", "optimizer_state", "states"):
        assert getattr(whole, name) == 2 * getattr(half, name)


def test_a_spread_donor(tiny_llama: Path, tmp_path: Path) -> None:
    found = planned(tiny_llama, tmp_path, donor_layers=2, position=(1, 3))
    layer = bytes_of(plain(tiny_llama / "recipient").model.layers[0])
    assert (found.before, found.donor, found.after) == (layer, 2 * layer, (NUM_LAYERS - 1) * layer)


def test_the_default_positions_are_those_of_train(tmp_path: Path) -> None:
    (tmp_path / "deep" / "recipient").mkdir(parents=True)
    tiny_llama_model(0, num_hidden_layers=12).save_pretrained(tmp_path / "deep" / "recipient")
    before = [planned(tmp_path / "deep", tmp_path, donor_layers=3, **more) for more in ({}, {"stream_prefix": True})]
    assert [11 * found.before // before[1].before for found in before] == [4, 11]


def test_a_donor_that_replaces_layers(tiny_llama: Path, tmp_path: Path) -> None:
    found = planned(tiny_llama, tmp_path, donor_layers=2, mode="replace")
    layer = bytes_of(plain(tiny_llama / "recipient").model.layers[0])
    assert (found.before, found.donor, found.after) == ((NUM_LAYERS - 2) * layer, 2 * layer, 0)


def test_nothing_before_the_donor(tiny_llama: Path, tmp_path: Path) -> None:
    found = planned(tiny_llama, tmp_path, position=0, blocks=10)
    assert (found.before, found.states, found.streamed, found.compared) == (0, 0, None, 0)
    assert "streamed" not in str(found)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_optimizer_state_is_that_of_a_run(tiny_llama: Path, tmp_path: Path, optimizer: str) -> None:
    model = plain(tiny_llama / "recipient")
    blocks = Blocks(torch.randint(0, model.config.vocab_size, (4, TOKENS)), name="noise")
    trainer = DonorTrainer(model, arguments(tmp_path, optim=optimizer, max_steps=1), blocks)
    trainer.train()
    state = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    kept = sum(value.nbytes for value in state if isinstance(value, torch.Tensor) and value.dim() > 0)
    assert planned(tiny_llama, tmp_path, optim=optimizer).optimizer_state == kept


def test_optimizers_in_8_bits(tiny_llama: Path, tmp_path: Path) -> None:
    layer = plain(tiny_llama / "recipient").model.layers[0]
    expected = sum(4 * p.numel() if p.numel() < 4096 else p.numel() + p.numel() // 64 for p in layer.parameters())
    assert planned(tiny_llama, tmp_path, optim="adamw_8bit").optimizer_state == 2 * expected


def test_what_autograd_keeps_is_counted(tiny: Path, tmp_path: Path) -> None:
    """A donor's step holds what its layers save, and with checkpointing less."""
    found = planned(tiny, tmp_path, donor_layers=3, position=1, block_length=64, per_device_train_batch_size=8)
    less = planned(
        tiny,
        tmp_path,
        donor_layers=3,
        position=1,
        block_length=64,
        per_device_train_batch_size=8,
        gradient_checkpointing=True,
    )
    assert found.activations is not None and less.activations is not None, found.notes + less.notes
    assert less.activations < found.activations


@pytest.mark.parametrize("kind", sorted(BUILDERS))
def test_live_bytes_on_the_meta_device_are_those_on_a_cpu(kind: str) -> None:
    """Without fused attention, whose CPU kernel allocates what the meta device does not."""
    peaks = []
    for device in ("meta", "cpu"):
        model = BUILDERS[kind](seed=1).eval().to(device)
        model.set_attn_implementation("eager")
        if kind == "gpt_oss":
            model.set_experts_implementation("batched_mm")
        model.config.pad_token_id = None
        ids = torch.zeros(2, TOKENS, dtype=torch.long, device=device)
        with LiveBytes([*model.parameters(), *model.buffers()]) as memory, OrdinaryText():
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        peaks.append(memory.peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.03)


def test_live_bytes_are_released() -> None:
    known = torch.empty(4, 4, device="meta")
    with LiveBytes([known]) as memory:
        view = known.t()
        first = known + 1
        del first
        second = known * 2
    assert (memory.peak, memory.live) == (64, 64)
    assert view.shape == second.shape


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"optim": "galore_adamw"}, "optim='galore_adamw'"),
        ({"distillation": 0.5}, "distillation"),
        ({"bf16": True}, "bf16"),
        ({"method": "standalone"}, "method"),
    ],
)
def test_what_is_not_known_is_refused(tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], fact: str) -> None:
    with refused(ConfigurationError, fact):
        planned(tiny_llama, tmp_path, **changes)


def test_arguments_that_are_set_twice(tiny_llama: Path, tmp_path: Path) -> None:
    for given in ({"count": 2}, {"position": 1}, {"batch_size": 3}, {"context": 4}):
        with refused(ConfigurationError, next(iter(given)), "arguments of the training run"):
            plan(tiny_llama / "recipient", train=arguments(tmp_path), **given)

"""Several processes train one donor: DDP and FSDP2, stopped and resumed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.helpers import refused, write_tokenizer
from tests.training.helpers import arguments, recipient, trainer
from transplant_hf import ConfigurationError
from transplant_hf.training.checkpoints import check_sharding

_SCRIPT = """
import json, sys
from pathlib import Path
import accelerate.state
import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback
from tests.training.helpers import losses, noise, recipient, trainer

torch.set_num_threads(1)
folder, run = Path(sys.argv[1]), sys.argv[2]
fields = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, **json.loads(sys.argv[3])}
if "fsdp" in fields:
    prepare = accelerate.state.AcceleratorState.__init__

    def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        # Accelerate uses FSDP on accelerators only; torch can do it on CPUs.
        prepare(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = with_plugin


class StopAt5(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


model = recipient() if "stream_prefix" not in fields else folder / "recipient"
texts = {"replay_dataset": noise(seed=2, name="general"), "eval_dataset": noise(seed=1)}
made = trainer(folder, model, **texts, **{"position": 3, **fields})
assert made.is_fsdp_enabled == ("fsdp" in fields)
if run == "stop":
    made.add_callback(StopAt5())
try:
    made.train(resume_from_checkpoint=run == "resume")
except KeyboardInterrupt:
    assert run == "stop"
else:
    loss = made.evaluate()["eval_loss"]
    made.save_donor(folder / "donor", recipient="recipient")
    if made.is_world_process_zero():
        (folder / "losses.json").write_text(json.dumps([*losses(made), loss]))
"""
_FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
_needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


def _zero(stage: int) -> dict[str, Any]:
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    return {**config, **dict.fromkeys(sizes, "auto")}


def _run(folder: Path, run: str = "whole", processes: int = 2, **fields: Any) -> list[float]:
    """Train in several processes; returns the losses of the steps and of an evaluation after them."""
    folder.mkdir(exist_ok=True)
    if "stream_prefix" in fields:
        recipient().save_pretrained(folder / "recipient")
        write_tokenizer(folder / "recipient")
    script = folder / "script.py"
    script.write_text(_SCRIPT)
    # Accelerate starts several processes on CPUs only through MPI; with this flag it starts them itself.
    words = ["--multi_gpu"] if processes > 1 else ["--cpu"]
    words += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", "--main_process_port", "0"]
    fields |= {"ddp_backend": "gloo"} if processes > 1 else {}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words, script, folder, run, json.dumps(fields)],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [] if run == "stop" else json.loads((folder / "losses.json").read_text())


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    one = _run(tmp_path / "one", processes=1, per_device_train_batch_size=4)
    assert len(one) == 9
    two = _run(tmp_path / "two", prefix_cache_dir=str(tmp_path / "states"))
    assert two == pytest.approx(one, rel=1e-4)
    assert len(list((tmp_path / "states").iterdir())) == 2, "each process computes its share of the hidden states"
    assert _run(tmp_path / "streamed", stream_prefix=True) == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"loss_chunk": 7},
        _FSDP,
        {"mode": "replace", "position": 2, "strength": 0.5, **_FSDP},
        {"distillation": 2.0, "gradient_checkpointing": True, **_FSDP},
        pytest.param({"deepspeed": _zero(2)}, marks=_needs_deepspeed),
    ],
)
def test_several_processes_resume_with_the_weights_of_a_run_that_was_never_stopped(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    ways = ("fsdp", "fsdp_config", "deepspeed", "loss_chunk")  # with none of them, DDP
    whole = _run(tmp_path / "whole", **{name: value for name, value in fields.items() if name not in ways})
    _run(tmp_path / "run", "stop", **fields)
    assert not (tmp_path / "run" / "checkpoint-4" / "pytorch_model_fsdp.bin").exists(), "the whole model was gathered"
    assert _run(tmp_path / "run", "resume", **fields) == pytest.approx(whole, rel=1e-5)
    donors = [load_file(tmp_path / name / "donor" / "donor.safetensors") for name in ("whole", "run")]
    assert donors[0].keys() == donors[1].keys()
    for name, tensor in donors[0].items():
        # Adam divides small gradients by themselves, so that the order of sums is seen.
        torch.testing.assert_close(donors[1][name], tensor, rtol=1e-5, atol=1e-4 if "loss_chunk" in fields else 1e-6)


@_needs_deepspeed
def test_zero_3_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with refused(ConfigurationError, "ZeRO-3 divides a model's weights", "stage 2", "FSDP2"):
        arguments(tmp_path, deepspeed=_zero(3))


def test_a_recipient_that_is_divided_already_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = recipient()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with refused(ConfigurationError, "divided over processes already", "train with fsdp=True"):
            trainer(tmp_path, model)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"fsdp_version": 1}, 'fsdp_config={"version": 2}'),
        ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading"),
    ],
)
def test_ways_of_sharding_that_are_refused(config: dict[str, Any], told: str) -> None:
    plugin = types.SimpleNamespace(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False, **config})
    state = types.SimpleNamespace(fsdp_plugin=plugin)
    with refused(ConfigurationError, told):
        check_sharding(types.SimpleNamespace(accelerator=types.SimpleNamespace(state=state)))

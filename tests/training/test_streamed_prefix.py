"""A donor for a model whose layers before it stay in their files: the same donor, each layer read once."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests.faults.test_disk_full import fill
from tests.helpers import BUILDERS, TOKENS, copied, logits_of, randomised, refused, run_python, write_tokenizer
from tests.training.helpers import losses, noise, recipient, trainer
from transplant_hf import AutoModelWithTransplant, CheckpointError, CompatibilityError, ConfigurationError, DataError
from transplant_hf.model.layers_in_files import LayersInFiles
from transplant_hf.partial.cache import StateFiles
from transplant_hf.training import DonorTrainer, train

LAYERS = 4
_SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **TOKENS,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}


def gemma3(seed: int = 1) -> PreTrainedModel:
    """Sliding attention over 4 tokens, and one layer of full attention."""
    return randomised(Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES, head_dim=8, sliding_window=4)), seed)


def mixtral(seed: int = 1) -> PreTrainedModel:
    """Experts, one tensor each in the checkpoint."""
    return randomised(MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4)), seed)


def qwen3_moe(seed: int = 1) -> PreTrainedModel:
    """Dense and expert layers in turn."""
    return randomised(Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, **_EXPERTS, mlp_only_layers=[2])), seed)


def qwen3_next(seed: int = 1) -> PreTrainedModel:
    """Linear attention, and one layer of full attention."""
    more = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    made = Qwen3NextConfig(**_SIZES, **_EXPERTS, **more, shared_expert_intermediate_size=24)
    return randomised(Qwen3NextForCausalLM(made), seed)


KINDS: dict[str, Callable[..., PreTrainedModel]] = {
    **BUILDERS,
    "gemma3": gemma3,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama in three files."""
    saved(recipient(), tmp_path / "recipient", max_shard_size="70KB")
    assert len(list((tmp_path / "recipient").glob("*.safetensors"))) >= 3
    return tmp_path / "recipient"


def saved(model: Any, folder: Path, **kwargs: Any) -> Path:
    model.save_pretrained(folder, **kwargs)
    write_tokenizer(folder)
    return folder


def streamed(out: Path, folder: Path, **fields: Any) -> DonorTrainer:
    return trainer(out, folder, **{"stream_prefix": True, "donor_layers": 1, "max_steps": 4, **fields})


def held(made: DonorTrainer) -> LayersInFiles:
    found = made.model._layers_in_files
    assert isinstance(found, LayersInFiles)
    return found


def same_donors(one: DonorTrainer, other: DonorTrainer) -> bool:
    ours, theirs = one.donor.tensors(), other.donor.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def prefix_bytes(folder: Path, count: int) -> int:
    model = AutoModelForCausalLM.from_pretrained(folder)
    stack = next(module for name, module in model.named_modules() if name.endswith(("layers", ".h")))
    return sum(tensor.nbytes for number in range(count) for tensor in stack[number].state_dict().values())


# The other tests of this file have Llamas, and models with experts in every layer are beside it.
MORE = ("llama", "qwen3_moe")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in MORE else ()) for kind in sorted(KINDS)]
)
def test_the_same_donor_and_each_layer_read_once(kind: str, tmp_path: Path) -> None:
    folder = saved(KINDS[kind](seed=1), tmp_path / "recipient")
    held_out = {"one": noise(6, seed=1), "two": noise(3, 8, seed=2)}
    how: dict[str, Any] = {"replay_dataset": noise(seed=3), "eval_dataset": held_out, "eval_strategy": "epoch"}
    made = {}
    for stream in (True, False):
        made[stream] = streamed(tmp_path / str(stream), folder, stream_prefix=stream, **how)
        made[stream].train()
    assert made[True].position == LAYERS - 1
    assert same_donors(made[True], made[False])
    assert losses(made[True]) == losses(made[False])
    assert held(made[True]).absent == [0, 1, 2]
    assert held(made[True]).bytes_read == prefix_bytes(folder, LAYERS - 1)
    measured = [made[stream].evaluate()["eval_two_loss"] for stream in (True, False)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-6)
    made[True].save_donor(tmp_path / "donor")
    with_donor = AutoModelWithTransplant.from_pretrained(tmp_path / "donor")
    made[False].finish()
    assert torch.allclose(logits_of(with_donor), logits_of(made[False].model.eval()), atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"position": 2, "donor_layers": 2, "gradient_checkpointing": True},
        {"position": LAYERS, "bf16": True},
        {"position": (1, 3), "donor_layers": 2},
        {"mode": "replace"},
        {"init": "copy", "start_layers": [0], "donor_layers": 1, "cache_prefix": "memory"},
        {"distillation": 1.0},
    ],
    ids=str,
)
def test_kinds_of_training(fields: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    made = [streamed(tmp_path / str(stream), folder, stream_prefix=stream, **fields) for stream in (True, False)]
    for one in made:
        one.train()
    assert same_donors(*made)
    assert not (tmp_path / "True" / "prefix-cache").exists()


def test_the_command_measures_before_and_after(folder: Path, tmp_path: Path) -> None:
    reports = {}
    for stream in (True, False):
        for position in (3, LAYERS):
            how: dict[str, Any] = {"position": position, "max_steps": 4, "donor_layers": 1, "use_cpu": True}
            reports[stream, position] = train(
                folder, noise(), tmp_path / f"out-{stream}-{position}", held_out=noise(6, seed=1, name="held"),
                stream_prefix=stream, disable_tqdm=True, **how,
            )  # fmt: skip
    for position in (3, LAYERS):
        one, other = reports[True, position], reports[False, position]
        assert dict(one.perplexity) == pytest.approx(dict(other.perplexity), rel=1e-5)
        assert set(one.perplexity) == {"recipient", "with donor"}
        assert not (tmp_path / f"out-True-{position}.training").exists()


def test_files_of_torch(tmp_path: Path) -> None:
    model = recipient()
    folder = saved(model, tmp_path / "recipient")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    made = [streamed(tmp_path / str(stream), folder, stream_prefix=stream) for stream in (True, False)]
    for one in made:
        one.train()
    assert same_donors(*made)


def test_beside_another_donor(tiny_llama: Path, tmp_path: Path) -> None:
    family = copied(tiny_llama, tmp_path / "family")
    model = AutoModelWithTransplant.from_pretrained(family / "donor")
    model.set_strength("donor", 0.5)  # its two layers run together
    model.save_pretrained(family / "thin", thin=True)
    made = [streamed(tmp_path / str(stream), family / "thin", stream_prefix=stream) for stream in (True, False)]
    for number, one in enumerate(made):
        one.train()
        one.save(tmp_path / f"saved-{number}")
    assert same_donors(*made)
    assert len(held(made[0]).absent) == 5
    loaded = [AutoModelWithTransplant.from_pretrained(tmp_path / f"saved-{number}") for number in range(2)]
    assert torch.equal(*map(logits_of, loaded))


# -- What is left out, and said --------------------------------------------------------------------------------------


def test_layers_without_weights_are_not_run_or_saved(folder: Path, tmp_path: Path) -> None:
    made = streamed(tmp_path / "out", folder, max_steps=2)
    made.train()
    with refused(ConfigurationError, "stayed in its files"):
        made.model(input_ids=torch.ones(1, 4, dtype=torch.long))
    with refused(ConfigurationError, "save_pretrained needs all weights", "layers 0..2"):
        made.model.save_pretrained(tmp_path / "full")
    with refused(DataError, "hidden states of this text were not computed", "--held-out"):
        made.evaluate(noise(4, seed=5))


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"position": 0}, ("no layer runs before position 0", "nothing to stream")),
        ({"method": "standalone"}, ("between the embeddings and the head",)),
        ({"cache_prefix": "off"}, ('cache_prefix="off"',)),
    ],
)
def test_nothing_to_stream(fields: dict[str, Any], facts: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    with refused(ConfigurationError, "--stream-prefix", *facts):
        streamed(tmp_path / "out", folder, **fields)
    trainer(tmp_path / "out", folder, **fields)


def test_a_loaded_recipient_is_not_streamed(tmp_path: Path) -> None:
    with refused(ConfigurationError, "in memory already", "folder or Hub id"):
        trainer(tmp_path / "out", recipient(), stream_prefix=True)


def test_automatic_where_memory_is_short(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    assert trainer(tmp_path / "one", folder).model._layers_in_files is None
    monkeypatch.setattr("transplant_hf.training.prefix._free_memory", lambda device: 100_000)
    made = trainer(tmp_path / "two", folder)
    assert held(made).count == 3
    assert any("97.7 KiB are free" in line and "stream_prefix" in line for line in warned)


# -- Faults ------------------------------------------------------------------------------------------------------------


def test_a_disk_without_room(folder: Path, tmp_path: Path, small_disk: Path) -> None:
    text = noise(400, 16)
    made = streamed(tmp_path / "out", folder, train_dataset=text, max_steps=100, prefix_cache_dir=str(small_disk / "c"))
    needed = 2 * len(made.rows.used) * 16 * 32 * 4
    with refused(ConfigurationError, f"{needed:,} bytes", "--prefix-cache-dir"):
        made.train()
    assert held(made).absent == [0, 1, 2]
    assert not (small_disk / "c").exists()


def test_a_disk_that_fills_up(folder: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, cache = noise(200, 16), str(small_disk / "c")
    made = streamed(tmp_path / "out", folder, train_dataset=text, max_steps=40, prefix_cache_dir=cache)
    monkeypatch.setattr(LayersInFiles, "load", then(LayersInFiles.load, 1, lambda: fill(small_disk, 8192)))
    with refused(CheckpointError, "disk is full", "goes on from there"):
        made.train()
    monkeypatch.undo()
    (small_disk / "filler").unlink()
    again = streamed(tmp_path / "out", folder, train_dataset=text, max_steps=40, prefix_cache_dir=cache)
    again.train()
    plain = streamed(tmp_path / "plain", folder, train_dataset=text, max_steps=40, stream_prefix=False)
    plain.train()
    assert same_donors(again, plain)


def then(method: Any, layer: int, action: Callable[[], Any]) -> Any:
    """A method that acts before one layer is read."""

    def changed(self: Any, number: int, *args: Any) -> Any:
        if number == layer and number not in self._loaded:
            action()
        return method(self, number, *args)

    return changed


def shard_of(folder: Path, layer: int) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / index[f"model.layers.{layer}.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda path: path.unlink(), ("is missing now",)),
        (lambda path: shutil.copy(path, f"{path}.new") and os.replace(f"{path}.new", path), ("changed",)),
    ],
    ids=["missing", "changed"],
)  # fmt: skip
def test_a_file_that_is_gone_or_another(
    change: Any, facts: tuple[str, ...], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = streamed(tmp_path / "out", folder)
    path = shard_of(folder, 1)
    monkeypatch.setattr(LayersInFiles, "load", then(LayersInFiles.load, 1, lambda: change(path)))
    with refused(CheckpointError, str(path), *facts):
        made.train()
    assert held(made).absent == [0, 1, 2]


@pytest.mark.parametrize("layer", [0, 1])
def test_stopped_at_a_layer_and_continued(
    layer: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = streamed(tmp_path / "out", folder)
    monkeypatch.setattr("transplant_hf.partial.cache.StateFiles.finish", stopping_after(layer))
    with pytest.raises(KeyboardInterrupt):
        made.train()
    monkeypatch.undo()
    again = streamed(tmp_path / "out", folder)
    before = held(again).bytes_read
    again.train()
    assert held(again).bytes_read - before < prefix_bytes(folder, 3 - layer)
    plain = streamed(tmp_path / "plain", folder, stream_prefix=False)
    plain.train()
    assert same_donors(again, plain)
    assert not (tmp_path / "out" / "prefix-cache").exists()


def stopping_after(layer: int) -> Any:
    finish = StateFiles.finish

    def finished(self: Any, layers: int) -> None:
        if layers == layer + 2:
            raise KeyboardInterrupt
        finish(self, layers)

    return finished


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.test_streamed_prefix import StateFiles, streamed
finish = StateFiles.finish
StateFiles.finish = lambda self, layers: (finish(self, layers), layers == 2 and os.kill(os.getpid(), signal.SIGKILL))
streamed(Path(sys.argv[2]), Path(sys.argv[1])).train()
"""


@pytest.mark.slow
def test_killed_after_a_layer_and_continued(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit status -9"):
        run_python(KILLED, folder, tmp_path / "out")
    again = streamed(tmp_path / "out", folder)
    again.train()
    assert held(again).bytes_read == prefix_bytes(folder, 1)  # the layer that the donor starts from, and the last one
    plain = streamed(tmp_path / "plain", folder, stream_prefix=False)
    plain.train()
    assert same_donors(again, plain)


def test_a_kept_cache_needs_no_layer(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    made = streamed(tmp_path / "one", folder, prefix_cache_dir=str(cache))
    made.train()
    again = streamed(tmp_path / "two", folder, prefix_cache_dir=str(cache), learning_rate=2e-3)
    start = held(again).bytes_read  # the layer that the donor starts from
    again.train()
    assert held(again).bytes_read == start
    other = streamed(tmp_path / "three", folder, prefix_cache_dir=str(cache), train_dataset=noise(seed=4))
    other.train()
    assert len(list(cache.iterdir())) == 2


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))


def change_embeddings(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.embed_tokens.weight.data.mul_(2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    path = folder / index["model.embed_tokens.weight"]
    save_file({name: model.state_dict()[name] for name, file in index.items() if file == path.name}, path)


def change_torch_file(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    torch.save({name: tensor * 1.5 for name, tensor in torch.load(path).items()}, path)


@pytest.mark.parametrize("change", [change_config, change_embeddings, change_torch_file])
def test_a_kept_cache_of_another_recipient_is_not_used(
    change: Callable[[Path], None], folder: Path, tmp_path: Path
) -> None:
    if change is change_torch_file:
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
        torch.save(recipient().state_dict(), folder / "pytorch_model.bin")
    streamed(tmp_path / "one", folder, prefix_cache_dir=str(tmp_path / "cache")).train()
    change(folder)
    made = [
        streamed(tmp_path / f"two-{number}", folder, prefix_cache_dir=str(tmp_path / name))
        for number, name in enumerate(("cache", "new"))
    ]
    for one in made:
        one.train()
    assert same_donors(*made)


def test_a_disk_needs_room_only_for_what_is_missing(folder: Path, tmp_path: Path, small_disk: Path) -> None:
    how: dict[str, Any] = {"train_dataset": noise(160), "max_steps": 40, "prefix_cache_dir": str(small_disk)}
    streamed(tmp_path / "one", folder, **how).train()
    (kept,) = small_disk.iterdir()
    states = kept / "text-0.3.states"
    fill(small_disk, 8192)
    streamed(tmp_path / "two", folder, **how).train()
    (small_disk / "filler").unlink()
    # Killed after layer 2, before it removed the states after layer 1.
    shutil.copy(states, kept / "text-0.1.states")
    states.rename(kept / "text-0.2.states")
    fill(small_disk, 8192)
    streamed(tmp_path / "three", folder, **how).train()
    assert [path.name for path in kept.iterdir()] == [states.name]


def test_two_runs_share_a_folder(folder: Path, tmp_path: Path, warned: list[str]) -> None:
    made = [streamed(tmp_path / str(n), folder, prefix_cache_dir=str(tmp_path / "cache")) for n in range(2)]
    threads = [threading.Thread(target=one.train) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same_donors(*made)
    read = sorted(held(one).bytes_read for one in made)
    assert read[1] == prefix_bytes(folder, 3) and read[0] == read[1] // 3


def test_layers_that_need_more_than_the_hidden_state(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = streamed(tmp_path / "out", folder)
    layers, seen = made.model.model.layers, dict[str, bool]()
    made.model.register_forward_pre_hook(lambda module, args: seen.clear())
    layers[0].mlp.register_forward_hook(lambda module, args, output: seen.__setitem__("ran", True))
    layers[1].mlp.register_forward_hook(lambda module, args, output: output * (1 + seen.get("ran", False)))
    with refused(CompatibilityError, "layer 1 of LlamaForCausalLM needs more than the hidden state", "stream_prefix"):
        made.train()

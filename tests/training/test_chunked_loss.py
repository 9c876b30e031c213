"""The loss in chunks of tokens: the same loss and gradients as the model's own, or the model's own."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.helpers import TOKENS, randomised, refused
from tests.training.helpers import losses, noise, recipient, trainer
from transplant_hf import ConfigurationError
from transplant_hf.training.chunked_loss import ChunkedLoss, check_liger, reason_against

_SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **TOKENS,
}


def _gemma2() -> Any:
    return randomised(Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=3.0, head_dim=8, **_SHAPE)), 1)


MODELS = {
    "llama": recipient,
    "gpt2": lambda: recipient("gpt2", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "gpt_oss": lambda: recipient("gpt_oss"),
    "gemma2": _gemma2,
    "granite": lambda: randomised(GraniteForCausalLM(GraniteConfig(logits_scaling=3.0, **_SHAPE)), 1),
    "cohere": lambda: randomised(CohereForCausalLM(CohereConfig(logit_scale=0.3, **_SHAPE)), 1),
}


def _step(made: Any, **inputs: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of one batch, as `Trainer` computes them."""
    made.model.train()
    made.model.zero_grad()
    count = inputs.pop("count", None)
    loss = made.compute_loss(made.model, inputs, num_items_in_batch=count)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "count"), [("llama", None), *((name, 50) for name in sorted(MODELS))])
def test_loss_and_gradients_are_the_models_own(name: str, count: int | None, tmp_path: Path) -> None:
    ids = noise().tokens[:3].long()
    labels = ids.clone()
    labels[0, :9] = labels[2, -1] = -100
    found = {}
    for chunk in (0, 5, 1):
        made = trainer(tmp_path, MODELS[name](), init="copy", donor_layers=1, loss_chunk=chunk)
        found[chunk] = _step(made, input_ids=ids, labels=labels, count=None if count is None else torch.tensor(count))
        assert (made._chunked is not None) == (chunk > 0)
    for chunk in (5, 1):
        assert found[chunk][0] == pytest.approx(found[0][0], rel=1e-6)
        assert found[chunk][1].keys() == found[0][1].keys()
        for parameter, gradient in found[0][1].items():
            assert torch.allclose(found[chunk][1][parameter], gradient, rtol=1e-4, atol=1e-6), parameter


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_checkpointing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"distillation": 3.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"method": "standalone"},
        {"eval_dataset": noise(seed=1), "eval_strategy": "steps", "eval_steps": 4},
        {"bf16": True},
    ],
)
def test_a_run_in_chunks_has_the_losses_of_a_run_without(fields: dict[str, Any], tmp_path: Path) -> None:
    runs = []
    for chunk in (0, 7):
        made = trainer(tmp_path / str(chunk), loss_chunk=chunk, replay_dataset=noise(seed=2, name="general"), **fields)
        made.train()
        assert (made._chunked is not None) == (chunk > 0)
        runs.append(
            [entry[name] for entry in made.state.log_history for name in ("loss", "eval_loss") if name in entry]
        )
    assert len(runs[0]) >= 8
    assert runs[1] == pytest.approx(runs[0], rel=2e-2 if "bf16" in fields else 1e-4)


def test_accumulated_batches_are_distilled_as_one_batch(tmp_path: Path) -> None:
    runs = []
    for number, accumulated in enumerate((1, 2)):
        fields = {"per_device_train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
        made = trainer(tmp_path / str(number), distillation=5.0, **fields)
        made.train()
        runs.append(losses(made))
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


def test_the_logits_of_a_batch_are_never_in_memory_together(tmp_path: Path) -> None:
    made = trainer(tmp_path, loss_chunk=6)
    most = []
    made.model.lm_head.register_forward_hook(lambda module, args, output: most.append(output.shape[:-1].numel()))
    made.train()
    assert max(most[-20:]) <= 6


def test_small_batches_have_the_models_own_loss(tmp_path: Path) -> None:
    made = trainer(tmp_path, loss_chunk=64)  # as many tokens as a batch has
    made.train()
    assert made._chunked is not None and not made._chunked_checked


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is set"),
        ({"torch_compile": True}, "torch_compile=True"),
    ],
)
def test_a_loss_of_another_kind_is_the_models_own(fields: dict[str, Any], told: str, tmp_path: Path) -> None:
    assert trainer(tmp_path, **fields)._chunked is None
    with refused(ConfigurationError, "the loss cannot be computed in chunks", told, "(--loss-chunk)"):
        trainer(tmp_path, loss_chunk=5, **fields)


def test_a_model_that_adds_to_its_loss_keeps_it(tmp_path: Path) -> None:
    shape = {**_SHAPE, "num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    model = randomised(MixtralForCausalLM(MixtralConfig(**shape)), 1)
    with refused(ConfigurationError, "the model's own loss differs from it"):
        trainer(tmp_path, model, loss_chunk=5).train()
    ids = noise().tokens[:3].long()
    chunked = ChunkedLoss(model, 5, torch.no_grad)
    assert "loss differs" in str(chunked.difference(model, {"input_ids": ids, "labels": ids}))


def test_a_trained_head_is_not_chunked(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    assert reason_against(made) is None
    made.model.lm_head.requires_grad_(True)
    assert reason_against(made) == "the head is trained"
    made.model.lm_head.requires_grad_(False)
    made.model.config.return_dict = False
    assert "return_dict=False" in str(reason_against(made))


def test_liger_is_honored_or_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with refused(ConfigurationError, "use_liger_kernel=True needs a GPU", "in chunks without it"):
        trainer(tmp_path, use_liger_kernel=True)
    on_gpu = types.SimpleNamespace(use_liger_kernel=True, device=torch.device("cuda"))
    with refused(ConfigurationError, "pip install liger-kernel"):
        check_liger(on_gpu, "llama", 0.0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    table = types.SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": print})
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", table)  # type: ignore[arg-type]
    with refused(ConfigurationError, "gives no logits, which distillation compares"):
        check_liger(on_gpu, "llama", 1.0)
    with refused(ConfigurationError, "no kernels for model type 'gpt2'"):
        check_liger(on_gpu, "gpt2", 0.0)
    check_liger(on_gpu, "llama", 0.0)


@pytest.mark.parametrize(
    ("optim", "package", "state"),
    [
        ("adamw_bnb_8bit", "bitsandbytes", "state1"),
        pytest.param("adamw_torch_8bit", "torchao", "exp_avg", marks=pytest.mark.slow),  # it compiles its step
    ],
)
def test_an_optimizer_in_8_bits_trains_and_resumes(optim: str, package: str, state: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    runs = []
    for checkpoint in (None, "checkpoint-4"):
        model = recipient(hidden_size=128, intermediate_size=256)  # smaller weights keep a state in 32 bits
        fields = {"optim": optim, "gradient_checkpointing": True, "position": 3}
        made = trainer(tmp_path, model, save_strategy="steps", save_steps=4, **fields)
        made.train(resume_from_checkpoint=checkpoint and str(tmp_path / checkpoint))
        runs.append(losses(made))
    states = [value[state] for value in made.optimizer.optimizer.state.values()]
    assert any(value.dtype == torch.uint8 or type(value).__name__ == "OptimState8bit" for value in states)
    assert runs[0][-1] < runs[0][0] and runs[1] == pytest.approx(runs[0], rel=1e-5)

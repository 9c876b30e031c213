"""Training a donor whose parts stand at several positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import logits_of, plain, refused, tiny_llama_model, write_tokenizer
from transplant_hf import ConfigurationError
from transplant_hf.texts import Blocks
from transplant_hf.training import DonorTrainer, DonorTrainingArguments


def arguments(folder: Path, **more: object) -> DonorTrainingArguments:
    options = {"max_steps": 2, "save_strategy": "no", "disable_tqdm": True, "replay_share": 0.0, **more}
    return DonorTrainingArguments(str(folder), per_device_train_batch_size=2, use_cpu=True, **options)  # type: ignore


@pytest.fixture
def blocks() -> Blocks:
    return Blocks(torch.randint(0, 250, (8, 12), generator=torch.Generator().manual_seed(0)), name="noise")


def test_it_starts_as_the_recipient_and_learns_at_each_place(tiny_llama: Path, blocks: Blocks, tmp_path: Path) -> None:
    recipient = plain(tiny_llama / "recipient")
    before = logits_of(recipient)
    trainer = DonorTrainer(recipient, arguments(tmp_path / "run", position=[1, 2, 4], learning_rate=1e-2), blocks)
    assert trainer.args.donor_layers == 3
    assert trainer.transplant.layer_map.layers_of("noise") == [1, 3, 6]
    torch.testing.assert_close(logits_of(trainer.transplant), before, rtol=0, atol=1e-6)
    trainer.train()
    donor = trainer.donor
    assert donor.layer_indices == [0, 1, 3] and donor.position == (1, 2, 4)
    for number in range(3):  # zero before the training
        assert donor.tensors()[f"layers.{number}.mlp.down_proj.weight"].any()
    trainer.save(tmp_path / "noise", recipient=str(tiny_llama / "recipient"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "noise")
    trainer.finish()
    assert torch.equal(logits_of(again), logits_of(trainer.transplant))


def test_parts_that_would_start_from_one_layer_are_refused(tiny_llama: Path, blocks: Blocks, tmp_path: Path) -> None:
    args = arguments(tmp_path / "run", position=[2, 3], donor_layers=4)
    with refused(ConfigurationError, "[2, 3]", "[0, 1, 1, 2]", "start_layers"):
        DonorTrainer(plain(tiny_llama / "recipient"), args, blocks)
    with refused(ConfigurationError, "3 layers", "2 parts"):
        DonorTrainer(plain(tiny_llama / "recipient"), arguments(tmp_path, position=[2, 3], donor_layers=3), blocks)


def test_a_deep_recipient_has_spread_donors_by_default(blocks: Blocks, tmp_path: Path) -> None:
    """A donor that is trained alone, or before which layers stay in their files, goes before the last layer."""
    deep = tiny_llama_model(0, num_hidden_layers=12)
    deep.save_pretrained(tmp_path / "deep")
    write_tokenizer(tmp_path / "deep")
    assert DonorTrainer(deep, arguments(tmp_path / "run"), blocks).position == (4, 8, 11)
    assert DonorTrainer(deep, arguments(tmp_path / "run", donor_layers=1), blocks).position == 11
    assert DonorTrainer(deep, arguments(tmp_path / "run", method="standalone"), blocks).position == 11
    streamed = {"stream_prefix": True}
    assert DonorTrainer(str(tmp_path / "deep"), arguments(tmp_path / "run", **streamed), blocks).position == 11
    assert DonorTrainer(deep, arguments(tmp_path / "run", mode="replace"), blocks).position == (0, 5, 11)
    both = arguments(tmp_path / "run", mode="replace", **streamed)
    assert DonorTrainer(str(tmp_path / "deep"), both, blocks).position == 9


def test_replaced_layers_start_from_themselves(tiny_llama: Path, blocks: Blocks, tmp_path: Path) -> None:
    recipient = plain(tiny_llama / "recipient")
    before = logits_of(recipient)
    args = arguments(tmp_path / "run", position=[1, 3], mode="replace")
    trainer = DonorTrainer(recipient, args, blocks)
    assert trainer.transplant.layer_map.layers_of("noise") == [1, 3]
    assert torch.equal(logits_of(trainer.transplant), before)
    trainer.train()
    trainer.save(tmp_path / "noise", recipient=str(tiny_llama / "recipient"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "noise")
    trainer.finish()
    assert len(again.model.layers) == len(recipient.model.layers)
    assert torch.equal(logits_of(again), logits_of(trainer.transplant))
    assert not torch.equal(logits_of(again), before)


def test_the_learning_rate_of_replaced_layers_follows_their_weights(
    tiny_llama: Path, blocks: Blocks, tmp_path: Path
) -> None:
    recipient, rates = plain(tiny_llama / "recipient"), []
    for factor in (1.0, 2.0):
        for weight in recipient.model.layers[1].parameters():
            weight.data *= factor if weight.dim() > 1 else 1.0
        args = arguments(tmp_path / "run", position=1, donor_layers=1, mode="replace")
        rates.append(DonorTrainer(recipient, args, blocks).args.learning_rate)
    assert rates[1] == pytest.approx(2 * rates[0])
    assert 1e-5 < rates[0] < 1e-3


def test_a_recipient_that_does_not_fit_has_the_donor_before_its_last_layer(
    blocks: Blocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama_model(0, num_hidden_layers=12).save_pretrained(tmp_path / "deep")
    write_tokenizer(tmp_path / "deep")
    monkeypatch.setattr("transplant_hf.training.prefix._free_memory", lambda device: 1000)
    assert DonorTrainer(str(tmp_path / "deep"), arguments(tmp_path / "run"), blocks).position == 11

"""Training records what the donor's domain looks like, from the hidden states that it computes anyway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from tests.helpers import copied, logits_of
from tests.training.helpers import noise, recipient, trainer
from transplant_hf import AutoModelWithTransplant, Donor, sign
from transplant_hf.donor.signature import Signature
from transplant_hf.partial import hidden_states
from transplant_hf.training import Part, PartTrainer, Rows, prefix, train

TEXT, GENERAL = noise(80, 32), noise(80, 32, seed=2, name="general")
EVERY_ROW: dict[str, Any] = {"max_steps": 10, "per_device_train_batch_size": 16, "replay_share": 0.5}


def signature_in(folder: Path) -> dict[str, Any] | None:
    found = Donor.from_pretrained(folder).record.signature
    return None if found is None else dict(found)


def trained(folder: Path, model: Any, general: Any = GENERAL, **fields: Any) -> Any:
    known = {**EVERY_ROW, "donor_layers": 1, "use_cpu": True}
    return train(model, TEXT, folder, general=general, disable_tqdm=True, **{**known, **fields})


def test_it_is_that_of_sign(tiny_llama: Path, tmp_path: Path) -> None:
    """In memory, in files, and with layers that stay in theirs."""
    found = []
    for name, fields in (("memory", {}), ("disk", {"cache_prefix": "disk"}), ("streamed", {"stream_prefix": True})):
        report = trained(tmp_path / name, str(tiny_llama / "recipient"), position=2, **fields)
        assert report.signed == (80, 80) and "from 80 rows of the text and 80 of general text" in str(report)
        content = signature_in(tmp_path / name)
        assert content is not None and content["position"] == 2
        found.append(Signature.from_dict(content, name))
    model = copied(tiny_llama, tmp_path / "again") / "donor"
    sign(model, TEXT.tokens.flatten(), GENERAL.tokens.flatten(), position=2, quiet=True)
    signed = Signature.from_dict(signature_in(model) or {}, "signed")
    for one in found:
        torch.testing.assert_close(one.probe, signed.probe, rtol=0.01, atol=0.01)
        torch.testing.assert_close(one.domain, signed.domain, rtol=0.1, atol=0.1)  # of all rows, and of four fifths
        torch.testing.assert_close(one.domain, found[0].domain, rtol=0.01, atol=0.01)


def test_it_chooses_the_donor(tiny_llama: Path, tmp_path: Path) -> None:
    trained(tmp_path / "law", str(tiny_llama / "recipient"))
    model: Any = AutoModelWithTransplant.from_pretrained(tmp_path / "law").eval()
    ids = torch.cat([noise(2, 32, seed=0).tokens[:1], GENERAL.tokens[:1]]).long()
    with model.using("auto"), torch.no_grad():
        logits_of(model, ids)
        assert model.routes[0].donor == "law"
        # The recipient never saw text, so that the donor predicts replayed text better, too. The signature alone:
        model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False)
        assert [route.donor for route in model.routes] == ["law", None]


def test_the_recipient_runs_no_more_for_it(tmp_path: Path) -> None:
    made = trainer(tmp_path, train_dataset=TEXT, replay_dataset=GENERAL, **EVERY_ROW)
    rows: list[int] = []
    made.transplant.model.layers[0].mlp.register_forward_hook(lambda *call: rows.append(call[2].shape[0]))
    made.train()
    assert made.signed_rows == (80, 80)
    # All blocks once; one row each to know the shape and the outputs of layers, to compare the part with the whole
    # model, and of the tokens that tell models apart.
    assert sum(rows) == 160 + 4


@pytest.mark.parametrize(
    "fields",
    [
        {"general": None},
        {"cache_prefix": "off"},
        {"position": 0},
        {"method": "standalone"},
        {"max_steps": 1},
    ],
    ids=str,
)
def test_none_without_states_or_general_text(fields: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    report = trained(tmp_path / "law", str(tiny_llama / "recipient"), **fields)
    assert report.signed is None and signature_in(tmp_path / "law") is None and "signed" not in str(report)


def test_of_a_spread_donor_at_its_first_position(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "law"
    trained(folder, str(tiny_llama / "recipient"), position=(1, 3), donor_layers=2)
    content = signature_in(folder)
    assert content is not None and content["position"] == 1
    model = AutoModelWithTransplant.from_pretrained(folder, strength="auto")
    logits_of(model, TEXT.tokens[:2].long())
    assert [route.donor for route in model.routes] == ["law", "law"]


def test_beside_another_donor(tmp_path: Path) -> None:
    """States that another donor changed are not those of the recipient."""
    model = recipient()
    first = trainer(tmp_path / "a", model, train_dataset=TEXT, replay_dataset=GENERAL, **EVERY_ROW)
    first.train()
    second = trainer(
        tmp_path / "b", first.transplant, train_dataset=TEXT, replay_dataset=GENERAL, donor_name="two", **EVERY_ROW
    )
    second.train()
    assert first.signature is not None and second.signature is None


def test_states_are_read_where_prompts_begin(tmp_path: Path) -> None:
    made = trainer(tmp_path, train_dataset=TEXT, replay_dataset=GENERAL, **EVERY_ROW)
    made.train()
    assert made.signature is not None
    states = hidden_states(recipient(), TEXT.tokens.long(), [made.signature.position])[made.signature.position]
    alike = states / states.pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(made.signature.domain, alike.mean((0, 1)), rtol=1e-3, atol=1e-3)


def test_a_run_that_makes_no_donor_computes_nothing_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons and recoveries train through the same cache, and have no donor to sign."""
    lengths: list[int] = []
    block_states = prefix.block_states

    def counted(model: Any, ids: torch.Tensor, *more: Any) -> torch.Tensor:
        lengths.append(ids.shape[1])
        return block_states(model, ids, *more)

    monkeypatch.setattr(prefix, "block_states", counted)
    rows = Rows(TEXT, 160, GENERAL, 0.5, 0)
    args = TrainingArguments(
        str(tmp_path), max_steps=10, per_device_train_batch_size=16, save_strategy="no", use_cpu=True
    )
    model = recipient().requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    made = PartTrainer(model, args, rows, part=Part(range(len(model.model.layers) - 1, len(model.model.layers))))
    made.train()
    assert made.cache_seconds > 0 and not lengths
    trainer(tmp_path / "donor", train_dataset=TEXT, replay_dataset=GENERAL, **EVERY_ROW).train()
    assert lengths == [8]

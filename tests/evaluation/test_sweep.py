"""A sweep gives what evaluating a transplant at each position gives, and runs less for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import BUILDERS, NUM_LAYERS, layers_of, plain, refused, some_ids
from transplant_hf import Donor, transplant
from transplant_hf.errors import CompatibilityError, ConfigurationError
from transplant_hf.evaluation import perplexity, sweep
from transplant_hf.evaluation import sweep as sweep_function
from transplant_hf.texts import Blocks

STREAM = some_ids(1, 75)[0]


def donor_of(folder: Path) -> Donor:
    return Donor.from_pretrained(folder / "donor")


def naive(recipient: Any, donor: Donor, position: int, **fields: Any) -> float:
    return perplexity(transplant(recipient, donor, position, **fields), STREAM, block_length=16).nll


def test_every_position_is_what_a_transplant_there_gives(tiny: Path) -> None:
    recipient, donor = plain(tiny / "recipient"), donor_of(tiny)
    report = sweep(recipient, donor, STREAM, block_length=16, batch_size=2)
    assert [row.position for row in report.rows] == list(range(NUM_LAYERS + 1))
    for row in report.rows:
        assert row.perplexity is not None
        assert row.perplexity.nll == pytest.approx(naive(recipient, donor, row.position), rel=1e-5)
        assert row.perplexity.tokens == 74
    assert len({round(row.perplexity.nll, 6) for row in report.rows if row.perplexity}) == NUM_LAYERS + 1
    assert report.recipient.nll == pytest.approx(perplexity(recipient, STREAM, block_length=16).nll, rel=1e-5)


def test_strengths(tiny: Path) -> None:
    recipient, donor = plain(tiny / "recipient"), donor_of(tiny)
    report = sweep(recipient, donor, STREAM, [0, 2, 4], strengths=(1.0, 0.5, 0.0), block_length=16)
    assert len(report.rows) == 9
    for row in report.rows:
        assert row.perplexity is not None
        wanted = naive(recipient, donor, row.position, strength=row.strength)
        assert row.perplexity.nll == pytest.approx(wanted, rel=1e-5)


def test_replacing(tiny: Path) -> None:
    recipient, donor = plain(tiny / "recipient"), donor_of(tiny)
    report = sweep(recipient, donor, STREAM, mode="replace", block_length=16)
    assert [row.position for row in report.rows] == [0, 1, 2]
    for row in report.rows:
        assert row.perplexity is not None
        wanted = naive(recipient, donor, row.position, mode="replace")
        assert row.perplexity.nll == pytest.approx(wanted, rel=1e-5)


def test_a_donor_that_recommends_another_mode_or_strength_is_named(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it is measured at the place that it recommends, and neither is given."""
    recipient, folder = tiny_llama / "recipient", tmp_path / "law"
    for mode, strength, fact in (("replace", 1.0, "mode replace"), ("insert", 0.5, "strength 0.5")):
        kept = {"recipient": str(recipient)}
        Donor.from_pretrained(tiny_llama / "donor").save_pretrained(folder, 1, mode=mode, strength=strength, **kept)
        sweep(recipient, folder, STREAM, [1, 2], block_length=16)
        sweep(folder, None, STREAM, [1], block_length=16)
        for record in caplog.records:
            assert f"recommends {fact} at position 1, and is measured with" in record.getMessage()
            assert "(--mode, --strengths)" in record.getMessage()
        assert len(caplog.records) == 2
        caplog.clear()
        sweep(recipient, folder, STREAM, [2], block_length=16)
        sweep(recipient, folder, STREAM, [1], [strength], mode=mode, block_length=16)
        assert not caplog.records


def test_sliding_windows_and_blocks(tiny_llama: Path) -> None:
    recipient, donor = plain(tiny_llama / "recipient"), donor_of(tiny_llama)
    model = transplant(recipient, donor, 3)
    (row,) = sweep(recipient, donor, STREAM, [3], block_length=16, stride=5).rows
    assert row.perplexity is not None
    assert row.perplexity.nll == pytest.approx(perplexity(model, STREAM, block_length=16, stride=5).nll, rel=1e-5)
    blocks = Blocks(STREAM.view(5, 15), "noise")
    report = sweep(recipient, donor, blocks, [3])
    assert report.text == "noise"
    assert report.rows[0].perplexity is not None
    assert report.rows[0].perplexity.nll == pytest.approx(perplexity(model, blocks).nll, rel=1e-5)


def test_several_donors_each_by_itself(tiny_llama: Path) -> None:
    recipient = plain(tiny_llama / "recipient")
    other = Donor.from_model(plain(tiny_llama / "source"), [0], name="first")
    report = sweep(tiny_llama / "recipient", {"a": tiny_llama / "donor", "b": other}, STREAM, [1], block_length=16)
    assert report.donors == ("a", "b")
    for row, donor in zip(report.rows, (donor_of(tiny_llama), other), strict=True):
        assert row.perplexity is not None
        assert row.perplexity.nll == pytest.approx(naive(recipient, donor, 1), rel=1e-5)
    with refused(ConfigurationError, "two donors are named 'donor'"):
        sweep(recipient, [tiny_llama / "donor", tiny_llama / "donor"], STREAM)


def test_the_donors_of_a_transplant_that_is_named(tiny_llama: Path) -> None:
    wanted = sweep(tiny_llama / "recipient", tiny_llama / "donor", STREAM)
    report = sweep(tiny_llama / "donor", None, STREAM)
    assert [row.perplexity and row.perplexity.nll for row in report.rows] == [
        row.perplexity and row.perplexity.nll for row in wanted.rows
    ]
    assert report.recipient.nll == wanted.recipient.nll
    assert report.donors == ("donor",)


def test_each_layer_runs_no_more_than_needed(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipient, donor = plain(tiny_llama / "recipient"), donor_of(tiny_llama)
    kind = type(layers_of(recipient)[0])
    run, calls = kind.forward, []

    def counted(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(hidden_states.shape[1])
        return run(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counted)
    sweep(recipient, donor, STREAM[:33], block_length=16, batch_size=1)
    layers, own = NUM_LAYERS, donor.num_layers
    # Two batches of 16 tokens; what is shorter looks at the model once, before.
    assert calls.count(16) == 2 * (layers + sum(own + layers - p for p in range(layers + 1)))


def test_the_donor_is_in_memory_once(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def kept(*args: Any, **kwargs: Any) -> Any:
        made.append(transplant(*args, **kwargs))
        return made[-1]

    monkeypatch.setitem(sweep_function.__globals__, "transplant", kept)
    recipient = plain(tiny_llama / "recipient")
    sweep(recipient, donor_of(tiny_llama), STREAM)
    assert len(made) == NUM_LAYERS + 1
    places = [{parameter.data_ptr() for parameter in model.parameters()} for model in made]
    assert all(place == places[0] for place in places)
    assert {parameter.data_ptr() for parameter in recipient.parameters()} < places[0]


def test_the_recipient_is_as_it_was(tiny_llama: Path) -> None:
    recipient = plain(tiny_llama / "recipient").train()
    before = {name: tensor.clone() for name, tensor in recipient.state_dict().items()}
    sweep(recipient, donor_of(tiny_llama), STREAM)
    assert recipient.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in recipient.state_dict().items())
    assert all("forward" not in vars(layer) and not layer._forward_pre_hooks for layer in layers_of(recipient))
    loss = recipient(input_ids=STREAM[None, :16], labels=STREAM[None, :16]).loss
    loss.backward()
    assert recipient.lm_head.weight.grad is not None


def test_a_position_where_a_donor_cannot_go_has_the_reason(tiny_llama: Path) -> None:
    recipient = plain(tiny_llama / "recipient")
    wide = Donor.from_model(BUILDERS["llama"](seed=4, hidden_size=64), [1], name="wide")
    report = sweep(recipient, {"wide": wide, "good": donor_of(tiny_llama)}, STREAM, [1, 9])
    reasons = {(row.donor, row.position): row.reason for row in report.rows}
    assert "hidden_size" in str(reasons["wide", 1])
    assert "9" in str(reasons["good", 9])
    assert reasons["good", 1] is None
    assert report.best is not None
    assert (report.best.donor, report.best.position) == ("good", 1)
    assert "wide cannot go to position 1" in str(report)
    assert sweep(recipient, wide, STREAM).best is None


def test_the_best_position_is_marked(tiny_llama: Path) -> None:
    recipient = plain(tiny_llama / "recipient")
    report = sweep(recipient, donor_of(tiny_llama), STREAM, strengths=(1.0, 0.5))
    best = report.best
    assert best is not None
    assert best.perplexity is not None
    assert best.perplexity.nll == min(row.perplexity.nll for row in report.rows if row.perplexity)
    marked = [line for line in str(report).splitlines()[1:] if "*" in line]
    assert len(marked) == 1
    assert marked[0].startswith(f"{best.position} ")
    assert f"{best.perplexity} *" in marked[0]
    assert f"{report.recipient}" in str(report).splitlines()[-1]
    found = json.loads(json.dumps(report.to_dict()))
    assert found["best"]["position"] == best.position
    assert found["recipient"]["perplexity"] == report.recipient.value
    assert [row["strength"] for row in found["rows"][:2]] == [1.0, 0.5]


def test_what_cannot_be_swept_is_refused(tiny_llama: Path) -> None:
    recipient, donor = plain(tiny_llama / "recipient"), donor_of(tiny_llama)
    with refused(ConfigurationError, "has donors already", "untouched recipient"):
        sweep(tiny_llama / "donor", donor, STREAM)
    with refused(ConfigurationError, "has donors already"):
        sweep(transplant(recipient, donor, 1), None, STREAM)
    with refused(ConfigurationError, "recipient has no donors"):
        sweep(tiny_llama / "recipient", None, STREAM)
    with refused(ConfigurationError, "no donor"):
        sweep(recipient, [], STREAM)
    with refused(ConfigurationError, "at least one strength and one position"):
        sweep(recipient, donor, STREAM, strengths=())


def test_a_donor_that_is_spread_moves_as_a_block_only_where_positions_are_named(
    tiny_llama: Path, tmp_path: Path
) -> None:
    recipient, donor = plain(tiny_llama / "recipient"), donor_of(tiny_llama).replaced(position=(1, 3))
    reason = ("spread through the recipient, at positions 1, 3", "evaluate")
    with refused(ConfigurationError, *reason):
        sweep(recipient, donor, STREAM)
    with refused(ConfigurationError, *reason):
        sweep(recipient, {donor: (1, 3)}, STREAM)
    transplant(recipient, donor).save_pretrained(tmp_path / "thin", thin=True)
    with refused(ConfigurationError, *reason):
        sweep(tmp_path / "thin", None, STREAM)
    assert [row.position for row in sweep(recipient, donor, STREAM, [2]).rows] == [2]
    assert [row.position for row in sweep(recipient, {donor: 2}, STREAM).rows] == [2]


def test_layers_that_pass_on_more_than_a_hidden_state_are_refused(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipient, donor = plain(tiny_llama / "recipient"), donor_of(tiny_llama)
    kind = type(layers_of(recipient)[0])
    run = kind.forward
    monkeypatch.setattr(kind, "seen", None, raising=False)

    def leaning(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.self_attn.layer_idx == 0:
            kind.seen = hidden_states
        elif kind.seen is not None and kind.seen.shape == hidden_states.shape:
            hidden_states = hidden_states + kind.seen
            kind.seen = None
        return run(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", leaning)
    with refused(CompatibilityError, "pass on more than a hidden state"):
        sweep(recipient, donor, STREAM, [1])
    assert all("forward" not in vars(layer) for layer in layers_of(recipient))


@pytest.mark.shared
def test_a_real_donor_is_best_where_it_was_trained(shared_folder: Path) -> None:
    models = shared_folder / "models"
    recipient = models / "recipient-llama-5m"
    donor = Donor.from_pt(models / "donors" / "shakespeare-in-place" / "donor_layers.pt", recipient, name="in-place")
    report = sweep(
        recipient, donor, shared_folder / "data" / "shakespeare.txt", block_length=128, max_tokens=1024, batch_size=4
    )
    assert report.best is not None
    assert report.best.position == 8
    assert report.text == "shakespeare"

"""Measuring a model whose first layers stay in their files gives the numbers of the whole model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import run as run  # a fixture
from tests.faults.test_disk_full import fill
from tests.helpers import DONOR_POSITION, NUM_LAYERS, loaded, plain, refused, some_ids
from transplant_hf import ConfigurationError, Donor
from transplant_hf.evaluation import EvaluationReport, Perplexity, SweepReport, evaluate, strength_curve, sweep
from transplant_hf.model.layers_in_files import LayersInFiles
from transplant_hf.texts import Blocks

STREAM = some_ids(1, 75)[0]
TEXTS = {"stream": STREAM, "blocks": Blocks(STREAM.view(5, 15))}
HOW: dict[str, Any] = {"block_length": 16, "batch_size": 2, "dtype": torch.float32, "quiet": True}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often the weights of each layer are read from files."""
    numbers: Counter[int] = Counter()
    load = LayersInFiles._load_checked

    def counted(self: Any, number: int, *args: Any) -> None:
        numbers[number] += 1
        load(self, number, *args)

    monkeypatch.setattr(LayersInFiles, "_load_checked", counted)
    return numbers


def same(one: Iterable[Perplexity | None], other: Iterable[Perplexity | None], rel: float = 1e-6) -> bool:
    """Whether perplexities are those of the same text and model, up to rounding in float32."""
    ours, theirs = ([found and (found.tokens, found.nll) for found in some] for some in (one, other))
    return all(a == b or (a and b and a == pytest.approx(b, rel=rel)) for a, b in zip(ours, theirs, strict=True))


def found_in(report: EvaluationReport | SweepReport) -> list[Perplexity | None]:
    return [row.perplexity for row in report.rows]


def test_a_donor_and_its_recipient(tiny: Path, read: Counter[int]) -> None:
    resident = evaluate(tiny / "donor", TEXTS, **HOW)
    assert not read
    streamed = evaluate(tiny / "donor", TEXTS, stream=True, **HOW)
    assert streamed.models == resident.models == ("recipient", "with donor")
    assert same(found_in(streamed), found_in(resident))
    for model in resident.models:  # a stream of tokens is read in the same batches
        assert streamed.of(model, "stream").nll == resident.of(model, "stream").nll
    assert read == {number: 1 for number in range(DONOR_POSITION)}


def test_windows_that_overlap_and_donors_that_replace(tiny_llama: Path, tmp_path: Path, read: Counter[int]) -> None:
    thin = tmp_path / "thin"
    loaded(tiny_llama, mode="replace", keep_replaced=True).save_pretrained(thin, thin=True)
    wanted = evaluate(thin, {"stream": STREAM}, stride=5, **HOW)
    found = evaluate(thin, {"stream": STREAM}, stride=5, stream=True, **HOW)
    assert same(found_in(found), found_in(wanted), rel=0)
    assert read == {number: 1 for number in range(DONOR_POSITION)}


def test_strengths(tiny_llama: Path, read: Counter[int]) -> None:
    wanted = strength_curve(tiny_llama / "donor", TEXTS, [0.0, 0.5, 1.0], **HOW)
    found = strength_curve(tiny_llama / "donor", TEXTS, [0.0, 0.5, 1.0], stream=True, **HOW)
    for strength, point in wanted.points.items():
        assert same(found.points[strength].values(), point.values())
    assert max(read.values()) == 1


def test_a_plain_model_keeps_its_last_layer(tiny_llama: Path, read: Counter[int]) -> None:
    models = {"recipient": tiny_llama / "recipient"}
    wanted = evaluate(tiny_llama / "source", TEXTS, **models, **HOW)
    found = evaluate(tiny_llama / "source", TEXTS, stream=True, **models, **HOW)
    assert found.models == wanted.models == ("recipient", "source")
    assert same(found_in(found), found_in(wanted))
    assert read == {number: 2 for number in range(NUM_LAYERS - 1)}  # of two models


@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_a_sweep_from_a_position_on(mode: str, tiny: Path, read: Counter[int]) -> None:
    how = {"positions": [2, 3, 9], "mode": mode, **HOW}
    wanted = sweep(tiny / "recipient", tiny / "donor", STREAM, **how)
    found = sweep(tiny / "recipient", tiny / "donor", STREAM, stream=True, **how)
    assert [(row.position, row.reason) for row in found.rows] == [(row.position, row.reason) for row in wanted.rows]
    assert same(found_in(found), found_in(wanted)) and any(found_in(found))
    assert found.recipient.nll == wanted.recipient.nll
    assert read == {0: 1, 1: 1}


def test_a_sweep_of_several_donors_and_strengths(tiny_llama: Path, read: Counter[int]) -> None:
    donor = Donor.from_pretrained(tiny_llama / "donor")
    donors = {donor: 3, Donor.from_model(plain(tiny_llama / "source"), [0], name="first"): 2}
    wanted = sweep(tiny_llama / "recipient", donors, STREAM, strengths=[1.0, 0.5], **HOW)
    found = sweep(tiny_llama / "recipient", donors, STREAM, strengths=[1.0, 0.5], stream=True, **HOW)
    assert same(found_in(found), found_in(wanted)) and all(found_in(found))
    assert read == {0: 1, 1: 1}
    wanted = sweep(tiny_llama / "donor", None, STREAM, [2], **HOW)
    found = sweep(tiny_llama / "donor", None, STREAM, [2], stream=True, **HOW)
    assert same(found_in(found), found_in(wanted)) and all(found_in(found))


def test_states_that_are_large_go_to_disk(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = evaluate(tiny_llama / "donor", TEXTS, **HOW)
    monkeypatch.setattr("transplant_hf.evaluation.measurement.MOST_IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert same(found_in(evaluate(tiny_llama / "donor", TEXTS, stream=True, **HOW)), found_in(wanted))
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room(tiny_llama: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transplant_hf.evaluation.measurement.MOST_IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    fill(small_disk, 20_000)
    with refused(ConfigurationError, "bytes on disk", str(small_disk), "TMPDIR", "--max-tokens"):
        evaluate(tiny_llama / "donor", TEXTS, stream=True, **HOW)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_what_cannot_be_streamed_is_refused(tiny_llama: Path) -> None:
    with refused(ConfigurationError, "stream=True (--stream) is not possible", "in memory already"):
        evaluate(plain(tiny_llama / "recipient"), TEXTS, stream=True)
    with refused(ConfigurationError, "(--stream)", "device_map='auto'"):
        evaluate(tiny_llama / "donor", TEXTS, stream=True, device_map="auto")
    with refused(ConfigurationError, "(--stream)", "no layer runs before position 0"):
        evaluate(tiny_llama / "recipient", TEXTS, donors={str(tiny_llama / "donor"): 0}, stream=True)
    with refused(ConfigurationError, "(--stream)", "no layer runs before position 0", "later positions"):
        sweep(tiny_llama / "recipient", tiny_llama / "donor", STREAM, stream=True)


def test_on_the_command_line(tiny_llama: Path, tmp_path: Path, run: Any) -> None:
    donor, text = tiny_llama / "donor", tmp_path / "hamlet.txt"
    text.write_text("To be, or not to be, that is the question. " * 20)
    words = ("--text", text, "--block-length", 16, "--json")
    outputs = []
    for stream in ((), ("--stream",)):
        for command in (("evaluate", donor), ("sweep", tiny_llama / "recipient", f"{donor}@2")):
            status, out, _ = run(*command, *words, *stream)
            assert status == 0
            outputs.append([row["perplexity"] for row in json.loads(out)["rows"]])
    assert outputs[:2] == [pytest.approx(found, rel=1e-6) for found in outputs[2:]]

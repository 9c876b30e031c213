"""A model on texts, and always the untouched recipient beside a transplant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import Shelf, loaded, plain, refused, some_ids, two_donors
from transplant_hf import Donor, transplant
from transplant_hf.errors import ConfigurationError, DataError
from transplant_hf.evaluation import evaluate, perplexity, strength_curve, sweep
from transplant_hf.texts import Blocks, TextSource

STREAM = some_ids(1, 60)[0]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "hamlet.txt"
    path.write_text("To be, or not to be, that is the question. " * 5)
    return path


def test_a_donor_repo_and_its_recipient(tiny: Path, text: Path) -> None:
    report = evaluate(tiny / "donor", {"hamlet": TextSource(str(text)), "noise": STREAM}, block_length=16)
    assert report.models == ("recipient", "with donor")
    assert report.texts == ("hamlet", "noise")
    for model, label in ((plain(tiny / "recipient"), "recipient"), (loaded(tiny), "with donor")):
        assert report.of(label, "noise").nll == pytest.approx(perplexity(model, STREAM, block_length=16).nll, rel=1e-6)
    assert report.of("recipient", "hamlet").tokens == len(text.read_text()) - 1


def test_the_recipient_of_a_transplant_in_memory_is_untouched(tiny_llama: Path) -> None:
    recipient = plain(tiny_llama / "recipient")
    model = transplant(recipient, str(tiny_llama / "donor"), position=2)
    report = evaluate(model, {"noise": STREAM})
    assert report.of("recipient", "noise").nll == perplexity(recipient, STREAM).nll
    assert report.of("with donor", "noise").nll == perplexity(model, STREAM).nll != perplexity(recipient, STREAM).nll


def test_two_donors_are_one_row(tiny_llama: Path) -> None:
    report = evaluate(two_donors(tiny_llama), {"noise": STREAM})
    assert report.models == ("recipient", "with a, b")


def test_adapters_are_off_in_the_recipients_row(tiny_llama: Path) -> None:
    peft = pytest.importorskip("peft")
    wanted = perplexity(plain(tiny_llama / "recipient"), STREAM).nll
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(loaded(tiny_llama), config)
    report = evaluate(adapted, {"noise": STREAM})
    assert report.of("recipient", "noise").nll == pytest.approx(wanted, rel=1e-6)
    inner = loaded(tiny_llama)
    inner.add_adapter(config)
    before = perplexity(inner, STREAM).nll
    report = evaluate(inner, {"noise": STREAM})
    assert report.of("recipient", "noise").nll == pytest.approx(wanted, rel=1e-6)
    assert report.of("with donor", "noise").nll == before == perplexity(inner, STREAM).nll


def test_layers_that_a_donor_replaces_are_kept(tiny_llama: Path) -> None:
    folder = tiny_llama.parent / "replacing"
    loaded(tiny_llama, mode="replace", keep_replaced=True).save_pretrained(folder, thin=True)
    report = evaluate(folder, {"noise": STREAM}, dtype=torch.float32)
    assert report.of("recipient", "noise").nll == perplexity(plain(tiny_llama / "recipient"), STREAM).nll
    with refused(ConfigurationError, "keep_replaced=True"):
        evaluate(loaded(tiny_llama, mode="replace"), {"noise": STREAM})
    report = evaluate(loaded(tiny_llama, mode="replace"), {"noise": STREAM}, recipient=tiny_llama / "recipient")
    assert report.models == ("recipient", "with donor")


def test_a_plain_model_is_one_row(tiny_llama: Path, text: Path) -> None:
    report = evaluate(tiny_llama / "source", {"noise": STREAM})
    assert report.models == ("source",)
    beside = evaluate(tiny_llama / "source", {"noise": STREAM}, recipient=plain(tiny_llama / "recipient"))
    assert beside.models == ("recipient", "source")
    assert beside.of("recipient", "noise").nll == perplexity(plain(tiny_llama / "recipient"), STREAM).nll


def test_blocks_keep_their_length_and_streams_may_slide(tiny_llama: Path) -> None:
    model = plain(tiny_llama / "recipient")
    blocks = Blocks(STREAM.view(6, 10))
    report = evaluate(model, {"blocks": blocks, "stream": STREAM}, block_length=16, stride=4)
    assert report.about["block_length"] == {"blocks": 10, "stream": 16}
    assert report.of("recipient", "blocks").nll == perplexity(model, blocks).nll
    assert report.of("recipient", "stream").nll == perplexity(model, STREAM, block_length=16, stride=4).nll
    short = evaluate(model, {"blocks": blocks, "stream": STREAM}, max_tokens=25)
    assert [row.perplexity.tokens for row in short.rows] == [18, 24]


def test_the_report_as_a_table_and_for_machines(tiny_llama: Path) -> None:
    report = evaluate(tiny_llama / "donor", {"noise": STREAM, "more noise": STREAM[:30]})
    lines = str(report).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "perplexity", "recipient", "with donor", "change", "tokens predicted"
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1
    assert str(report.of("with donor", "noise")) in lines[2]
    found = json.loads(json.dumps(report.to_dict()))
    assert found["model"] == str(tiny_llama / "donor")
    assert found["rows"][0]["model"] == "recipient"
    assert found["rows"][0]["perplexity"] == report.rows[0].perplexity.value


def test_the_tokenizer_is_the_recipients(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    thin = tmp_path / "thin"
    loaded(tiny_llama).save_pretrained(thin, thin=True)
    for file in thin.glob("tokenizer*"):
        file.unlink()
    assert evaluate(thin, {"hamlet": str(text)}).of("recipient", "hamlet").tokens > 0
    assert evaluate(loaded(tiny_llama), {"hamlet": str(text)}).texts == ("hamlet",)
    assert evaluate(loaded(tiny_llama), str(text)).texts == (text.stem,)
    assert evaluate(plain(tiny_llama / "recipient"), {"hamlet": str(text)}).texts == ("hamlet",)
    with refused(ConfigurationError, "no tokenizer", "source", "tokenizer="):
        evaluate(tiny_llama / "source", {"hamlet": str(text)})


@pytest.mark.hub
def test_a_donor_on_the_hub(both: Shelf, text: Path) -> None:
    report = evaluate(both.law, {"hamlet": str(text)}, revision=both.law_commit)
    assert report.models[0] == "recipient"
    assert report.about["revision"] == both.law_commit


def test_what_cannot_be_evaluated_is_refused(tiny_llama: Path, text: Path) -> None:
    model = plain(tiny_llama / "recipient")
    with refused(ConfigurationError, "no text"):
        evaluate(model, {})
    with refused(ConfigurationError, "revision, dtype", "loaded model"):
        evaluate(model, {"noise": STREAM}, revision="main", dtype="auto")
    with refused(DataError, "Blocks, a stream of tokens", "int"):
        evaluate(model, {"noise": 3})
    model.resize_token_embeddings(200)
    with refused(DataError, "does not belong to", "has 200 tokens"):
        evaluate(model, {"hamlet": str(text)})


def test_text_is_there_before_a_model_is_loaded(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transplant_hf.evaluation.models_and_texts.load_model", lambda *args, **kwargs: pytest.fail("loaded")
    )
    (tmp_path / "empty.jsonl").touch()
    for measure in (evaluate, strength_curve, lambda model, texts: sweep(model, None, texts["law"])):
        with refused(DataError, "missing.txt"):
            measure(tiny_llama / "donor", {"law": tmp_path / "missing.txt"})
        with refused(DataError, "empty.jsonl is empty"):
            measure(tiny_llama / "donor", {"law": tmp_path / "empty.jsonl"})


@pytest.mark.shared
def test_a_real_donor_in_its_recipient(shared_folder: Path) -> None:
    models = shared_folder / "models"
    recipient = plain(models / "recipient-llama-5m")
    donor = Donor.from_pt(
        models / "donors" / "shakespeare-in-place" / "donor_layers.pt",
        models / "recipient-llama-5m",
        name="shakespeare",
    )
    model = transplant(recipient, donor, position=8)
    source = TextSource(str(shared_folder / "data" / "shakespeare.txt"))
    report = evaluate(model, {"shakespeare": source}, block_length=128, max_tokens=128 * 32)
    assert report.of("with shakespeare", "shakespeare").value < 0.4 * report.of("recipient", "shakespeare").value

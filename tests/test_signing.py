"""`sign`: what the text of a donor's domain looks like, in its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import copied, edit_json, loaded, make_family, plain, refused, tiny_gpt2_model, tiny_llama_model
from transplant_hf import ConfigurationError, DataError, Donor, sign
from transplant_hf.cli import main
from transplant_hf.donor.signature import Discriminant, Signature, describe_rows


@pytest.fixture
def family(tmp_path: Path) -> Path:
    (tmp_path / "law.txt").write_text("the court held that the appeal is dismissed with costs. " * 150)
    (tmp_path / "general.txt").write_text("1234567890 +-*/ 42 = 6 x 7; " * 300)
    return make_family(tmp_path, tiny_gpt2_model)


def signature_in(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "donor_config.json").read_text())["signature"])


def test_the_command(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((family / "donor" / "donor_config.json").read_text())
    texts = ["--text", str(family / "law.txt"), "--general", str(family / "general.txt")]
    assert main(["sign", str(family / "donor"), *texts, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["position"] == 1 and report["right"] == [1.0, 1.0] and report["bytes"] < 4000
    after = json.loads((family / "donor" / "donor_config.json").read_text())
    assert after.pop("signature")["position"] == 1 and after == before
    assert main(["sign", str(family / "donor"), *texts, "--position", "3"]) == 0
    assert "100.0% of the text" in capsys.readouterr().out
    assert signature_in(family / "donor")["position"] == 3


def test_the_donor_itself_makes_no_difference(family: Path) -> None:
    """Signed alone, or with donors in the model, or with a loaded recipient."""
    texts = (str(family / "law.txt"), str(family / "general.txt"))
    found = []
    for recipient in (None, str(family / "recipient"), loaded(family, 0)):
        tokenizer = {"tokenizer": loaded_tokenizer(family)} if recipient is not None else {}
        sign(family / "donor", *texts, recipient=recipient, quiet=True, **tokenizer)
        found.append(signature_in(family / "donor"))
    assert found[0] == found[1] == found[2]


def test_an_adapter_in_the_recipient_makes_no_difference(tiny_llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    donor, found = copied(tiny_llama / "donor", tmp_path / "donor"), []
    texts = [torch.arange(3200) % 6 + first for first in (10, 90)]
    model = plain(tiny_llama / "recipient")
    for adapted in (False, True):
        if adapted:
            model.add_adapter(peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
        sign(donor, *texts, recipient=model, quiet=True)
        found.append(signature_in(donor))
    assert found[0] == found[1]


def loaded_tokenizer(family: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(family / "recipient")


def test_the_signature_stays_with_the_donor(family: Path, tmp_path: Path) -> None:
    sign(family / "donor", str(family / "law.txt"), str(family / "general.txt"), quiet=True)
    known = signature_in(family / "donor")
    model = loaded(family, 1)
    model.save_pretrained(tmp_path / "thin", thin=True)
    for name, donor in (("again", Donor.from_pretrained(family / "donor")), ("taken", Donor.from_model(model, [1, 2]))):
        donor.save_pretrained(tmp_path / name, position=1, recipient=str(family / "recipient"))
    for folder in ("thin", "again", "taken"):
        assert signature_in(tmp_path / folder) == known


def test_refusals(family: Path, tmp_path: Path) -> None:
    law, general = str(family / "law.txt"), str(family / "general.txt")
    with refused(ConfigurationError, "user/law is not a folder with a donor", "Download"):
        sign("user/law", law, general)
    with refused(ConfigurationError, "is not a folder with a donor"):
        sign(family / "recipient", law, general)
    with refused(DataError, "missing.txt"):
        sign(family / "donor", str(tmp_path / "missing.txt"), general)
    with refused(ConfigurationError, "positions [9]", "0..4"):
        sign(family / "donor", law, general, position=9, quiet=True)
    (tmp_path / "short.txt").write_text("a few words, and some more that make one row of tokens. " * 20)
    with refused(DataError, "at least 32 rows", "general text"):
        sign(family / "donor", law, str(tmp_path / "short.txt"), quiet=True)
    assert "signature" not in json.loads((family / "donor" / "donor_config.json").read_text())
    edit_json(family / "donor" / "donor_config.json", signature="x")
    with pytest.raises(Exception, match="signature must be of type dict"):
        Donor.from_pretrained(family / "donor")


def test_several_signatures_make_one_discriminant() -> None:
    """As the discriminant of all classes and one full covariance, when the covariance has low rank."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 24, generator=generator)

    def noise() -> torch.Tensor:
        few, many = (torch.randn(4000, size, generator=generator) for size in (6, 24))
        return few @ mixing + 0.5 * many

    means = torch.randn(3, 24, generator=generator)
    general, *domains = (mean + noise() for mean in means)
    signatures = [Signature.of_rows(1, rows, general, torch.zeros(24)) for rows in domains]
    signatures = [Signature.from_dict(one.to_dict(), "it") for one in signatures]
    found = Discriminant(signatures)
    centered = torch.cat([rows - rows.mean(0) for rows in (general, *domains)])
    covariance = 0.9 * centered.T @ centered / len(centered)
    covariance += 0.1 * covariance.trace() / 0.9 / 24 * torch.eye(24)
    for number, rows in enumerate(domains):
        weight = torch.linalg.solve(covariance, rows.mean(0) - general.mean(0))
        assert torch.cosine_similarity(found.weight[number], weight, dim=0) > 0.98
    scores = [torch.cat([torch.zeros(4000, 1), found.scores(rows)], 1) for rows in (general, *domains)]
    told = torch.stack(scores).argmax(2)
    assert (told == torch.arange(3)[:, None]).float().mean() > 0.8


def test_fewer_rows_than_directions_have_the_same_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(80, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    wide = Signature.of_rows(1, few[:40], few[40:], torch.zeros(96))
    # Rows that occur twice have the same mean and, but for its degrees of freedom, the same covariance.
    twice = Signature.of_rows(1, few[:40].repeat(2, 1), few[40:].repeat(2, 1), torch.zeros(96))
    scale = 78 / 158 * 2
    assert twice.rest == pytest.approx(wide.rest * scale, rel=1e-6)
    torch.testing.assert_close(twice.factor.T @ twice.factor, wide.factor.T @ wide.factor * scale, rtol=1e-4, atol=1e-3)


def test_rows_are_described_by_their_first_tokens() -> None:
    states = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    alike = states / states.pow(2).mean(-1, keepdim=True).sqrt()
    mask = torch.ones(2, 50)
    mask[1, :12] = 0
    found = describe_rows(states, mask)
    torch.testing.assert_close(found, torch.stack([alike[0, :32].mean(0), alike[1, 12:44].mean(0)]))
    torch.testing.assert_close(describe_rows(states)[0], found[0])
    torch.testing.assert_close(describe_rows(1000 * states, mask), found)
    assert describe_rows(states[:, :7]).isnan().all() and describe_rows(states[:, :8]).isfinite().all()
    states[1, :12] = torch.nan  # padding counts for nothing
    torch.testing.assert_close(describe_rows(states, mask), found)


def test_a_llama(tmp_path: Path) -> None:
    """With a beginning-of-text token, if the tokenizer has one."""
    folder = make_family(tmp_path, tiny_llama_model)
    rows = [torch.randint(first, first + 6, (3200,)) for first in (10, 90)]
    assert sign(folder / "donor", *rows, quiet=True).rows == (80, 80)

"""Cards of real saves: their facts, and snippets that run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification

from tests.helpers import Shelf, copied, edit_json, loaded, refused, tiny_gpt2_model, tiny_llama_model, two_donors
from tests.hub_server.client import run_with_hub
from transplant_hf import AutoModelWithTransplant, ConfigurationError, Donor, DonorSpec, transplant
from transplant_hf.layer_map import LayerMap

ROOT = Path(__file__).parents[2]
# The variant with trust_remote_code=True comes first in a process: after the other it would be no test.
WITHOUT_IMPORT = "import sys\nassert 'transplant_hf' not in sys.modules\n{}"


def card_in(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def snippets(card: ModelCard) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card.text, flags=re.S | re.M)


def run_in(folder: Path, code: str, **environment: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(folder / "modules"), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, f"{code}\n{run.stdout}\n{run.stderr}"


# -- Facts -----------------------------------------------------------------------------------------------------------


def test_the_map_of_a_donor_follows_the_recipient(tiny: Path) -> None:
    """GPT-2 says n_layer, the others num_hidden_layers."""
    assert str(LayerMap(loaded(tiny).layer_map)) in card_in(tiny / "donor").text


def test_the_map_of_a_recipient_that_is_not_here(tmp_path: Path) -> None:
    donor = Donor.from_model(tiny_llama_model(0), [1, 2], name="law")
    donor.save_pretrained(tmp_path / "law", position=3, recipient="user/elsewhere")
    text = card_in(tmp_path / "law").text
    assert "    4  |  law 2\n```" in text
    assert "The other layers of the recipient follow." in text


def test_files_and_metadata(tiny_gpt2: Path, tmp_path: Path) -> None:
    family = copied(tiny_gpt2, tmp_path / "family")
    edit_json(family / "donor" / "donor_config.json", metadata={"perplexity": 52.5, "license": "mit"})
    for target, save in (
        ("thin", lambda: loaded(family).save_pretrained(tmp_path / "thin", thin=True)),
        ("donor", lambda: Donor.from_pretrained(family / "donor").save_pretrained(tmp_path / "donor")),
    ):
        edit_json(family / "donor" / "config.json", recipient=str(family / "recipient"))
        if target == "donor":
            edit_json(
                family / "donor" / "donor_config.json", source={"id": str(family / "recipient"), "revision": None}
            )
        save()
        card = card_in(tmp_path / target)
        record = json.loads((tmp_path / target / "donor_config.json").read_text())
        for name, stamp in record["files"].items():
            assert f"- `{name}`, {stamp['size']:,} bytes, sha256 `{stamp['sha256']}`" in card.text
        assert card.data.license == "mit"
        assert "- `perplexity`: `52.5`" in card.text
        assert "transplant_hf measured none of them" in card.text
        assert str(tmp_path) not in card.text


def test_several_donors_have_a_card_too(tiny: Path, tmp_path: Path) -> None:
    model = two_donors(tiny, "replace")
    model.save_pretrained(tmp_path / "thin", thin=True)
    card = card_in(tmp_path / "thin")
    assert str(LayerMap(model.layer_map)) in card.text
    assert "`a/donor.safetensors`" in card.text
    assert "- `b`: 2, replacing 2 of the recipient's layers" in card.text
    assert "keep_replaced=True" in card.text and "generate.model.disable_transplants()" not in card.text


def test_a_full_save_with_a_donor_switched_off(tiny_gpt2: Path, tmp_path: Path) -> None:
    model = two_donors(tiny_gpt2)
    with model.disable_transplants("a"):
        model.save_pretrained(tmp_path / "full")
        layer_map = str(LayerMap(model.layer_map))
    text = card_in(tmp_path / "full").text
    assert layer_map in text
    assert "- `b`:" in text
    assert "- `a`:" not in text


def test_a_head_that_does_not_generate(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama / "donor")
    model.save_pretrained(tmp_path / "full")
    card = card_in(tmp_path / "full")
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text


def test_a_transplant_in_memory_names_no_base_model(tiny_gpt2: Path, tmp_path: Path) -> None:
    donor = Donor.from_model(tiny_gpt2_model(2), [1], name="law")
    transplant(tiny_gpt2_model(1), donor, 1).save_pretrained(tmp_path / "full")
    card = card_in(tmp_path / "full")
    assert "base_model" not in card.data.to_dict()
    assert "a model that was not loaded by name" in card.text


@pytest.mark.hub
def test_base_models_on_the_hub(both: Shelf, tmp_path: Path) -> None:
    model = AutoModelWithTransplant.from_pretrained(
        both.base, donors=[DonorSpec(both.law, 1), DonorSpec(str(both.family / "donor"), 2, name="local")]
    )
    model.save_pretrained(tmp_path / "full")
    card = card_in(tmp_path / "full")
    assert card.data.base_model == [both.base, both.law]
    assert card.data.base_model_relation == "merge"
    for fact in (f"`{both.base}` at `{both.base_commit}`", f"from `{both.law}` at `{both.law_commit}`"):
        assert fact in card.text
    assert str(both.family) not in card.text
    model.save_pretrained(tmp_path / "thin", thin=True)
    thin = card_in(tmp_path / "thin")
    assert (thin.data.base_model, thin.data.base_model_relation) == (both.base, "adapter")


# -- Licenses --------------------------------------------------------------------------------------------------------


def test_a_license_that_is_passed(tiny_gpt2: Path, tmp_path: Path) -> None:
    model = loaded(tiny_gpt2)
    model.save_pretrained(tmp_path / "thin", thin=True, license="mit")
    model.save_pretrained(tmp_path / "full", license="cc-by-4.0")
    donor = Donor.from_pretrained(tiny_gpt2 / "donor")
    donor.save_pretrained(tmp_path / "donor", recipient=str(tiny_gpt2 / "recipient"), license="apache-2.0")
    found = {name: card_in(tmp_path / name).data.license for name in ("thin", "full", "donor")}
    assert found == {"thin": "mit", "full": "cc-by-4.0", "donor": "apache-2.0"}
    with refused(ConfigurationError, "license", "'My own'"):
        model.save_pretrained(tmp_path / "other", license="My own")
    assert not (tmp_path / "other").exists()


def test_a_license_in_the_recipients_card(tiny_gpt2: Path, tmp_path: Path) -> None:
    family = copied(tiny_gpt2, tmp_path / "family")
    (family / "recipient" / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    model = loaded(family)
    model.save_pretrained(tmp_path / "thin", thin=True)
    assert card_in(tmp_path / "thin").data.license == "mit"
    model.save_pretrained(tmp_path / "full")
    assert card_in(tmp_path / "full").data.license is None, "the donor's own is not known"
    edit_json(family / "donor" / "donor_config.json", metadata={"license": "mit"})
    loaded(family).save_pretrained(tmp_path / "full")
    assert card_in(tmp_path / "full").data.license == "mit"
    edit_json(family / "donor" / "donor_config.json", metadata={"license": "cc-by-nc-4.0"})
    loaded(family).save_pretrained(tmp_path / "full")
    assert card_in(tmp_path / "full").data.license is None, "they differ"


@pytest.mark.parametrize("content", [b"---\nlicense: [\n---\n", b"---\n- x\n---\n", b"\xff\xfe\x00", b"none"])
def test_a_recipients_card_that_cannot_be_read(tiny_gpt2: Path, tmp_path: Path, content: bytes) -> None:
    family = copied(tiny_gpt2, tmp_path / "family")
    (family / "recipient" / "README.md").write_bytes(content)
    loaded(family).save_pretrained(tmp_path / "thin", thin=True)
    assert card_in(tmp_path / "thin").data.license is None


# -- Snippets --------------------------------------------------------------------------------------------------------


def test_the_snippets_of_a_donor_run(tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family := copied(tiny_gpt2, tmp_path / "family"))
    codes = snippets(card_in(family / "donor"))
    assert len(codes) == 2
    assert codes[0].startswith("import transplant_hf")
    assert "import transplant_hf" not in codes[1]
    for code in codes:
        exec(code, {})  # noqa: S102 - our own card


@pytest.mark.slow
def test_the_snippet_without_the_import_runs_in_a_process_without_it(tiny_gpt2: Path, tmp_path: Path) -> None:
    family = copied(tiny_gpt2, tmp_path / "family")
    codes = snippets(card_in(family / "donor"))
    run_in(family, WITHOUT_IMPORT.format(codes[1]) + codes[0])


@pytest.mark.slow
def test_the_snippets_of_full_saves_run(tiny_gpt2: Path, inverse_gpt2: Path, tmp_path: Path) -> None:
    loaded(tiny_gpt2).save_pretrained(tmp_path / "native")
    loaded(inverse_gpt2).save_pretrained(tmp_path / "surgery")
    codes = snippets(card_in(tmp_path / "native"))
    assert len(codes) == 1
    run_in(tmp_path, f"{codes[0]}\nimport sys\nassert 'transplant_hf' not in sys.modules")
    codes = snippets(card_in(tmp_path / "surgery"))
    assert len(codes) == 2
    run_in(tmp_path, WITHOUT_IMPORT.format(codes[1]) + codes[0])


@pytest.mark.slow
@pytest.mark.hub
def test_the_snippets_of_repositories_run(both: Shelf, tmp_path: Path) -> None:
    model = AutoModelWithTransplant.from_pretrained(both.law)
    for thin in (True, False):
        model.save_pretrained(tmp_path / "out", thin=thin)
        repo = f"{both.law}-snippet-{thin}"
        text = (tmp_path / "out" / "README.md").read_text().replace('"out"', f'"{repo}"')
        both.hub.add_repo(repo, tmp_path / "out")
        code = "".join(reversed(snippets(ModelCard(text))))
        run = run_with_hub(both.hub, code, cache=tmp_path / "cache")
        assert run.returncode == 0, f"{code}\n{run.stderr}"


@pytest.mark.slow
def test_the_snippets_of_the_seeds_run(tiny_gpt2: Path, tmp_path: Path) -> None:
    """With a tiny donor under the name that the conversion gives."""
    family = copied(tiny_gpt2, tmp_path / "family")
    (family / "donor").rename(family / "not-gpt2")
    codes = snippets(ModelCard.load(ROOT / "model_cards" / "not-gpt2.md"))
    run_in(family, WITHOUT_IMPORT.format(codes[1]) + codes[0])

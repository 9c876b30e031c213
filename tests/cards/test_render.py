"""Cards from facts: every field, strangers' text that stays text, numbers that are quoted and never invented."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import pytest
import yaml
from huggingface_hub import ModelCard

from tests.helpers import refused
from transplant_hf import CheckpointError, ConfigurationError
from transplant_hf.cards import (
    CardFacts,
    DonorFacts,
    FileFacts,
    License,
    donor_card,
    full_card,
    license_in,
    license_named,
    render,
    written_by_us,
)
from transplant_hf.layer_map import Placement, Splice

SHA = "c" * 40
DONOR = DonorFacts(
    name="law",
    layers=(4, 5),
    position=1,
    reference="user/law",
    revision="d" * 40,
    source="user/base",
    metadata={"perplexity": 52.5, "dataset": "wikitext", "method": {"lr": [0.01]}},
    files=(FileFacts("donor.safetensors", 81_234_567, "e" * 64),),
)
FACTS = CardFacts(
    repo="user/law",
    model_type="gpt2",
    donors=(DONOR,),
    layer_map=Splice(12, [Placement("law", 1, (4, 5))]).layer_map(),
    recipient="user/base",
    recipient_revision=SHA,
    license=License("apache-2.0"),
)
CARDS: list[Callable[[CardFacts], ModelCard]] = [donor_card, full_card]


def reread(card: ModelCard) -> ModelCard:
    """The card as the Hub's own reader finds it in a file."""
    again = ModelCard(str(card))
    assert str(again) == str(card)
    return again


def with_donor(**changes: Any) -> CardFacts:
    return dataclasses.replace(FACTS, donors=(dataclasses.replace(DONOR, **changes),))


# -- What a card says ------------------------------------------------------------------------------------------------


def test_a_donors_card() -> None:
    card = reread(donor_card(FACTS))
    data = card.data.to_dict()
    results = data.pop("model-index")
    assert data == {
        "base_model": "user/base",
        "base_model_relation": "adapter",
        "library_name": "transplant-hf",
        "pipeline_tag": "text-generation",
        "tags": ["transplant", "neural-organ-transplantation", "gpt2"],
        "license": "apache-2.0",
        "datasets": ["wikitext"],
    }
    assert results == [
        {
            "name": "user/law",
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"name": "wikitext", "type": "wikitext"},
                    "metrics": [
                        {
                            "type": "perplexity",
                            "value": 52.5,
                            "name": "perplexity (reported by the donor's author)",
                        }
                    ],
                }
            ],
        }
    ]
    facts = [
        "# law\n",
        "2 decoder layers of `user/base` (`gpt2`, layers 4, 5), to be inserted at position 1",
        f"**Recipient:** `user/base` at `{SHA}`",
        "import transplant_hf",
        'model="user/law")',
        'model="user/law", trust_remote_code=True)',
        str(FACTS.layer_map),
        "arXiv 2601.13580",
        "What the author reports",
        "transplant_hf measured none of them",
        '- `method`: `{"lr": [0.01]}`',
        f"- `donor.safetensors`, 81,234,567 bytes, sha256 `{'e' * 64}`",
        "works only in the recipient that it names",
        "tuned LoRA",
        "no safety evaluation",
        "License: `apache-2.0`.",
        "@misc{neural-organ-transplantation,",
    ]
    assert not [fact for fact in facts if fact not in card.text]


def test_the_card_of_a_full_export() -> None:
    card = reread(full_card(dataclasses.replace(FACTS, native=True)))
    assert card.data.base_model == ["user/base", "user/law"]
    assert card.data.base_model_relation == "merge"
    assert card.data.library_name == "transplant-hf"
    assert "transformers" in card.data.tags
    assert "model-index" not in card.data.to_dict(), "the donor's author measured something else"
    facts = [
        f"`user/base` at `{SHA}`",
        f"- `law`, from `user/law` at `{'d' * 40}`: layers 4, 5 of `user/base`, inserted at position 1",
        "without transplant_hf",
        f'AutoTokenizer.from_pretrained("user/base", revision="{SHA}")',
        str(FACTS.layer_map),
        "not about this repository as a whole",
    ]
    assert not [fact for fact in facts if fact not in card.text]
    assert "import transplant_hf" not in card.text


def test_the_card_of_a_full_export_in_the_transplant_format() -> None:
    card = reread(full_card(FACTS))
    assert "transformers" not in card.data.tags
    assert "needs the Python package transplant_hf, installed from its own sources" in card.text
    assert "import transplant_hf" in card.text
    assert "trust_remote_code=True)" in card.text
    headless = full_card(dataclasses.replace(FACTS, auto_class="AutoModel", task=None))
    assert headless.data.pipeline_tag is None
    assert 'model = AutoModel.from_pretrained("user/law")' in headless.text
    assert "pipeline(" not in headless.text


def test_what_is_not_known_is_left_out() -> None:
    bare = DonorFacts("law", (4,), 0)
    facts = CardFacts("law", "gpt2", (bare,), Splice(0, [Placement("law", 0, (4,))]).layer_map(), whole_map=False)
    for render_card in CARDS:
        card = reread(render_card(facts))
        kept = {"library_name", "pipeline_tag", "tags"}
        assert set(card.data.to_dict()) == kept
        assert "reports" not in card.text
        assert "## Files" not in card.text
        assert "None" not in card.text
        assert "No license is recorded" in card.text
        assert "\n\n\n" not in card.text
    assert "The recipient's further layers follow." in donor_card(facts).text


@pytest.mark.parametrize("recipient", ["/models/base", "../base", "./base", "~/base", "a/b/c", ".."])
def test_a_folder_is_no_base_model(recipient: str) -> None:
    donors = (dataclasses.replace(DONOR, reference=None, source=recipient),)
    for render_card in CARDS:
        card = render_card(dataclasses.replace(FACTS, recipient=recipient, donors=donors))
        assert card.data.base_model is None
        assert "base_model_relation" not in card.data.to_dict()
        assert "/models" not in card.text


def test_a_folder_here_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert donor_card(dataclasses.replace(FACTS, recipient_revision=None)).data.base_model is None
    assert donor_card(FACTS).data.base_model == "user/base"  # a name with a commit is never a folder
    assert full_card(FACTS).data.base_model == "user/law"


def test_without_a_tokenizer_the_snippets_name_the_recipients() -> None:
    for render_card in CARDS:
        text = render_card(dataclasses.replace(FACTS, with_tokenizer=False)).text
        assert text.count('model="user/law", tokenizer="user/base"') == 2
        assert "tokenizer=" not in render_card(dataclasses.replace(FACTS, with_tokenizer=False, recipient="../x")).text


def test_several_donors() -> None:
    second = DonorFacts("code", (0,), 3, "replace", metadata={"note": "x"})
    strong = dataclasses.replace(DONOR, strength=0.5)
    card = reread(donor_card(dataclasses.replace(FACTS, donors=(strong, second))))
    facts = [
        "2 donors",
        "- `law`: 1, at strength 0.5",
        "- `code`: 3, replacing 1 of the recipient's layers",
        "`law`:\n\n- `perplexity`",
        "`code`:\n\n- `note`",
    ]
    assert not [fact for fact in facts if fact not in card.text]


# -- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("render_card", CARDS)
def test_a_perplexity_that_is_not_finite(render_card: Callable[[CardFacts], ModelCard], value: float) -> None:
    with refused(CheckpointError, "'law'", f"eval_perplexity={value}", "finite"):
        render_card(with_donor(metadata={"eval_perplexity": value}))


def test_what_is_no_perplexity_is_no_result() -> None:
    metadata = {"loss": 3.5, "perplexity": "52.5", "best_perplexity": True, "epochs": 3}
    card = donor_card(with_donor(metadata=metadata))
    assert "model-index" not in card.data.to_dict()
    assert "- `perplexity`: `52.5`" in card.text


def test_a_perplexity_without_a_data_set() -> None:
    card = donor_card(with_donor(metadata={"perplexity": 3}))
    dataset = card.data.to_dict()["model-index"][0]["results"][0]["dataset"]
    assert dataset == {"name": "not recorded", "type": "unknown"}
    assert card.data.datasets is None


# -- Licences --------------------------------------------------------------------------------------------------------


def test_a_licence_that_was_recorded() -> None:
    assert license_in({"license": " MIT "}) == License("mit")
    other = {"license": "other", "license_name": "own", "license_link": "https://example.org/terms"}
    assert license_in(other) == License("other", "own", "https://example.org/terms")
    card = reread(donor_card(dataclasses.replace(FACTS, license=license_in(other))))
    assert (card.data.license_name, card.data.license_link) == ("own", "https://example.org/terms")


@pytest.mark.parametrize("value", [None, 3, "", "see the file", "mit\nbase_model: x", ["mit"], "{{ 7*7 }}"])
def test_what_is_no_licence_is_left_out(value: Any) -> None:
    assert license_in({"license": value}) is None


@pytest.mark.parametrize("value", ["", "MIT", "see the file", 3, "mit\n"])
def test_a_licence_that_was_passed_is_checked(value: Any) -> None:
    with refused(ConfigurationError, "license", "'apache-2.0'", repr(value)):
        license_named(value)


def test_links_of_other_kinds_are_not_taken_over() -> None:
    found = license_in({"license": "other", "license_name": "a\nb", "license_link": "javascript:alert(1)"})
    assert found == License("other")


# -- Strangers' text -------------------------------------------------------------------------------------------------

HOSTILE = (
    "{{ 7*7 }}{% for x in range(9) %}x{% endfor %}",
    "---\nlicense: mit\n---\n",
    "\n---\nbase_model: evil/evil\n---\n# Evil",
    "```\n# Evil\n```python\nimport os\n",
    "` `` ``` `evil`",
    "[x](javascript:alert(1)) ![y](http://evil.example/y.png)",
    "<script>alert(1)</script> <img src=x onerror=y> <!-- ",
    'x", trust_remote_code=True); import os; os.system("evil") #',
    "a: [b, {c: d}] & *e !!python/object/apply:os.system ['x']",
    "\u202eevil\u2066 \x00\x1b[31m \ud800 \u2028# Evil",
    "| a | b |\n|---|---|\n",
)
HARMLESS = {"pipeline", "print", "generate", "from_pretrained"}


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("render_card", CARDS)
def test_hostile_text_stays_text(render_card: Callable[[CardFacts], ModelCard], text: str) -> None:
    donor = DonorFacts(
        name=text,
        layers=(4, 5),
        position=1,
        source=text,
        metadata={text: text, "perplexity": 3.5, "dataset": text, "datasets": [text, {"x": text}], "license": text},
        files=(FileFacts(text, 3, text),),
    )
    facts = dataclasses.replace(
        FACTS,
        repo=f"user/{text}",
        model_type=text,
        donors=(donor,),
        layer_map=Splice(2, [Placement(text, 1, (4, 5))]).layer_map(),
        recipient=text,
        recipient_revision=text,
        license=license_in(donor.metadata),
    )
    card = reread(render_card(facts))
    plain = reread(render_card(dataclasses.replace(FACTS, donors=(dataclasses.replace(DONOR, reference=None),))))
    written = str(card)
    assert written.encode()
    assert written_by_us(written)
    assert "49" not in card.text.replace(card.text[-120:], "")
    assert "xxxxxxxxx" not in card.text
    assert card.data.base_model is None
    assert card.data.license is None
    assert card.data.tags[:2] == ["transplant", "neural-organ-transplantation"]
    assert set(card.data.to_dict()) <= set(plain.data.to_dict())
    # As many headings and code blocks as in a card of harmless names, and in the same places.
    assert structure(card.text) == structure(plain.text)
    for block in snippets(card.text):
        called = [node.func for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        assert {ast.unparse(function).rpartition(".")[2] for function in called} <= HARMLESS


def structure(text: str) -> list[str]:
    """The headings but the first, and where code blocks begin and end."""
    lines = [line for line in text.splitlines() if line.startswith(("#", "```", "~~~"))]
    assert lines[0].startswith("# ")
    return lines[1:]


def snippets(text: str) -> list[str]:
    """The Python blocks of a card."""
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.S | re.M)


def test_markdown_outside_of_code_is_escaped() -> None:
    title = donor_card(with_donor(name="[x](javascript:y) <b> my_law `z`")).text.splitlines()[1]
    assert title == r"# \[x\]\(javascript\:y\) \<b\> my\_law \`z\`"


def test_long_metadata_is_cut() -> None:
    metadata = {f"key{number}": "x" * 5000 for number in range(60)}
    card = donor_card(with_donor(metadata=metadata))
    assert "- and 20 more" in card.text
    assert len(card.text) < 20_000


def test_the_header_is_plain_yaml() -> None:
    """Without the Hub's own reader."""
    header = str(donor_card(FACTS)).split("---\n")[1]
    assert yaml.safe_load(header)["base_model"] == "user/base"


# -- Templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [render.DONOR_TEMPLATE, render.FULL_TEMPLATE])
def test_a_template_asks_for_nothing_that_is_not_given(name: str) -> None:
    """Jinja leaves out silently what it does not find."""
    parsed = jinja2.Environment().parse(render.template_path(name).read_text(encoding="utf-8"))
    assert jinja2.meta.find_undeclared_variables(parsed) <= {"card_data", "title", *render._variables(FACTS)}


def test_a_missing_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "PLACES", (tmp_path / "a", tmp_path / "b"))
    with refused(ConfigurationError, "donor.md", str(tmp_path / "a"), str(tmp_path / "b"), "install"):
        donor_card(FACTS)

"""Cards from facts: every field, text of others that stays text, numbers that are quoted and never invented."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import pytest
import yaml
from huggingface_hub import ModelCard

from tests.helpers import refused
from transplant_hf import ConfigurationError, DonorSpec, TransplantConfig
from transplant_hf.cards import (
    DONOR_TEMPLATE,
    FULL_TEMPLATE,
    TRAINED_HERE,
    check_license,
    render,
    render_card,
    written_by_us,
)
from transplant_hf.cards.licenses import license_in
from transplant_hf.donor import DonorRecord
from transplant_hf.donor.record import FileStamp
from transplant_hf.heads import BASE
from transplant_hf.layer_map import Placement, Splice

SHA, DONOR_SHA = "c" * 40, "d" * 40
TEMPLATES = [DONOR_TEMPLATE, FULL_TEMPLATE]
RECORD = DonorRecord(
    model_type="gpt2",
    source_config={"model_type": "gpt2", "n_layer": 12},
    layer_indices=(4, 5),
    source_id="user/base",
    name="law",
    metadata={"perplexity": 52.5, "dataset": "wikitext", "method": {"lr": [0.01]}},
    files={"donor.safetensors": FileStamp("e" * 64, 81_234_567)},
)
SPEC = DonorSpec("user/law", 1, name="law", revision=DONOR_SHA)
LAYER_MAP = Splice(12, [Placement("law", 1, (4, 5))]).layer_map()


def card_of(
    template: str,
    *pairs: tuple[DonorSpec, DonorRecord],
    repo: str = "user/law",
    recipient: str = "user/base",
    revision: str | None = SHA,
    **options: Any,
) -> ModelCard:
    """Render a card and read it as the Hub does."""
    specs, records = zip(*(pairs or [(SPEC, RECORD)]), strict=True)
    config = TransplantConfig(recipient=recipient, recipient_revision=revision, donors=list(specs))
    card = render_card(template, repo, config, records, **{"license": "apache-2.0", "num_layers": 12, **options})
    again = ModelCard(str(card))
    assert str(again) == str(card)
    return again


def with_metadata(**metadata: Any) -> tuple[DonorSpec, DonorRecord]:
    return SPEC, dataclasses.replace(RECORD, metadata=metadata)


def assert_facts(card: ModelCard, *facts: str) -> None:
    assert not [fact for fact in facts if fact not in card.text]


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_a_training_recorded_is_not_a_claim_of_the_author(template: str) -> None:
    trained = card_of(template, with_metadata(made_by=TRAINED_HERE, steps=7)).text
    assert "## Training" in trained and "report" not in trained and "`steps`: `7`" in trained
    recovered = card_of(template, with_metadata(method="own", recovered={"steps": 7})).text
    training, author = recovered.index("## Training"), recovered.index("claims")
    assert training < recovered.index("`recovered`") < author < recovered.index("`method`")
    assert "## Training" not in card_of(template).text


# -- What a card says ------------------------------------------------------------------------------------------------


def test_a_donors_card() -> None:
    card = card_of(DONOR_TEMPLATE)
    assert card.data.to_dict() == {
        "base_model": "user/base",
        "base_model_relation": "adapter",
        "library_name": "transplant-hf",
        "pipeline_tag": "text-generation",
        "tags": ["transplant", "neural-organ-transplantation", "gpt2"],
        "license": "apache-2.0",
        "datasets": ["wikitext"],
    }
    assert_facts(
        card,
        "# law\n",
        "2 decoder layers of `user/base` (`gpt2`, layers 4, 5), to be inserted at position 1",
        f"**Recipient:** `user/base` at `{SHA}`",
        "checkout of its repository with `pip install .`",
        'model="user/law")',
        'model="user/law", trust_remote_code=True)',
        str(LAYER_MAP),
        "arXiv 2601.13580",
        "What the author reports",
        "transplant_hf measured none of them",
        '- `method`: `{"lr": [0.01]}`',
        "- `perplexity`: `52.5`",
        f"- `donor.safetensors`, 81,234,567 bytes, sha256 `{'e' * 64}`",
        "was made for the recipient that it names",
        "Evaluate on your own data.",
        "no safety evaluation",
        "License: `apache-2.0`.",
        "@article{alzuraiqi2026neural,",
    )


def test_the_card_of_a_full_export() -> None:
    card = card_of(FULL_TEMPLATE, native=True, layer_map=LAYER_MAP)
    assert card.data.base_model == ["user/base", "user/law"]
    assert card.data.base_model_relation == "merge"
    assert "transformers" in card.data.tags
    assert_facts(
        card,
        f"`user/base` at `{SHA}`",
        f"- `law`, from `user/law` at `{DONOR_SHA}`: layers 4, 5 of `user/base`, inserted at position 1",
        "without transplant_hf",
        f'AutoTokenizer.from_pretrained("user/base", revision="{SHA}")',
        str(LAYER_MAP),
        "not about this repository as a whole",
    )
    assert "import transplant_hf" not in card.text
    assert "## Files" not in card.text


def test_the_card_of_a_full_export_in_the_transplant_format() -> None:
    card = card_of(FULL_TEMPLATE)
    assert "transformers" not in card.data.tags
    assert_facts(card, "needs the Python package transplant_hf", "import transplant_hf", "trust_remote_code=True)")
    headless = card_of(FULL_TEMPLATE, head=BASE)
    assert headless.data.pipeline_tag is None
    assert 'model = AutoModel.from_pretrained("user/law")' in headless.text
    assert "pipeline(" not in headless.text


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_not_known_is_left_out(template: str) -> None:
    bare = DonorSpec(".", 0, name="law"), DonorRecord("gpt2", {}, (4,))
    card = card_of(template, bare, repo="law", recipient="", revision=None, license=None, num_layers=None)
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert_facts(card, "No license is recorded", "a model that was not loaded by name")
    for text in ("report", "## Files", "None", "\n\n\n"):
        assert text not in card.text
    if template == DONOR_TEMPLATE:
        assert "The other layers of the recipient follow." in card.text


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("recipient", ["/models/base", "../base", "./base", "~/base", "a/b/c", ".."])
def test_a_folder_is_no_base_model(recipient: str, template: str) -> None:
    local = dataclasses.replace(SPEC, donor=".", revision=None), dataclasses.replace(RECORD, source_id=recipient)
    card = card_of(template, local, recipient=recipient)
    assert card.data.base_model is None
    assert "base_model_relation" not in card.data.to_dict()
    assert "/models" not in card.text


def test_a_folder_here_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert card_of(DONOR_TEMPLATE, revision=None).data.base_model is None
    assert card_of(DONOR_TEMPLATE).data.base_model == "user/base"  # a name with a commit is never a folder


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_a_tokenizer_the_examples_name_the_recipients(template: str) -> None:
    text = card_of(template, with_tokenizer=False).text
    assert text.count('model="user/law", tokenizer="user/base"') == 2
    assert "tokenizer=" not in card_of(template, with_tokenizer=False, recipient="../x").text


def test_several_donors() -> None:
    second = (
        DonorSpec(".", 3, "replace", name="code"),
        dataclasses.replace(RECORD, layer_indices=(0,), metadata={"note": "x"}),
    )
    card = card_of(DONOR_TEMPLATE, (dataclasses.replace(SPEC, strength=0.5), RECORD), second)
    assert_facts(
        card,
        "2 donors",
        "- `law`: 1, at strength 0.5",
        "- `code`: 3, replacing 1 of the recipient's layers",
        "`law`:\n\n- `perplexity`",
        "`code`:\n\n- `note`",
    )


def test_perplexities_that_a_training_measured() -> None:
    held_out = {"law": {"recipient": 20.5, "trained": None}}
    card = card_of(DONOR_TEMPLATE, with_metadata(held_out_perplexity=held_out, steps=3))
    assert_facts(card, "- `law`: recipient 20.50, trained too large", "Perplexity on held-out text")


# -- Licenses --------------------------------------------------------------------------------------------------------


def test_a_license_that_was_recorded() -> None:
    assert license_in({"license": " MIT "}) == {"license": "mit"}
    other = {"license": "other", "license_name": "own", "license_link": "https://example.org/terms"}
    assert license_in(other) == other
    card = card_of(DONOR_TEMPLATE, with_metadata(**other), license=None)
    assert (card.data.license_name, card.data.license_link) == ("own", "https://example.org/terms")
    assert license_in({**other, "license_name": "a\nb", "license_link": "javascript:x"}) == {"license": "other"}


@pytest.mark.parametrize("value", [None, 3, "", "see the file", "mit\nbase_model: x", ["mit"], "{{ 7*7 }}"])
def test_what_is_no_license_is_left_out(value: Any) -> None:
    assert license_in({"license": value}) == {}


@pytest.mark.parametrize("value", ["", "MIT", "see the file", 3, "mit\n"])
def test_a_license_that_was_passed_is_checked(value: Any) -> None:
    with refused(ConfigurationError, "license", "'apache-2.0'", repr(value)):
        check_license(value)


# -- Text of others --------------------------------------------------------------------------------------------------

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
@pytest.mark.parametrize("template", TEMPLATES)
def test_hostile_text_stays_text(template: str, text: str) -> None:
    record = dataclasses.replace(
        RECORD,
        model_type=text,
        source_id=text,
        metadata={text: text, "perplexity": 3.5, "dataset": text, "datasets": [text, {"x": text}], "license": text},
        files={text: FileStamp(text, 3)},
    )
    spec = dataclasses.replace(SPEC, donor=".", revision=None)
    named = spec
    with contextlib.suppress(ConfigurationError):  # a specification refuses most such names itself
        named = dataclasses.replace(spec, name=text)
    options = {"layer_map": Splice(2, [Placement(text, 1, (4, 5))]).layer_map(), "license": None}
    where = {"repo": f"user/{text}", "recipient": text.replace("\0", ""), "revision": text.replace("\0", "")}
    card = card_of(template, (named, record), **where, **options)  # type: ignore[arg-type]
    plain = card_of(template, (spec, RECORD), layer_map=LAYER_MAP)
    written = str(card)
    assert written.encode() and written_by_us(written)
    assert "49" not in card.text.replace(card.text[-120:], "")
    assert "xxxxxxxxx" not in card.text
    assert card.data.base_model is None and card.data.license is None
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
    title = card_of(FULL_TEMPLATE, repo="[x](javascript:y) <b> my_law `z`").text.splitlines()[1]
    assert title == r"# \[x\]\(javascript\:y\) \<b\> my\_law \`z\`"


def test_long_metadata_is_cut() -> None:
    card = card_of(DONOR_TEMPLATE, with_metadata(**{f"key{number}": "x" * 5000 for number in range(60)}))
    assert "- and 20 more" in card.text
    assert len(card.text) < 20_000


def test_the_header_is_plain_yaml() -> None:
    """Without the Hub's own reader."""
    header = str(card_of(DONOR_TEMPLATE)).split("---\n")[1]
    assert yaml.safe_load(header)["base_model"] == "user/base"


# -- Templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_has_all_its_variables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jinja leaves out silently what it does not find."""
    seen: set[str] = set()
    original = ModelCard.from_template

    def watched(*args: Any, **values: Any) -> Any:
        seen.update(values)
        return original(*args, **values)

    monkeypatch.setattr(ModelCard, "from_template", watched)
    card_of(name)
    parsed = jinja2.Environment().parse(render.template_path(name).read_text(encoding="utf-8"))
    assert jinja2.meta.find_undeclared_variables(parsed) <= {"card_data", *seen}


def test_a_missing_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "PLACES", (tmp_path / "a", tmp_path / "b"))
    with refused(ConfigurationError, "donor.md", str(tmp_path / "a"), str(tmp_path / "b"), "install"):
        card_of(DONOR_TEMPLATE)

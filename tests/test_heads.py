"""Every Auto class on a transplant's name: the head that the recipient's type has, or which ones it has."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from transformers import (
    AutoModelForCTC,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    pipeline,
)

from tests.architectures.tiny_models import tiny_model
from tests.helpers import refused, some_ids
from transplant_hf import CompatibilityError, Donor, TransplantConfig
from transplant_hf.donor.entry import AUTO_MAP
from transplant_hf.heads import BASE, CAUSAL_LM, HEADS, auto_classes, auto_classes_for, head_of
from transplant_hf.registration import LOADERS, register


def test_every_auto_class_knows_transplants() -> None:
    register()
    every = {name for name in dir(transformers) if name.startswith("AutoModel")} - {"AutoModelForDecision"}
    assert {auto.__name__ for auto in auto_classes()} == every
    for auto in auto_classes():
        assert TransplantConfig in auto._model_mapping, auto
    assert {head.loader for head in HEADS} <= set(LOADERS)
    assert {name.rpartition(".")[2] for name in AUTO_MAP.values()} <= {"TransplantConfig", *LOADERS}


@pytest.mark.parametrize(
    ("auto", "named"),
    [(AutoModelForQuestionAnswering, "GPT2ForQuestionAnswering"), (AutoModelForPreTraining, "GPT2LMHeadModel")],
)
def test_a_donor_by_other_heads(tiny_gpt2: Path, auto: type, named: str) -> None:
    model = auto.from_pretrained(tiny_gpt2 / "donor")  # type: ignore[attr-defined]
    assert type(model).__name__ == named
    assert [slot.source for slot in model.layer_map][1:3] == ["donor", "donor"]
    assert model(some_ids()) is not None


def test_a_multimodal_donor_by_the_heads_of_its_recipient(tmp_path: Path) -> None:
    tiny_model("gemma3").save_pretrained(tmp_path / "recipient")
    donor = Donor.from_model(tiny_model("gemma3", seed=1), [1, 2], name="law")
    donor.save_pretrained(tmp_path / "donor", position=1, recipient=str(tmp_path / "recipient"))
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto.from_pretrained(tmp_path / "donor")
        assert type(model).__name__ == "Gemma3ForConditionalGeneration"
        assert len(model.layer_map) == 6


def test_a_head_that_the_recipients_type_has_not(tiny_gpt2: Path) -> None:
    with refused(CompatibilityError, "gpt2", "no such head", "AutoModelForCTC has no class", "AutoModelForCausalLM,"):
        AutoModelForCTC.from_pretrained(tiny_gpt2 / "donor")
    with pytest.raises(CompatibilityError, match="AutoModelForImageTextToText has no class"):
        AutoModelForImageTextToText.from_pretrained(tiny_gpt2 / "donor")


def test_a_pipeline_goes_on_to_a_head_that_there_is(tiny_gpt2: Path) -> None:
    """It tries `AutoModelForDecision` and `AutoModelForImageTextToText` first, which GPT-2 has no class for."""
    found = pipeline("decision", model=str(tiny_gpt2 / "donor"), tokenizer=str(tiny_gpt2 / "recipient"))
    assert type(found.model).__name__ == "GPT2LMHeadModel"


def test_the_head_of_a_class() -> None:
    config = tiny_model("gpt2").config
    assert head_of(["GPT2LMHeadModel"], config) == CAUSAL_LM
    assert head_of(["GPT2Model"], config) == BASE
    for named in ("GPT2ForSequenceClassification", "GPT2ForQuestionAnswering", "OtherForTokenClassification"):
        head = head_of([named], config)
        assert head is not None and named.endswith(head.auto_class.removeprefix("AutoModel"))
    assert head_of(["SomethingElse"], config) is None
    assert "AutoModelForQuestionAnswering" in auto_classes_for(config)
    assert "AutoModelForCTC" not in auto_classes_for(config)

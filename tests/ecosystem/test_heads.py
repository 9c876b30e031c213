"""Rows of heads other than the one for the next token, and of embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, pipeline

from tests.ecosystem.cases import ALSO_PLAIN, Case, padded, same
from tests.helpers import refused
from transplant_hf import CompatibilityError

SECTION = "Heads and embeddings"
TEXTS = ["Once upon a time", "Hi", "The court finds that"]


def same_head(model: Any, reference: Any) -> None:
    """Give the reference the new, random head of a model: whatever it has outside its decoder."""
    inner = model.base_model_prefix
    heads = {name: module for name, module in model.named_children() if name != inner}
    assert heads
    for name, module in heads.items():
        getattr(reference, name).load_state_dict(module.state_dict())


@torch.no_grad()
def classified(model: Any, case: Case) -> torch.Tensor:
    """Logits of padded rows."""
    return model.eval()(**padded(case, "right")).logits


def check_head(case: Case, auto: Any, folder: Path) -> None:
    """Compare a new head's logits with the reference's; saved in full, plain Transformers reads them back."""
    if type(case.recipient_model().config) not in auto._model_mapping:
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            auto.from_pretrained(case.recipient)
        with refused(CompatibilityError, "has no such head", f"{auto.__name__} has no class"):
            auto.from_pretrained(case.thin)
        pytest.xfail(
            f"{auto.__name__} of Transformers has no class for the architecture, {ALSO_PLAIN}: "
            f"https://huggingface.co/docs/transformers/model_doc/{case.architecture}"
        )
    torch.manual_seed(0)
    model = auto.from_pretrained(case.thin, num_labels=3)
    reference = auto.from_pretrained(case.native, num_labels=3)
    assert type(reference).__name__ == type(model).__name__
    same_head(model, reference)
    logits = classified(model, case)
    assert logits.shape[-1] == 3
    same(logits, classified(reference, case))
    model.save_pretrained(folder)
    again = type(reference).from_pretrained(folder)
    same(classified(again, case), logits)
    with model.disable_transplants():
        recipient = auto.from_pretrained(case.recipient, num_labels=3)
        same_head(model, recipient)
        same(classified(model, case), classified(recipient, case))


@pytest.mark.ecosystem(section=SECTION, feature="`AutoModel`, the decoder without a head")
def test_auto_model(case: Case) -> None:
    model, reference = (AutoModel.from_pretrained(folder).eval() for folder in (case.thin, case.native))
    assert type(reference).__name__ == type(model).__name__
    with torch.no_grad():
        same(model(case.ids).last_hidden_state, reference(case.ids).last_hidden_state)


@pytest.mark.ecosystem(section=SECTION, feature="`AutoModelForSequenceClassification`")
def test_sequence_classification(case: Case, tmp_path: Path) -> None:
    check_head(case, AutoModelForSequenceClassification, tmp_path)


@pytest.mark.ecosystem(section=SECTION, feature="`AutoModelForTokenClassification`")
def test_token_classification(case: Case, tmp_path: Path) -> None:
    check_head(case, AutoModelForTokenClassification, tmp_path)


@pytest.mark.ecosystem(section=SECTION, feature="feature-extraction pipeline, mean over tokens")
def test_mean_of_features(case: Case) -> None:
    features = pipeline("feature-extraction", model=str(case.thin))
    found = torch.stack([torch.tensor(features(text)[0]).mean(0) for text in TEXTS])
    torch.testing.assert_close(found, _means(case), rtol=1e-5, atol=1e-5)


@pytest.mark.ecosystem(section=SECTION, feature="sentence-transformers: `Transformer` and mean `Pooling`")
def test_sentence_transformers(case: Case) -> None:
    library = pytest.importorskip("sentence_transformers", minversion="6.0")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    words = modules.Transformer(str(case.thin))
    pooled = modules.Pooling(words.get_embedding_dimension(), pooling_mode="mean")
    found = library.SentenceTransformer(modules=[words, pooled], device="cpu").encode(TEXTS, convert_to_tensor=True)
    # It asks a model with a chat template in the words of a chat.
    torch.testing.assert_close(found, _means(case, "[user]{}\n"), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _means(case: Case, frame: str = "{}") -> torch.Tensor:
    reference = AutoModel.from_pretrained(case.native).eval()
    ids = [case.tokenizer(frame.format(text), return_tensors="pt").input_ids for text in TEXTS]
    return torch.cat([reference(one).last_hidden_state.mean(1) for one in ids])

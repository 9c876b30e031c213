"""Perplexity against computations by hand: which tokens count, from what context, and that padding does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from tests.helpers import BUILDERS, END_OF_TEXT, logits_of, refused, some_ids, tiny_llama_model, write_tokenizer
from transplant_hf.errors import CheckpointError, ConfigurationError, DataError
from transplant_hf.evaluation import Perplexity, document_perplexity, perplexity
from transplant_hf.evaluation import losses as losses_module
from transplant_hf.evaluation.losses import batch_loss
from transplant_hf.evaluation.windows import Batch
from transplant_hf.texts import Blocks


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama_model(seed=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def token_losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The loss of each token of a row but the first, from the whole row before it; `[tokens - 1]`."""
    logits = logits_of(model, ids[None])[0, :-1]
    return -torch.log_softmax(logits, -1).gather(1, ids[1:, None].long())[:, 0]


def by_hand(model: Any, stream: torch.Tensor, length: int, stride: int) -> tuple[float, int]:
    """Window after window, each token taken from the first that has it as a target."""
    found: dict[int, float] = {}
    begin = 0
    while len(found) < len(stream) - 1:
        losses = token_losses(model, stream[begin : begin + length + 1])
        for place, loss in enumerate(losses.tolist()):
            found.setdefault(begin + place + 1, loss)
        begin += stride
    return sum(found.values()) / len(found), len(found)


@pytest.mark.parametrize("length", [2, 8, 9, 17, 30, 33])
@pytest.mark.parametrize("stride", [None, 1, 3, 8])
def test_each_token_of_a_stream_counts_once(model: Any, length: int, stride: int | None) -> None:
    stream = some_ids(1, length, seed=length)[0]
    nll, count = by_hand(model, stream, 8, stride or 8)
    before = stream.clone()
    for batch_size in (1, 3, 16):
        found = perplexity(model, stream, block_length=8, stride=stride, batch_size=batch_size)
        assert found.nll == pytest.approx(nll, rel=1e-5)
        assert found.tokens == count == length - 1
    assert found.value == pytest.approx(math.exp(nll), rel=1e-4)
    assert torch.equal(stream, before)


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_blocks_leave_out_their_first_token(family: str) -> None:
    model = BUILDERS[family](seed=5)
    ids = some_ids(5, 12)
    losses = torch.cat([token_losses(model, row) for row in ids])
    for batch_size in (1, 2, 8):
        found = perplexity(model, Blocks(ids), batch_size=batch_size)
        assert (found.nll, found.tokens) == (pytest.approx(losses.mean().item(), rel=1e-5), 55)
    # What the model itself calls its loss.
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(found.nll, rel=1e-5)


@pytest.mark.parametrize("stride", [None, 3])
def test_a_start_token_stands_before_every_window(model: Any, stride: int | None) -> None:
    stream = some_ids(1, 21)[0]
    whole = torch.cat([torch.tensor([END_OF_TEXT]), stream])
    found: dict[int, float] = {}
    for begin in range(0, 21, stride or 8):
        window = whole[begin : begin + 9].clone()
        window[0] = END_OF_TEXT
        for place, loss in enumerate(token_losses(model, window).tolist()):
            found.setdefault(begin + place, loss)
    got = perplexity(model, stream, block_length=8, stride=stride, start_token=END_OF_TEXT)
    assert got.tokens == len(found) == 21
    assert got.nll == pytest.approx(sum(found.values()) / 21, rel=1e-5)


def test_a_model_that_knows_nothing_has_its_vocabulary_as_perplexity() -> None:
    model = tiny_llama_model(seed=1, tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, some_ids(1, 50)[0], block_length=16).value == pytest.approx(260)


def test_every_module_gets_its_mode_back() -> None:
    model = tiny_llama_model(seed=1)
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    perplexity(model, some_ids(1, 20)[0])
    assert [module.training for module in model.modules()] == before
    with refused(DataError):
        perplexity(model, torch.tensor([999, 1]))
    assert [module.training for module in model.modules()] == before


def test_dropout_does_not_run() -> None:
    model = BUILDERS["gpt2"](seed=1, resid_pdrop=0.5)
    wanted = perplexity(model, some_ids(1, 20)[0]).nll
    assert perplexity(model.train(), some_ids(1, 20)[0]).nll == wanted


def test_a_peft_model() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama_model(seed=1)
    plain = perplexity(model, some_ids(1, 20)[0]).nll
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert perplexity(adapted, some_ids(1, 20)[0]).nll != plain
    with adapted.disable_adapter():
        assert perplexity(adapted, some_ids(1, 20)[0]).nll == pytest.approx(plain, rel=1e-6)


def test_weights_that_are_not_finite_are_named_by_batch(model: Any) -> None:
    broken = tiny_llama_model(seed=1)
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = float("nan")
    ids = torch.ones(3, 8).long()
    ids[2, 3] = 7
    with refused(CheckpointError, "batch 2 of law", "1 x 7 tokens", "nan", "float32"):
        perplexity(broken, Blocks(ids, "law"), batch_size=1)


@pytest.mark.parametrize(
    ("text", "fields", "kind", "facts"),
    [
        (torch.tensor([1]), {}, DataError, ("at least 2 tokens", "[1]")),
        (torch.tensor([1, 260]), {}, DataError, ("260", "0..259")),
        (torch.tensor([-1, 3]), {}, DataError, ("-1",)),
        (torch.arange(9), {"block_length": 65}, ConfigurationError, ("65", "64")),
        (torch.arange(9), {"block_length": 4, "stride": 5}, ConfigurationError, ("stride=5",)),
        (torch.arange(9), {"block_length": 4, "stride": 0}, ConfigurationError, ("stride=0",)),
        (torch.arange(9), {"batch_size": 0}, ConfigurationError, ("batch_size",)),
        (Blocks(torch.ones(2, 4)), {"stride": 2}, ConfigurationError, ("blocks already", "stride=2")),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: Any, text: Any, fields: dict[str, int], kind: Any, facts: tuple[str, ...]
) -> None:
    with refused(kind, *facts):
        perplexity(model, text, **fields)


# -- Chunks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [slice(0), slice(0, 4), slice(None, None, 3)])
def test_chunks_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch, masked: slice) -> None:
    logits = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.arange(21).view(3, 7) % 11
    targets[:, masked] = -100
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    for chunk in (1, 30, 1000):
        monkeypatch.setattr(losses_module, "_CHUNK_LOGITS", chunk)
        assert batch_loss(logits, Batch(targets, targets), 0, "noise") == pytest.approx(wanted, rel=1e-6)


def test_no_forward_pass_gives_more_logits_than_fit(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = perplexity(model, some_ids(1, 40)[0], block_length=4)
    rows: list[int] = []
    hook = model.register_forward_hook(lambda module, args, output: rows.append(len(output.logits)))
    monkeypatch.setattr(losses_module, "_MAX_LOGITS", 2 * 4 * 260)
    found = perplexity(model, some_ids(1, 40)[0], block_length=4)
    hook.remove()
    assert max(rows) == 2
    assert found.nll == pytest.approx(wanted.nll, rel=1e-5)


# -- Documents ---------------------------------------------------------------------------------------------------

DOCUMENTS = ["to be", "or not to be, that is the question", "", "x", "whether"]


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_padding_does_not_change_the_number(family: str, tokenizer: Any) -> None:
    model = BUILDERS[family](seed=7)
    rows = [torch.tensor(tokenizer(text)["input_ids"])[:20] for text in DOCUMENTS if len(text) > 1]
    losses = torch.cat([token_losses(model, row) for row in rows])
    for batch_size in (1, 2, 8):
        found = document_perplexity(model, DOCUMENTS, tokenizer, max_length=20, batch_size=batch_size)
        assert found.tokens == len(losses) == 4 + 19 + 6
        assert found.nll == pytest.approx(losses.mean().item(), rel=1e-5)


def test_the_model_is_told_what_is_padding(model: Any, tokenizer: Any) -> None:
    masks: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(lambda m, args, kw: masks.append(kw["attention_mask"]), with_kwargs=True)
    found = document_perplexity(model, DOCUMENTS, tokenizer, batch_size=2)
    hook.remove()
    assert [mask.shape[0] for mask in masks] == [2, 1]
    assert sum(int(mask.sum()) for mask in masks) == found.tokens


def test_counting_padding_would_change_the_number(model: Any, tokenizer: Any) -> None:
    found = document_perplexity(model, DOCUMENTS, tokenizer)
    tokenizer.padding_side = "right"
    padded = tokenizer([text for text in DOCUMENTS if len(text) > 1], padding=True, return_tensors="pt")
    counted = model(**padded, labels=padded["input_ids"]).loss.item()
    assert abs(counted - found.nll) > 0.1
    labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
    assert model(**padded, labels=labels).loss.item() == pytest.approx(found.nll, rel=1e-5)


def test_documents_without_two_tokens_are_refused(model: Any, tokenizer: Any) -> None:
    with refused(DataError, "none of 2 documents of law"):
        document_perplexity(model, ["", "x"], tokenizer, name="law")
    with refused(DataError, "none of 0"):
        document_perplexity(model, [], tokenizer)
    with refused(DataError, "has 100 tokens"):
        document_perplexity(tiny_llama_model(1, vocab_size=100, pad_token_id=None), ["xyz"], tokenizer)


def test_a_result_as_text_and_for_machines() -> None:
    found = Perplexity(nll=2.0, tokens=10, seconds=1.0)
    assert str(found) == "7.39"
    assert found.to_dict() == {"perplexity": math.exp(2.0), "nll": 2.0, "tokens": 10, "seconds": 1.0}
    assert Perplexity(1000.0, 1).value == math.inf


@pytest.mark.shared
def test_a_real_recipient(shared_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from transplant_hf.texts import pack

    folder = shared_folder / "models" / "recipient-llama-5m"
    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = pack(shared_folder / "data" / "shakespeare.txt", words, 128)
    last = text.part(-len(text) // 10)
    # The number that stands beside the model.
    assert perplexity(model, last.part(0, 64)).value == pytest.approx(286, rel=0.15)

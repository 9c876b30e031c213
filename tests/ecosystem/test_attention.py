"""Rows of attention implementations: each against the reference with the same one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version

import pytest
import torch
from torch._inductor.exc import InductorError

from tests.ecosystem.cases import ALSO_PLAIN, Case, padded, same
from tests.helpers import generated, logits_of, refused
from transplant_hf import CompatibilityError

PAGE = "https://huggingface.co/docs/transformers/attention_interface"
SECTION = "Attention"
FLEX = "flex_attention"


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Flex attention is compiled; no test sees what another one compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check(case: Case, implementation: str) -> None:
    """Compare logits and generation, alone and padded, with the reference."""
    check_logits(case, implementation)
    inputs = padded(case, "left")
    ids = inputs.pop("input_ids")
    model = case.load(attn_implementation=implementation)
    reference = case.independent(attn_implementation=implementation)
    assert torch.equal(generated(model, case.ids), generated(reference, case.ids))
    assert torch.equal(generated(model, ids, **inputs), generated(reference, ids, **inputs))


def check_logits(case: Case, implementation: str) -> None:
    """Compare logits, alone and padded, with the reference."""
    refuse_as_plain(case, implementation)
    model = case.load(attn_implementation=implementation)
    reference = case.independent(attn_implementation=implementation)
    assert model.config._attn_implementation == reference.config._attn_implementation == implementation
    same(logits_of(model, case.ids), logits_of(reference, case.ids))
    inputs = with_ids(padded(case, "left"))
    same(logits_of(model, **inputs), logits_of(reference, **inputs))


def refuse_as_plain(case: Case, implementation: str) -> None:
    """End the test with the reason where the plain recipient does not take an implementation."""
    try:
        case.recipient_model(attn_implementation=implementation)
    except ValueError as error:
        reason = str(error)
        with refused(CompatibilityError, reason):
            case.load(attn_implementation=implementation)
        assert "does not support an attention implementation" in reason
        link = re.search(r"https://\S+/issues/\d+", reason)
        assert link
        pytest.xfail(f"{re.split(r' yet|[.] Please', reason)[0]}, {ALSO_PLAIN}: {link[0]}")


def with_ids(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, by the name that `logits_of` has for the tokens."""
    return {"ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


@pytest.mark.ecosystem(section=SECTION, feature="eager")
def test_eager(case: Case) -> None:
    check(case, "eager")


@pytest.mark.ecosystem(section=SECTION, feature="sdpa")
def test_sdpa(case: Case) -> None:
    check(case, "sdpa")


def check_flex(case: Case) -> None:
    """End the test with the reason where the recipient's flex attention needs a GPU."""
    refuse_as_plain(case, FLEX)
    if case.architecture == "gpt_oss" and not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="sinks cannot be run on CPU"):
            logits_of(case.recipient_model(attn_implementation=FLEX), case.ids)
        pytest.skip(f"flex attention with attention sinks needs a GPU, {ALSO_PLAIN}: {PAGE}")


@pytest.mark.slow
@pytest.mark.ecosystem(section=SECTION, feature="flex attention: logits, of padded rows too")
def test_flex(case: Case) -> None:
    check_flex(case)
    check_logits(case, FLEX)


@pytest.mark.slow
@pytest.mark.ecosystem(section=SECTION, feature="flex attention: cached `generate`")
def test_flex_generate(case: Case) -> None:
    check_flex_generate(case, {"input_ids": case.ids})


@pytest.mark.slow
@pytest.mark.ecosystem(section=SECTION, feature="flex attention: cached `generate` of padded rows")
def test_flex_generate_padded(case: Case) -> None:
    check_flex_generate(case, padded(case, "left"))


def check_flex_generate(case: Case, inputs: dict[str, torch.Tensor]) -> None:
    """Compare tokens, or end the test with the reason where the reference cannot say its own."""
    check_flex(case)
    ids = inputs.pop("input_ids")
    try:
        expected = generated(case.independent(attn_implementation=FLEX), ids, **inputs)
    except InductorError as error:
        if "C++ compile error" not in str(error):
            raise
        number = version("torch").partition("+")[0]
        pytest.xfail(
            f"on a CPU, torch {number} writes C++ for it that does not compile, {ALSO_PLAIN}; "
            "on flex attention on CPUs: https://github.com/pytorch/pytorch/issues/169224"
        )
    assert torch.equal(generated(case.load(attn_implementation=FLEX), ids, **inputs), expected)


@pytest.mark.ecosystem(section=SECTION, feature="a padded row is the row alone, padded left or right")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(case: Case, side: str) -> None:
    inputs = padded(case, side)
    kept = inputs["attention_mask"][1].bool()
    if side == "left":  # `generate` counts positions from the first token that is not padding
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    ids = inputs.pop("input_ids")
    found = logits_of(case.load(), ids, **inputs)
    reference = case.independent()
    same(found, logits_of(reference, ids, **inputs))
    torch.testing.assert_close(found[1, kept], logits_of(reference, ids[1:, kept])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.ecosystem(section=SECTION, feature="attentions and hidden states of all layers are returned")
def test_outputs(case: Case) -> None:
    found, expected = (
        model(case.ids, output_attentions=True, output_hidden_states=True)
        for model in (case.load(attn_implementation="eager"), case.independent(attn_implementation="eager"))
    )
    for name, count in (("attentions", 6), ("hidden_states", 7)):
        assert len(found[name]) == count
        same(torch.stack(found[name]), torch.stack(expected[name]))

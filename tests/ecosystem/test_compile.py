"""Rows of `torch.compile` and of exports to other runtimes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.compile_fx import compile_fx
from torch.export import Dim
from transformers import CompileConfig

from tests.ecosystem.cases import Case
from tests.helpers import generated, logits_of, some_ids

SECTION = "Compilation"
EXPORT = "Export"


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """No test sees what another one compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums in another order differ in their last bits."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.ecosystem(section=SECTION, feature="`torch.compile(fullgraph=True)` of the forward pass (inductor)")
def test_fullgraph(case: Case) -> None:
    counter: Any = CompileCounterWithBackend("inductor")
    compiled: Any = torch.compile(case.load(), fullgraph=True, backend=counter)
    close(logits_of(compiled, case.ids), logits_of(case.independent(), case.ids))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.ecosystem(section=SECTION, feature="a compiled forward pass inside and outside `disable_transplants()`")
def test_compiled_switch(case: Case) -> None:
    counter: Any = CompileCounterWithBackend("aot_eager")
    model = case.load()
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    expected = [logits_of(one, case.ids) for one in (case.independent(), case.recipient_model())]
    for _ in range(3):
        close(logits_of(compiled, case.ids), expected[0])
        with model.disable_transplants():
            close(logits_of(compiled, case.ids), expected[1])
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.ecosystem(section=SECTION, feature="`generate` with a compiled forward pass and a static cache (inductor)")
def test_compiled_generate(case: Case) -> None:
    tokens, graphs = generated_compiled(case.load(), case.ids, compile_fx)
    torch.compiler.reset()
    expected, as_many = generated_compiled(case.independent(), case.ids, lambda graph, _: graph.forward)
    assert graphs == as_many >= 1
    assert torch.equal(tokens, expected)
    assert torch.equal(tokens, generated(case.independent(), case.ids))


def generated_compiled(model: Any, ids: torch.Tensor, finish: Any) -> tuple[torch.Tensor, int]:
    """Generate with a static cache and a compiled forward pass; the tokens, and how many graphs it took."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return finish(graph, inputs)

    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True  # by default `generate` compiles on accelerators only
    return generated(model, ids, cache_implementation="static", compile_config=config), len(graphs)


@pytest.mark.slow
@pytest.mark.ecosystem(section=EXPORT, feature="`torch.export`, batch and length dynamic")
def test_torch_export(case: Case) -> None:
    ids, others = some_ids(2, 9, seed=5), some_ids(3, 7, seed=6)
    free = {0: Dim.AUTO, 1: Dim.AUTO}
    program = torch.export.export(
        case.load(),
        (),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False},
        dynamic_shapes={"input_ids": free, "attention_mask": free, "use_cache": None},
        strict=False,
    )
    with torch.no_grad():
        found = program.module()(input_ids=others, attention_mask=torch.ones_like(others), use_cache=False)
    close(found.logits, logits_of(case.independent(), others))


@pytest.mark.slow
@pytest.mark.ecosystem(section=EXPORT, feature="ONNX by Transformers' exporter, run by ONNX Runtime")
def test_onnx(case: Case) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    onnx = pytest.importorskip("transformers.exporters.exporter_onnx")
    ids, others = some_ids(2, 9, seed=5), some_ids(3, 7, seed=6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = onnx.OnnxExporter().export(case.load(), inputs, config=onnx.OnnxConfig(dynamic=True))
    found = program(input_ids=others, attention_mask=torch.ones_like(others))
    close(torch.as_tensor(found["logits"]), logits_of(case.independent(), others))

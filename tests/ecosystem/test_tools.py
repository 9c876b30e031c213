"""Rows of tools around Transformers: evaluation and serving."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ecosystem.cases import Case

EVALUATION = "Evaluation and serving"
CONTEXT, CONTINUATION = "To be, or not to be", ", that is the question."


@torch.no_grad()
def log_probabilities(case: Case, ids: list[int]) -> torch.Tensor:
    """What the reference thinks of each token after the first, `[tokens - 1]`."""
    logits = case.independent()(torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.slow
@pytest.mark.ecosystem(section=EVALUATION, feature="lm-evaluation-harness: log-likelihoods of a thin transplant")
def test_lm_evaluation_harness(case: Case) -> None:
    models = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    harness = models.HFLM(pretrained=str(case.thin), device="cpu", batch_size=2, dtype="float32")
    asked = [instance("loglikelihood", {}, pair, 0) for pair in ((CONTEXT, CONTINUATION), (CONTEXT, "?"))]
    found = [score for score, _ in harness.loglikelihood(asked, disable_tqdm=True)]
    whole = [case.tokenizer(CONTEXT + rest).input_ids for rest in (CONTINUATION, "?")]
    start = len(case.tokenizer(CONTEXT).input_ids) - 1
    assert found == pytest.approx([float(log_probabilities(case, ids)[start:].sum()) for ids in whole], rel=1e-4)
    rolling = [instance("loglikelihood_rolling", {}, (CONTEXT + CONTINUATION,), 0)]
    ids = [case.tokenizer.bos_token_id, *whole[0]]
    expected = float(log_probabilities(case, ids).sum())
    assert harness.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx([expected], rel=1e-4)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """`transformers serve` with one model; the address it answers at."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    serve = pytest.importorskip("transformers.cli.serve").Serve
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = serve(force_model=str(folder), device="cpu", port=port, non_blocking=True)
    try:
        yield f"http://localhost:{port}"
    finally:
        server.kill_server()


def completed(address: str, folder: Path, prompt: str) -> str:
    """What the server says next, as likely as can be."""
    body = {"model": str(folder), "prompt": prompt, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    for _ in range(100):
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)["choices"][0]["text"]
        except ConnectionError:
            time.sleep(0.1)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(0.1)
    raise TimeoutError(f"nothing answers at {address}")


@pytest.mark.ecosystem(section=EVALUATION, feature="`transformers serve` of a full save: completions")
def test_serve_full(case: Case, tmp_path: Path) -> None:
    case.load().save_pretrained(tmp_path)
    case.tokenizer.save_pretrained(tmp_path)
    with serving(tmp_path) as address:
        said = completed(address, tmp_path, CONTEXT)
    ids: Any = case.tokenizer(CONTEXT, return_tensors="pt").input_ids
    tokens = case.independent().generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
    assert said == case.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.ecosystem(section=EVALUATION, feature="`transformers serve` of a thin transplant or donor repo")
def test_serve_thin(case: Case) -> None:
    with pytest.raises(AttributeError, match="transformers has no attribute TransplantForCausalLM"), serving(case.thin):
        pass
    pytest.xfail(
        "`transformers serve` looks the class up by its name in Transformers itself, not through the Auto classes; "
        "serve a full save, which [`transplant-hf export`](export.md) writes: "
        "https://huggingface.co/docs/transformers/serving"
    )

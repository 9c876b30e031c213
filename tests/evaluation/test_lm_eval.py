"""The evaluation harness of EleutherAI reads a donor repo by its name, where it is installed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.helpers import loaded
from transplant_hf.evaluation import perplexity
from transplant_hf.texts import encode

TEXT = "To be, or not to be, that is the question."
TASK = """
task: hamlet
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install 'lm-eval[hf]'")
def test_the_harness_measures_a_donor_repo_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "hamlet.jsonl"
    file.write_text(json.dumps({"text": TEXT}) + "\n")
    (tmp_path / "hamlet.yaml").write_text(TASK.format(file=file))
    command = ["-m", "lm_eval", "run", "--model", "hf", "--tasks", "hamlet", "--include_path", str(tmp_path)]
    named = f"pretrained={tiny_llama / 'donor'},trust_remote_code=True"
    command += ["--model_args", named, "--device", "cpu", "--output_path", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(result.read_text())["results"]["hamlet"]["byte_perplexity,none"]
    # The harness puts the end of text before a document; the tiny tokenizer's tokens are bytes.
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama / "donor")
    stream = encode([TEXT], tokenizer)
    ours = perplexity(loaded(tiny_llama), stream, start_token=tokenizer.bos_token_id)
    assert found == pytest.approx(math.exp(ours.nll), rel=1e-4)

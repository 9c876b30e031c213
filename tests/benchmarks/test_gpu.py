"""The GPU benchmark, tried on the CPU with toy models: what it writes, what it reports, and what it refuses."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHAPES = ("tiny", "tiny-gpt-oss")
NUMBERS = {"rounds": 2, "batch": 2, "length": 8, "tokens": 3, "steps": 1}
WORDS = ["--device", "cpu", *(word for name, n in NUMBERS.items() for word in (f"--{name}", str(n))), "--folder"]


@pytest.fixture(scope="module")
def gpu(script: Callable[[str], Any]) -> Any:
    pytest.importorskip("peft")
    return script("gpu")


@pytest.fixture(scope="module")
def written(gpu: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with the toy models."""
    folder = tmp_path_factory.mktemp("bench")
    for name in SHAPES:
        gpu.prepare(gpu.SHAPES[name], folder, "cpu")
    return folder


@pytest.fixture
def in_this_process(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that every fresh process takes to import."""
    monkeypatch.setattr(gpu, "child", importlib.import_module("one_gpu").run)


@pytest.mark.parametrize("name", SHAPES)
def test_the_checkpoint_is_what_the_model_itself_would_save(gpu: Any, written: Path, tmp_path: Path, name: str) -> None:
    for part, config in (
        ("recipient", gpu.SHAPES[name].build_config()),
        ("whole", gpu.SHAPES[name].whole_config()),
    ):
        model, info = AutoModelForCausalLM.from_pretrained(written / name / part, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (part, info)
        assert model.config.num_hidden_layers == config.num_hidden_layers
        assert model.dtype == torch.bfloat16
        model.save_pretrained(tmp_path / part)
        saved = load_file(tmp_path / part / "model.safetensors")
        index = json.loads((written / name / part / "model.safetensors.index.json").read_text())["weight_map"]
        assert set(index) == set(saved)
        for file in set(index.values()):
            for tensor, value in load_file(written / name / part / file).items():
                assert torch.equal(value, saved[tensor]), tensor


def test_layers_of_the_whole_model_are_those_of_recipient_and_donor(gpu: Any, written: Path) -> None:
    """Kinds of layers go along: an even layer of GPT-OSS slides wherever it runs."""
    shape = gpu.SHAPES["tiny-gpt-oss"]
    kinds = shape.build_config().layer_types
    assert shape.whole_order() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]
    assert shape.whole_config().layer_types == [kinds[layer] for layer in shape.whole_order()]
    thin = AutoModelForCausalLM.from_pretrained(written / shape.name / "donor")
    assert [layer for _, layer in thin.layer_map] == shape.whole_order()
    shared = sorted(
        path.name for path in (written / shape.name / "whole").glob("*.safetensors") if path.stat().st_nlink > 1
    )
    assert len(shared) == shape.position + 1  # the layers before the donor, and what is of no layer


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", ["tiny", pytest.param("tiny-gpt-oss", marks=pytest.mark.slow)])
def test_the_report_has_every_row(gpu: Any, written: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert gpu.main([*WORDS, str(written), "--shapes", name]) == 0
    report = capsys.readouterr().out
    versions, _, device = report.splitlines()[:3]
    assert f"torch {torch.__version__}" in versions and "flash-attn" in versions
    assert "name cpu" in device and "date 20" in device
    rows = [line.split("|")[1].strip() for line in report.splitlines() if line.startswith("|") and "---" not in line]
    assert rows == [
        *("load to first token", "whole", "whole-again", "transplant", "recipient"),
        *("decode", "whole-again / whole", "transplant / whole", "disabled / recipient", "transplant / recipient"),
        *("training step", "donor", "donor-states", "lora"),
    ]
    skipped = {"tiny": "flash_attention_2: skipped", "tiny-gpt-oss": "flash_attention_4: skipped"}
    assert skipped[name] in report


@pytest.mark.usefixtures("in_this_process")
def test_json_holds_every_round(gpu: Any, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*WORDS, str(written), "--shapes", "tiny", "--attention", "eager", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]["tiny"]["eager"]
    assert not found["skipped"]
    assert [len(found[what]["rounds"]) for what in ("serve", "train")] == [2, 2]
    for measured in found["serve"]["rounds"]:
        assert measured["states"]["transplant"]["difference"] == 0
        assert measured["states"]["disabled"]["difference"] == 0
        assert measured["states"]["transplant"]["tokens"] == measured["states"]["whole"]["tokens"]
    trained = {name: row["trained"] for name, row in found["train"]["rounds"][0].items()}
    donor = sum(tensor.numel() for tensor in load_file(written / "tiny" / "donor" / "donor.safetensors").values())
    assert trained["donor"] == trained["donor-states"] == donor


@pytest.mark.usefixtures("in_this_process")
def test_a_model_with_other_logits_is_refused(
    gpu: Any, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(written / "tiny", tmp_path / "tiny")
    shard = next((tmp_path / "tiny" / "whole").glob("model-00009-*.safetensors"))
    tensors = {name: tensor.flip(0) for name, tensor in load_file(shard).items()}
    save_file(tensors, shard, {"format": "pt"})
    donor = tmp_path / "tiny" / "donor" / "config.json"
    donor.write_text(donor.read_text().replace(str(written), str(tmp_path)))
    assert gpu.main([*WORDS, str(tmp_path), "--shapes", "tiny", "--what", "serve"]) == 1
    shown = capsys.readouterr()
    assert "refused, the logits of transplant differ from those of whole" in shown.err
    assert "load to first token" not in shown.out


def test_what_is_refused(gpu: Any) -> None:
    wanted = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert gpu.check_logits("disabled", wanted.clone(), "recipient", wanted) == 0
    for wrong in (wanted.roll(1, 0), wanted * 1.02, wanted * float("nan")):
        with pytest.raises(gpu.WrongResultError, match="logits of disabled differ from those of recipient"):
            gpu.check_logits("disabled", wrong, "recipient", wanted)
    gpu.check_loss("lora", 5.0, 5.0)
    for wrong_loss in (5.2, float("nan")):
        with pytest.raises(gpu.WrongResultError, match=r"first loss of lora is .* must be 5\.0000"):
            gpu.check_loss("lora", wrong_loss, 5.0)


def test_no_gpu_is_said_so(gpu: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no GPU that this torch can use"):
        gpu.main(["--shapes", "tiny"])


def test_a_disk_that_is_too_small_is_said_so(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match=r"GPT-OSS-20B shape.* take 4\d\.\d GiB .* has 10\.0 GiB left"):
        gpu.prepare(gpu.SHAPES["gpt-oss"], tmp_path, "cpu")


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *WORDS, str(tmp_path), "--shapes", "tiny", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "disabled / recipient" in done.stdout and "lora" in done.stdout

"""Several processes train one donor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from tests.training.helpers import losses, noise, trainer

torch.set_num_threads(1)
folder, batch = Path(sys.argv[1]), int(sys.argv[2])
several = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
general = noise(seed=2, name="general")
made = trainer(folder, per_device_train_batch_size=batch, replay_dataset=general, position=3, **several)
made.train()
if made.is_world_process_zero():
    made.donor.save_pretrained(folder / "donor", position=3, recipient="recipient")
    (folder / "losses.json").write_text(json.dumps(losses(made)))
"""


def _run(script: Path, folder: Path, batch: int, processes: int) -> list[float]:
    # Accelerate starts several processes on CPUs only through MPI; with this flag it starts them itself.
    words = ["--multi_gpu"] if processes > 1 else ["--cpu"]
    words += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", "--main_process_port", "0"]
    run = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words, str(script), str(folder), str(batch)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: list[float] = json.loads((folder / "losses.json").read_text())
    return found


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = _run(script, tmp_path / "one", batch=4, processes=1)
    two = _run(script, tmp_path / "two", batch=2, processes=2)
    assert len(one) == 8 and two == pytest.approx(one, rel=1e-4)

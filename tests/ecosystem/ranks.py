"""Two processes on this machine that hold a model between them (gloo), and what they tell of it.

Run as a script it is one rank: `python -m tests.ecosystem.ranks JOB ARCHITECTURE FOLDER RESULT`, with RANK and
WORLD_SIZE set. ARCHITECTURE and FOLDER are those of a `Case`; RESULT gets tensors and, in its metadata, plain values.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.ecosystem.cases import Case

__all__ = ["RANKS", "run_ranks", "trained_once"]

RANKS = 2
LIMIT_S = 400
ROOT = Path(__file__).parents[2]


# -- In the test ---------------------------------------------------------------------------------------------------


def run_ranks(job: str, case: Case) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Run a job in two processes.

    Args:
        job: One of `JOBS`.
        case: An architecture and its folders.

    Returns:
        What each rank found: tensors, and plain values.
    """
    with tempfile.TemporaryDirectory() as place:
        common = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
        common |= {"STORE": f"{place}/store", "LOCAL_WORLD_SIZE": str(RANKS)}
        results = [Path(place) / f"{rank}.safetensors" for rank in range(RANKS)]
        logs = [Path(place) / f"{rank}.log" for rank in range(RANKS)]
        words = (case.architecture, str(case.folder))
        processes = []
        for rank in range(RANKS):
            with logs[rank].open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.ecosystem.ranks", job, *words, str(results[rank])],
                        env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=ROOT,
                    )
                )
        try:
            ended = [process.wait(LIMIT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert ended == [0] * RANKS, "\n".join(log.read_text()[-3000:] for log in logs)
        return [_read(path) for path in results]


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["said"])
    return load_file(path), said


def trained_once(model: Any, layers: list[int], ids: torch.Tensor, path: str) -> dict[str, torch.Tensor]:
    """Take one step of gradient descent in some layers only, and return their weights by name."""
    chosen = _only_layers_learn(model, layers, path)
    _step(model, chosen, ids)
    return {name: parameter.detach() for name, parameter in chosen.items()}


# -- In each rank --------------------------------------------------------------------------------------------------


def _only_layers_learn(model: Any, layers: list[int], path: str) -> dict[str, torch.nn.Parameter]:
    starts = tuple(f"{path}.{number}." for number in layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(starts))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _step(model: Any, chosen: dict[str, torch.nn.Parameter], ids: torch.Tensor) -> None:
    # In evaluation mode: dropout would differ between the ranks.
    optimizer = torch.optim.SGD(chosen.values(), lr=0.5)
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()


def _distributed(case: Case, **sizes: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Load the transplant divided by Transformers itself, every byte that is read counted."""
    from torch.distributed.tensor import DTensor
    from transformers.distributed import DistributedConfig

    with counted_reads() as reads:
        try:
            model = case.load(distributed_config=DistributedConfig(**sizes))
        except ValueError as error:
            return {}, {"refused": str(error)}
    held = {name: _local(parameter).nbytes for name, parameter in model.named_parameters()}
    divided = sorted(name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor))
    with torch.no_grad():
        logits = model(case.ids, use_cache=False).logits
        cached = model(case.ids, use_cache=True).past_key_values
        with model.disable_transplants():
            off = model(case.ids, use_cache=False).logits
    said = {
        "held": held,
        "buffers": sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        "divided": divided,
        "cache": sum(part.nbytes for layer in cached.layers for part in (layer.keys, layer.values)),
        "layer_map": [list(slot) for slot in model.layer_map],
        **reads,
    }
    return {"logits": logits, "off": off}, said


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[no-any-return]


def _tensor(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return _distributed(case, tp_size=RANKS)


def _expert(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return _distributed(case, tp_size=RANKS, ep_size=RANKS)


def _fsdp_loaded(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return _distributed(case, fsdp_size=RANKS)


def _fsdp(case: Case) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """`fully_shard` on each layer and the rest: forward, a step in the donor's layers, and the weights gathered."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from transplant_hf.architecture import find_stack

    model = case.load()
    path = find_stack(model)
    layers = [number for number, slot in enumerate(model.layer_map) if slot.source != "recipient"]
    chosen = _only_layers_learn(model, layers, path)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.get_submodule(path):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    held = {name: _local(parameter).nbytes for name, parameter in model.named_parameters()}
    with torch.no_grad():
        logits = model(case.ids, use_cache=False).logits
    rank = int(os.environ["RANK"])
    chosen = {name: parameter for name, parameter in model.named_parameters() if name in chosen}
    _step(model, chosen, case.ids[rank : rank + 1])
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = {f"after.{name}": tensor for name, tensor in get_model_state_dict(model, options=options).items()}
    with model.disable_transplants(), torch.no_grad():
        off = model(case.ids, use_cache=False).logits
    return {"logits": logits, "off": off, **gathered}, {"held": held, "path": path, "layers": layers}


class counted_reads:  # noqa: N801 - used as a function, in a with statement
    """Counts what is asked of safetensors files, by file, and what is hashed."""

    def __enter__(self) -> dict[str, Any]:
        from transplant_hf.donor import record, tensors
        from transplant_hf.splice import weights

        self.found: dict[str, Any] = {"read": {}, "hashed": {}}
        self._undo: list[tuple[Any, str, Any]] = []
        for module in (tensors, weights):
            self._patch(module, "safe_open", self._counting(module.safe_open))
        self._patch(record, "sha256_of", self._hashing(record.sha256_of))
        return self.found

    def __exit__(self, *error: object) -> None:
        for module, name, old in self._undo:
            setattr(module, name, old)

    def _patch(self, module: Any, name: str, new: Any) -> None:
        self._undo.append((module, name, getattr(module, name)))
        setattr(module, name, new)

    def _counting(self, real: Any) -> Callable[..., Any]:
        read = self.found["read"]

        class Slice:
            def __init__(self, part: Any, path: str) -> None:
                self.part, self.path = part, path

            def __getitem__(self, index: Any) -> torch.Tensor:
                tensor = self.part[index]
                read[self.path] = read.get(self.path, 0) + tensor.numel() * tensor.element_size()
                return tensor  # type: ignore[no-any-return]

            def __getattr__(self, name: str) -> Any:
                return getattr(self.part, name)

        class File:
            def __init__(self, path: Any, **kwargs: Any) -> None:
                self.file, self.path = real(path, **kwargs), str(path)
                read.setdefault(self.path, 0)

            def get_slice(self, name: str) -> Slice:
                return Slice(self.file.get_slice(name), self.path)

            def __enter__(self) -> File:
                self.file.__enter__()
                return self

            def __exit__(self, *error: object) -> None:
                self.file.__exit__(*error)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

        return File

    def _hashing(self, real: Any) -> Callable[[Path], str]:
        def hashed(path: Path) -> str:
            self.found["hashed"][str(path)] = path.stat().st_size
            return real(path)  # type: ignore[no-any-return]

        return hashed


JOBS = {"tensor": _tensor, "expert": _expert, "fsdp": _fsdp, "fsdp_loaded": _fsdp_loaded}


def main(job: str, architecture: str, folder: str, result: str) -> None:
    """Be one rank."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.environ["STORE"], RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=RANKS)
    try:
        tensors, said = JOBS[job](Case(architecture, Path(folder)))
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
    # Some share memory, which the file format does not allow.
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, result, metadata={"said": json.dumps(said)})


if __name__ == "__main__":
    main(*sys.argv[1:])

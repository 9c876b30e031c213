"""One measured load in a fresh process; prints one line of JSON. Started by `load.py`.

The clock starts after all imports, right before the first `from_pretrained`, and stops when the logits of a 16-token
input are there: `from_pretrained` alone says little, because nothing is read from mapped files before it is used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch
from cost import status
from models import MODELS, Folders
from routes import ROUTES, import_model_code
from transformers.utils import logging

__all__ = ["PeakAnonymous", "input_tokens", "measure"]

_INPUT_TOKENS = 16


class PeakAnonymous(AbstractContextManager["PeakAnonymous"]):
    """Samples this process's anonymous memory: the part that cannot be dropped and read again from a file."""

    def __init__(self, interval: float = 0.004) -> None:
        self._interval, self._stop = interval, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before = self._peak = status("RssAnon")

    @property
    def mib(self) -> float:
        """The peak in MiB, less what was there before."""
        return (self._peak - self._before) / 2**20

    @property
    def before_mib(self) -> float:
        """What there was before, in MiB."""
        return self._before / 2**20

    def __enter__(self) -> PeakAnonymous:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, status("RssAnon"))

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._peak = max(self._peak, status("RssAnon"))


def input_tokens(vocab_size: int, length: int = _INPUT_TOKENS) -> torch.Tensor:
    """Return the same random tokens every time."""
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


def measure(model: str, route: str, folder: Path) -> dict[str, float | str]:
    """Load one model by one way.

    Args:
        model: A name in `MODELS`.
        route: A name in `ROUTES`.
        folder: The work folder.

    Returns:
        Seconds to the first logits, seconds until the call returned, CPU seconds, peak anonymous MiB, page faults
        that had to wait for the disk, and a digest of the logits.
    """
    shape = MODELS[model]
    import_model_code(shape)
    load = ROUTES[route](shape, Folders(folder / model))
    tokens = input_tokens(shape.build_config().vocab_size)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    with PeakAnonymous() as memory, torch.no_grad():
        cpu, start = time.process_time(), time.perf_counter()
        loaded = load()
        returned = time.perf_counter()
        logits = loaded(tokens).logits
        end, cpu_end = time.perf_counter(), time.process_time()
    return {
        "seconds": end - start,
        "call_seconds": returned - start,
        "cpu_seconds": cpu_end - cpu,
        "anon_mib": memory.mib,
        "disk_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
        "logits": hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()[:16],
    }


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python benchmarks/one_load.py gpt2 thin FOLDER"
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("route", choices=ROUTES)
    parser.add_argument("folder", type=Path, help="the work folder of load.py")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print(json.dumps(measure(args.model, args.route, args.folder)))


if __name__ == "__main__":
    main()

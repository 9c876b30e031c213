"""What a process takes: seconds of the clock and of all cores, and memory."""

from __future__ import annotations

import time
from pathlib import Path

__all__ = ["Cost", "status"]


class Cost:
    """What this process takes from here on; make one at a time, since the system keeps one peak."""

    def __init__(self) -> None:
        self._memory = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        self._seconds, self._processor = time.perf_counter(), time.process_time()

    def so_far(self) -> dict[str, float]:
        """Return it: the peak is of resident memory in bytes, mapped pages included, above `before`."""
        return {
            "seconds": round(time.perf_counter() - self._seconds, 2),
            "processor_seconds": round(time.process_time() - self._processor, 2),
            "peak": status("VmHWM") - self._memory,
            "before": self._memory,
        }


def status(field: str) -> int:
    """Return a size that the system knows of this process, such as "VmRSS", in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(f"{field}:"))

"""What there is to run on: devices, memory, and how fast weights are read."""

from __future__ import annotations

import dataclasses

from ..errors import ConfigurationError

__all__ = ["PARALLEL", "Hardware"]

# How layers and tensors are spread: whole layers on devices (`device_map="auto"`), a part of every tensor on each
# (`DistributedConfig(tp_size=...)`), some experts on each besides (`ep_size=...`), or parts that are gathered layer by
# layer (`fsdp_size=...`, `fully_shard`).
PARALLEL = ("auto", "tensor", "expert", "fsdp")


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a model is to run on.

    Args:
        devices: How many accelerators of one kind, or processes.
        memory: Bytes that each may use; `None` when it does not matter.
        cpu_memory: Bytes of main memory that weights may be offloaded to; none by default.
        bandwidth: Bytes that one process reads in a second; `None` when it does not matter.
        parallel: "auto" puts whole layers on devices, "tensor" and "fsdp" a part of every tensor on each, "expert" some
            experts on each and of the other tensors a part where the model has a plan for it.

    Raises:
        ConfigurationError: No device, or an unknown way.
    """

    devices: int = 1
    memory: int | None = None
    cpu_memory: int | None = None
    bandwidth: int | None = None
    parallel: str = "auto"

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ConfigurationError(f"devices must be at least 1, got {self.devices}.")
        if self.parallel not in PARALLEL:
            raise ConfigurationError(f"parallel must be one of {', '.join(PARALLEL)}, got {self.parallel!r}.")
        for name in ("memory", "cpu_memory", "bandwidth"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigurationError(f"{name} must be more than 0 bytes, got {value}.")

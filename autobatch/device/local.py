"""From the name of a device to the device, for those that exist on this machine."""

from __future__ import annotations

import re

from autobatch.device.base import Device
from autobatch.device.host import HostDevice
from autobatch.errors import DeviceNotFoundError, InvalidArgumentError

_ALLOWED = "'auto', 'cpu', or a torch device such as 'cuda', 'cuda:1' or 'mps'"


def resolve_local(spec: str, *, memory_limit_bytes: int | None = None) -> Device:
    """The device named ``spec``: ``"auto"``, ``"cpu"``, or any torch device such as ``"cuda:1"`` or ``"mps"``.

    ``"auto"`` is a GPU if torch has one, else another accelerator, else the host's memory. A name without an index
    is torch's current device of that kind.

    Args:
        memory_limit_bytes: what the workload may have of the device at most; None for all that is free to it.

    Raises:
        InvalidArgumentError: if ``spec`` does not read as a device.
        DeviceNotFoundError: if there is no such device here; the message lists those that exist.
    """
    match = re.fullmatch(r"([a-z][a-z0-9_]*)(:\d+)?", spec.strip().lower()) if isinstance(spec, str) else None
    if match is None:
        raise InvalidArgumentError("device", spec, _ALLOWED)
    name = match[0]
    if name in ("cpu", "cpu:0"):
        return HostDevice(memory_limit_bytes=memory_limit_bytes)
    existing = local_names()
    if name == "auto":
        name = _kind(existing[0])
    if name not in (*existing, *map(_kind, existing)):
        raise DeviceNotFoundError(f"no device {spec!r} here; there is: {', '.join(existing)}")
    if _kind(name) == "cpu":
        return HostDevice(memory_limit_bytes=memory_limit_bytes)
    if _kind(name) == "cuda":
        from autobatch.device.cuda import CudaDevice

        return CudaDevice(name, memory_limit_bytes=memory_limit_bytes)
    from autobatch.device.accelerator import AcceleratorDevice

    return AcceleratorDevice(name, memory_limit_bytes=memory_limit_bytes)


def local_names() -> list[str]:
    """Every device torch can use here, in the order in which ``"auto"`` prefers them; the last is ``"cpu"``."""
    import torch  # here, because naming the host needs none

    counts = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        counts.setdefault(accelerator.type, torch.accelerator.device_count())
    return [*(f"{kind}:{index}" for kind, count in counts.items() for index in range(count)), "cpu"]


def _kind(name: str) -> str:
    return name.partition(":")[0]

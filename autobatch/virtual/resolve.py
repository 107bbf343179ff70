"""From the name of a device to the device, whether it exists or not."""

from __future__ import annotations

import sys

from autobatch.device.base import Device
from autobatch.device.local import resolve_local
from autobatch.errors import DeviceNotFoundError, InvalidArgumentError
from autobatch.virtual.catalog import find_card
from autobatch.virtual.device import VirtualGPU

_ALLOWED = (
    "'auto', a torch device such as 'cuda:0' or 'cpu', a Device, or the name of a virtual GPU such as 'a100-40gb'"
)
_TORCH_KINDS = frozenset({"auto", "cpu", "cuda", "hip", "xpu", "mps", "hpu", "npu", "mtia", "maia", "privateuseone"})
"""Names that always mean a device of this machine, so that a missing one is not looked for in the catalog."""


def resolve_device(
    spec: str | Device, *, memory_limit_bytes: int | None = None, any_capability: bool = False, count: int = 1
) -> Device:
    """The device that ``spec`` names; a Device is returned as it is.

    Args:
        memory_limit_bytes: what the workload may have of it at most; None for all that is free.
        any_capability: for a virtual GPU that this torch has no kernels for.
        count: how many of a virtual GPU there are, for a workload of several processes.

    Raises:
        InvalidArgumentError: if ``spec`` is no name of a device, with the nearest that are.
        DeviceNotFoundError: if it is one, and there is none here.
    """
    if "torch" in sys.modules and isinstance(spec, sys.modules["torch"].device):
        spec = str(spec)
    if count != 1 and not (isinstance(spec, str) and _is_card(spec)):
        raise InvalidArgumentError("count", count, "left out: only of a virtual GPU there are as many as one likes")
    if not isinstance(spec, str):
        if not isinstance(spec, Device):
            raise InvalidArgumentError("device", spec, _ALLOWED)
        return spec
    if spec.partition(":")[0].strip().lower() in _TORCH_KINDS:
        return resolve_local(spec, memory_limit_bytes=memory_limit_bytes)
    if not _is_card(spec):
        try:
            # A backend of somebody else's registers a name of its own.
            return resolve_local(spec, memory_limit_bytes=memory_limit_bytes)
        except (InvalidArgumentError, DeviceNotFoundError):
            find_card(spec)  # says it better: it lists the nearest names
    return VirtualGPU(spec, memory_limit_bytes=memory_limit_bytes, any_capability=any_capability, count=count)


def _is_card(spec: str) -> bool:
    try:
        find_card(spec)
    except (InvalidArgumentError, DeviceNotFoundError):
        return False
    return True

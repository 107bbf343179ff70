"""What ranks on one machine share: its memory, and the lock of a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from autobatch.device.base import Device
from autobatch.device.host import HostDevice
from autobatch.probe.agreement import Agreement
from autobatch.probe.lock import assumed_lock, device_lock, lock_path


def shared(device: Device, agreement: Agreement) -> Device:
    """``device`` for one of the ranks of this machine: of host memory each has an equal part, unless it has a limit."""
    return device.shared_by(agreement.local_size) if isinstance(device, HostDevice) else device


@contextmanager
def locked(device: Device, agreement: Agreement) -> Iterator[None]:
    """Holds the lock of ``device`` inside, for all ranks that use it: the first of them takes it.

    Each for itself would wait for the others, and they for it.
    """
    if not agreement.ranks.are_several:
        with device_lock(device):
            yield
        return
    mine = (agreement.host, str(lock_path(device)))
    first = agreement.exchange("the lock", mine).index(mine) == agreement.ranks.rank
    with device_lock(device) if first else assumed_lock(device):
        agreement.exchange("the lock is held", None)
        yield

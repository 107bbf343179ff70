"""Host memory under a limit on private data, where torch's CPU allocator fails as a GPU's does.

Linux's ``RLIMIT_DATA`` (private writable mappings, kernel 4.7 and newer) makes an allocation fail cleanly where
otherwise the machine would swap, or the out-of-memory killer would choose a process.
"""

from __future__ import annotations

import functools
import importlib
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import psutil

from autobatch.device import host_history, process
from autobatch.device.base import DeviceInfo, Isolation
from autobatch.device.recording import RecordedRun, recording
from autobatch.errors import DeviceError
from autobatch.result import Measurement
from autobatch.units import KIB, MIB, format_bytes

_RECORDER_AT_MOST_BYTES = 64 * MIB  # what a recorder may take to begin with: a thread, with its stack

SHARE_OF_AVAILABLE = 0.8
"""The default budget is this share of what is available: others on the machine grow too."""

CHILD_ENVIRONMENT = {
    # A fixed threshold (glibc's own grows with use, up to 32 MiB) keeps tensors out of the heap, so that each goes
    # back to the system when it is freed; one arena, because every further one keeps free memory of its own.
    "MALLOC_MMAP_THRESHOLD_": str(256 * KIB),
    "MALLOC_TRIM_THRESHOLD_": str(256 * KIB),
    "MALLOC_ARENA_MAX": "1",
}
"""Settings of glibc's malloc (mallopt(3)) for a child process: they must be there before it starts."""


def missing_settings() -> dict[str, str]:
    """Those of :data:`CHILD_ENVIRONMENT` that this process does not have, with a value of its user's or this one."""
    return {k: v for k, v in CHILD_ENVIRONMENT.items() if k not in os.environ} if sys.platform == "linux" else {}


class _Baseline(NamedTuple):
    """What an idle process with its imports done has: this one, less its free heap and its live tensors."""

    data_bytes: int
    resident_bytes: int
    """Private data too, but only what is in memory."""


class HostDevice:
    """The memory of this machine, counted as what the workload may add to an idle process with its imports done.

    That idle process is this one, less its free heap and its live tensors, as it was at :meth:`begin`, or else at the
    first question. A limit of b bytes lets private data, touched or not, grow b bytes above it. A model that exists
    already counts.

    A heap with a past has holes. They are private data and no memory, so they are no one's: the limit goes up by them,
    since a tensor that fits into none has to find its room beside them, and what fits into one is noticed by the peak.

    Peaks are those of private data that is resident (allocated) and of private data, touched or not (reserved), above
    the idle process's. Only the second count what the limit does. The kernel keeps no mark of it, but one of the
    address space (``VmPeak``), of which it is all that comes and goes with tensors.

    Args:
        memory_limit_bytes: what the workload may add; None for :data:`SHARE_OF_AVAILABLE` of what is available.
        shares: so many processes of one job share what is available, where no limit is given.
    """

    torch_device = "cpu"
    ends_by_itself = False

    def __init__(self, *, memory_limit_bytes: int | None = None, shares: int = 1) -> None:
        self._memory_limit_bytes, self._shares = memory_limit_bytes, shares
        self._old_peak_bytes = self._old_space_bytes = self._holes_bytes = 0
        self._marks_peaks, self._is_restricted = True, False

    def shared_by(self, processes: int) -> HostDevice:
        """This memory for one of so many processes, each with an equal part unless a limit says what it may have."""
        if self._memory_limit_bytes is not None or processes == self._shares:
            return self
        return HostDevice(shares=processes)

    def info(self) -> DeviceInfo:
        memory = psutil.virtual_memory()
        return DeviceInfo(
            name="host memory",
            kind="cpu",
            total_bytes=memory.total,
            free_bytes=memory.available,
            details={"budget": self._budget_in_words()},
        )

    def isolation(self) -> Isolation:
        return Isolation(
            required=False,
            reason="a fresh process has a heap without a past",
            device=self.torch_device,
            environment=missing_settings(),
            memory_limit_bytes=self.budget_bytes(),
            forks=sys.platform == "linux",
            anew=True,  # a heap grows with use, by some per cent in a few trials, and training begins with none
        )

    def budget_bytes(self) -> int:
        """What the workload may add to an idle process, what it holds already included. In bytes."""
        budget_bytes = self._default_budget_bytes if self._memory_limit_bytes is None else self._memory_limit_bytes
        soft_bytes = process.soft_limit_bytes()
        if soft_bytes is None:
            return budget_bytes
        return max(0, min(budget_bytes, soft_bytes - self._baseline.data_bytes - process.free_heap_bytes()))

    def begin(self, found: Any = None) -> Any:
        importlib.import_module("torch")  # the workload's imports are not the workload
        self._baseline = _Baseline(*(found or process.idle_bytes()))
        return self._baseline

    def held_bytes(self) -> int:
        """Bytes of the CPU tensors that Python can reach."""
        return process.tensor_bytes()

    @contextmanager
    def restrict(self, limit_bytes: int | None) -> Iterator[bool]:
        """Lowers the soft limit of the whole process, as in :meth:`autobatch.device.base.Device.restrict`.

        Gives False where the heap has holes, which may hold something on top of the limit.

        Raises:
            DeviceError: where the platform has no such limit, or does not keep it.
        """
        limits = [b for b in (limit_bytes, self._memory_limit_bytes) if b is not None]
        if not limits:
            yield True
            return
        _check_platform()
        idle_bytes, outer = self._baseline.data_bytes, (self._holes_bytes, self._is_restricted)
        self.release()
        holes_bytes = process.holes_bytes(min(limits)) if self._marks_peaks else 0
        data_bytes = idle_bytes + holes_bytes + min(limits)
        users_bytes = process.soft_limit_bytes()
        before_bytes = process.limit_data(data_bytes if users_bytes is None else min(data_bytes, users_bytes))
        try:
            self._holes_bytes, self._is_restricted = holes_bytes, True
            _check_limit(data_bytes)
            yield not holes_bytes
        finally:
            self._holes_bytes, self._is_restricted = outer
            process.limit_data(before_bytes)

    def synchronize(self) -> None:
        """Nothing to wait for: CPU operators have finished when they return."""

    def release(self) -> None:
        process.trim_heap()

    def reset_peaks(self) -> None:
        self._old_peak_bytes = 0
        self._old_space_bytes = process.status_bytes().get("VmPeak", 0)  # never reset: only one above it will be known
        if not process.reset_resident_peak():  # then only a peak above the mark will be known
            self._old_peak_bytes, self._marks_peaks = process.peak_resident_bytes(), False

    def retries(self) -> None:
        """Unknown: malloc does not count."""

    def streams(self) -> None:
        """Unknown: there are none."""

    @contextmanager
    def recording(self) -> Iterator[RecordedRun | None]:
        """Records inside what torch allocates. The thread that the profiler starts for it is none of the workload's."""
        before_bytes, soft_bytes = process.status_bytes().get("VmData", 0), process.soft_limit_bytes()
        _limit(soft_bytes, _RECORDER_AT_MOST_BYTES)
        with recording(host_history.begin(importlib.import_module("torch"))) as run:
            own_bytes = max(0, process.status_bytes().get("VmData", 0) - before_bytes)
            _limit(soft_bytes, own_bytes)
            self._baseline = self._baseline._replace(data_bytes=self._baseline.data_bytes + own_bytes)
            try:
                yield run
            finally:
                if not self._is_restricted:  # else that ends with :meth:`restrict`, when peaks have been measured
                    _limit(soft_bytes)

    def measure(self) -> Measurement:
        memory, resident_bytes = psutil.virtual_memory(), process.peak_resident_bytes()
        data_bytes = process.peak_data_bytes(above_space_bytes=self._old_space_bytes)
        if data_bytes is not None:
            data_bytes = max(0, data_bytes - self._baseline.data_bytes - self._holes_bytes)
        return Measurement(
            peak_allocated_bytes=(
                max(0, resident_bytes - self._baseline.resident_bytes)
                if resident_bytes > self._old_peak_bytes
                else None
            ),
            peak_reserved_bytes=data_bytes,
            device_used_bytes=memory.total - memory.available,
        )

    @functools.cached_property
    def _baseline(self) -> _Baseline:
        self.begin()
        return self._baseline

    @functools.cached_property
    def _default_budget_bytes(self) -> int:
        # Asked once: what the workload takes must not shrink its own budget.
        sources = (psutil.virtual_memory().available, process.container_available_bytes())
        available_bytes = SHARE_OF_AVAILABLE * min(b for b in sources if b is not None)
        return int(available_bytes / self._shares) + process.tensor_bytes()

    def _budget_in_words(self) -> str:
        if self._memory_limit_bytes is not None:
            return f"{format_bytes(self._memory_limit_bytes)}, the limit given"
        whose = f" for each of {self._shares} ranks" if self._shares > 1 else ""
        part = SHARE_OF_AVAILABLE / self._shares
        return f"{format_bytes(self._default_budget_bytes)}, {part:.0%} of what is available{whose}"


def _check_platform() -> None:
    """Raises DeviceError unless there is the limit, and ``/proc`` to tell how far from it a process is."""
    with suppress(ImportError):
        importlib.import_module("resource")
        if sys.platform == "linux" and "VmData" in process.status_bytes():
            return
    raise DeviceError(
        f"host memory cannot be limited on this platform ({sys.platform}): that takes Linux, with /proc. "
        "Possible here: a GPU or another accelerator, or the same command in a Linux container or WSL 2"
    )


def _limit(soft_bytes: int | None, more_bytes: int = 0) -> None:
    """Makes ``soft_bytes`` and so many more the limit on private data; None where there was none."""
    if soft_bytes is not None:
        process.limit_data(soft_bytes + more_bytes)


def _check_limit(data_bytes: int) -> None:
    """Tries to exceed the limit without touching a page: some sandboxes accept a limit and do not keep it."""
    no_reserve = (
        0x4000  # MAP_NORESERVE, which `mmap` does not name before Python 3.13: overcommit must not refuse first
    )
    try:
        mapping = mmap.mmap(-1, data_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError:
        return
    mapping.close()
    raise DeviceError(
        "this system accepts a limit on private data (RLIMIT_DATA) and does not keep it, as some sandboxes do. "
        "Possible here: a GPU or another accelerator"
    )

"""The one seam between the search and the world: what a place of memory must answer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from autobatch.replay.trace import Trace
from autobatch.result import Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """Another process that holds memory of a device. ``used_bytes`` is None where the driver does not tell."""

    pid: int
    name: str | None
    used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """A device as a person wants to see it. ``None`` is unknown."""

    name: str
    """The model, such as ``NVIDIA A100-SXM4-40GB`` or ``host memory``."""
    kind: str
    """``cuda``, ``rocm``, ``xpu``, ``mps``, ``cpu``, ``fake``, ..."""
    index: int | None = None
    uuid: str | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    others: tuple[GpuProcess, ...] = ()
    """Other processes on the same device; where the driver does not tell, ``details["others_unknown"]`` is True."""
    capability: str | None = None
    """Compute capability, such as ``8.0``."""
    driver: str | None = None
    virtual: bool = False
    """True where no such hardware is present and memory is only accounted."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else is worth knowing of this kind of device (``mig``, ``compute_mode``, ``power_limit_w``, ...)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolation:
    """What a child process needs so that trials in it happen on this device.

    A Device never starts a process: it only says this, and ``probe/isolation.py`` acts on it.
    """

    required: bool
    """True where trials cannot run in the present process at all."""
    reason: str
    """Why, for a person: ``"a virtual GPU lives in a process of its own"``."""
    device: str
    """The device as the child resolves it: ``"cuda:0"``, ``"cpu"``."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables to set in the child before it starts, beside the present ones."""
    memory_limit_bytes: int | None = None
    """For the child's device: what the workload may add; None for the device's own budget."""
    anew: bool = False
    """True where every trial needs a child of its own, because one that has run a trial has less room than before."""
    forks: bool = False
    """True where a fork of the present process can try what lives in it: there is no driver that forbids it."""


class Recording(Protocol):
    """What the allocator is asked for while a few steps run."""

    def step_ended(self) -> None:
        """Called after each step."""

    def finish(self) -> Trace | None:
        """Records no more. Gives what was asked for; None where nothing could be told from it."""


@runtime_checkable
class Device(Protocol):
    """A place where training memory is.

    The measuring half (:meth:`budget_bytes` and below) speaks of the *present* process. A device whose
    :meth:`isolation` is ``required`` raises :class:`~autobatch.errors.DeviceError` there, unless the present
    process is one in which it exists.
    """

    @property
    def torch_device(self) -> str:
        """What to give to ``Tensor.to``: ``"cuda:0"``, ``"cpu"``, ``"mps"``. A fake has ``"cpu"``."""

    @property
    def ends_by_itself(self) -> bool:
        """Whether memory ends where the budget does. False on the host, which would swap: there :meth:`restrict` has
        to put an end to it."""

    def info(self) -> DeviceInfo:
        """Who this is, and who else uses it. Never raises for a figure that cannot be had: that is None."""

    def isolation(self) -> Isolation:
        """Whether trials need a child process, and with which environment and limits."""

    def budget_bytes(self) -> int | None:
        """Bytes this process's workload can have at most, in all: what it holds plus what is free to it."""

    def begin(self, found: Any = None) -> Any:
        """What this process has now, but for live tensors, is no part of the workload. Called before trials begin, and
        before a workload that is built for them. Gives what it found, which forks of one process are told instead of
        looking each for itself."""

    def held_bytes(self) -> int | None:
        """Bytes of live tensors of this process now; None where the device cannot tell."""

    def restrict(self, limit_bytes: int | None) -> AbstractContextManager[bool]:
        """Inside, the workload can have ``limit_bytes`` at most and runs out of memory above.

        Gives False where the device cannot be made smaller: then the caller compares peaks. ``None`` restricts
        nothing. The limit the user had set is in force too, and is put back on leaving, whatever happened.
        """

    def synchronize(self) -> None:
        """Waits for all work given to the device."""

    def release(self) -> None:
        """Gives cached memory back to the device."""

    def reset_peaks(self) -> None:
        """Starts a new measurement: peaks count from now on."""

    def retries(self) -> int | None:
        """How often this process's allocator had to free and retry, since it began; None if unknown."""

    def streams(self) -> int | None:
        """On how many streams this process has memory now; None if unknown."""

    def recording(self) -> AbstractContextManager[Recording | None]:
        """Records inside what the allocator is asked for; None where nobody can.

        To be entered within :meth:`restrict`, and left before it: what the recorder takes is let through there, and is
        no part of what :meth:`measure` tells until that ends.
        """

    def measure(self) -> Measurement:
        """Peaks since :meth:`reset_peaks`. Retries, step time and capacity are the trial's to fill in."""

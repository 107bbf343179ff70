"""Where trials run: what the finder asks of such a place, and the one that is this process."""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from autobatch import __version__
from autobatch.device.base import Device
from autobatch.probe.search.within import Extent
from autobatch.probe.trial import Attempt, TrialRequest, clean_up, run_trial
from autobatch.probe.workload import Workload
from autobatch.probe.workload.signature import Signature, signature_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The place of the trials once the workload stands in it. Bytes; None is unknown."""

    budget_bytes: int | None
    """What the workload can have in all."""
    held_bytes: int | None
    """What the model holds of it before anything is run."""
    mode: str
    name: str
    data: Mapping[str, Extent] = field(default_factory=dict)
    """What there is to draw from, by mode; a mode whose batches come from a function is left out."""
    environment: Mapping[str, Any] = field(default_factory=dict)


Agree = Callable[[TrialRequest, Callable[[], Attempt]], Attempt]
"""Runs an attempt at a request and says what came of it, for this process or for all ranks of a job."""


def alone(request: TrialRequest, run: Callable[[], Attempt]) -> Attempt:
    """What an attempt means to a process that need not agree with others."""
    return run()


class Executor(Protocol):
    """Runs trials one after the other, in one process or in several."""

    where: str
    """In which processes, as the result says it."""
    begins_small: bool
    """Whether a trial can run smaller batches first."""

    def setting(self) -> Setting:
        """The place as it is now. Raises what building the workload raises."""

    def signature(self, batch_size: int) -> Signature:
        """What tells the workload from others, with ``batch_size`` samples made for it."""

    def run(self, request: TrialRequest) -> Attempt:
        """Tries one size, in a process that may have tried others before."""

    def confirm(self, requests: tuple[TrialRequest, ...]) -> list[Attempt]:
        """Runs each request as a fresh start, as far as this place can, and stops at the first that fails.

        Where the process that searched is still there, it comes first, as one history more.
        """

    def close(self) -> None:
        """Leaves nothing behind: no process, no limit, no memory."""


class LocalExecutor:
    """Trials in this process, of live objects. Restoring them is the caller's part."""

    where = "this process"
    begins_small = True

    def __init__(
        self,
        workload: Workload,
        device: Device,
        restore: Callable[[], object] = lambda: None,
        *,
        agree: Agree = alone,
    ) -> None:
        self._workload, self._device, self._restore, self._agree = workload, device, restore, agree
        self._is_spared = self._froze = False
        workload.begin()

    def setting(self) -> Setting:
        # Nothing is released here: in a fresh process, training begins with the cache that building left behind.
        return Setting(
            budget_bytes=self._device.budget_bytes(),
            held_bytes=self._device.held_bytes(),
            mode=self._workload.mode,
            name=self._workload.name,
            data=self._workload.data(),
            environment=describe(self._device),
        )

    def signature(self, batch_size: int) -> Signature:
        return signature_of(self._workload, batch_size)

    def run(self, request: TrialRequest) -> Attempt:
        self.spare()
        return self._agree(request, lambda: run_trial(self._workload, self._device, request))

    def spare(self) -> None:
        """What was there before the first trial is no garbage: the collection after each is spared looking at it, which
        takes half a second where large libraries are loaded.
        """
        if self._is_spared:
            return
        self._is_spared = True
        if not gc.get_freeze_count():  # else somebody has done so who may rely on it; it counts all of it, one by one
            gc.collect()
            self._froze = True
            gc.freeze()

    def confirm(self, requests: tuple[TrialRequest, ...]) -> list[Attempt]:
        # The state before the probe and an emptied cache: that is how this process goes on to train.
        attempts: list[Attempt] = []
        for request in requests:
            self._restore()
            self.clear()
            attempts.append(self.run(request))
            if not attempts[-1].trial.fits:
                break
        return attempts

    def clear(self) -> None:
        """Lets go of what a step left alive, and gives the caches back."""
        clean_up(self._workload, self._device)

    def spare_no_more(self) -> None:
        """Undoes :meth:`spare`."""
        if self._froze:
            gc.unfreeze()
        self._is_spared = self._froze = False

    def begin_in_fork(self, found: Any) -> Any:
        """As the trials of the process begin of which this one is a fork: without gradients of the caller's. What the
        fork has of its own, such as its thread's stack, is no part of the workload. ``found`` is what the first fork
        was given here, None to that one."""
        self.clear()
        with seeing_all() if found is None else nullcontext():
            return self._device.begin(found)

    def close(self) -> None:
        self.spare_no_more()
        self.clear()


@contextmanager
def seeing_all() -> Iterator[None]:
    """Inside, what ``gc.freeze()`` hides is seen; afterwards all there is is hidden. Meant for a process of ours."""
    gc.unfreeze()
    try:
        yield
    finally:
        gc.freeze()


def describe(device: Device) -> dict[str, Any]:
    """Device, driver and versions, as a result records them. All of it goes to JSON."""
    info = device.info()
    return {
        "device": info.name,
        "kind": info.kind,
        "virtual": info.virtual,
        "note": "a GPU that is not there: PyTorch's own allocator ran, no kernel did" if info.virtual else "",
        "total_bytes": info.total_bytes,
        "free_bytes": info.free_bytes,
        "others": [{"pid": p.pid, "name": p.name, "used_bytes": p.used_bytes} for p in info.others],
        "capability": info.capability,
        "driver": info.driver,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "autobatch": __version__,
        "details": {key: str(value) for key, value in info.details.items()},
    }

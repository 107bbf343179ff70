"""VirtualGPU: a Device whose trials run in a child process under the driver, or here once it is attached."""

from __future__ import annotations

import os
import shutil
import warnings
import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.device.base import DeviceInfo, GpuProcess, Isolation, Recording
from autobatch.errors import AutobatchWarning, DeviceError, InvalidArgumentError
from autobatch.result import Measurement
from autobatch.virtual.attach import attach_process, check_attachable, environment, make_state_folder, present_state
from autobatch.virtual.catalog import find_card
from autobatch.virtual.host import check_kernels, untested_torch
from autobatch.virtual.state import MAX_CARDS, create_state, read_state

if TYPE_CHECKING:
    from autobatch.device.cuda import CudaDevice


class VirtualGPU:
    """A GPU that is not there: torch's own CUDA build computes nothing on it and accounts every byte.

    Trials run in a child process. Values are zero there; only memory is told.

    Args:
        spec: a name of the catalog (``"a100-40gb"``; ``autobatch devices --virtual`` lists them) or a card of one's own
            (``"memory=24GiB,capability=8.6"``).
        any_capability: also a card for which this torch has no kernels, for the arithmetic of its memory alone.
        count: that many of them, as ``cuda:0``, ``cuda:1``, ...; this object speaks of the first.
        memory_limit_bytes: what a workload may have at most, beside the card's own size.
        shared_with: another VirtualGPU that is the same card, so that both see what the other uses.

    Raises:
        InvalidArgumentError: if an argument is wrong.
        DeviceNotFoundError: if there is no such card, or this machine or its torch cannot have a virtual GPU.
    """

    ends_by_itself = True

    def __init__(
        self,
        spec: str,
        *,
        any_capability: bool = False,
        count: int = 1,
        memory_limit_bytes: int | None = None,
        shared_with: VirtualGPU | None = None,
    ) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_CARDS:
            raise InvalidArgumentError("count", count, f"a number of GPUs from 1 to {MAX_CARDS}")
        self.card = find_card(spec)
        if said := untested_torch():
            warnings.warn(said, AutobatchWarning, stacklevel=2)
        if not any_capability:
            check_kernels(self.card)
        if shared_with is not None and shared_with.card != self.card:
            raise InvalidArgumentError("shared_with", shared_with.card.name, f"the same card, {self.card.name}")
        self.count = count
        self._memory_limit_bytes = memory_limit_bytes
        self._shared_with = shared_with  # its state file lives as long as it does
        self._state_path: Path | None = None

    def __repr__(self) -> str:
        return f"VirtualGPU({self.card.name!r}{f', count={self.count}' if self.count > 1 else ''})"

    @property
    def state_path(self) -> Path:
        """The file in which the bytes of this card are kept, made when it is first asked for."""
        if self._shared_with is not None:
            return self._shared_with.state_path
        if self._state_path is None:
            folder = make_state_folder()
            weakref.finalize(self, _remove, folder, os.getpid())
            create_state(folder / "state", [self.card] * self.count)
            self._state_path = folder / "state"
        return self._state_path

    def attach(self) -> VirtualGPU:
        """Turns the present process, and its future children, into one that has this GPU. For good.

        Raises:
            DeviceError: if torch is imported already, or if this process has a virtual GPU.
        """
        check_attachable()
        attach_process(self.state_path)
        _kept.append(self)
        return self

    @property
    def torch_device(self) -> str:
        return "cuda:0"

    def info(self) -> DeviceInfo:
        card, state = self.card, None if self._unused() else read_state(self.state_path)[0]
        alive = [p for p in state.processes if p.alive] if state else []
        return DeviceInfo(
            name=card.title,
            kind="cuda",
            index=0,
            uuid=state.uuid if state else None,
            total_bytes=card.total_bytes,
            free_bytes=card.total_bytes - state.used_bytes if state else card.total_bytes,
            others=tuple(
                GpuProcess(pid=p.pid, name=_name_of(p.pid), used_bytes=p.used_bytes)
                for p in alive
                if p.pid != os.getpid()
            ),
            capability=f"{card.capability[0]}.{card.capability[1]}",
            virtual=True,
            details={
                "card": card.name,
                "multiprocessors": card.multiprocessors,
                "outside_bytes": card.outside_bytes,
                "sources": dict(card.sources),
            },
        )

    def isolation(self) -> Isolation:
        here = self._is_here()
        # What is visible here is a choice among the GPUs of this machine; the child has others.
        visible = {} if here else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(self.count)))}
        return Isolation(
            required=not here,
            reason="this process has the virtual GPU" if here else "a virtual GPU lives in a process of its own",
            device=self.torch_device,
            environment=environment(self.state_path) | visible,
            memory_limit_bytes=self._memory_limit_bytes,
        )

    def budget_bytes(self) -> int | None:
        return self._here().budget_bytes()

    def begin(self, found: Any = None) -> Any:
        return self._here().begin(found)

    def held_bytes(self) -> int | None:
        return self._here().held_bytes()

    def restrict(self, limit_bytes: int | None) -> AbstractContextManager[bool]:
        return self._here().restrict(limit_bytes)

    def synchronize(self) -> None:
        self._here().synchronize()

    def release(self) -> None:
        self._here().release()

    def reset_peaks(self) -> None:
        self._here().reset_peaks()

    def retries(self) -> int | None:
        return self._here().retries()

    def streams(self) -> int | None:
        return self._here().streams()

    def recording(self) -> AbstractContextManager[Recording | None]:
        return self._here().recording()

    def measure(self) -> Measurement:
        return self._here().measure()

    def _unused(self) -> bool:
        return self._state_path is None and (self._shared_with is None or self._shared_with._unused())

    def _is_here(self) -> bool:
        return not self._unused() and present_state() == self.state_path

    def _here(self) -> CudaDevice:
        if not self._is_here():
            raise DeviceError(f"{self!r} is not in this process: its trials run in a child, or attach() it first")
        from autobatch.device.cuda import CudaDevice  # imports torch, which must come after attaching

        return CudaDevice(self.torch_device, memory_limit_bytes=self._memory_limit_bytes)


_kept: list[VirtualGPU] = []  # attached to this process: their state must live as long as it does


def _remove(folder: Path, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a forked child inherits the object, not the file
        shutil.rmtree(folder)


def _name_of(pid: int) -> str | None:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # it ended in the meantime
        return None
    return " ".join(word.decode(errors="replace") for word in words if word) or None

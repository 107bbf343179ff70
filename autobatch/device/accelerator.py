"""Every other torch accelerator (Intel XPU, Apple MPS, out-of-tree backends), through ``torch.accelerator``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from autobatch.device.base import DeviceInfo, Isolation
from autobatch.device.fraction import reserve_at_most
from autobatch.errors import DeviceNotFoundError
from autobatch.result import Measurement

MPS_DEFAULT_FRACTION = 1.7
"""Of Metal's recommended working set, unless ``PYTORCH_MPS_HIGH_WATERMARK_RATIO`` says otherwise (MPSAllocator.h)."""


class AcceleratorDevice:
    """One accelerator of the present process, as far as its backend answers.

    Backends implement different parts of ``torch.accelerator``'s memory functions (MPS: from torch 2.14 on). What one
    does not answer is None; where it has no memory fraction, :meth:`restrict` gives False. MPS does not tell which
    fraction is set: a call of ``torch.mps.set_per_process_memory_fraction`` before is forgotten after a restriction.

    Args:
        torch_device: ``"xpu"``, ``"xpu:1"``, ``"mps"``, ...
        memory_limit_bytes: what the workload may reserve at most; None for all that is free.
        api: in the place of ``torch.accelerator``.
        backend: in the place of the backend's own module, such as ``torch.xpu``.

    Raises:
        DeviceNotFoundError: if there is no such accelerator.
    """

    ends_by_itself = True

    def __init__(
        self,
        torch_device: str,
        *,
        memory_limit_bytes: int | None = None,
        api: Any = torch.accelerator,
        backend: Any = None,
    ) -> None:
        self._kind, _, index = torch_device.partition(":")
        current = api.current_accelerator(check_available=True)
        if current is None or current.type != self._kind:
            raise DeviceNotFoundError(f"{torch_device}: torch's accelerator here is {current or 'none'}")
        self._index: int = int(index) if index else api.current_device_index()
        if self._index >= api.device_count():
            raise DeviceNotFoundError(f"{torch_device}: there are {api.device_count()}, counted from {self._kind}:0")
        self._memory_limit_bytes = memory_limit_bytes
        self._api = api
        self._backend = backend if backend is not None else torch.get_device_module(self._kind)

    @property
    def torch_device(self) -> str:
        return f"{self._kind}:{self._index}"

    def info(self) -> DeviceInfo:
        properties = _ask(self._backend, "get_device_properties", self._index)
        free_bytes, total_bytes = self._memory() or (None, None)
        return DeviceInfo(
            name=getattr(properties, "name", f"{self._kind} accelerator"),
            kind=self._kind,
            index=self._index,
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            driver=getattr(properties, "driver_version", None),
        )

    def isolation(self) -> Isolation:
        return Isolation(
            required=False,
            reason="a child process has an allocator without a past",
            device=self.torch_device,
            memory_limit_bytes=self._memory_limit_bytes,
        )

    def budget_bytes(self) -> int | None:
        """What this process has reserved plus what is free, at most the user's limits; None if unknown. In bytes."""
        memory, reserved_bytes = self._memory(), self._reserved_bytes()
        bounds = [self._memory_limit_bytes]
        if memory is not None and reserved_bytes is not None:
            free_bytes, total_bytes = memory
            bounds += [reserved_bytes + free_bytes, round(self._fraction() * total_bytes)]
        return min((b for b in bounds if b is not None), default=None)

    def begin(self, found: Any = None) -> None:
        """Nothing to note: torch counts tensors by themselves."""

    def held_bytes(self) -> int | None:
        held_bytes = self._stat("allocated_bytes.all.current")
        return held_bytes if held_bytes is not None else _ask(self._backend, "current_allocated_memory")

    @contextmanager
    def restrict(self, limit_bytes: int | None) -> Iterator[bool]:
        limits = [b for b in (limit_bytes, self._memory_limit_bytes) if b is not None]
        memory = self._memory()
        set_fraction = getattr(self._backend, "set_per_process_memory_fraction", None)
        if not limits or memory is None or set_fraction is None:
            yield not limits
            return
        total_bytes = memory[1]
        before = self._fraction()
        wanted_bytes = min(round(before * total_bytes), *limits)
        # The cap only refuses to reserve more; what is cached above it would still be handed out.
        if (self._reserved_bytes() or 0) > wanted_bytes:
            self.release()
        index = () if self._kind == "mps" else (self._index,)  # MPS is one device and takes none
        with reserve_at_most(
            wanted_bytes, total_bytes, before=before, set_fraction=lambda fraction: set_fraction(fraction, *index)
        ):
            yield True

    def synchronize(self) -> None:
        self._api.synchronize(self._index)

    def release(self) -> None:
        # The backend's own first: torch.accelerator's does nothing for backends it does not reach.
        getattr(self._backend, "empty_cache", self._api.empty_cache)()

    def reset_peaks(self) -> None:
        _ask(self._api, "reset_peak_memory_stats", self._index)

    def retries(self) -> int | None:
        return self._stat("num_alloc_retries")

    def streams(self) -> None:
        """Unknown: torch.accelerator does not tell."""

    def recording(self) -> AbstractContextManager[None]:
        """None: torch.accelerator keeps no history."""
        return nullcontext()

    def measure(self) -> Measurement:
        memory = self._memory()
        return Measurement(
            peak_allocated_bytes=self._stat("allocated_bytes.all.peak"),
            peak_reserved_bytes=self._stat("reserved_bytes.all.peak"),
            device_used_bytes=None if memory is None else memory[1] - memory[0],
        )

    def _stat(self, name: str) -> int | None:
        """One of the allocator's figures; None where the backend has none of them."""
        stats = _ask(self._api, "memory_stats", self._index)
        return None if stats is None else int(stats.get(name, 0))  # empty before the first allocation

    def _reserved_bytes(self) -> int | None:
        reserved_bytes = self._stat("reserved_bytes.all.current")
        return reserved_bytes if reserved_bytes is not None else _ask(self._backend, "driver_allocated_memory")

    def _memory(self) -> tuple[int, int] | None:
        """Free and total bytes; MPS before torch 2.14 has names of its own for them."""
        memory: tuple[int, int] | None = _ask(self._api, "get_memory_info", self._index)
        if memory is None:
            total_bytes = _ask(self._backend, "recommended_max_memory")
            taken_bytes = _ask(self._backend, "driver_allocated_memory")
            if total_bytes is not None and taken_bytes is not None:
                memory = (max(0, total_bytes - taken_bytes), total_bytes)
        return memory

    def _fraction(self) -> float:
        """The fraction in force: told by the backend, else its default."""
        told = _ask(self._backend, "get_per_process_memory_fraction", self._index)
        if told is not None:
            return float(told)
        if self._kind != "mps":
            return 1.0
        return float(os.environ.get("PYTORCH_MPS_HIGH_WATERMARK_RATIO", MPS_DEFAULT_FRACTION))


def _ask(module: Any, function: str, *arguments: Any) -> Any:
    """What ``module.function(*arguments)`` answers; None from a backend that does not have it or refuses."""
    try:
        return getattr(module, function)(*arguments)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None

"""NVIDIA and AMD GPUs, through ``torch.cuda`` and its caching allocator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autobatch.device import cuda_history, nvml
from autobatch.device.base import DeviceInfo, Isolation
from autobatch.device.fraction import reserve_at_most
from autobatch.device.oom import classify, first_line
from autobatch.device.recording import RecordedRun, recording
from autobatch.errors import DeviceError, DeviceNotFoundError
from autobatch.result import Measurement


class CudaDevice:
    """One GPU of the present process.

    Every figure of memory is of *reserved* bytes: what the caching allocator took from the driver. What the process
    holds besides (the context, loaded kernels, libraries) is taken from the budget, because it is not free.

    Args:
        torch_device: ``"cuda"`` or ``"cuda:N"``.
        memory_limit_bytes: what the workload may have at most, in reserved bytes; None for all that is free.

    Raises:
        DeviceNotFoundError: if there is no such GPU for this process.
    """

    ends_by_itself = True

    def __init__(self, torch_device: str = "cuda", *, memory_limit_bytes: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise DeviceNotFoundError(f"{torch_device}: torch {torch.__version__} sees no CUDA or ROCm GPU")
        index = torch.device(torch_device).index
        self._index = torch.cuda.current_device() if index is None else index
        if not 0 <= self._index < torch.cuda.device_count():
            raise DeviceNotFoundError(f"{torch_device}: there are {torch.cuda.device_count()}, counted from cuda:0")
        self._memory_limit_bytes = memory_limit_bytes

    @property
    def torch_device(self) -> str:
        return f"cuda:{self._index}"

    def info(self) -> DeviceInfo:
        properties = torch.cuda.get_device_properties(self._index)
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._index)
        kind = "rocm" if torch.version.hip else "cuda"
        seen = nvml.find_gpu(str(properties.uuid), holds_memory=True) if kind == "cuda" else None
        unseen = {"others_unknown": True}
        known = seen or DeviceInfo(name=properties.name, kind=kind, uuid=str(properties.uuid), details=unseen)
        return replace(
            known,
            index=self._index,
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            capability=f"{properties.major}.{properties.minor}",
            virtual=_is_virtual(),
            details={**known.details, "multiprocessors": properties.multi_processor_count},
        )

    def isolation(self) -> Isolation:
        return Isolation(
            required=False,
            reason="a child process has an allocator without a past",
            device=self.torch_device,
            memory_limit_bytes=self._memory_limit_bytes,
        )

    def budget_bytes(self) -> int:
        """What this process has reserved plus what the driver has free, at most the user's limits. In bytes.

        Other processes and this one's context are not free, so they are left out. Kernels and libraries that the
        first steps load make it smaller: ask again after them for the exact figure.
        """
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._index)
        available_bytes = torch.cuda.memory_reserved(self._index) + free_bytes
        return min(available_bytes, self._allowed_bytes(total_bytes))

    def begin(self, found: Any = None) -> None:
        """Nothing to note: torch counts tensors by themselves."""

    def held_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._index)

    @contextmanager
    def restrict(self, limit_bytes: int | None) -> Iterator[bool]:
        total_bytes = torch.cuda.mem_get_info(self._index)[1]
        allowed_bytes = self._allowed_bytes(total_bytes)
        wanted_bytes = allowed_bytes if limit_bytes is None else min(limit_bytes, allowed_bytes)
        # The cap only refuses to reserve more; what is cached above it would still be handed out.
        if torch.cuda.memory_reserved(self._index) > wanted_bytes:
            torch.cuda.empty_cache()
        with reserve_at_most(
            wanted_bytes,
            total_bytes,
            before=torch.cuda.get_per_process_memory_fraction(self._index),
            set_fraction=lambda fraction: torch.cuda.set_per_process_memory_fraction(fraction, self._index),
        ):
            yield True

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._index)

    def release(self) -> None:
        torch.cuda.empty_cache()

    def reset_peaks(self) -> None:
        """The first question to the GPU: makes the context, without which the allocator refuses.

        Raises:
            DeviceError: if the GPU does not answer.
        """
        try:
            torch.cuda.init()
            torch.cuda.mem_get_info(self._index)
        except RuntimeError as exc:
            if classify(exc) is not None:
                raise
            raise DeviceError(f"{self.torch_device} cannot be used: {first_line(exc)}") from exc
        torch.cuda.reset_peak_memory_stats(self._index)

    def retries(self) -> int | None:
        # Not every allocator backend counts them.
        retries: int | None = torch.cuda.memory_stats(self._index).get("num_alloc_retries")
        return retries

    def streams(self) -> int:
        return len({part["stream"] for part in torch.cuda.memory_snapshot() if part["device"] == self._index})

    def recording(self) -> AbstractContextManager[RecordedRun | None]:
        return recording(cuda_history.begin(torch, self._index))

    def measure(self) -> Measurement:
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._index)
        return Measurement(
            peak_allocated_bytes=torch.cuda.max_memory_allocated(self._index),
            peak_reserved_bytes=torch.cuda.max_memory_reserved(self._index),
            device_used_bytes=total_bytes - free_bytes,
        )

    def _allowed_bytes(self, total_bytes: int) -> int:
        """The least of the user's own fraction and the limit given to this object."""
        fraction = torch.cuda.get_per_process_memory_fraction(self._index)
        allowed_bytes = round(fraction * total_bytes)
        return allowed_bytes if self._memory_limit_bytes is None else min(allowed_bytes, self._memory_limit_bytes)


def _is_virtual() -> bool:
    """Whether CUDA here is answered by the virtual driver: then the file that this variable names is mapped."""
    state = os.environ.get("AUTOBATCH_VIRTUAL_STATE")
    if not state:
        return False
    try:
        mappings = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux, so no virtual GPU either
        return False
    return any(line.endswith(f" {os.path.realpath(state)}") for line in mappings)

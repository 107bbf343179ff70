"""The devices under test, each with a way to use memory on it that is not the device's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from autobatch.device.base import Device
from autobatch.testing import FakeDevice
from autobatch.units import GIB, KIB


@dataclass(frozen=True)
class Place:
    """A device and what the suite does around it."""

    device: Device
    use: Callable[[int], None]
    """Takes so many bytes and gives them back."""
    limit: Callable[[], float]
    """The limit in force now, in the device's own terms."""
    user_limit: Callable[[int], object]
    """A context in which the user has limited this process to so many bytes more than it has."""
    limited: Callable[[int], Device] | None
    """The same device for a workload that may have so many bytes; None for one that knows no such thing."""
    hold: Callable[[int], object] | None = None
    """A context in which so many bytes are held; None where nothing can be."""
    past: object = None
    """What is alive all the while."""


def fake() -> Place:
    device = FakeDevice(4 * GIB, lambda n: n)
    return Place(
        device=device, use=device.step, limit=device.budget_bytes, user_limit=device.restrict, limited=None, hold=None
    )


def host() -> Place:
    import resource

    from autobatch.device.host import HostDevice
    from autobatch.device.process import status_bytes

    @contextmanager
    def user_limit(size_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (status_bytes()["VmData"] + size_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)

    return Place(
        device=HostDevice(),
        use=lambda size_bytes: _take(size_bytes, "cpu"),
        limit=lambda: resource.getrlimit(resource.RLIMIT_DATA)[0],
        user_limit=user_limit,
        limited=lambda size_bytes: HostDevice(memory_limit_bytes=size_bytes),
        hold=lambda size_bytes: _holding(size_bytes, "cpu"),
    )


def host_with_holes() -> Place:
    """As in a process that has worked for a while: 200 MiB of its heap are free, and no piece is larger than 1 MiB."""
    import torch

    pieces = [torch.ones(16 * KIB, dtype=torch.uint8) for _ in range(12800)]  # below malloc's mapping threshold
    return replace(host(), past=pieces[::64])


def cuda() -> Place:
    from autobatch.device.cuda import CudaDevice

    return _on_cuda(lambda limit_bytes: CudaDevice("cuda:0", memory_limit_bytes=limit_bytes))


def accelerator() -> Place:
    """CUDA as one accelerator among others."""
    from autobatch.device.accelerator import AcceleratorDevice

    return _on_cuda(lambda limit_bytes: AcceleratorDevice("cuda:0", memory_limit_bytes=limit_bytes))


def _on_cuda(make: Callable[[int | None], Device]) -> Place:
    import torch

    @contextmanager
    def user_limit(size_bytes: int) -> Iterator[None]:
        total_bytes = torch.cuda.mem_get_info(0)[1]
        torch.cuda.set_per_process_memory_fraction(size_bytes / total_bytes, 0)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, 0)

    return Place(
        device=make(None),
        use=lambda size_bytes: _take(size_bytes, "cuda:0"),
        limit=lambda: torch.cuda.get_per_process_memory_fraction(0),
        user_limit=user_limit,
        limited=make,
        hold=lambda size_bytes: _holding(size_bytes, "cuda:0"),
    )


def _take(size_bytes: int, torch_device: str) -> None:
    import torch

    torch.ones(size_bytes, dtype=torch.uint8, device=torch_device)


@contextmanager
def _holding(size_bytes: int, torch_device: str) -> Iterator[None]:
    import torch

    tensor = torch.ones(size_bytes, dtype=torch.uint8, device=torch_device)
    yield
    del tensor

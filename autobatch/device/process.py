"""What the present process holds of the host's memory, as Linux, glibc and torch tell it. No torch is imported here."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path


def status_bytes() -> dict[str, int]:
    """The sizes in ``/proc/self/status`` (``VmData``, ``VmRSS``, ``VmHWM``, ...) in bytes; empty without ``/proc``."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(size_kib) * 1024 for name, size_kib, _ in fields}


def tensor_bytes() -> int:
    """Bytes of private data behind the CPU tensors that Python can reach, each byte once.

    Not of those that ``gc.freeze()`` has hidden, nor of files that are mapped to be shared or only read.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return 0
    things = gc.get_objects()
    # By type, each judged once: there are many objects and few types, and isinstance would ask the object itself,
    # which a lazy proxy answers by importing something.
    kinds = {kind for kind in set(map(type, things)) if issubclass(kind, torch.Tensor)}
    places = set[tuple[int, int]]()
    is_private = _private_data()
    for tensor in (thing for thing in things if type(thing) in kinds):
        # Subclasses that only wrap other tensors have no storage; what they wrap is found by itself.
        with contextlib.suppress(NotImplementedError, RuntimeError):
            storage = tensor.untyped_storage()
            if storage.device.type == "cpu" and not storage.is_shared() and is_private(storage.data_ptr()):
                places.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    size_bytes = counted_to = 0
    for start, end in sorted(places):  # arrays may share what is behind several tensors, in part too
        size_bytes += max(0, end - max(start, counted_to))
        counted_to = max(counted_to, end)
    return size_bytes


def _private_data() -> Callable[[int], bool]:
    """Tells whether an address is one of private data; without ``/proc``, that each is."""
    ends: list[int] = []  # of the mappings in their order, each with where it starts
    starts: list[int] = []
    try:
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, rights, *_ = line.split(None, 2)
            if rights.startswith("rw") and rights.endswith("p"):
                start, end = (int(address, 16) for address in addresses.split("-"))
                starts.append(start)
                ends.append(end)
    except OSError:
        return lambda address: True
    return lambda address: (at := bisect_right(ends, address)) < len(ends) and starts[at] <= address


_M_ARENA_MAX = -8  # malloc.h
_ALWAYS_FREE = 0.01  # of a limit: any heap has some room for what is small, whatever lived in it before


class _MallInfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2`` (mallinfo(3)): ten counters, of which one is read."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def free_heap_bytes() -> int:
    """Bytes of the heap that malloc would hand out without asking the system; 0 where the C library does not tell.

    They are private data, and cost no memory once :func:`trim_heap` has run.
    """
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2  # glibc 2.33
    except (AttributeError, OSError, TypeError):  # another C library; TypeError: Windows has no name for "this program"
        return 0
    mallinfo2.restype = _MallInfo2
    return int(mallinfo2().fordblks)


def holes_bytes(limit_bytes: int) -> int:
    """What is free in the heap, if it is enough to matter beside a limit on private data; else 0."""
    free_bytes = free_heap_bytes()
    return free_bytes if free_bytes > _ALWAYS_FREE * limit_bytes else 0


def trim_heap() -> None:
    """Gives the heap's free pages back to the system, where the C library can (glibc)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def share_heap() -> None:
    """Lets threads that are yet to start use the heap of the first one, where the C library can (glibc)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def idle_bytes() -> tuple[int, int]:
    """Private data, and what of it is resident, of this process less its free heap and its live tensors. In bytes.

    What it would have if it were idle, with its imports done: what a limit on the workload is counted from.
    """
    trim_heap()
    status, tensors = status_bytes(), tensor_bytes()
    data_bytes = status.get("VmData", 0) - free_heap_bytes() - tensors
    return max(0, data_bytes), max(0, _private(status, "VmRSS") - tensors)


def peak_resident_bytes() -> int:
    """The most private data that was resident at once, since the kernel's mark was last reset."""
    return _private(status_bytes(), "VmHWM")


def _private(status: dict[str, int], resident: str) -> int:
    """The field of resident memory less the pages of files and of shared memory that are in it now."""
    return status.get(resident, 0) - status.get("RssFile", 0) - status.get("RssShmem", 0)


def peak_data_bytes(*, above_space_bytes: int) -> int | None:
    """The most private data there was at once, touched or not; None where the address space, of which alone the kernel
    keeps a mark, was not larger since than ``above_space_bytes``.

    What is mapped and is no private data (libraries, the room that malloc's arenas keep) mostly stays.
    """
    status = status_bytes()
    space_bytes = status.get("VmPeak", 0)
    if space_bytes <= above_space_bytes:
        return None
    data_bytes = space_bytes - (status.get("VmSize", 0) - status.get("VmData", 0))
    return min(data_bytes, soft_limit_bytes() or data_bytes)


def reset_resident_peak() -> bool:
    """Lets the kernel's mark of resident memory begin anew; False where it cannot, and stays where it is."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to what is resident now
    except OSError:
        return False
    return True


def limit_data(soft_bytes: int) -> int:
    """Lets private data be ``soft_bytes`` at most, or what the hard limit allows; gives what it could be before."""
    import resource

    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    possible = soft_bytes if hard == resource.RLIM_INFINITY else min(soft_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (possible, hard))
    return before


def soft_limit_bytes() -> int | None:
    """The limit on private data that is in force; None where there is none."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft: int = resource.getrlimit(resource.RLIMIT_DATA)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def container_available_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the control group of this process (a container's limit) leaves, in bytes; None if there is no limit.

    Page cache that the kernel can drop counts as available, as it does in ``MemAvailable``.
    """
    left_bytes = [left for group in _groups(root) if (left := _left_in(group)) is not None]
    return min(left_bytes, default=None)


def _groups(root: Path) -> list[Path]:
    """The folders whose limits hold for this process: its own control group and those around it."""
    groups = [root, root / "memory"]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                base = root / controllers
                own = base / path.lstrip("/")
                groups += [own, *(parent for parent in own.parents if parent.is_relative_to(base))]
    return groups


def _left_in(group: Path) -> int | None:
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        # "max" is no number, and version 1 writes a limit larger than any machine instead.
        with contextlib.suppress(OSError, ValueError):
            left_bytes = int((group / limit).read_text()) - int((group / used).read_text())
            counters = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return max(0, left_bytes) + int(counters.get(cache, 0))
    return None


def out_of_memory_kills() -> int | None:
    """How many processes the kernel has killed for lack of memory since it started; None where it does not say."""
    try:
        fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except OSError:
        return None
    return int(fields["oom_kill"]) if "oom_kill" in fields else None

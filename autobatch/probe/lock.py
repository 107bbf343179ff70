"""One probe at a time on one GPU, for two would measure each other.

The lock is the system's own and dies with the process that holds it, however that ends. On host memory every probe has
a limit of its own and needs no lock.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from autobatch.device import nvml
from autobatch.device.base import Device
from autobatch.errors import AutobatchWarning
from autobatch.virtual.attach import present_state
from autobatch.virtual.device import VirtualGPU

HELD_VARIABLE = "AUTOBATCH_DEVICE_LOCKS"
"""Names the locks that a child process works under, so that it does not wait for its own parent."""

_SILENT_S = 1.0  # a wait that is longer is told
_POLL_S = 0.1

_held: set[tuple[Path, int]] = set()
"""Locks of this process, each with the thread that has it: a search within a search passes, another thread waits."""


@contextlib.contextmanager
def device_lock(device: Device) -> Iterator[None]:
    """Holds the lock of ``device`` inside; waits for another probe to end, and says so.

    Where no lock can be had, because its folder cannot be written, that is said too and the probe goes on.
    """
    path = lock_path(device)
    holder = (path, threading.get_ident()) if path is not None else None
    if path is None or holder is None or holder in _held or str(path) in _inherited():
        yield
        return
    lock = FileLock(path, mode=0o600)
    locked = _acquire(lock, device.torch_device)
    _held.add(holder)
    try:
        yield
    finally:
        _held.discard(holder)
        if locked:
            lock.release()


@contextlib.contextmanager
def assumed_lock(device: Device) -> Iterator[None]:
    """Inside, the lock of ``device`` counts as held here: another rank of this job has it for all of them."""
    path = lock_path(device)
    holder = (path, threading.get_ident()) if path is not None else None
    if path is None or holder is None or holder in _held:
        yield
        return
    _held.add(holder)
    try:
        yield
    finally:
        _held.discard(holder)


def child_environment() -> dict[str, str]:
    """What a child process must be told of the locks that are held here."""
    paths = {*_inherited(), *(str(path) for path, _ in _held)}
    return {HELD_VARIABLE: os.pathsep.join(sorted(paths))} if paths else {}


def lock_path(device: Device) -> Path | None:
    """The file that stands for the memory of ``device``, the same for all who use it; None where none is needed."""
    kind, _, index = device.torch_device.partition(":")
    if isinstance(device, VirtualGPU):
        # Beside its state, and removed with it: who does not share the state has a GPU of their own.
        return device.state_path.with_name(f"probe-{index}.lock")
    if kind == "cpu":
        return None
    state = present_state()
    if kind == "cuda" and state is not None:
        return state.with_name(f"probe-{index}.lock")
    return lock_path_of(kind, int(index or 0))


def lock_path_of(kind: str, index: int) -> Path:
    """The file that stands for an accelerator that is there, the same for all processes of this user."""
    name = re.sub(r"[^\w.-]", "_", _uuid(index) if kind == "cuda" else f"{kind}-{index}")
    return user_cache_path("autobatch") / "locks" / f"{name}.lock"


def _uuid(index: int) -> str:
    """Which GPU ``cuda:index`` is, by whatever number others know it. Makes no context where NVML can tell."""
    found = next((gpu.uuid for gpu in nvml.list_gpus() if gpu.index == index and gpu.uuid), None)
    if found is None:
        import torch

        found = str(torch.cuda.get_device_properties(index).uuid)
    return found.removeprefix("GPU-").removeprefix("MIG-")


def _acquire(lock: FileLock, name: str) -> bool:
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            lock.acquire(timeout=_SILENT_S, poll_interval=_POLL_S)
        except Timeout:
            message = f"another probe is at work on {name}: waiting until it has ended"
            warnings.warn(message, AutobatchWarning, stacklevel=5)
            lock.acquire(timeout=-1, poll_interval=_POLL_S)
    except (OSError, NotImplementedError) as exc:
        message = f"{name} is not locked against other probes: {lock.lock_file} cannot be locked ({exc})"
        warnings.warn(message, AutobatchWarning, stacklevel=5)
        return False
    return True


def _inherited() -> set[str]:
    return set(filter(None, os.environ.get(HELD_VARIABLE, "").split(os.pathsep)))

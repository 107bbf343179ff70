"""Makes a virtual GPU appear: in the present process before torch is imported, or in the environment of a child.

The driver wins over NVIDIA's libraries by being in the process first: ``LD_PRELOAD`` does that for a child, loading it
into the global scope before the first ``import torch`` does it here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from autobatch.errors import DeviceError
from autobatch.virtual.build import driver_folder, preload_libraries
from autobatch.virtual.catalog import Card
from autobatch.virtual.folders import make_folder
from autobatch.virtual.state import STATE_VARIABLE, create_state

_FOLDER_VARIABLE = "TRITON_LIBCUDA_PATH"  # Triton looks for libcuda.so.1 there, and we for our own traces
_WAIT_VARIABLE = "TORCH_AUTOGRAD_SHUTDOWN_WAIT_LIMIT"
_OTHERS = re.compile(r"lib(?:cuda|cudart|nvidia-ml)\.so\S*")

_PREFIX = "autobatch-gpu-"

_attached: Path | None = None


def make_state_folder() -> Path:
    """A new folder that only this user can enter, in memory where the system has such a place."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return make_folder(_PREFIX, Path(runtime if os.access(runtime, os.W_OK | os.X_OK) else tempfile.gettempdir()))


@contextlib.contextmanager
def temporary_state(cards: Sequence[Card]) -> Iterator[Path]:
    """The state file of new virtual GPUs, removed on leaving."""
    folder = make_state_folder()
    try:
        create_state(folder / "state", cards)
        yield folder / "state"
    finally:
        shutil.rmtree(folder)


def environment(state_path: Path, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that give a child process the virtual GPUs of ``state_path``, with their full values.

    Ours stand in front of what ``LD_PRELOAD`` and ``LD_LIBRARY_PATH`` hold in ``base``, never in its place.

    Raises:
        DeviceError: if the driver cannot be built, or lies at a path that ``LD_PRELOAD`` cannot express.
    """
    folder = driver_folder()
    libraries = ":".join(str(path) for path in preload_libraries(folder))
    if re.search(r"\s|:", str(folder)):
        raise DeviceError(
            f"LD_PRELOAD cannot name a path with blanks or colons: {folder}. Set XDG_CACHE_HOME to another"
        )
    return {
        STATE_VARIABLE: str(state_path),
        "LD_PRELOAD": _in_front(libraries, base.get("LD_PRELOAD")),
        "LD_LIBRARY_PATH": _in_front(str(folder), base.get("LD_LIBRARY_PATH")),
        _FOLDER_VARIABLE: str(folder),
        # torch 2.14 prints a warning for every refused allocation, and a search refuses many.
        "TORCH_CPP_LOG_LEVEL": base.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        # For a thread that will not end (driver/ending.c) torch would wait 10 s.
        _WAIT_VARIABLE: base.get(_WAIT_VARIABLE, "0.5"),
        "GLIBC_TUNABLES": _with_huge_pages(base.get("GLIBC_TUNABLES")),
    }


def _with_huge_pages(tunables: str | None) -> str:
    """Batches are made in the host's memory for each step, and here that is most of a step: faulting in pages of
    4 KiB took a third of a search with ResNet-50. (glibc 2.35 and newer; others ignore what they do not know.)
    """
    if tunables and "glibc.malloc.hugetlb=" in tunables:
        return tunables
    return ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))


def _in_front(ours: str, theirs: str | None) -> str:
    if not theirs:
        return ours
    return theirs if theirs == ours or theirs.startswith(ours + ":") else f"{ours}:{theirs}"


def attach_process(state_path: Path) -> None:
    """Gives the present process the virtual GPUs of ``state_path``, and its future children too.

    Raises:
        DeviceError: if it has virtual GPUs already, or if torch or NVIDIA's own libraries are loaded already.
    """
    global _attached
    check_attachable()
    variables = environment(state_path)
    os.environ.update(variables)
    for library in preload_libraries(Path(variables[_FOLDER_VARIABLE])):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    _attached = state_path


def check_attachable() -> None:
    """Says why a virtual GPU cannot be attached to the present process any more, if so.

    Raises:
        DeviceError: naming the reason and the way that remains.
    """
    if present_state() is not None:
        raise DeviceError("this process has virtual GPUs already, and can have them once only: start another process")
    late = "too late to attach a virtual GPU: {} Attach first thing in the process, or use `autobatch run`"
    if "torch" in sys.modules:
        raise DeviceError(late.format("torch is imported already and has looked for a GPU."))
    if (loaded := _OTHERS.search(_mapped_files())) is not None:
        raise DeviceError(late.format(f"NVIDIA's {loaded[0]} is loaded in this process already."))


def present_state() -> Path | None:
    """The state of the virtual GPUs that the present process has, attached or inherited; None without."""
    if _attached is not None:
        return _attached
    state, folder = os.environ.get(STATE_VARIABLE), os.environ.get(_FOLDER_VARIABLE)
    # Mappings are listed by where files lie, which is not how a cache folder behind a link is called.
    return Path(state) if state and folder and f" {os.path.realpath(folder)}/" in _mapped_files() else None


def _mapped_files() -> str:
    try:
        return Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # no Linux, so no virtual GPU either
        return ""

"""NVIDIA GPUs as their driver sees them, all processes included, through NVML. No torch, no CUDA context.

Whatever the driver does not tell (no library, no permission, not supported, too old) is None: unknown, not an error.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import pynvml

from autobatch.device.base import DeviceInfo, GpuProcess


def list_gpus(*, nvml: Any = pynvml, environ: Mapping[str, str] = os.environ) -> list[DeviceInfo]:
    """Every GPU of this machine in the order of the PCI bus, each followed by its MIG slices.

    ``index`` is the number by which CUDA knows it in this process; None where ``CUDA_VISIBLE_DEVICES`` hides it, and
    where only CUDA knows the order (it puts the fastest first unless ``CUDA_DEVICE_ORDER`` is ``PCI_BUS_ID``).

    Args:
        nvml: in the place of the module ``pynvml``.
        environ: in the place of this process's environment.
    """
    with _session(nvml) as driver:
        count = _ask(driver, "nvmlDeviceGetCount") or 0
        answers = (_ask(driver, "nvmlDeviceGetHandleByIndex", index) for index in range(count))
        handles = [handle for handle in answers if handle is not None]  # none for a GPU that was lost
        gpus = [_describe(driver, handle) for handle in handles]
        slices = [_slices(driver, handle) for handle in handles]
    rows = [row for gpu, parts in zip(gpus, slices, strict=True) for row in (gpu, *parts)]
    by_pci = environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({gpu.name for gpu in gpus}) == 1
    order = visible_uuids(
        environ.get("CUDA_VISIBLE_DEVICES"),
        [row.uuid or "" for row in rows],
        numbered=[gpu.uuid or "" for gpu in gpus] if by_pci and not any(slices) else None,
    )
    return [replace(row, index=order.index(row.uuid) if order and row.uuid in order else None) for row in rows]


def find_gpu(uuid: str, *, nvml: Any = pynvml, holds_memory: bool = False) -> DeviceInfo | None:
    """The GPU or MIG slice with this UUID, with or without its prefix; None if the driver does not tell.

    Args:
        holds_memory: whether the present process certainly holds memory of it. A driver that does not list it then
            lists none, or those outside of this container by other numbers: who they are is unknown.
    """
    with _session(nvml) as driver:
        for name in (uuid, f"GPU-{uuid}", f"MIG-{uuid}"):
            handle = _ask(driver, "nvmlDeviceGetHandleByUUID", name)
            if handle is not None:
                return _describe(driver, handle, holds_memory=holds_memory)
    return None


def visible_uuids(variable: str | None, uuids: Sequence[str], *, numbered: Sequence[str] | None) -> list[str] | None:
    """The UUIDs that CUDA numbers 0, 1, ... for a process whose ``CUDA_VISIBLE_DEVICES`` is ``variable``.

    Entries are numbers or beginnings of UUIDs (``GPU-...``, ``MIG-...``), all of the kind of the first. As in CUDA, an
    entry that names nothing ends the list, and one that names a device again empties it.

    Args:
        variable: None where it is not set, which shows every GPU.
        uuids: every GPU and slice there is.
        numbered: the GPUs in CUDA's own order; None if that is unknown, and then so is the answer to numbers.
    """
    if variable is None:
        return None if numbered is None else list(numbered)
    found: list[str] = []
    prefix = variable[:4] if variable.startswith(("GPU-", "MIG-")) else None
    for entry in variable.split(","):
        if prefix is not None:
            matches = [uuid for uuid in uuids if uuid.startswith(entry)] if entry.startswith(prefix) else []
        else:
            number = re.match(r"\s*\+?(\d+)", entry)  # CUDA reads as far as there are digits
            if number is not None and numbered is None:
                return None
            matches = list(numbered or ())[int(number[1]) :][:1] if number is not None else []
        if len(matches) != 1:
            break
        if matches[0] in found:
            return []
        found += matches
    return found


@contextmanager
def _session(nvml: Any) -> Iterator[Any]:
    """The driver, asked to listen; None where there is none."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield None
        return
    try:
        yield nvml
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _ask(driver: Any, function: str, *arguments: Any) -> Any:
    """What the driver answers; None if it, or the Python module, does not know or may not tell."""
    if driver is None:
        return None
    try:
        return getattr(driver, function)(*arguments)
    except (AttributeError, driver.NVMLError):
        return None


def _describe(driver: Any, handle: Any, *, holds_memory: bool = False) -> DeviceInfo:
    memory = _ask(driver, "nvmlDeviceGetMemoryInfo", handle)
    capability = _ask(driver, "nvmlDeviceGetCudaComputeCapability", handle)
    power_limit_mw = _ask(driver, "nvmlDeviceGetPowerManagementLimit", handle)
    processes = _processes(driver, handle)
    if holds_memory and processes is not None and os.getpid() not in {process.pid for process in processes}:
        processes = None
    details = {
        "compute_mode": _ask(driver, "nvmlDeviceGetComputeMode", handle),
        "mig": (_ask(driver, "nvmlDeviceGetMigMode", handle) or [None])[0],
        "others_unknown": True if processes is None else None,
        "power_limit_w": None if power_limit_mw is None else power_limit_mw / 1000,
    }
    return DeviceInfo(
        name=_ask(driver, "nvmlDeviceGetName", handle) or "NVIDIA GPU",
        kind="cuda",
        uuid=_ask(driver, "nvmlDeviceGetUUID", handle),
        total_bytes=getattr(memory, "total", None),
        free_bytes=getattr(memory, "free", None),
        others=tuple(process for process in processes or () if process.pid != os.getpid()),
        capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        driver=_ask(driver, "nvmlSystemGetDriverVersion"),
        details={name: value for name, value in details.items() if value is not None},
    )


def _slices(driver: Any, handle: Any) -> list[DeviceInfo]:
    """The MIG slices of a GPU; none where it is not partitioned."""
    mode = _ask(driver, "nvmlDeviceGetMigMode", handle)
    if not mode or not mode[0]:
        return []
    count = _ask(driver, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0
    handles = (_ask(driver, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index) for index in range(count))
    return [_describe(driver, mig) for mig in handles if mig is not None]


def _processes(driver: Any, handle: Any) -> list[GpuProcess] | None:
    """Every process that holds memory of the GPU; None if the driver does not tell."""
    used: dict[int, int | None] = {}
    answered = False
    for kind in ("Compute", "Graphics"):
        # The newest the driver has: each version of the call has its own layout.
        for version in ("_v3", "_v2"):
            found = _ask(driver, f"nvmlDeviceGet{kind}RunningProcesses{version}", handle)
            if found is not None:
                answered = True
                used |= {process.pid: process.usedGpuMemory for process in found}
                break
    if not answered:
        return None
    return [
        GpuProcess(pid=pid, name=_process_name(driver, pid), used_bytes=used_bytes) for pid, used_bytes in used.items()
    ]


def _process_name(driver: Any, pid: int) -> str | None:
    name: str | None
    try:
        name = psutil.Process(pid).name()
    except psutil.Error:
        # Gone, or outside of this container: the driver may still know.
        name = _ask(driver, "nvmlSystemGetProcessName", pid)
    return name

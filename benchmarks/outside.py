"""What a process takes of a GPU beside torch's allocator: its context, kernels as they are loaded, libraries' own.

Read from the driver (NVML, before there is a context and after each stage) less what the allocator has reserved. Each
run is a fork of this process, which has imported torch and touched no GPU; nothing else may use the GPU meanwhile::

    python -m benchmarks.outside [--json FILE]

Three kinds of rows, each with kernels loaded when they are first used (``CUDA_MODULE_LOADING=LAZY``, the default) and
all at once (``EAGER``): ``chain``, one stage after the other in one process; ``alone``, a stage as the first in its
process; ``training``, three steps of a workload of ``benchmarks/cells.py``. The last is what a card of the catalog has.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autobatch.device import nvml
from autobatch.units import MIB
from benchmarks import cells
from benchmarks.measure import Place, environment, forked
from benchmarks.records import as_text, file_for

DEVICE = "cuda:0"
LOADING = ("LAZY", "EAGER")
TRAINING = ("resnet50", "gpt2", "bert", "vit_b_16")
_WITHIN_S = 60.0


def context() -> None:
    import torch

    torch.cuda.init()
    torch.cuda.mem_get_info(DEVICE)


def kernel() -> None:
    _randn(64).add_(1)


def matmul() -> None:
    _randn(512, 512) @ _randn(512, 512)


def linear_bf16() -> None:
    import torch

    half = _randn(512, 512).bfloat16()
    torch.nn.functional.linear(half, half, half[0])


def backward() -> None:
    weight = _randn(512, 512).requires_grad_()
    (_randn(512, 512) @ weight).relu().sum().backward()


def convolution() -> None:
    import torch

    torch.nn.functional.conv2d(_randn(8, 64, 56, 56), _randn(64, 64, 3, 3), padding=1)


def convolution_backward() -> None:
    import torch

    weight = _randn(64, 64, 3, 3).requires_grad_()
    torch.nn.functional.conv2d(_randn(8, 64, 56, 56), weight, padding=1).sum().backward()


def convolution_fp16() -> None:
    """Channels last, forward and backward."""
    import torch

    images = _randn(8, 64, 56, 56).half().to(memory_format=torch.channels_last)
    weight = _randn(64, 64, 3, 3).half().to(memory_format=torch.channels_last).requires_grad_()
    torch.nn.functional.conv2d(images, weight, padding=1).sum().backward()


def attention() -> None:
    import torch

    heads = [_randn(2, 8, 256, 64).bfloat16().requires_grad_() for _ in range(3)]
    torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).sum().backward()


def optimizers() -> None:
    import torch

    for options in ({"foreach": True}, {"fused": True}):
        weight = torch.nn.Parameter(_randn(512, 512))
        weight.grad = _randn(512, 512)
        torch.optim.AdamW([weight], **options).step()


def recurrent() -> None:
    import torch

    net = torch.nn.LSTM(64, 64, num_layers=2, device=DEVICE)
    net(_randn(16, 8, 64))[0].sum().backward()


def fourier() -> None:
    import torch

    torch.fft.fft(_randn(64, 1024))


def solver() -> None:
    import torch

    torch.linalg.cholesky(torch.eye(256, device=DEVICE))
    torch.linalg.svd(_randn(64, 64))


def collectives() -> None:
    """NCCL, as the only rank of its world."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
    dist.all_reduce(_randn(1024))
    torch.cuda.synchronize()


STAGES: tuple[Callable[[], None], ...] = (
    context,
    kernel,
    matmul,
    linear_bf16,
    backward,
    convolution,
    convolution_backward,
    convolution_fp16,
    attention,
    optimizers,
    recurrent,
    fourier,
    solver,
    collectives,
)


def _randn(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, device=DEVICE)


class Meter:
    """Bytes beside the allocator since it was made, which must be before there is a context."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml, self._handle = pynvml, handle_of(pynvml)
        self._before = self._used_bytes()

    def outside_bytes(self) -> int:
        import torch

        torch.cuda.synchronize()
        return self._used_bytes() - self._before - torch.cuda.memory_reserved(DEVICE)

    def process_bytes(self) -> int | None:
        """What the driver says that this process holds, the allocator's part included; None where it does not say."""
        found = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        return next((process.usedGpuMemory for process in found if process.pid == os.getpid()), None)

    def _used_bytes(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)


def handle_of(driver: Any) -> Any:
    """The driver's own of the GPU that CUDA calls 0 here. Makes no context."""
    (uuid,) = [gpu.uuid for gpu in nvml.list_gpus() if gpu.index == 0]
    return driver.nvmlDeviceGetHandleByUUID(uuid)


def measured(stages: Sequence[tuple[str, Callable[[], None]]], loading: str) -> dict[str, Any]:
    """The bytes outside after each of ``stages``, which run one after the other in this process."""
    import torch

    os.environ["CUDA_MODULE_LOADING"] = loading
    meter, found = Meter(), []
    for name, run in stages:
        started_s = time.monotonic()
        run()
        torch.cuda.synchronize()
        seconds = round(time.monotonic() - started_s, 3)
        found.append({"stage": name, "outside_bytes": meter.outside_bytes(), "seconds": seconds})
    return {
        "stages": found,
        "process_bytes": meter.process_bytes(),
        "reserved_bytes": torch.cuda.memory_reserved(DEVICE),
        "cublas_workspace_config": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def trained(name: str) -> Callable[[], None]:
    """Three steps of a workload, on few samples: the number does not change which kernels there are by much."""

    def run() -> None:
        from autobatch.probe.workload.building import build

        workload = build(getattr(cells, name), DEVICE)
        for _ in range(3):
            workload.train_step(4)

    return run


def runs() -> list[tuple[str, str, list[tuple[str, Callable[[], None]]]]]:
    """Every run: its kind, how kernels are loaded, and its stages."""
    named = [(stage.__name__, stage) for stage in STAGES]
    found = [("chain", loading, named) for loading in LOADING]
    found += [("alone", "LAZY", [named[0], named[1], stage]) for stage in named[2:]]
    found += [("training", loading, [named[0], (name, trained(name))]) for name in TRAINING for loading in LOADING]
    return found


def run(file: Path | None = None) -> dict[str, Any]:
    """Measures, and writes the file after each run."""
    for module in ("torch._dynamo", "torchvision", "transformers", "autobatch.probe.workload.building"):
        __import__(module)
    results: dict[str, Any] = {"environment": environment(Place(device=DEVICE)), "rows": []}
    results["memory"] = forked(totals)
    file = file or file_for("outside", results["environment"])
    for kind, loading, stages in runs():
        known = forked(lambda stages=stages, loading=loading: measured(stages, loading), _WITHIN_S)  # type: ignore[misc]
        results["rows"].append({"run": kind, "loading": loading, "last": stages[-1][0], **known})
        file.write_text(as_text(results))
        print(json.dumps(results["rows"][-1]), file=sys.stderr, flush=True)
    return results


def totals() -> dict[str, Any]:
    """The GPU's memory as NVML and as torch see it, in bytes."""
    import pynvml
    import torch

    pynvml.nvmlInit()
    handle = handle_of(pynvml)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    found = {f"nvml_{part}": int(getattr(memory, part)) for part in ("total", "used", "free")}
    free_bytes, total_bytes = torch.cuda.mem_get_info(DEVICE)
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        **found,
        "torch_total": total_bytes,
        "torch_free": free_bytes,
        "properties_total": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "nvml_processes": len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """MiB outside the allocator: after every stage of a chain, and what each adds where it comes first."""
    chains = {row["loading"]: row["stages"] for row in rows if row["run"] == "chain" and "stages" in row}
    alone = {
        row["last"]: row["stages"][-1]["outside_bytes"] - row["stages"][1]["outside_bytes"]
        for row in rows
        if row["run"] == "alone" and "stages" in row
    }
    lines = ["| after | LAZY, MiB | EAGER, MiB | added where it comes first, MiB |", "|---|---|---|---|"]
    for at, stage in enumerate(STAGES):
        name = stage.__name__
        figures = [chains[mode][at]["outside_bytes"] if mode in chains else None for mode in LOADING]
        lines.append(f"| {name} | {' | '.join(_mib(figure) for figure in (*figures, alone.get(name)))} |")
    for name in TRAINING:
        found = {row["loading"]: row for row in rows if row["run"] == "training" and row["last"] == name}
        figures = [found[mode]["stages"][-1]["outside_bytes"] if "stages" in found[mode] else None for mode in LOADING]
        lines.append(f"| training {name} | {' | '.join(_mib(figure) for figure in figures)} | |")
    return "\n".join(lines)


def _mib(size_bytes: int | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / MIB:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    print(table(run(parser.parse_args().json)["rows"]))


if __name__ == "__main__":
    main()

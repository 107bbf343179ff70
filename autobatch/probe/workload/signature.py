"""What a workload is, for a cache: everything that decides its memory and can be seen without running it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import autobatch
from autobatch.probe.workload import Workload

_SCALARS = (bool, int, float, str, type(None))
_VARIABLES = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_HIP_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "TORCH_BLAS_PREFER_CUBLASLT",
)
"""Variables that change what the allocator or a library takes."""
_LIBRARIES = (Path(torch.__file__).parent, Path(autobatch.__file__).parent)  # their versions are in the question anyway


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """``text`` tells workloads apart; None where they cannot be told apart, and then ``reason`` says why."""

    text: str | None
    reason: str = ""


def signature_of(workload: Workload, batch_size: int) -> Signature:
    """The signature of ``workload``, for which ``batch_size`` samples are made.

    Parameters and buffers, the settings of every module, optimizer, samples, precision and the flags of torch, and the
    files in which the model, its loss and its samples are written. Code elsewhere that they call is not seen.
    """
    if workload.step is not None:
        return Signature(text=None, reason="nothing tells one step function from another")
    try:
        samples = list(_leaves(workload.sample(batch_size)))
    except Exception as exc:  # noqa: BLE001 - the trial of this size meets it again, and says what it means
        return Signature(text=None, reason=f"no sample could be made ({type(exc).__name__}: {exc})")
    parts = {
        "tensors": [_tensor(name, item) for name, item in _tensors(workload.model)],
        "modules": [_module(name, module) for name, module in workload.model.named_modules()],
        "optimizers": [_optimizer(optimizer) for optimizer in workload.optimizers],
        "samples": samples,
        "training": _training(workload),
        "torch": _torch_flags(),
        "variables": [(name, os.environ.get(name)) for name in _VARIABLES],
        "sources": _sources(workload),
    }
    return Signature(text=hashlib.sha256(repr(parts).encode()).hexdigest())


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _tensor(name: str, item: Tensor) -> tuple[Any, ...]:
    return name, tuple(item.shape), str(item.dtype), item.requires_grad, item.device.type


def _module(name: str, module: nn.Module) -> tuple[Any, ...]:
    # Checkpointing, attention and dropout are such settings; whether it trains just now is not.
    settings = _settings(module, without=("training",))
    config = getattr(module, "config", None)
    configured = _settings(config) if hasattr(config, "__dict__") else ()
    return name, _name(type(module)), module._compiled_call_impl is not None, settings, configured


def _settings(item: Any, *, without: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    return sorted(
        (name, repr(value)) for name, value in vars(item).items() if isinstance(value, _SCALARS) and name not in without
    )


def _optimizer(optimizer: Any) -> tuple[Any, ...]:
    groups = [
        # Rates change as training goes on; whether there is momentum decides memory, how much of it does not.
        (len(group["params"]), sorted((k, _without_size(v)) for k, v in group.items() if isinstance(v, _SCALARS)))
        for group in getattr(optimizer, "param_groups", ())
    ]
    return _name(type(optimizer)), groups, len(getattr(optimizer, "state", ())) > 0


def _without_size(value: Any) -> str:
    return repr(value != 0 if isinstance(value, float) else value)


def _training(workload: Workload) -> tuple[Any, ...]:
    others = (workload.scheduler, workload.scaler, workload.loss_fn, workload._evaluate, *workload.extra_state)
    return (
        workload.mode,
        workload.precision,
        workload.accumulate,
        workload.max_grad_norm is not None,
        [_name(other if inspect.isroutine(other) else type(other)) for other in others],
        # A library may have put a class of its own around an optimizer.
        [_optimizer(getattr(other, "optimizer", other)) for other in others if isinstance(other, Optimizer)],
        [_name(item) if _is_code(item) else repr(item) for item in workload.identity],
    )


def _torch_flags() -> tuple[Any, ...]:
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    return (
        str(torch.get_default_dtype()),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.get_float32_matmul_precision()),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        torch.are_deterministic_algorithms_enabled(),
    )


def _leaves(batch: Any) -> Iterator[tuple[Any, ...]]:
    """Shape, type and device of every tensor in a batch, in their order."""
    if isinstance(batch, Tensor):
        yield tuple(batch.shape), str(batch.dtype), batch.device.type
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from ((str(key), *leaf) for leaf in _leaves(value))
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from _leaves(value)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from _leaves(getattr(batch, field.name))
    else:
        yield (_name(type(batch)),)


def _sources(workload: Workload) -> list[tuple[str, str]]:
    """Name and hash of each file in which something of the workload is written."""
    written: list[Any] = [type(module) for module in workload.model.modules()]
    written += [workload.sample, workload.loss_fn, workload._evaluate, *map(type, workload.optimizers)]
    written += filter(_is_code, workload.identity)
    paths = {path for item in written if (path := _source(item)) is not None}
    return sorted((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths)


def _is_code(item: Any) -> bool:
    return inspect.isroutine(item) or isinstance(item, (type, functools.partial))


def _source(item: Any) -> Path | None:
    while isinstance(item, functools.partial):
        item = item.func
    wanted: Callable[..., Any] | type = item if inspect.isroutine(item) or isinstance(item, type) else type(item)
    try:
        found = inspect.getsourcefile(inspect.unwrap(wanted))
    except TypeError:  # written in C, or typed into a console
        return None
    path = Path(found) if found else None
    if path is None or not path.is_file() or any(path.is_relative_to(library) for library in _LIBRARIES):
        return None
    return path


def _name(item: Any) -> str:
    return f"{getattr(item, '__module__', '')}.{getattr(item, '__qualname__', type(item).__qualname__)}"

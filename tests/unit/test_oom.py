"""Which errors mean out of memory: each row of the table, built from the type in which it really comes."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch

from autobatch.device.oom import Tier, classify, classify_exit, first_line, is_oom

LINEAR = "when calling `cublasSgemm( handle, opa, opb, m, n, k, &alpha, a, lda, b, ldb, &beta, c, ldc)`"
KERNEL_HELP = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)


def accelerator_error(message: str, error_code: int) -> Exception:
    error = torch.AcceleratorError(message)
    error.error_code = error_code  # as torch's C++ does
    return error


DEFINITE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 39.39 GiB"),
    torch.OutOfMemoryError("Allocation on device"),  # the type is enough
    torch.cuda.OutOfMemoryError("HIP out of memory. Tried to allocate 1.00 GiB."),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 15.78 GiB total capacity)"),
    RuntimeError("HIP out of memory. Tried to allocate 1.00 GiB."),
    RuntimeError("XPU out of memory. Tried to allocate 64.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.90 GB, other allocations: 384.00 KB)"),
    accelerator_error("CUDA error: out of memory" + KERNEL_HELP, 2),
    accelerator_error("CUDA error: memory allocation failed in words of tomorrow", 2),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: out of memory\n" + KERNEL_HELP),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("HIP error: hipErrorOutOfMemory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    torch.distributed.DistBackendError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 1153433600 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried ..."),
    RuntimeError("posix_memalign failed"),
    MemoryError(),
    MemoryError("std::bad_alloc"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)"),
    RuntimeError("synStatus=8 [Device not found] PT_DEVMEM Allocation failed. FATAL ERROR"),
    RuntimeError("Allocation is out of device memory on current platform."),
]
SUSPECT = [
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not create a memory object"),
]
LIMIT = [
    RuntimeError("Invalid buffer size: 24.00 GiB"),
    RuntimeError("upsample_nearest2d only supports output tensors with less than INT_MAX elements, but got [3, 4]"),
    accelerator_error("CUDA error: invalid configuration argument" + KERNEL_HELP, 9),
    RuntimeError("CUDA error: invalid configuration argument"),
    RuntimeError("Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, but got false."),
]
FATAL = [
    accelerator_error("CUDA error: device-side assert triggered" + KERNEL_HELP, 710),
    RuntimeError("CUDA error: device-side assert triggered"),
    accelerator_error("CUDA error: an illegal memory access was encountered" + KERNEL_HELP, 700),
    RuntimeError("CUDA error: misaligned address"),
    RuntimeError("CUDA error: unspecified launch failure"),
    accelerator_error("HIP error: something new", 719),
]
NOT_OOM = [
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x10 and 20x5)"),
    RuntimeError(f"CUDA error: CUBLAS_STATUS_EXECUTION_FAILED {LINEAR}"),
    RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 999 'unknown error'"),
    accelerator_error("CUDA error: no kernel image is available for execution on the device", 209),
    accelerator_error("CUDA error: OS call failed or operation not supported on this OS" + KERNEL_HELP, 304),
    RuntimeError("No available memory module named 'cache'"),
    KeyError("CUDA out of memory"),
    ValueError("CUDA out of memory"),
    AssertionError("CUDA out of memory"),
    OSError(12, "Cannot allocate memory"),
    RecursionError("maximum recursion depth exceeded"),
    KeyboardInterrupt(),
]


def label(error: BaseException) -> str:
    return f"{type(error).__name__}-{str(error)[:50]}"


@pytest.mark.parametrize(
    ("error", "tier"),
    [
        pytest.param(error, tier, id=label(error))
        for tier, errors in (
            (Tier.DEFINITE, DEFINITE),
            (Tier.SUSPECT, SUSPECT),
            (Tier.LIMIT, LIMIT),
            (Tier.FATAL, FATAL),
            (None, NOT_OOM),
        )
        for error in errors
    ],
)
def test_each_row_of_the_table(error: BaseException, tier: Tier | None) -> None:
    assert classify(error) is tier
    assert is_oom(error) is (tier is Tier.DEFINITE)


def test_a_real_failure_of_the_cpu_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_oom(caught.value)


def test_a_real_shape_error_and_a_real_key_error_are_not() -> None:
    with pytest.raises(RuntimeError) as shape:
        torch.ones(2, 3) @ torch.ones(2, 3)
    with pytest.raises(KeyError) as key:
        {}[51]
    assert classify(shape.value) is classify(key.value) is None


def test_causes_and_contexts_are_followed() -> None:
    oom = torch.OutOfMemoryError("CUDA out of memory.")
    explicit, implicit = RuntimeError("training step failed"), ValueError("while logging")
    explicit.__cause__ = oom
    implicit.__context__ = explicit
    assert classify(explicit) is classify(implicit) is Tier.DEFINITE
    assert first_line(implicit) == "CUDA out of memory."


def translate(error: Exception, to: Exception, *, cause: Exception | None) -> None:
    try:
        raise error
    except (RuntimeError, ValueError):
        raise to from cause


def test_a_suppressed_context_is_not_followed_but_its_cause_is() -> None:
    oom = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(KeyError) as hidden:
        translate(oom, KeyError("a bug of its own"), cause=None)
    assert hidden.value.__context__ is oom
    assert classify(hidden.value) is None
    with pytest.raises(RuntimeError) as wrapped:
        translate(ValueError("unrelated"), RuntimeError("wrapped"), cause=oom)
    assert classify(wrapped.value) is Tier.DEFINITE


def test_a_context_that_the_caller_is_handling_was_there_before_but_a_cause_counts() -> None:
    found: list[Tier | None] = []
    outer = torch.OutOfMemoryError("CUDA out of memory.")
    try:
        raise outer
    except torch.OutOfMemoryError:
        with pytest.raises(ValueError, match="a bug") as caught:
            raise ValueError("a bug of its own")  # noqa: B904 - that is the case
        found += [classify(caught.value), classify(outer)]
        caught.value.__cause__ = outer
        found.append(classify(caught.value))
    assert caught.value.__context__ is outer
    assert found == [None, Tier.DEFINITE, Tier.DEFINITE]


def test_circles_of_causes_end() -> None:
    first, second = RuntimeError("one"), RuntimeError("two")
    first.__cause__, second.__cause__ = second, first
    assert classify(first) is None
    second.__context__ = MemoryError()
    second.__suppress_context__ = False
    assert classify(first) is Tier.DEFINITE


def test_the_graver_tier_wins_along_a_chain() -> None:
    fatal = RuntimeError("CUDA error: an illegal memory access was encountered")
    fatal.__context__ = torch.OutOfMemoryError("CUDA out of memory.")
    assert classify(fatal) is Tier.FATAL
    suspect = RuntimeError("could not create a primitive")
    suspect.__context__ = MemoryError("std::bad_alloc")
    assert classify(suspect) is Tier.DEFINITE


def test_first_line_is_one_line_and_never_empty() -> None:
    assert first_line(RuntimeError("\n  CUDA error: out of memory\nmore")) == "CUDA error: out of memory"
    assert first_line(MemoryError()) == "MemoryError"
    assert first_line(KeyError("x")) == "'x'"


@pytest.mark.parametrize(
    ("number", "exhausted", "tier"),
    [
        (signal.SIGKILL, True, Tier.DEFINITE),
        (signal.SIGKILL, False, None),
        (signal.SIGSEGV, True, Tier.SUSPECT),
        (signal.SIGSEGV, False, None),
        (signal.SIGTERM, True, None),
        (signal.SIGABRT, True, None),
    ],
)
def test_a_child_killed_by_a_signal(number: int, exhausted: bool, tier: Tier | None) -> None:
    assert classify_exit(number, memory_exhausted=exhausted) is tier


def test_needs_no_torch() -> None:
    code = (
        "import sys; from autobatch.device.oom import is_oom; assert is_oom(MemoryError()); "
        "assert not is_oom(RuntimeError('x')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

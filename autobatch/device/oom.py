"""Which exceptions, and which deaths of a child process, mean "out of memory".

Recognised by type first, then by message, through the whole chain of causes. What is not in the tables below is not
an out-of-memory error: it belongs to the user and never shrinks a batch.
"""

from __future__ import annotations

import enum
import signal
import sys
import traceback
from collections.abc import Iterator


class Tier(enum.Enum):
    """How sure a sign of exhausted memory is. The order of the members is the order in which they win."""

    FATAL = "fatal"
    """The device's context is broken: only a new process helps. Never out of memory."""
    DEFINITE = "definite"
    """Out of memory."""
    LIMIT = "limit"
    """A size limit of a kernel, not memory: it caps the search."""
    SUSPECT = "suspect"
    """Out of memory only if something else agrees: a smaller size passes, or the allocator's ``num_ooms`` rose."""


MESSAGES: dict[Tier, tuple[str, ...]] = {
    Tier.FATAL: (
        "device-side assert triggered",  # torch ends every message of CUDA with advice on "device-side assertions"
        "illegal memory access",
        "misaligned address",
        "unspecified launch failure",
    ),
    Tier.DEFINITE: (
        "CUDA out of memory",
        "HIP out of memory",
        "XPU out of memory",
        "MPS backend out of memory",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "hipErrorOutOfMemory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "CUFFT_ALLOC_FAILED",
        "Cuda failure 2 'out of memory'",  # NCCL
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory",  # Windows
        "posix_memalign failed",
        "std::bad_alloc",
        "UR_RESULT_ERROR_OUT_OF_RESOURCES",
        "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
        "PI_ERROR_OUT_OF_RESOURCES",
        "PT_DEVMEM Allocation failed",
        "Allocation is out of device memory",
    ),
    Tier.LIMIT: (
        "Invalid buffer size",  # MPS: one buffer is larger than Metal allows
        "INT_MAX elements",
        "invalid configuration argument",
        "canUse32BitIndexMath",
    ),
    Tier.SUSPECT: (
        "CUBLAS_STATUS_NOT_INITIALIZED",
        "CUDNN_STATUS_INTERNAL_ERROR",
        "CUDNN_STATUS_NOT_SUPPORTED",
        # cuDNN, when no plan ran: every plan's workspace was refused, or none supports the operation.
        "GET was unable to find an engine",
        "FIND was unable to find an engine",
        "CUFFT_INTERNAL_ERROR",
        "CUSOLVER_STATUS_INTERNAL_ERROR",
        "could not create a primitive",  # oneDNN
        "could not create a memory object",
    ),
}
"""What a message must contain. Only a ``RuntimeError`` is asked, the type in which torch reports all of these."""

ERROR_CODES: dict[int, Tier] = {
    2: Tier.DEFINITE,  # cudaErrorMemoryAllocation, hipErrorOutOfMemory
    9: Tier.LIMIT,  # invalid configuration
    700: Tier.FATAL,  # illegal address
    710: Tier.FATAL,  # device-side assert
    716: Tier.FATAL,  # misaligned address
    719: Tier.FATAL,  # launch failure
}
"""``error_code`` of a ``torch.AcceleratorError``: the numbers of ``cudaError_t``, which HIP shares."""


_SHORT_LINE = 120


def classify(exc: BaseException) -> Tier | None:
    """What ``exc`` says about memory, itself or through what caused it; None if nothing.

    ``__cause__`` and ``__context__`` are followed; a context hidden by ``raise ... from None`` is not, nor is one
    that the caller is handling while this is asked: it was there before.
    """
    tiers = {tier for error in _chain(exc) if (tier := _tier_of(error))}
    return next((tier for tier in Tier if tier in tiers), None)


def is_oom(exc: BaseException) -> bool:
    """Whether ``exc`` certainly means that memory ran out, on a GPU, another accelerator or the host.

    Errors that only may mean it (:attr:`Tier.SUSPECT`) are not counted here.
    """
    return classify(exc) is Tier.DEFINITE


def first_line(exc: BaseException) -> str:
    """One line for a person: of the error in the chain that decided, else of ``exc`` itself."""
    decided = classify(exc)
    error = next((e for e in _chain(exc) if decided and _tier_of(e) is decided), exc)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # torch goes on for a paragraph after saying what and how much.
    return lines[0] if len(lines[0]) <= _SHORT_LINE else ". ".join(lines[0].split(". ")[:2])


def forget_frames(exc: BaseException, *, places_too: bool = False) -> None:
    """Clears the locals of every frame that ``exc``, or one it is chained to, holds: they are the tensors.

    Args:
        places_too: also lets go of the frames, for an error that nobody will raise again. Their functions may be
            closures that hold tensors: torch calls a module with hooks through one, with its inputs.
    """
    for error in list(_chain(exc, hidden=True)):
        traceback.clear_frames(error.__traceback__)
        if places_too:
            error.__traceback__ = None


def classify_exit(signal_number: int, *, memory_exhausted: bool) -> Tier | None:
    """What the death of a child process by ``signal_number`` says about memory; None if nothing.

    Args:
        memory_exhausted: whether host memory was about to run out, or the child ran under a memory limit.
    """
    if not memory_exhausted:
        return None
    # Numbers, because Windows has no SIGKILL to compare with.
    return {9: Tier.DEFINITE, int(signal.SIGSEGV): Tier.SUSPECT}.get(signal_number)


def _chain(exc: BaseException, *, hidden: bool = False) -> Iterator[BaseException]:
    """``exc`` and what led to it, each once, nearest first; with ``hidden`` also contexts that are not shown."""
    waiting, seen = [exc], set[int]()
    handled = sys.exc_info()[1]
    while waiting:
        error = waiting.pop(0)
        if id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        context = None if error.__suppress_context__ and not hidden else error.__context__
        before = context is handled and handled is not exc
        waiting += [linked for linked in (error.__cause__, None if before else context) if linked is not None]


def _tier_of(error: BaseException) -> Tier | None:
    """What this one error says, whatever caused it."""
    if isinstance(error, MemoryError):
        return Tier.DEFINITE
    if not isinstance(error, RuntimeError):
        return None
    # Without torch in the process there is no error of its types: no reason to import it.
    torch = sys.modules.get("torch")
    if torch is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return Tier.DEFINITE
        if isinstance(error, torch.AcceleratorError):
            tier = ERROR_CODES.get(getattr(error, "error_code", -1))
            if tier is not None:
                return tier
    message = str(error)
    return next((tier for tier in Tier if any(text in message for text in MESSAGES.get(tier, ()))), None)

"""What a prober and the processes of its trials say to each other."""

from __future__ import annotations

import pickle
import struct
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import autobatch
from autobatch.errors import WorkloadFailedError

NUMBER = struct.Struct("q")  # what the server writes to its socket: a worker's pid, then how it ended
FORK, NEXT_JOB = b"f", b"j"  # what it is told there: the first comes with the worker's own socket


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a server needs to know. ``payload`` is the pickled builder: a reference by name, as in spawn."""

    payload: bytes
    main: Mapping[str, str]
    """How to import the main script, if the builder is part of it: the rest of what ``spawn.prepare()`` takes."""
    variables: Mapping[str, str]
    """To be set in the environment before that."""
    device: str
    memory_limit_bytes: int | None
    meets: bool = False
    """Whether a worker is told first where it meets those of other ranks: variables of its environment."""


@dataclass(frozen=True, slots=True)
class SignatureRequest:
    """Asks what the workload is, with so many samples made for it."""

    batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An exception on its way to the prober, beside the traceback that cannot travel with it."""

    exception: BaseException
    traceback_text: str


def portable(exc: BaseException) -> Failure:
    """``exc`` if it survives pickling, else a WorkloadFailedError that says the same."""
    text = "".join(traceback.format_exception(type(exc), exc, _workload_frames(exc.__traceback__)))
    try:
        copied = pickle.loads(pickle.dumps(exc))
        if type(copied) is not type(exc) or str(copied) != str(exc):
            raise pickle.PicklingError("it changes on the way")
    except Exception:  # noqa: BLE001 - an exception's own __reduce__ or __init__ may raise anything
        exc = WorkloadFailedError(f"{type(exc).__name__}: {exc}", traceback_text=text)
    return Failure(exception=exc, traceback_text=text)


def _workload_frames(frames: TracebackType | None) -> TracebackType | None:
    """``frames`` from where autobatch calls the workload on: those before say nothing about an error of its own."""
    root, found = str(Path(autobatch.__file__).parent), frames
    while found is not None and found.tb_frame.f_code.co_filename.startswith(root):
        found = found.tb_next
    return found or frames

"""The small mapped file in which one machine of virtual GPUs keeps who holds how much.

The driver (``driver/state.h``) maps the same file: the fields here are its fields, in its order, and a test compiles
the header to compare their offsets. Writing happens there, under the file's own lock; this module makes the file and
reads it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autobatch.errors import DeviceNotFoundError, DeviceQueryError, InvalidArgumentError

if TYPE_CHECKING:
    from autobatch.virtual.catalog import Card

STATE_VARIABLE = "AUTOBATCH_VIRTUAL_STATE"
"""Names the file. The driver reads the cards of the machine from it."""
STATE_VERSION = 2
MAX_CARDS = 64
_MAGIC = b"abvgpu\r\n"
_MAX_ENTRIES = 4096
_ALIVE = 1


class _Card(ctypes.Structure):
    _fields_ = (
        ("title", ctypes.c_char * 96),
        ("uuid", ctypes.c_char * 48),
        ("total_bytes", ctypes.c_uint64),
        ("outside_bytes", ctypes.c_uint64),
        ("capability_major", ctypes.c_int32),
        ("capability_minor", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class _Entry(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_int64),
        ("started", ctypes.c_uint64),
        ("card", ctypes.c_uint32),
        ("status", ctypes.c_uint32),
        ("used_bytes", ctypes.c_uint64),
        ("peak_bytes", ctypes.c_uint64),
        ("refused", ctypes.c_uint64),
    )


class _State(ctypes.Structure):
    _fields_ = (
        ("magic", ctypes.c_char * 8),
        ("version", ctypes.c_uint32),
        ("card_count", ctypes.c_uint32),
        ("entry_count", ctypes.c_uint32),
        ("fail_count", ctypes.c_uint32),
        ("fail_allocation", ctypes.c_int64),
        ("allocations", ctypes.c_int64),
        ("lock", ctypes.c_char * 64),
        ("cards", _Card * MAX_CARDS),
        ("entries", _Entry * _MAX_ENTRIES),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    """One process on one card, also one that is gone."""

    pid: int
    alive: bool
    used_bytes: int
    """What it holds now, its context included, in bytes."""
    peak_bytes: int
    """The most it ever held, in bytes."""
    refused_allocations: int
    """How many allocations the driver refused it. PyTorch tries again after most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardState:
    """One virtual GPU now."""

    title: str
    uuid: str
    total_bytes: int
    outside_bytes: int
    """What each process's context takes, in bytes."""
    used_bytes: int
    """What all living processes hold, in bytes."""
    processes: tuple[ProcessState, ...]


def create_state(path: Path, cards: Sequence[Card], *, fail_allocation: int | None = None) -> None:
    """Makes the file of a new machine with these cards, readable by this user alone.

    ``fail_allocation`` tells the driver to refuse the allocation with that number, counted from 1 over all processes:
    the one after it succeeds again.

    Raises:
        InvalidArgumentError: if there are no cards or more than 64, or one that the file cannot hold.
        DeviceNotFoundError: on another platform than Linux.
    """
    if not 1 <= len(cards) <= MAX_CARDS:
        raise InvalidArgumentError("cards", len(cards), f"1 to {MAX_CARDS} cards")
    if fail_allocation is not None and fail_allocation < 1:
        raise InvalidArgumentError("fail_allocation", fail_allocation, "a number from 1 on, or None")
    if sys.platform != "linux":
        raise DeviceNotFoundError(f"virtual GPUs need Linux, and this is {sys.platform}")
    state = _State(magic=_MAGIC, version=STATE_VERSION, card_count=len(cards))
    state.fail_allocation, state.fail_count = fail_allocation or 0, 1
    for place, card in zip(state.cards, cards, strict=False):
        _fill(place, card)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        file = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(file, "r+b") as stream:
            stream.write(bytes(state))
            stream.flush()
            with mmap.mmap(stream.fileno(), ctypes.sizeof(_State)) as mapped:
                _make_lock(_State.from_buffer(mapped))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def refuse_allocations(path: Path, after: int, count: int = 1) -> None:
    """Tells the driver of a living machine to refuse ``count`` allocations in a row, once ``after`` more were made.

    torch frees its cache and tries once more where one is refused: two in a row are an out-of-memory error.

    Raises:
        InvalidArgumentError: if ``after`` is below 0 or ``count`` below 1.
    """
    for name, number, least in (("after", after, 0), ("count", count, 1)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise InvalidArgumentError(name, number, f"a whole number from {least} on")
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), ctypes.sizeof(_State)) as mapped:
        state = _State.from_buffer(mapped)
        # The count goes first: a driver that looks in between then refuses nothing yet.
        state.fail_allocation = 0
        state.fail_count = count
        state.fail_allocation = state.allocations + after + 1
        del state  # it holds the map open


def read_state(path: Path) -> tuple[CardState, ...]:
    """Each card as it is now, with the processes on it and those that are gone.

    Raises:
        DeviceQueryError: if ``path`` is not the file of such a machine, or of another version.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DeviceQueryError(f"the virtual GPU's state cannot be read: {error}") from error
    if len(data) != ctypes.sizeof(_State):
        raise DeviceQueryError(f"{path} is not the state of a virtual GPU of this version of autobatch")
    state = _State.from_buffer_copy(data)
    # ctypes cuts text at its first zero byte, which the magic has none of.
    if state.magic != _MAGIC or state.version != STATE_VERSION or not 1 <= state.card_count <= MAX_CARDS:
        raise DeviceQueryError(f"{path} is not the state of a virtual GPU of this version of autobatch")
    entries = state.entries[: min(state.entry_count, _MAX_ENTRIES)]
    return tuple(_card_state(index, card, entries) for index, card in enumerate(state.cards[: state.card_count]))


def _card_state(index: int, card: _Card, entries: Sequence[_Entry]) -> CardState:
    processes = tuple(_process_state(entry) for entry in entries if entry.card == index)
    return CardState(
        title=card.title.decode(),
        uuid=card.uuid.decode(),
        total_bytes=card.total_bytes,
        outside_bytes=card.outside_bytes,
        used_bytes=sum(process.used_bytes for process in processes),
        processes=processes,
    )


def _process_state(entry: _Entry) -> ProcessState:
    # The driver notices a death at the next allocation of anybody; a reader may come before that.
    alive = entry.status == _ALIVE and start_time(entry.pid) == entry.started
    return ProcessState(
        pid=entry.pid,
        alive=alive,
        used_bytes=entry.used_bytes if alive else 0,
        peak_bytes=entry.peak_bytes,
        refused_allocations=entry.refused,
    )


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks after boot; None if it is gone, as a zombie is, which holds nothing."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if not fields or fields[0] in "ZX" else int(fields[19])


def _fill(place: _Card, card: Card) -> None:
    title = card.title.encode()
    if len(title) >= _Card.title.size or b"\0" in title:
        raise InvalidArgumentError("title", card.title, f"a name of at most {_Card.title.size - 1} bytes")
    if not 0 <= card.outside_bytes < card.total_bytes < 2**63:
        raise InvalidArgumentError("total_bytes", card.total_bytes, f"more than outside_bytes={card.outside_bytes}")
    place.title = title
    place.uuid = f"GPU-{uuid.uuid4()}".encode()
    place.total_bytes, place.outside_bytes = card.total_bytes, card.outside_bytes
    place.capability_major, place.capability_minor = card.capability
    place.multiprocessors = card.multiprocessors


def _make_lock(state: _State) -> None:
    """A mutex that processes share and that survives the death of its holder, as POSIX threads make it."""
    libc = ctypes.CDLL(None, use_errno=True)
    kind, mutex = ctypes.create_string_buffer(64), ctypes.byref(state, _State.lock.offset)
    shared = robust = 1  # PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST on Linux
    results = (
        libc.pthread_mutexattr_init(kind),
        libc.pthread_mutexattr_setpshared(kind, shared),
        libc.pthread_mutexattr_setrobust(kind, robust),
        libc.pthread_mutex_init(mutex, kind),
    )
    if any(results):
        raise DeviceNotFoundError(f"this system has no lock that processes can share: {os.strerror(max(results))}")

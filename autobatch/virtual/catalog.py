"""GPUs that a virtual one can be: what torch says of each, and where every figure comes from.

``cards.csv`` beside this file holds the figures as their sources print them. Drivers and ECC change what torch reports
as total memory (by up to 1.8 % and 6 %), so each row has the lowest figure seen under Linux.
"""

from __future__ import annotations

import csv
import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from autobatch.errors import DeviceNotFoundError, InvalidArgumentError
from autobatch.units import MIB, TIB, format_bytes, parse_bytes

_FIGURES = Path(__file__).with_name("cards.csv")
_VENDOR = re.compile(r"^(nvidia|geforce|tesla)+")
_TITLE = re.compile(r"[A-Za-z0-9 ._-]{1,64}")
_CAPABILITY = re.compile(r"(\d{1,2})\.(\d)")
_GRANULE_BYTES = 64 * 1024  # the totals that are known to the byte are all multiples of it
_MOST_BYTES = 16 * TIB  # a process has room for the addresses of so much, twice

_ESTIMATE = "estimated: 36 MiB + 3.84 MiB a multiprocessor + 80 MiB, the residual of that fit"

ALLOWED = "a name of the catalog such as 'a100-40gb', or 'memory=24GiB,capability=8.6[,sms=82][,outside=0][,name=mine]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU, as torch describes it."""

    name: str
    """How it is asked for: ``a100-40gb``."""
    title: str
    """What torch prints: ``NVIDIA A100-SXM4-40GB``."""
    total_bytes: int
    """Usable memory as torch reports it, in bytes."""
    outside_bytes: int
    """What a process takes beside torch's allocator (context, loaded kernels, cuBLAS), in bytes."""
    capability: tuple[int, int]
    """Compute capability."""
    multiprocessors: int
    """Streaming multiprocessors."""
    sources: Mapping[str, str]
    """Where each of the figures above comes from, by the name of its field."""


def estimate_outside_bytes(multiprocessors: int) -> int:
    """Bytes beside the allocator where nobody measured them: 36 MiB + 3.84 MiB for each multiprocessor.

    A fit through 20 kinds of GPU in public out-of-memory messages (in use, less allocated, less reserved but
    unallocated). Its residual, 80 MiB, is added: rather a batch too small than one that fails.
    """
    return int((36 + 3.84 * multiprocessors + 80) * MIB)


@functools.cache
def cards() -> tuple[Card, ...]:
    """Every GPU of the catalog, in its order."""
    with _FIGURES.open(encoding="utf-8", newline="") as file:
        return tuple(_card(row) for row in csv.DictReader(file))


def find_card(name: str) -> Card:
    """The GPU called ``name``; case, dashes and spaces do not matter, nor do vendor and series.

    ``memory=24GiB,capability=8.6`` is a card of one's own. What it does not say is taken as in the catalog's most
    similar card (``sms``) or estimated (``outside``, see :func:`estimate_outside_bytes`).

    Raises:
        InvalidArgumentError: if ``name`` is not a string, or describes a card that cannot be.
        DeviceNotFoundError: if the catalog does not have it; the message names the nearest that exist.
    """
    if not isinstance(name, str) or not name.strip():
        raise InvalidArgumentError("gpu", name, ALLOWED)
    if "=" in name:
        return _described(name)
    wanted = _key(name)
    named = [card for card in cards() if _key(card.name) == wanted]
    titled = [card for card in cards() if _key(card.title) == wanted]
    if len(found := named or titled) == 1:
        return found[0]
    near = ", ".join(_nearest(wanted))
    raise DeviceNotFoundError(f"no virtual GPU is called {name!r}. The nearest that exist: {near}. Or {_own(name)}")


def _own(name: str) -> str:
    return f"describe it: 'memory=24GiB,capability=8.6,name={re.sub('[^A-Za-z0-9.-]+', '-', name.strip())}'"


def _nearest(wanted: str) -> list[str]:
    keys = {_key(card.name): card.name for card in cards()}
    begun = [name for key, name in keys.items() if key.startswith(wanted) or wanted.startswith(key)]
    similar = [keys[key] for key in difflib.get_close_matches(wanted, keys, n=4, cutoff=0.0)]
    return list(dict.fromkeys([*begun, *similar]))[:4]


def _key(name: str) -> str:
    return _VENDOR.sub("", re.sub(r"[\s_-]+", "", name.lower()))


def _card(row: dict[str, str]) -> Card:
    multiprocessors = int(row["multiprocessors"])
    measured = row["outside_mib"]
    total = parse_bytes(int(row["total"]) if row["total"].isdigit() else row["total"])
    return Card(
        name=row["name"],
        title=row["title"],
        total_bytes=total // _GRANULE_BYTES * _GRANULE_BYTES,
        outside_bytes=int(measured) * MIB if measured else estimate_outside_bytes(multiprocessors),
        capability=_capability(row["capability"]),
        multiprocessors=multiprocessors,
        sources={
            "total_bytes": row["total_source"],
            "outside_bytes": row["outside_source"] or _ESTIMATE,
            "capability": "NVIDIA's list of CUDA GPUs",
            "multiprocessors": "NVIDIA's data sheet",
        },
    )


def _described(text: str) -> Card:
    """The card that ``memory=...,capability=...`` describes."""
    fields = _fields(text)
    total_bytes = parse_bytes(fields["memory"], argument="memory")
    capability = _capability(fields["capability"])
    multiprocessors = _multiprocessors(fields.get("sms"), total_bytes, capability)
    outside = fields.get("outside")
    if outside is None:
        outside_bytes, source = estimate_outside_bytes(multiprocessors), _ESTIMATE
    else:
        outside_bytes, source = 0 if outside == "0" else parse_bytes(outside, argument="outside"), "given"
    if outside is None and outside_bytes >= total_bytes:
        more = f"more than the {format_bytes(outside_bytes)} that such a card needs outside the allocator"
        raise InvalidArgumentError("memory", fields["memory"], f"{more}, with a unit such as GiB")
    if outside_bytes >= total_bytes:
        raise InvalidArgumentError("outside", outside, f"less than the memory, {total_bytes} bytes")
    if total_bytes > _MOST_BYTES:
        raise InvalidArgumentError("memory", fields["memory"], f"at most {format_bytes(_MOST_BYTES)}")
    name = fields.get("name", "virtual")
    if not _TITLE.fullmatch(name):
        raise InvalidArgumentError("name", name, "up to 64 letters, digits, blanks, dots and dashes")
    return Card(
        name=name,
        title=name if "name" in fields else f"Virtual GPU {fields['memory']}",
        total_bytes=total_bytes,
        outside_bytes=outside_bytes,
        capability=capability,
        multiprocessors=multiprocessors,
        sources={
            "total_bytes": "given",
            "outside_bytes": source,
            "capability": "given",
            "multiprocessors": "given" if "sms" in fields else "as the catalog's most similar card",
        },
    )


def _fields(text: str) -> dict[str, str]:
    known = ("memory", "capability", "sms", "outside", "name")
    fields: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value or key not in known or key in fields:
            raise InvalidArgumentError("gpu", text, ALLOWED)
        fields[key] = value
    if not {"memory", "capability"} <= fields.keys():
        raise InvalidArgumentError("gpu", text, ALLOWED)
    return fields


def _capability(text: str) -> tuple[int, int]:
    match = _CAPABILITY.fullmatch(text)
    if match is None:
        raise InvalidArgumentError("capability", text, "a compute capability such as 8.6")
    return int(match[1]), int(match[2])


def _multiprocessors(text: str | None, total_bytes: int, capability: tuple[int, int]) -> int:
    if text is None:
        alike = min(
            cards(),
            key=lambda c: (
                c.capability != capability,
                abs(c.capability[0] - capability[0]),
                abs(c.total_bytes - total_bytes),
            ),
        )
        return alike.multiprocessors
    if not text.isdigit() or not 1 <= int(text) <= 1024:
        raise InvalidArgumentError("sms", text, "a number of multiprocessors from 1 to 1024")
    return int(text)

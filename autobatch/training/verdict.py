"""How a rank's try of a window went, and what all the ranks' tries mean."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from autobatch.device.oom import Tier, classify, first_line
from autobatch.errors import DeviceCorruptedError, DoesNotFitError, RankError

_ABOUT_MEMORY = frozenset({Tier.DEFINITE, Tier.SUSPECT, Tier.LIMIT})


class Kind(enum.Enum):
    """What came of a try."""

    RAN = enum.auto()
    LESS = enum.auto()
    """Memory ran out, and less can be tried."""
    LEAST = enum.auto()
    """Memory ran out at one sample."""
    UNSURE = enum.auto()
    """An error at one sample that may mean memory: a smaller size is what could have told."""
    BROKEN = enum.auto()
    """An error that is not about memory."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One rank's try."""

    kind: Kind
    message: str = ""
    """The first line of the error."""


def verdict_of(failure: BaseException | None, size: int) -> Verdict:
    """What ``failure``, None for none, means where at most ``size`` samples were run at once."""
    if failure is None:
        return Verdict(Kind.RAN)
    tier, message = classify(failure), first_line(failure)
    if tier not in _ABOUT_MEMORY:
        return Verdict(Kind.BROKEN, message)
    if size > 1:
        return Verdict(Kind.LESS, message)
    return Verdict(Kind.UNSURE if tier is Tier.SUSPECT else Kind.LEAST, message)


def raise_own(failure: BaseException, where: str) -> None:
    """Raises ``failure`` of this rank: unchanged, unless the device is broken."""
    if classify(failure) is Tier.FATAL:
        raise DeviceCorruptedError(f"in {where}: {first_line(failure)}") from failure
    raise failure


def raise_for_all(verdicts: Sequence[Verdict], window: int) -> None:
    """Raises what ends a window on every rank; nothing if it is to be repeated with less.

    Raises:
        RankError: a rank failed for another reason than memory.
        DoesNotFitError: not even one sample fits.
    """
    for rank, verdict in enumerate(verdicts):
        if verdict.kind in (Kind.BROKEN, Kind.UNSURE):
            raise RankError(f"rank {rank} failed in window {window}: {verdict.message}")
    for rank, verdict in enumerate(verdicts):
        if verdict.kind is Kind.LEAST:
            whose = f" on rank {rank}" if len(verdicts) > 1 else ""
            raise DoesNotFitError(f"in window {window} not even one sample fits{whose}: {verdict.message}")

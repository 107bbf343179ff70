"""Agreement across the ranks of a torch.distributed job.

It travels over a gloo group of its own, on host memory: a rank that has just run out of device memory cannot be asked
for a buffer there, and what is agreed on here cannot get mixed up with the collectives of a model.
"""

from __future__ import annotations

import datetime
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed

from autobatch.device.oom import forget_frames
from autobatch.errors import RankError

T = TypeVar("T")

WITHIN_S = 1800.0
"""A rank that is silent for so long is given up: torch's own limit for gloo. One that has died is noticed at once."""

_GONE = "a rank of this job was lost before: nothing can be agreed on any more"


class _Line:
    """The gloo group of one job, shared by all that speak over it; None once it has failed."""

    def __init__(self, group: Any) -> None:
        self.group = group


_lines: weakref.WeakKeyDictionary[Any, _Line] = weakref.WeakKeyDictionary()


class Ranks:
    """This process among its ranks; alone where there is no process group.

    Every method is a collective: all ranks must call it, in the same order.

    Raises:
        RankError: from every method, where a rank is gone or silent. All that follow raise it too.
    """

    def __init__(self, line: _Line | None = None) -> None:
        self._line = line
        self.rank: int = 0 if line is None or line.group is None else distributed.get_rank(line.group)
        self.size: int = 1 if line is None or line.group is None else distributed.get_world_size(line.group)

    @classmethod
    def here(cls) -> Ranks:
        """The ranks of the default process group. Its first call for a process group is a collective too."""
        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return cls()
        world = distributed.group.WORLD
        if world not in _lines:
            timeout = datetime.timedelta(seconds=WITHIN_S)
            try:
                _lines[world] = _Line(distributed.new_group(backend="gloo", timeout=timeout))
            except RuntimeError as exc:
                raise _lost("agreeing", exc) from exc
        if _lines[world].group is None:
            raise RankError(_GONE)
        return cls(_lines[world])

    @property
    def are_several(self) -> bool:
        return self.size > 1

    def gather(self, item: T) -> list[T]:
        """What each rank gave, in their order. ``item`` is pickled."""
        if not self.are_several:
            return [item]
        items: list[Any] = [None] * self.size
        self._ask("gathering", lambda group: distributed.all_gather_object(items, item, group=group))
        return items

    def broadcast(self, item: T) -> T:
        """What rank 0 gave. ``item`` is pickled."""
        if not self.are_several:
            return item
        items = [item]
        self._ask("broadcasting", lambda group: distributed.broadcast_object_list(items, group_src=0, group=group))
        return items[0]

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum over all ranks of each of ``values``, as float64."""
        if not self.are_several:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device="cpu")
        self._ask("adding up", lambda group: distributed.all_reduce(total, group=group))
        return total.tolist()

    def _ask(self, doing: str, collective: Callable[[Any], Any]) -> None:
        line = self._line
        if line is None or line.group is None:
            raise RankError(_GONE)
        try:
            collective(line.group)
            return
        except RuntimeError as exc:
            failure = exc
        # Whoever waits for this rank would do so until the deadline: closed connections tell them at once. They close
        # with the last reference, and a traceback has some.
        forget_frames(failure)
        group, line.group = line.group, None
        distributed.destroy_process_group(group)
        del group
        gc.collect()
        raise _lost(doing, failure) from failure


def _lost(doing: str, failure: RuntimeError) -> RankError:
    said = str(failure).partition("\n")[0].partition("This is typically")[0].strip()
    return RankError(f"{doing} with the other ranks failed, one of them is gone or silent: {said}")

"""How each allocation of a step grows with the batch, from the steps of two sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autobatch.replay.trace import Trace

_IN_A_ROW = 6  # so many allocations one after the other that go together are taken to be the same ones
_FARTHEST = 60  # allocations that are looked past for such a row, in both lists together
_SLACK = 512  # bytes by which a size may be off and still lie between fixed and in proportion: a few counters and seeds


@dataclass(frozen=True, slots=True)
class Scaling:
    """The allocations of ``trace``, which ran a batch of ``size``, at other batch sizes."""

    trace: Trace
    size: int
    per_sample: tuple[float, ...]
    """Bytes that each allocation grows by with one more sample; 0 where it has no counterpart."""
    unknown: tuple[int, ...]
    """The allocations without a counterpart in the smaller batch: workspaces of kernels that it does not need."""

    def sizes(self, batch_size: int, *, unknown_grow: bool = False) -> list[int]:
        """Bytes of each allocation at ``batch_size``, those without a counterpart fixed or in proportion to it."""
        more = batch_size - self.size
        sizes = [
            max(1, round(size + growth * more)) for size, growth in zip(self.trace.sizes, self.per_sample, strict=True)
        ]
        if unknown_grow and more > 0:
            for k in self.unknown:
                sizes[k] = self.trace.sizes[k] * batch_size // self.size
        return sizes

    def prolonged(self, more: int) -> Scaling:
        """The same with ``more`` steps like the last, where that is how it goes on."""
        trace, start = self.trace.prolonged(more), len(self.trace.sizes)
        last = self.trace.last_step()
        times = more if len(trace.sizes) > start else 0
        repeated = tuple(k + (again + 1) * len(last) for again in range(times) for k in self.unknown if k in last)
        return Scaling(
            trace, self.size, self.per_sample + self.per_sample[last.start :] * times, self.unknown + repeated
        )


def scaling(smaller: Trace, smaller_size: int, trace: Trace, size: int) -> Scaling:
    """How ``trace``, of a batch of ``size``, grows, seen against that of a smaller batch.

    A tensor is of a fixed size, in proportion to the batch, or between. The two lists are walked side by side for as
    long as that holds; where it does not, one of them has allocations that the other lacks.
    """
    partners = _partners(smaller.sizes, trace.sizes, smaller_size, size)
    more = size - smaller_size
    return Scaling(
        trace=trace,
        size=size,
        per_sample=tuple(
            0.0 if partner is None else (bytes_ - smaller.sizes[partner]) / more
            for partner, bytes_ in zip(partners, trace.sizes, strict=True)
        ),
        unknown=tuple(k for k, partner in enumerate(partners) if partner is None),
    )


def _partners(few: Sequence[int], many: Sequence[int], n: int, m: int) -> list[int | None]:
    """For each of ``many``, allocated by a batch of ``m``, which of ``few`` it is in a batch of ``n``."""

    def go_together(i: int, j: int) -> bool:
        return few[i] <= many[j] and many[j] * n <= few[i] * m + _SLACK * n

    def row(i: int, j: int) -> bool:
        length = min(_IN_A_ROW, len(few) - i, len(many) - j)
        return length > 0 and all(go_together(i + k, j + k) for k in range(length))

    partners: list[int | None] = [None] * len(many)
    i = j = 0
    while i < len(few) and j < len(many):
        if go_together(i, j):
            partners[j] = i
            i, j = i + 1, j + 1
            continue
        ahead = ((past, total - past) for total in range(1, _FARTHEST) for past in range(total + 1))
        past, beyond = next(((a, b) for a, b in ahead if row(i + a, j + b)), (1, 1))
        i, j = i + past, j + beyond
    return partners

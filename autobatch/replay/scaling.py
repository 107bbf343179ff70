"""How each allocation of a step grows with the batch, from the steps of two sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autobatch.replay.trace import Trace

_IN_A_ROW = 6  # so many allocations one after the other that go together are taken to be the same ones
_FARTHEST = 60  # allocations that are looked past for such a row, in both lists together
_MOST_MISSING = 600  # allocations without a counterpart: more, and the two runs are not alike
_ROUNDED = 1 / 1000  # the part by which a size may be rounded and still be in proportion
_SLACK = 512  # bytes by which a size may be off and still lie between fixed and in proportion: a few counters and seeds


@dataclass(frozen=True, slots=True)
class Scaling:
    """The allocations of ``trace``, which ran a batch of ``size``, at other batch sizes."""

    trace: Trace
    size: int
    per_sample: tuple[float, ...]
    """Bytes that each allocation grows by with one more sample, as it did between the two sizes; 0 where it has no
    counterpart in the smaller batch."""
    squares: tuple[int, ...]
    """Those that grew with the square of the batch, as the scores of all samples against all do, and some workspaces
    by chance."""
    uncertain: tuple[int, ...]
    """The allocations of which that is not sure: without a counterpart, or neither fixed nor in proportion. They are
    workspaces of kernels, which others may take the place of."""

    def sizes(self, batch_size: int, *, at_worst: bool = False) -> list[int]:
        """Bytes of each allocation at ``batch_size``. At worst, those that are uncertain grow in proportion to it,
        and what grew with its square goes on to."""
        more = batch_size - self.size
        sizes = [
            max(1, round(size + growth * more)) for size, growth in zip(self.trace.sizes, self.per_sample, strict=True)
        ]
        if at_worst and more > 0:
            for k in self.uncertain:
                sizes[k] = self.trace.sizes[k] * batch_size // self.size
            for k in self.squares:
                sizes[k] = self.trace.sizes[k] * batch_size**2 // self.size**2
        return sizes

    def prolonged(self, more: int) -> Scaling:
        """The same with ``more`` steps like the last, where that is how it goes on."""
        trace, start = self.trace.prolonged(more), len(self.trace.sizes)
        last = self.trace.last_step()
        times = more if len(trace.sizes) > start else 0

        def repeated(some: tuple[int, ...]) -> tuple[int, ...]:
            return some + tuple(k + again * len(last) for again in range(1, times + 1) for k in some if k in last)

        return Scaling(
            trace=trace,
            size=self.size,
            per_sample=self.per_sample + self.per_sample[last.start :] * times,
            squares=repeated(self.squares),
            uncertain=repeated(self.uncertain),
        )


def scaling(smaller: Trace, smaller_size: int, trace: Trace, size: int) -> Scaling:
    """How ``trace``, of a batch of ``size``, grows, seen against that of a smaller batch.

    A tensor is of a fixed size, in proportion to the batch, between, or in proportion to its square. The two lists are
    walked side by side for as long as that holds; where it does not, one of them has allocations that the other lacks.
    """
    growths, squares, uncertain = [], [], []
    for k, partner in enumerate(_partners(smaller.sizes, trace.sizes, smaller_size, size)):
        few, many = 0 if partner is None else smaller.sizes[partner], trace.sizes[k]
        growths.append(0.0 if partner is None else (many - few) / (size - smaller_size))
        if partner is not None and _is_square(few, many, smaller_size, size):
            squares.append(k)
        elif partner is None or not (few == many or _in_proportion(few, many, smaller_size, size)):
            uncertain.append(k)
    return Scaling(
        trace=trace, size=size, per_sample=tuple(growths), squares=tuple(squares), uncertain=tuple(uncertain)
    )


def _is_square(few: int, many: int, n: int, m: int) -> bool:
    return few > 0 and many * n * n == few * m * m


def _in_proportion(few: int, many: int, n: int, m: int) -> bool:
    return abs(many * n - few * m) <= _SLACK * m + many * n * _ROUNDED


def _partners(few: Sequence[int], many: Sequence[int], n: int, m: int) -> list[int | None]:
    """For each of ``many``, allocated by a batch of ``m``, which of ``few`` it is in a batch of ``n``."""

    def go_together(i: int, j: int) -> bool:
        return few[i] <= many[j] and (many[j] * n <= few[i] * m + _SLACK * n or _is_square(few[i], many[j], n, m))

    def row(i: int, j: int) -> bool:
        length = min(_IN_A_ROW, len(few) - i, len(many) - j)
        return length > 0 and all(go_together(i + k, j + k) for k in range(length))

    partners: list[int | None] = [None] * len(many)
    i = j = missing = 0
    while i < len(few) and j < len(many) and missing < _MOST_MISSING:
        if go_together(i, j):
            partners[j] = i
            i, j = i + 1, j + 1
            continue
        ahead = ((past, total - past) for total in range(1, _FARTHEST) for past in range(total + 1))
        past, beyond = next(((a, b) for a, b in ahead if row(i + a, j + b)), (1, 1))
        i, j, missing = i + past, j + beyond, missing + past + beyond
    return partners

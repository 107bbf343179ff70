"""Gradients of a window in micro-batches that fit: tried, judged by all ranks, and repeated where they do not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from autobatch.device.oom import Tier, classify
from autobatch.errors import DoesNotFitError, InvalidArgumentError, RankError
from autobatch.training.passes import MicroBatch, Passes
from autobatch.training.recovery import OnRecovery, Recovery, Snapshot, forget
from autobatch.training.split import micro_batches, samples_of
from autobatch.training.together import Together
from autobatch.training.update import Update
from autobatch.training.verdict import Kind, Verdict, raise_for_all, raise_own, verdict_of

T = TypeVar("T")
Told = TypeVar("Told")


@dataclass(frozen=True, slots=True)
class Whole:
    """What a window has, over all ranks."""

    samples: int
    terms: float
    most_parts: int
    """So many micro-batches every rank must run, where the model needs the ranks in step; else 0."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A window whose gradients are there."""

    loss: Tensor
    """This rank's part of the window's loss."""
    micro_batches: int
    """Of this rank."""
    whole: Whole


class Runner:
    """Runs windows, and knows the micro-batch that fits.

    Args:
        micro_batch_size: the most samples that are run at once.
        grow_after: after so many windows without running out a halved micro-batch is doubled; None never.
        on_recovery: told before a window is repeated.
    """

    def __init__(
        self,
        passes: Passes,
        update: Update,
        together: Together,
        *,
        micro_batch_size: int,
        grow_after: int | None,
        on_recovery: OnRecovery | None,
    ) -> None:
        self._passes, self._update, self._together = passes, update, together
        self._grow_after, self._on_recovery = grow_after, on_recovery
        self._devices = passes.devices  # asked once: a large model has thousands of parameters
        self.micro_batch_size = self._most = micro_batch_size
        self.windows = 0
        """How many are done."""
        self.clean = 0
        """How many of the last ones ran at once."""

    def run(self, batches: Sequence[Any]) -> Ran:
        """Leaves the gradients of the window's samples on this rank, or none at all and an error."""
        most, snapshots = self.micro_batch_size, list[Snapshot]()
        try:
            self._together.begin()
            self._together.agreed(lambda: snapshots.append(self._snapshot()))
            while (ran := self._attempt(batches, snapshots[0])) is None:
                pass
        except BaseException:
            self._update.zero_grad()
            self.micro_batch_size = most  # a window that is given up says nothing of the next
            raise
        return ran

    def restart(self, micro_batch_size: int) -> None:
        """Begins anew with micro-batches of another size."""
        self.micro_batch_size = self._most = micro_batch_size
        self.windows = self.clean = 0

    def done(self) -> None:
        """After a window has ended well: a micro-batch that was halved may grow again."""
        self.windows += 1
        self.clean += 1
        if self._grow_after is not None and self.clean >= self._grow_after and self.micro_batch_size < self._most:
            self.micro_batch_size, self.clean = min(self._most, 2 * self.micro_batch_size), 0

    def _snapshot(self) -> Snapshot:
        failure = None
        try:
            return Snapshot(self._passes.modules, self._devices)
        except Exception as exc:  # noqa: BLE001 - classified below
            failure = exc
        if classify(failure) is not Tier.DEFINITE:
            raise failure
        forget(failure, self._passes.device)  # what is cached may be enough
        return Snapshot(self._passes.modules, self._devices)

    def _attempt(self, batches: Sequence[Any], snapshot: Snapshot) -> Ran | None:
        """The window, with its gradients there. None if memory ran out on a rank and less is to be tried: then
        everything is as before.
        """
        self._update.zero_grad()
        size = _largest(batches, self.micro_batch_size)
        counted = self._tried(lambda: self._counted(batches), _facts, size, snapshot, in_step=False)
        if counted is None:
            return None
        parts, facts = counted
        whole = self._whole(facts, batches)
        watched = (len(parts) > 1 or self._together.ranks.are_several) and self._passes.is_watched(self.windows)
        if whole.most_parts > len(parts):
            parts = [*parts, *[_filler(parts[0])] * (whole.most_parts - len(parts))]
        done = self._tried(
            lambda: self._passes.run(parts, whole.terms, self._update, watched=watched),
            _nothing,
            size,
            snapshot,
            in_step=self._together.talks_in_forward,
        )
        return None if done is None else Ran(done[0], micro_batches=len(parts), whole=whole)

    def _counted(self, batches: Sequence[Any]) -> list[MicroBatch]:
        split = (part for batch in batches for part in micro_batches(batch, samples_of(batch), self.micro_batch_size))
        return [self._passes.counted(part) for part in split]

    def _whole(self, facts: Sequence[tuple[int, float, int]], batches: Sequence[Any]) -> Whole:
        samples, terms, counts = zip(*facts, strict=True)
        if not any(samples):
            raise InvalidArgumentError("batches", tuple(batches), "at least one, with at least one sample")
        in_step = self._together.talks_in_forward
        if in_step and not all(counts):
            raise RankError(f"rank {counts.index(0)} has no sample, and this model needs one on every rank")
        return Whole(sum(samples), sum(terms), most_parts=max(counts) if in_step else 0)

    def _tried(
        self, function: Callable[[], T], told: Callable[[T], Told], size: int, snapshot: Snapshot, *, in_step: bool
    ) -> tuple[T, list[Told]] | None:
        """What ``function`` gives here, and what is ``told`` of it on each rank. None if memory ran out on one.

        ``in_step`` is whether the ranks run collectives in it, and wait there for one that fails.
        """
        failure: BaseException | None = None
        answer: Any = None
        try:
            answer = function()
        except Exception as exc:  # noqa: BLE001 - judged below: what is not memory is raised unchanged
            failure = exc
        mine = verdict_of(failure, size)
        try:
            if failure is not None and in_step:
                self._give_up(failure, mine)
            each = self._together.ranks.gather((mine, None if failure is not None else told(answer)))
            verdicts = [verdict for verdict, _ in each]
            if all(verdict.kind is Kind.RAN for verdict in verdicts):
                return answer, [facts for _, facts in each]  # type: ignore[misc]  # each has told
            if failure is not None and mine.kind is Kind.BROKEN:
                raise_own(failure, f"window {self.windows}")
            self._undo(failure, snapshot)
            if failure is not None and mine.kind is Kind.UNSURE:
                raise failure
            raise_for_all(verdicts, self.windows)
        finally:
            del failure, answer  # with its traceback it would keep this frame alive, and the batch
        self._halve(size, verdicts)
        return None

    def _give_up(self, failure: BaseException, mine: Verdict) -> None:
        """The other ranks wait for this one in a collective, and cannot be asked."""
        if mine.kind in (Kind.LESS, Kind.LEAST):
            said = f"memory ran out on rank {self._together.ranks.rank} in window {self.windows}"
            raise DoesNotFitError(
                f"{said}, which a model that needs its ranks in step does not survive: {mine.message}"
            )
        raise_own(failure, f"window {self.windows}")

    def _undo(self, failure: BaseException | None, snapshot: Snapshot) -> None:
        self._update.zero_grad()
        forget(failure, self._passes.device)
        snapshot.restore()

    def _halve(self, size: int, verdicts: Sequence[Verdict]) -> None:
        half = self.micro_batch_size // 2
        if verdicts[self._together.ranks.rank].kind is not Kind.RAN and half >= size:
            half = size // 2  # it was less than a micro-batch that ran out here
        self.micro_batch_size, self.clean = max(1, half), -1
        if self._on_recovery is not None:
            rank = next(rank for rank, verdict in enumerate(verdicts) if verdict.kind is Kind.LESS)
            whose = f"rank {rank}: " if len(verdicts) > 1 else ""
            self._on_recovery(
                Recovery(
                    window=self.windows,
                    micro_batch_size=size,
                    next_micro_batch_size=self.micro_batch_size,
                    message=f"{whose}{verdicts[rank].message}",
                )
            )


def _largest(batches: Sequence[Any], most: int) -> int:
    """Samples of the largest micro-batch; 1 where a batch is none, which is said when it is split."""
    sizes = []
    for batch in batches:
        with contextlib.suppress(InvalidArgumentError):
            samples = samples_of(batch)
            sizes.append(-(-samples // max(1, -(-samples // most))))
    return max(sizes, default=1) or 1


def _facts(parts: list[MicroBatch]) -> tuple[int, float, int]:
    return sum(samples_of(part.batch) for part in parts), sum(part.terms for part in parts), len(parts)


def _nothing(loss: Tensor) -> None:
    """A loss is added up where the gradients are."""


def _filler(part: MicroBatch) -> MicroBatch:
    """One sample that counts nothing, for a rank that has fewer micro-batches than others."""
    return MicroBatch(next(iter(micro_batches(part.batch, samples_of(part.batch), 1))), 0.0)

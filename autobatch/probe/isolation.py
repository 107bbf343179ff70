"""Trials in a child process that can be lost.

The prober starts one server (:mod:`autobatch.probe.processes.worker`), and it forks workers. A worker lives across the
trials that fit and is replaced after a failure, a hang or its death, or after every trial where the device says so; a
confirmation gets a fresh one. Live objects are tried in forks of the present process instead
(:mod:`autobatch.probe.processes.fork`), and commands run in processes of their own
(:mod:`autobatch.probe.command.run`). A Device never starts any.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from autobatch.device.base import Isolation
from autobatch.device.oom import Tier
from autobatch.errors import DeviceError, WorkloadFailedError
from autobatch.probe.executor import Agree, LocalExecutor, Setting, alone
from autobatch.probe.processes.ahead import server_for
from autobatch.probe.processes.errors import WorkerLostError
from autobatch.probe.processes.fork import Forks
from autobatch.probe.processes.job import job_of
from autobatch.probe.processes.server import ANSWER_WITHIN_S, Worker, WorkerSource
from autobatch.probe.trial import Attempt, TrialRequest
from autobatch.probe.workload.signature import Signature
from autobatch.result import AFTER_SEARCH, Outcome, Trial


class _WorkerExecutor:
    """Trials in workers, which come with the first question from what ``start`` makes.

    Args:
        start: makes where the workers come from.
        anew: whether every trial needs a worker of its own.
        answer_within_s: a worker that is silent for so long is given up.
        agree: what an attempt means where other ranks try the same.
    """

    where = "processes of their own"
    begins_small = True

    def __init__(
        self, start: Callable[[], WorkerSource], *, anew: bool, answer_within_s: float, agree: Agree = alone
    ) -> None:
        self._start, self._anew, self._answer_within_s, self._agree = start, anew, answer_within_s, agree
        self._source: WorkerSource | None = None
        self._worker: Worker | None = None

    def setting(self) -> Setting:
        return self._living_worker().setting

    def signature(self, batch_size: int) -> Signature:
        try:
            return self._living_worker().signature(batch_size)
        except WorkerLostError as lost:  # the trial of this size will meet it again
            self._worker = None
            return Signature(text=None, reason=str(lost))

    def run(self, request: TrialRequest) -> Attempt:
        if (self._anew or request.afresh) and self._worker is not None and self._worker.has_tried:
            self._retire()
        attempt = self._agree(request, lambda: self._run(request))
        if not attempt.trial.fits:
            self._retire()
        return attempt

    def confirm(self, requests: tuple[TrialRequest, ...]) -> list[Attempt]:
        attempts: list[Attempt] = []
        if self._worker is not None and self._worker.has_tried and requests and not self._anew:
            # The process that searched is a history of its own, while it is there.
            attempts.append(self.run(_after_search(requests[0])))
        if self._anew:  # a heap with a past has less room: what fails mostly does behind other batches
            requests = tuple(sorted(requests, key=lambda request: not request.sizes_before))
        for request in requests:
            if attempts and not attempts[-1].trial.fits:
                break
            if request.shuffle_seed is None or request.shuffle_seed == 0:
                # One shuffled epoch may follow another: each begins with empty caches and a new optimizer, and fails
                # where it fails in a process of its own, at a third of the time.
                self._retire()
            attempts.append(self.run(request))
        return attempts

    def close(self) -> None:
        try:
            self._retire()
        finally:  # a second Ctrl-C may come while a large worker ends
            if self._source is not None:
                self._source.close()
                self._source = None

    def _run(self, request: TrialRequest) -> Attempt:
        """The trial; a worker lost for no reason of memory is replaced and the size asked once more."""
        try:
            return self._ask(request)
        except WorkerLostError:
            pass
        try:
            return self._ask(request)
        except WorkerLostError as lost:
            raise WorkloadFailedError(f"batch {request.batch_size}: {lost}", request.batch_size) from None

    def _ask(self, request: TrialRequest) -> Attempt:
        try:
            trial, suspect, trace = self._living_worker().ask(request)
            return Attempt(trial=trial, suspect=suspect, trace=trace)
        except WorkerLostError as lost:
            self._worker = None
            if lost.tier is None:
                raise
            failure = WorkloadFailedError(str(lost), request.batch_size)
            return Attempt(trial=_lost_trial(request, lost), suspect=failure if lost.tier is Tier.SUSPECT else None)

    def _living_worker(self) -> Worker:
        if self._worker is None:
            if self._source is None or not self._source.makes_many:
                if self._source is not None:
                    self._source.close()
                self._source = self._start()
                self._source.ready()  # before ranks meet: whoever is lost until then is missed there, at once
            self._worker = self._new_worker(self._source)
        return self._worker

    def _new_worker(self, source: WorkerSource) -> Worker:
        return Worker(source, self._answer_within_s)

    def _retire(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


class ChildExecutor(_WorkerExecutor):
    """Trials of a workload that a child process builds.

    Args:
        builder: picklable by reference; returns the Workload.
        isolation: what the device says its child needs.
        answer_within_s: a worker that is silent for so long is given up.
        meets: whether the workers are told where to meet those of other ranks.
        agree: what an attempt means where other ranks try the same.

    Raises:
        InvalidArgumentError: if ``builder`` cannot be found by name in another process.
        DeviceError: where the platform cannot fork.
    """

    where = "child processes"

    def __init__(
        self,
        builder: Callable[..., Any],
        isolation: Isolation,
        *,
        answer_within_s: float = ANSWER_WITHIN_S,
        meets: bool = False,
        agree: Agree = alone,
    ) -> None:
        if not hasattr(os, "fork") or not hasattr(socket, "recv_fds"):
            raise DeviceError("trials in a child process need Linux or macOS; isolate=False runs them in this one")
        job = job_of(builder, isolation, meets=meets)
        super().__init__(
            lambda: server_for(job, isolation, answer_within_s),
            anew=isolation.anew,
            answer_within_s=answer_within_s,
            agree=agree,
        )


class ForkExecutor(_WorkerExecutor):
    """Trials of live objects in forks of this process, one for each, whose end undoes what they did.

    A trial finds the heap as this process goes on to train with it.
    """

    where = "forks of this process"

    def __init__(self, live: LocalExecutor, *, answer_within_s: float = ANSWER_WITHIN_S, agree: Agree = alone) -> None:
        super().__init__(lambda: Forks(live), anew=True, answer_within_s=answer_within_s, agree=agree)


def _after_search(request: TrialRequest) -> TrialRequest:
    return replace(request, history=AFTER_SEARCH)


def _lost_trial(request: TrialRequest, lost: WorkerLostError) -> Trial:
    return Trial(
        batch_size=request.batch_size,
        outcome=Outcome.OOM,
        message=str(lost),
        mode=request.mode,
        history=request.history,
    )

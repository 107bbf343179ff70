"""Trials in a child process that can be lost.

The prober starts one server (:mod:`autobatch.probe.worker`), and it forks workers. A worker lives across the trials
that fit and is replaced after a failure, a hang or its death, or after every trial where the device says so; a
confirmation gets a fresh one. Live objects are tried in forks of the present process instead
(:mod:`autobatch.probe.fork`), and commands run in processes of their own (:mod:`autobatch.probe.command_run`). A
Device never starts any.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing import spawn
from typing import Any

from autobatch.device.base import Isolation
from autobatch.device.oom import Tier
from autobatch.errors import DeviceError, InvalidArgumentError, WorkloadFailedError
from autobatch.probe.executor import Agree, LocalExecutor, Setting, alone
from autobatch.probe.fork import Forks
from autobatch.probe.lock import child_environment
from autobatch.probe.processes import ANSWER_WITHIN_S, Server, Worker, WorkerLostError, WorkerSource
from autobatch.probe.signature import Signature
from autobatch.probe.trial import Attempt, TrialRequest
from autobatch.probe.worker import Job
from autobatch.result import Outcome, Trial

RENDEZVOUS_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"),
)
"""What a launcher such as torchrun tells a rank, and ``init_process_group()`` reads."""


class _WorkerExecutor:
    """Trials in workers, which come with the first question from what ``start`` makes.

    Args:
        start: makes where the workers come from.
        anew: whether every trial needs a worker of its own.
        answer_within_s: a worker that is silent for so long is given up.
        agree: what an attempt means where other ranks try the same.
    """

    where = "processes of their own"

    def __init__(
        self, start: Callable[[], WorkerSource], *, anew: bool, answer_within_s: float, agree: Agree = alone
    ) -> None:
        self._start, self._anew, self._answer_within_s, self._agree = start, anew, answer_within_s, agree
        self._source: WorkerSource | None = None
        self._ahead: WorkerSource | None = None
        self._worker: Worker | None = None

    def begin(self) -> None:
        """Has the workers' source begin its imports, for a question that may come."""
        self._ahead = self._start()

    def setting(self) -> Setting:
        return self._living_worker().setting

    def signature(self, batch_size: int) -> Signature:
        try:
            return self._living_worker().signature(batch_size)
        except WorkerLostError as lost:  # the trial of this size will meet it again
            self._worker = None
            return Signature(text=None, reason=str(lost))

    def run(self, request: TrialRequest) -> Attempt:
        if self._anew and self._worker is not None and self._worker.has_tried:
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
            for source in filter(None, (self._source, self._ahead)):
                source.close()
            self._source = self._ahead = None

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
            trial, suspect = self._living_worker().ask(request)
        except WorkerLostError as lost:
            self._worker = None
            if lost.tier is None:
                raise
            failure = WorkloadFailedError(str(lost), request.batch_size)
            return Attempt(trial=_lost_trial(request, lost), suspect=failure if lost.tier is Tier.SUSPECT else None)
        return Attempt(trial=trial, suspect=suspect)

    def _living_worker(self) -> Worker:
        if self._worker is None:
            if self._source is None or not self._source.makes_many:
                if self._source is not None:
                    self._source.close()
                self._source, self._ahead = self._ahead or self._start(), None
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
        job = Job(
            payload=_by_reference(builder),
            preparation=_preparation(builder),
            device=isolation.device,
            memory_limit_bytes=isolation.memory_limit_bytes,
            meets=meets,
        )
        environment = {**_without_job(os.environ), **child_environment(), **isolation.environment}
        super().__init__(
            lambda: Server(job, environment, answer_within_s),
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


_WITHOUT_A_FILE = (
    "a function in a file that can be imported, because trials run in a process of their own; for what a notebook or "
    "`python -c` defines, call autobatch.VirtualGPU('a100-40gb').attach() before torch is imported, and give "
    "device='cuda'"
)


def _by_reference(builder: Callable[..., Any]) -> bytes:
    allowed = (
        "importable by name, because trials run in a process of their own: a function at the top of a module "
        "(or of a script, under `if __name__ == '__main__'`), not a lambda, a local function or a live Workload"
    )
    try:
        payload = pickle.dumps(builder)
    except Exception as exc:
        raise InvalidArgumentError("workload", builder, allowed) from exc
    main = getattr(sys.modules["__main__"], "__file__", None)  # "<stdin>" for a script that is piped in
    if b"__main__" in payload and (main is None or not os.path.exists(main)):
        raise InvalidArgumentError("workload", builder, _WITHOUT_A_FILE)
    return payload


def is_importable(builder: Callable[..., Any]) -> bool:
    """Whether another process can find ``builder`` by its name, and there can be one."""
    if not hasattr(os, "fork"):
        return False
    try:
        _by_reference(builder)
    except InvalidArgumentError:
        return False
    return True


def _preparation(builder: Callable[..., Any]) -> dict[str, Any]:
    data: dict[str, Any] = spawn.get_preparation_data("autobatch")
    data.pop("authkey", None)  # refuses to be pickled, and nothing here needs it
    if b"__main__" not in pickle.dumps(builder):
        # The workload is elsewhere: no reason to run the main script's imports once more.
        data.pop("init_main_from_path", None)
        data.pop("init_main_from_name", None)
    return data


def _without_job(variables: Mapping[str, str]) -> dict[str, str]:
    """``variables`` without a launcher's rendezvous: a child that went there would be taken for this rank itself."""
    several = int(variables.get("WORLD_SIZE") or 1) > 1
    return {name: value for name, value in variables.items() if not (several and name in RENDEZVOUS_VARIABLES)}


def _after_search(request: TrialRequest) -> TrialRequest:
    return replace(request, history="the search itself")


def _lost_trial(request: TrialRequest, lost: WorkerLostError) -> Trial:
    return Trial(
        batch_size=request.batch_size,
        outcome=Outcome.OOM,
        message=str(lost),
        mode=request.mode,
        history=request.history,
    )

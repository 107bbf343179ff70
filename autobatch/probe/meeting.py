"""Child processes of several ranks that train together, each rank's trials in one of its own.

A model that is sharded runs collectives amid forward, so one rank that runs out of memory strands the others there. A
child process can be lost: as soon as one rank's has failed, the others end theirs, and new ones meet for the next
trial. They meet as the workers of torchrun do, at a store of torch.distributed that another process hosts: here rank
0's prober.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is public, and not said to be

from autobatch.device.base import Isolation
from autobatch.errors import WorkloadFailedError
from autobatch.probe.agreement import Agreement
from autobatch.probe.executor import Setting
from autobatch.probe.isolation import ChildExecutor
from autobatch.probe.processes.errors import StrandedError, WorkerLostError
from autobatch.probe.processes.job import RENDEZVOUS_VARIABLES
from autobatch.probe.processes.server import ANSWER_WITHIN_S, Worker, WorkerSource
from autobatch.probe.trial import Attempt, TrialRequest

_FAILED_KEY = "autobatch/failed"
_STORE_WITHIN = datetime.timedelta(seconds=60)
_LOST_TOUCH = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")


class Meeting:
    """A :class:`~autobatch.probe.processes.server.Meeting`, opened anew for each generation of workers."""

    def __init__(self, agreement: Agreement, device: str) -> None:
        self._agreement = agreement
        kind, _, index = device.partition(":")
        # A card may have another number for the child than for this rank.
        self._local_rank = index or "0" if kind == "cuda" else str(agreement.local_rank)
        is_one_machine = agreement.local_size == agreement.ranks.size
        host = "localhost" if is_one_machine else os.environ.get("MASTER_ADDR") or agreement.host
        self._host = agreement.exchange("where to meet", host)[0]
        self._store: Any = None

    def open(self) -> None:
        """Opens the next meeting, whose workers know nothing of the last one's. All ranks must."""
        self.close()
        store = None
        if self._agreement.ranks.rank == 0:
            store = TCPStore(self._host, 0, is_master=True, wait_for_workers=False, timeout=_STORE_WITHIN)
        self._port = self._agreement.exchange("the meeting", store.port if store is not None else 0)[0]
        self._store = store or TCPStore(
            self._host, self._port, is_master=False, wait_for_workers=False, timeout=_STORE_WITHIN
        )

    def environment(self) -> dict[str, str]:
        """What a worker must be told to come to the present meeting."""
        values = (
            *(self._agreement.ranks.rank, self._agreement.ranks.size, self._local_rank, self._agreement.local_size),
            *(self._host, self._port),
            *(True, 0),  # the store is there already
        )
        return dict(zip(RENDEZVOUS_VARIABLES, map(str, values), strict=True))

    def fail(self) -> None:
        """Tells the others that this rank's worker has failed."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the host of the store is gone, as they will notice
                self._store.set(_FAILED_KEY, "")

    def has_failed(self) -> bool:
        try:
            return bool(self._store.check([_FAILED_KEY]))
        except RuntimeError:  # its host is gone
            return True

    def close(self) -> None:
        self._store = None


class MeetingExecutor(ChildExecutor):
    """Trials of a workload that a child process of each rank builds, where these children may train together.

    Args:
        builder: picklable by reference; returns the Workload, and may call ``init_process_group()``.
        isolation: what the device says its child needs.
        agreement: with the other ranks, which do the same.
    """

    where = "child processes of each rank"

    def __init__(
        self,
        builder: Callable[..., Any],
        isolation: Isolation,
        agreement: Agreement,
        *,
        answer_within_s: float = ANSWER_WITHIN_S,
    ) -> None:
        super().__init__(builder, isolation, answer_within_s=answer_within_s, meets=True, agree=agreement.attempt)
        self._meeting = Meeting(agreement, isolation.device)

    def setting(self) -> Setting:
        with self._failure_told():
            return super().setting()

    def close(self) -> None:
        super().close()
        self._meeting.close()

    def _new_worker(self, source: WorkerSource) -> Worker:
        self._meeting.open()
        return Worker(source, self._answer_within_s, self._meeting)

    def _run(self, request: TrialRequest) -> Attempt:
        # A worker that was lost is not asked again: it could not meet the others alone.
        with self._failure_told():
            try:
                attempt = self._ask(request)
            except WorkerLostError as lost:
                raise WorkloadFailedError(f"batch {request.batch_size}: {lost}", request.batch_size) from None
            if not attempt.trial.fits:
                self._meeting.fail()
            return attempt

    @contextlib.contextmanager
    def _failure_told(self) -> Iterator[None]:
        try:
            yield
        except BaseException as exc:
            # The worker is not waited for any more: it goes with the others of its meeting.
            self._retire()
            self._meeting.fail()
            if isinstance(exc, RuntimeError) and any(sign in str(exc) for sign in _LOST_TOUCH):
                raise StrandedError(f"the processes of the ranks lost touch: {exc}") from exc
            raise

"""Trials in a child process: replaced when lost, ended with the prober, and silent about nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from autobatch.device.host import HostDevice
from autobatch.errors import DoesNotFitError, InvalidArgumentError, WorkloadFailedError
from autobatch.probe.isolation import ChildExecutor
from autobatch.probe.processes import ChildTraceback
from autobatch.probe.trial import TrialRequest
from autobatch.result import Outcome
from autobatch.units import MIB
from tests.workloads import small, uses_threads

LIMIT_BYTES = 256 * MIB


@contextmanager
def executor(builder: object, *, anew: bool = False, **options: object) -> Iterator[ChildExecutor]:
    isolation = replace(HostDevice(memory_limit_bytes=LIMIT_BYTES).isolation(), anew=anew)
    with closing(ChildExecutor(builder, isolation, **options)) as child:
        yield child
    assert not psutil.Process().children(recursive=True)


def request(batch_size: int, limit_bytes: int | None = LIMIT_BYTES) -> TrialRequest:
    return TrialRequest(batch_size=batch_size, steps=2, limit_bytes=limit_bytes)


def worker_of(child: ChildExecutor) -> int:
    child.setting()
    return child._worker._pid


def test_a_worker_lives_across_fits_and_is_replaced_after_a_failure() -> None:
    with executor(small.build) as child:
        first = worker_of(child)
        assert child.run(request(1)).trial.fits
        assert child.run(request(20)).trial.fits
        assert worker_of(child) == first
        assert child.run(request(1000)).trial.outcome is Outcome.OOM
        assert not psutil.pid_exists(first)
        assert worker_of(child) != first
        assert child.run(request(20)).trial.fits


def test_what_building_left_for_the_collector_is_gone_after_the_first_trial() -> None:
    with executor(small.leaves_garbage) as child:
        assert child.run(request(1)).trial.fits
        assert child.run(request(2)).trial.fits


def test_on_the_host_every_trial_has_a_worker_of_its_own() -> None:
    assert HostDevice().isolation().anew
    with executor(small.build, anew=True) as child:
        workers = [worker_of(child)]
        for size in (20, 10):
            trial = child.run(request(size)).trial
            # The kernel's mark cannot be reset: in a worker that had more before, a smaller peak is unknown.
            assert trial.measurement.peak_reserved_bytes >= size * MIB
            workers.append(child._worker._pid)
        assert workers[0] == workers[1] != workers[2]
        fresh, after_small = request(10), request(10)
        assert len(child.confirm((fresh, after_small))) == 2


def test_a_confirmation_runs_in_the_searching_process_and_in_fresh_ones() -> None:
    with executor(small.build) as child:
        child.run(request(2))
        attempts = child.confirm((request(4), request(5)))
        assert [a.trial.batch_size for a in attempts] == [4, 4, 5]
        assert attempts[0].trial.history == "the search itself"


def test_an_error_of_the_workload_s_own_is_raised_as_it_was_with_its_traceback() -> None:
    with executor(small.raises_key_error) as child:
        child.run(request(1))
        with pytest.raises(KeyError, match="column") as caught:
            child.run(request(3))
        assert isinstance(caught.value.__cause__, ChildTraceback)
        assert "small.py" in str(caught.value.__cause__)


def test_an_error_that_cannot_travel_is_told_in_words() -> None:
    with executor(small.raises_unpicklable) as child, pytest.raises(WorkloadFailedError, match="it broke") as caught:
        child.run(request(3))
    assert "UnpicklableError" in caught.value.traceback_text


def test_a_kill_for_no_reason_of_memory_is_tried_once_more_and_then_told() -> None:
    with executor(small.killed) as child:
        with pytest.raises(WorkloadFailedError, match=r"batch 3.*SIGKILL"):
            child.run(request(3, limit_bytes=None))
        assert child.run(request(1)).trial.fits


def test_a_crash_under_a_memory_limit_is_only_suspected_to_be_memory() -> None:
    with executor(small.crashes) as child:
        attempt = child.run(request(3))
    assert attempt.trial.outcome is Outcome.OOM
    assert "SIGSEGV" in attempt.trial.message
    assert isinstance(attempt.suspect, WorkloadFailedError)


def test_a_hang_ends_at_the_deadline() -> None:
    with executor(small.hangs, answer_within_s=60.0) as child:
        child.setting()
        child._worker._answer_within_s = child._answer_within_s = 1.0
        with pytest.raises(WorkloadFailedError, match="no answer within 1 s"):
            child.run(request(3))


def test_grandchildren_end_with_the_executor() -> None:
    with executor(small.has_a_child_of_its_own) as child:
        child.setting()
        assert len(psutil.Process().children(recursive=True)) == 3


def test_what_building_raises_is_raised_here() -> None:
    with executor(small.fails_while_built) as child, pytest.raises(LookupError, match="no such model"):
        child.setting()
    with executor(small.returns_nothing) as child, pytest.raises(InvalidArgumentError, match="workload"):
        child.setting()


def test_a_child_that_leaves_while_it_builds_is_told_with_its_exit_code() -> None:
    told = "the child process ended with exit code 9 and without an answer while it built the workload"
    with executor(small.leaves_while_built) as child, pytest.raises(WorkloadFailedError, match=told):
        child.setting()


def test_a_model_that_alone_is_too_large_says_how_many_bytes_it_needs() -> None:
    from autobatch.probe.building import build

    def builder(device: str) -> object:
        if device != "meta":
            raise MemoryError
        return small.build()

    with pytest.raises(DoesNotFitError, match="take 4 bytes"):
        build(builder, "cpu")


@pytest.mark.parametrize("builder", [lambda: None, small.build().train_step], ids=["lambda", "bound"])
def test_what_no_other_process_can_import_is_refused(builder: object) -> None:
    with pytest.raises(InvalidArgumentError, match="importable by name"), executor(builder):
        pass


def test_a_module_whose_import_used_cpu_threads_gets_new_processes_instead_of_forks() -> None:
    with executor(uses_threads.build) as child:
        first = worker_of(child)
        assert not child._source.makes_many
        assert child.run(request(20)).trial.fits
        assert child.run(request(1000)).trial.outcome is Outcome.OOM
        assert child.run(request(20)).trial.fits
        assert worker_of(child) != first


def test_killing_the_prober_leaves_no_orphan(tmp_path: Path) -> None:
    script = (
        "from autobatch.device.host import HostDevice\n"
        "from autobatch.probe.isolation import ChildExecutor\n"
        "from autobatch.probe.trial import TrialRequest\n"
        "from tests.workloads import small\n"
        "child = ChildExecutor(small.hangs, HostDevice().isolation())\n"
        "child.setting(); print('ready', flush=True)\n"
        "child.run(TrialRequest(batch_size=3, steps=2))\n"
    )
    prober = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert prober.stdout.readline() == "ready\n"
    children = psutil.Process(prober.pid).children(recursive=True)
    assert len(children) == 2
    os.kill(prober.pid, signal.SIGKILL)
    prober.communicate()
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert time.monotonic() > 0
    assert len(gone) == 2

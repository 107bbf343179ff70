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
from functools import partial
from pathlib import Path

import psutil
import pytest

from autobatch.device.host import HostDevice
from autobatch.errors import DoesNotFitError, InvalidArgumentError, WorkloadFailedError
from autobatch.probe.isolation import ChildExecutor
from autobatch.probe.processes.errors import ChildTraceback
from autobatch.probe.trial import TrialRequest
from autobatch.result import Outcome
from autobatch.units import MIB
from tests.workloads import small, uses_threads

LIMIT_BYTES = 256 * MIB


@contextmanager
def executor(builder: object) -> Iterator[ChildExecutor]:
    before = children()
    isolation = replace(HostDevice(memory_limit_bytes=LIMIT_BYTES).isolation(), anew=False)  # as on a GPU
    with closing(ChildExecutor(builder, isolation)) as child:
        yield child
    assert not children() - before


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.fixture(scope="module")
def how(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("odd") / "how"


@pytest.fixture(scope="module")
def odd(how: Path) -> Iterator[ChildExecutor]:
    how.touch()
    with executor(partial(small.odd, how)) as child:
        yield child


@pytest.fixture
def child(odd: ChildExecutor, how: Path) -> Iterator[ChildExecutor]:
    """As if it were new, but that its server is there."""
    how.write_text("")
    odd._retire()
    return odd


def request(batch_size: int, limit_bytes: int | None = LIMIT_BYTES) -> TrialRequest:
    return TrialRequest(batch_size=batch_size, steps=2, limit_bytes=limit_bytes)


def worker_of(child: ChildExecutor) -> int:
    child.setting()
    return child._worker._pid


def test_a_worker_lives_across_fits_and_is_replaced_after_a_failure(child: ChildExecutor) -> None:
    first = worker_of(child)
    assert child.run(request(1)).trial.fits
    assert child.run(request(20)).trial.fits
    assert worker_of(child) == first
    assert child.run(request(1000)).trial.outcome is Outcome.OOM
    assert not psutil.pid_exists(first)
    assert worker_of(child) != first
    assert child.run(request(20)).trial.fits


def test_a_trial_that_is_to_run_afresh_has_a_worker_that_has_tried_nothing(child: ChildExecutor) -> None:
    first = worker_of(child)
    assert child.run(replace(request(1), afresh=True)).trial.fits
    assert worker_of(child) == first
    assert child.run(replace(request(2), afresh=True)).trial.fits
    assert worker_of(child) != first


def test_what_building_left_for_the_collector_is_gone_after_the_first_trial(child: ChildExecutor, how: Path) -> None:
    how.write_text("leaves_garbage")
    assert child.run(request(1)).trial.fits
    assert child.run(request(2)).trial.fits


def test_on_the_host_every_trial_has_a_worker_of_its_own(child: ChildExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ChildExecutor(small.build, HostDevice().isolation())._anew
    monkeypatch.setattr(child, "_anew", True)
    workers = [worker_of(child)]
    for size in (20, 10):
        trial = child.run(request(size)).trial
        # The kernel's mark cannot be reset: in a worker that had more before, a smaller peak is unknown.
        assert trial.measurement.peak_reserved_bytes >= size * MIB
        workers.append(child._worker._pid)
    assert workers[0] == workers[1] != workers[2]
    fresh, after_small = request(10), request(10)
    assert len(child.confirm((fresh, after_small))) == 2


def test_a_confirmation_runs_in_the_searching_process_and_in_fresh_ones(child: ChildExecutor) -> None:
    child.run(request(2))
    attempts = child.confirm((request(4), request(5)))
    assert [a.trial.batch_size for a in attempts] == [4, 4, 5]
    assert attempts[0].trial.history == "the search itself"


def test_an_error_of_the_workload_s_own_is_raised_as_it_was_with_its_traceback(child: ChildExecutor) -> None:
    child.run(request(1))
    with pytest.raises(KeyError, match="column") as caught:
        child.run(request(small.KEY_ERROR))
    assert isinstance(caught.value.__cause__, ChildTraceback)
    assert "small.py" in str(caught.value.__cause__)


def test_an_error_that_cannot_travel_is_told_in_words(child: ChildExecutor) -> None:
    with pytest.raises(WorkloadFailedError, match="it broke") as caught:
        child.run(request(small.UNPICKLABLE))
    assert "UnpicklableError" in caught.value.traceback_text


def test_a_kill_for_no_reason_of_memory_is_tried_once_more_and_then_told(child: ChildExecutor) -> None:
    with pytest.raises(WorkloadFailedError, match=rf"batch {small.KILLED}.*SIGKILL"):
        child.run(request(small.KILLED, limit_bytes=None))
    assert child.run(request(1)).trial.fits


def test_a_crash_under_a_memory_limit_is_only_suspected_to_be_memory(child: ChildExecutor) -> None:
    attempt = child.run(request(small.CRASHES))
    assert attempt.trial.outcome is Outcome.OOM
    assert "SIGSEGV" in attempt.trial.message
    assert isinstance(attempt.suspect, WorkloadFailedError)


def test_a_hang_ends_at_the_deadline(child: ChildExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    child.setting()
    child._worker._answer_within_s = 1.0
    monkeypatch.setattr(child, "_answer_within_s", 1.0)
    with pytest.raises(WorkloadFailedError, match="no answer within 1 s"):
        child.run(request(small.HANGS))


def test_grandchildren_end_with_the_executor() -> None:
    before = children()
    with executor(small.has_a_child_of_its_own) as child:
        child.setting()
        assert len(children() - before) == 3  # a server, a worker, and its child


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("fails_while_built", LookupError, "no such model"),
        ("returns_nothing", InvalidArgumentError, "workload"),
        (
            "leaves_while_built",
            WorkloadFailedError,
            "the child process ended with exit code 9 and without an answer while it built the workload",
        ),
    ],
)
def test_what_goes_wrong_in_building_is_raised_here(
    child: ChildExecutor, how: Path, name: str, error: type[Exception], said: str
) -> None:
    how.write_text(name)
    with pytest.raises(error, match=said):
        child.setting()


def test_a_model_that_alone_is_too_large_says_how_many_bytes_it_needs() -> None:
    from autobatch.probe.workload.building import build

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
        "from functools import partial\n"
        "from pathlib import Path\n"
        "from autobatch.device.host import HostDevice\n"
        "from autobatch.probe.isolation import ChildExecutor\n"
        "from autobatch.probe.trial import TrialRequest\n"
        "from tests.workloads import small\n"
        "child = ChildExecutor(partial(small.odd, Path('/dev/null')), HostDevice().isolation())\n"
        "child.setting(); print('ready', flush=True)\n"
        "child.run(TrialRequest(batch_size=small.HANGS, steps=2))\n"
    )
    prober = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert prober.stdout.readline() == "ready\n"
    started = psutil.Process(prober.pid).children(recursive=True)
    assert len(started) == 2
    os.kill(prober.pid, signal.SIGKILL)
    prober.communicate()
    gone, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
    assert time.monotonic() > 0
    assert len(gone) == 2

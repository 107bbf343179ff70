"""What recorded trials tell the search: which of them count, and what a size is expected to fail in."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from autobatch.errors import AutobatchWarning
from autobatch.probe import foresight
from autobatch.probe.foresight import Recorded
from autobatch.probe.trial import Attempt
from autobatch.replay.forecast import Forecast
from autobatch.replay.trace import ALLOCATES, Trace
from autobatch.result import AFTER_SEARCH, FRESH, Measurement, Outcome, Trial
from autobatch.units import GIB, KIB, MIB


def trace(n: int, workspace_bytes: int = 0) -> Trace:
    """Three steps that take 100 MiB, 10 MiB a sample and a workspace."""
    sizes = array("q", [100 * MIB, 10 * MIB * n, max(1, workspace_bytes)] * 3)
    events = array("q", [event for k in (0, 3, 6) for event in (*[ALLOCATES] * 3, k, k + 1, k + 2)])
    return Trace(segments=(), events=events, sizes=sizes, streams=array("q", [0] * 9), steps=(3, 6, 9))


def attempt(n: int, outcome: Outcome = Outcome.FITS, recorded: Trace | None = None) -> Attempt:
    return Attempt(trial=Trial(batch_size=n, outcome=outcome), trace=recorded or trace(n))


def recorded(*attempts: Attempt, capacity_bytes: int | None = GIB) -> Recorded:
    found = Recorded(capacity_bytes, 3, lambda own: own)
    for each in attempts:
        found.learn(each)
    return found


def test_one_recorded_size_foretells_nothing() -> None:
    found = recorded(attempt(1))
    assert found.has(1)
    assert found.has(2)
    assert found.forecast(1) is None
    assert not found.expects_failure(10**9)


def test_two_do() -> None:
    found = recorded(attempt(1), attempt(3))
    assert found.forecast(3) == Forecast(92, 92, 92)  # (1024 - 100) / 10
    assert found.expects_failure(93)
    assert not found.expects_failure(92)
    assert not found.belongs_behind_small(93)


def test_the_end_is_where_the_forecast_is_and_not_beyond() -> None:
    found = recorded(attempt(1), attempt(3))
    assert not found.is_at_the_end(92)  # nothing has been foretold
    found.forecast(3)
    assert [found.is_at_the_end(size) for size in (91, 92, 93)] == [False, True, False]


def test_where_small_batches_decide_the_end_is_not_for_a_process_that_has_run_none(monkeypatch) -> None:
    found = recorded(attempt(1), attempt(3))
    monkeypatch.setattr(foresight, "forecast", lambda *args, **options: Forecast(92, 92, 95))
    found.forecast(3)
    assert not any(found.is_at_the_end(size) for size in (91, 92, 93))


def test_without_a_capacity_nothing_is_foretold() -> None:
    assert recorded(attempt(1), attempt(3), capacity_bytes=None).forecast(3) is None


def test_a_trial_that_was_not_recorded_tells_nothing() -> None:
    found = Recorded(GIB, 3, lambda own: own)
    found.learn(Attempt(trial=Trial(batch_size=1, outcome=Outcome.FITS)))
    assert not found.has(1)


@pytest.mark.parametrize("outcome", [Outcome.THRASHED, Outcome.OVER_HEADROOM])
def test_one_that_ran_and_did_not_fit_tells_what_is_below_it(outcome: Outcome) -> None:
    """From 3 samples 87 are foretold; the workspace that is seen at 86 has grown in between."""
    found = recorded(attempt(1, recorded=trace(1, 50 * MIB)), attempt(3, recorded=trace(3, 50 * MIB)))
    assert found.forecast(3) == Forecast(87, 87, 87)
    found.learn(attempt(86, outcome, trace(86, 200 * MIB)))
    below = found.forecast(3)
    assert below is not None
    needed = [100 + 10 * n + 50 + 150 * (n - 3) / 83 for n in (below.most, below.most + 2)]  # in MiB, which are rounded
    assert needed[0] <= 1024 < needed[1]


def test_ranks_take_what_they_agree_on() -> None:
    found = Recorded(GIB, 3, lambda own: None if own is None else Forecast(50, 60, 55))
    for each in (attempt(1), attempt(3)):
        found.learn(each)
    assert found.forecast(3) == Forecast(50, 60, 55)
    assert not found.expects_failure(70)  # it is not sure


def test_what_would_take_too_long_is_given_up_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autobatch.replay.forecast._MOST_EVENTS", 50)
    found = recorded(attempt(1), attempt(3))
    assert found.forecast(3) is None
    monkeypatch.undo()
    assert found.forecast(3) is None


def test_a_replay_that_fails_is_told_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ours, and no error of the search's."""

    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("autobatch.probe.foresight.forecast", fail)
    found = recorded(attempt(1), attempt(3))
    with pytest.warns(AutobatchWarning, match="ZeroDivisionError: of ours"):
        assert found.forecast(3) is None
    monkeypatch.undo()
    assert found.forecast(3) is None


def of_host(n: int, peak_bytes: int | None = None, *, is_recorded: bool = True) -> Attempt:
    """As :func:`trace`, on the host."""
    seen = replace(trace(n, KIB), mapped_from_bytes=256 * KIB) if is_recorded else None
    measured = Measurement(peak_allocated_bytes=None, peak_reserved_bytes=peak_bytes)
    return Attempt(trial=Trial(batch_size=n, outcome=Outcome.FITS, measurement=measured), trace=seen)


def test_on_the_host_what_a_process_has_beside_tensors_is_as_at_the_largest_trial() -> None:
    found = recorded(of_host(1, 200 * MIB), of_host(3, 180 * MIB))
    # 130 MiB are tensors of three samples, and 50 are others.
    assert found.forecast(3) == Forecast(87, 87, 87, is_from_afar=True, is_rough=True)
    found.learn(of_host(40, 530 * MIB, is_recorded=False))
    assert found.forecast(40) == Forecast(89, 89, 89, is_rough=True)


def test_on_the_host_peaks_that_are_not_known_say_nothing() -> None:
    """As in a process that had more before: there a forecast from near is not one from afar for that."""
    assert recorded(of_host(1), of_host(40)).forecast(40) == Forecast(92, 92, 92, is_rough=True)
    assert recorded(of_host(1, 120 * MIB), of_host(40)).forecast(40).is_from_afar is False


def test_on_the_host_no_more_is_recorded_than_it_takes() -> None:
    """It takes some of the memory that is tried; a GPU's does not."""
    found = recorded(of_host(1))
    assert found.wants()
    found.learn(of_host(3))
    found.forecast(3)
    assert not found.wants()
    on_a_gpu = recorded(attempt(1), attempt(3))
    on_a_gpu.forecast(3)
    assert on_a_gpu.wants()


def test_on_the_host_trials_run_behind_small_batches_once_nothing_more_is_recorded() -> None:
    """What kernels keep for each size is part of what a process has beside tensors, then and in training."""
    found = recorded(of_host(1))
    assert not found.belongs_behind_small(3)
    found.learn(of_host(3))
    found.forecast(3)
    assert [found.belongs_behind_small(size) for size in (10, 92, 93)] == [True] * 3


@pytest.mark.parametrize(
    ("history", "steps", "refuted"),
    [(FRESH, 0, True), (FRESH, 2, True), (AFTER_SEARCH, 2, True), (FRESH, 3, False), ("smaller batches", 0, False)],
)
def test_what_fails_later_or_behind_others_was_not_foretold_wrongly(history: str, steps: int, refuted: bool) -> None:
    """A trial, which has three steps, would not have told either."""
    confirming = Trial(batch_size=9, outcome=Outcome.OOM, history=history, steps=steps)
    assert Recorded(1, 3, lambda own: own).refutes(confirming) is refuted

"""Agreement among ranks that are threads here: what each of them hears, and that none waits for one that failed."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from autobatch.errors import DeviceNotFoundError, DoesNotFitError, InvalidArgumentError, RankError
from autobatch.probe import lock, neighbours
from autobatch.probe.agreement import Agreement
from autobatch.probe.executor import Setting
from autobatch.probe.processes.errors import StrandedError
from autobatch.probe.search.within import Extent
from autobatch.probe.trial import Attempt, TrialRequest
from autobatch.replay.forecast import Forecast
from autobatch.replay.trace import Trace
from autobatch.result import Measurement, Outcome, Trial
from autobatch.testing import FakeDevice

REQUEST = TrialRequest(batch_size=4, steps=3)


class Hall:
    """Where the threads meet. A thread that never comes breaks it for all, within a second."""

    def __init__(self, size: int) -> None:
        self.said: list[Any] = [None] * size
        self.door = threading.Barrier(size, timeout=1.0)
        self.meetings = 0

    def gather(self, rank: int, item: Any) -> list[Any]:
        self.said[rank] = item
        try:
            self.door.wait()
            heard = list(self.said)
            if self.door.wait() == 0:
                self.meetings += 1
        except threading.BrokenBarrierError:
            raise RankError("one of them is gone or silent") from None
        return heard


class Ranks:
    are_several = True

    def __init__(self, rank: int, hall: Hall) -> None:
        self.rank, self.size = rank, len(hall.said)
        self.gather = lambda item: hall.gather(rank, item)


def together(*functions: Callable[[Agreement], Any], hall: Hall | None = None) -> list[Any]:
    """What each rank's function gave or raised."""
    place = hall or Hall(len(functions))

    def run(rank: int) -> Any:
        agreement = Agreement(Ranks(rank, place))  # type: ignore[arg-type]
        try:
            with agreement.session():
                return functions[rank](agreement)
        except Exception as exc:  # noqa: BLE001 - the test looks at it
            return exc

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, range(len(functions))))


def trial(outcome: Outcome = Outcome.FITS, *, peak: int | None = 50, capacity: int = 100, step_s: float = 1.0) -> Trial:
    measured = Measurement(
        peak_allocated_bytes=peak, peak_reserved_bytes=peak, capacity_bytes=capacity, step_time_s=step_s
    )
    return Trial(batch_size=4, outcome=outcome, measurement=measured, message=outcome.value)


def attempts(*each: Attempt | BaseException) -> list[Any]:
    def asker(mine: Attempt | BaseException) -> Callable[[Agreement], Attempt]:
        def run() -> Attempt:
            if isinstance(mine, BaseException):
                raise mine
            return mine

        return lambda agreement: agreement.attempt(REQUEST, run)

    return together(*map(asker, each))


TRACE = Trace(segments=(), events=array("q"), sizes=array("q"), streams=array("q"), steps=())


def test_a_trial_counts_as_recorded_where_all_ranks_have_recorded_it() -> None:
    """Each keeps its own record; ranks that did not know the same would go different ways."""
    all_of_them = attempts(Attempt(trial=trial(), trace=TRACE), Attempt(trial=trial(), trace=TRACE))
    assert [attempt.trace for attempt in all_of_them] == [TRACE, TRACE]
    one = attempts(Attempt(trial=trial(), trace=TRACE), Attempt(trial=trial()))
    assert [attempt.trace for attempt in one] == [None, None]


def test_of_several_forecasts_the_least_counts() -> None:
    own = [Forecast(90, 100, 110), Forecast(95, 97, 120), Forecast(92, 99, 105)]
    told = together(*(lambda agreement, mine=mine: agreement.forecast(mine) for mine in own))
    assert told == [Forecast(90, 97, 105)] * 3
    from_afar = Forecast(100, 110, 120, is_from_afar=True, is_rough=True)
    told = together(lambda a: a.forecast(own[0]), lambda a: a.forecast(from_afar))
    assert told == [Forecast(90, 100, 110, is_from_afar=True, is_rough=True)] * 2
    assert together(lambda a: a.forecast(own[0]), lambda a: a.forecast(None)) == [None, None]
    assert Agreement().forecast(own[0]) == own[0]


def test_alone_everything_is_as_it_says_itself() -> None:
    agreement, mine = Agreement(), Attempt(trial=trial())
    with agreement.session():
        assert agreement.attempt(REQUEST, lambda: mine) is mine
        assert agreement.exchange("anything", 3) == [3]
        agreement.begin({"start": 1})
    with pytest.raises(KeyError), agreement.session():
        raise KeyError("column 7")
    with pytest.raises(StrandedError):
        agreement.ask("anything", _stranded)


def test_a_rank_that_ran_out_decides_for_all() -> None:
    found = attempts(Attempt(trial=trial()), Attempt(trial=trial(Outcome.OOM)), Attempt(trial=trial()))
    assert [each.trial.outcome for each in found] == [Outcome.OOM] * 3
    assert [each.suspect for each in found] == [None] * 3


def test_of_ranks_that_fit_the_one_with_the_least_room_decides_and_the_slowest_tells_the_time() -> None:
    roomy, tight = trial(peak=60, capacity=100, step_s=3.0), trial(peak=50, capacity=60, step_s=1.0)
    first, second = attempts(Attempt(trial=roomy), Attempt(trial=tight))
    assert first == second
    assert first.trial.measurement.peak_allocated_bytes == 50
    assert first.trial.measurement.step_time_s == 3.0


def test_a_suspect_error_stays_that_of_its_rank_and_is_named_elsewhere() -> None:
    error = RuntimeError("CUDNN_STATUS_INTERNAL_ERROR")
    first, second = attempts(Attempt(trial=trial()), Attempt(trial=trial(Outcome.OOM), suspect=error))
    assert second.suspect is error
    assert isinstance(first.suspect, RankError)
    assert str(first.suspect) == "rank 1 failed: RuntimeError: CUDNN_STATUS_INTERNAL_ERROR"


def test_memory_that_surely_ran_out_says_more_than_a_suspect_error() -> None:
    sure, unsure = Attempt(trial=trial(Outcome.OOM)), Attempt(trial=trial(Outcome.OOM), suspect=RuntimeError("cuDNN"))
    assert [each.suspect for each in attempts(unsure, sure)] == [None, None]


def test_a_stranded_rank_takes_the_failure_that_stranded_it() -> None:
    first, second = attempts(StrandedError("given up"), Attempt(trial=trial(Outcome.OOM)))
    assert first == second
    assert first.trial.outcome is Outcome.OOM


def test_a_rank_stranded_by_nobody_is_an_error() -> None:
    lost = StrandedError("given up")
    lost.__cause__ = RuntimeError("Connection closed by peer")
    first, second = attempts(lost, Attempt(trial=trial()))
    assert first is lost.__cause__
    assert str(second) == "rank 0 failed: given up"


def test_an_error_is_raised_where_it_was_and_named_elsewhere() -> None:
    error = KeyError("column 7")
    first, second = attempts(Attempt(trial=trial()), error)
    assert second is error
    assert isinstance(first, RankError)
    assert (first.rank, str(first)) == (1, "rank 1 failed: KeyError: 'column 7'")


def test_an_error_reaches_ranks_that_ask_for_something_else_by_then() -> None:
    def fails(agreement: Agreement) -> None:
        raise DeviceNotFoundError("no cuda:1 here")

    first, second = together(lambda agreement: agreement.exchange("the answer", 1), fails)
    assert isinstance(second, DeviceNotFoundError)
    assert str(first) == "rank 1 failed: DeviceNotFoundError: no cuda:1 here"
    assert isinstance(first.__cause__, DeviceNotFoundError)


def test_an_error_of_one_beside_a_size_that_does_not_fit_on_another() -> None:
    def refuses(agreement: Agreement) -> None:
        raise DoesNotFitError("batch 1 does not fit")

    def fails(agreement: Agreement) -> None:
        raise KeyError("column 7")

    third, first, second = together(lambda agreement: agreement.exchange("the answer", 1), refuses, fails)
    assert isinstance(first, DoesNotFitError)
    assert isinstance(second, KeyError)
    assert str(third) == "rank 2 failed: KeyError: 'column 7'"


def test_what_does_not_fit_on_one_rank_fits_nowhere() -> None:
    shown = trial(Outcome.OOM)

    def refuses(agreement: Agreement) -> None:
        raise DoesNotFitError("batch 4 does not fit", shown)

    first, second = together(lambda agreement: agreement.exchange("the answer", 1), refuses)
    assert str(second) == "batch 4 does not fit"
    assert isinstance(first, DoesNotFitError)
    assert (str(first), first.trial) == ("on rank 1, batch 4 does not fit", shown)


def test_ranks_that_went_different_ways_are_told() -> None:
    found = together(lambda agreement: agreement.exchange("one", 1), lambda agreement: agreement.exchange("two", 1))
    assert [str(each) for each in found] == [str(found[0])] * 2
    assert "rank 0: one; rank 1: two" in str(found[0])


def test_a_silent_rank_is_an_error_and_nobody_asks_it_again() -> None:
    hall = Hall(2)
    first, second = together(lambda agreement: agreement.exchange("one", 1), lambda agreement: "gone", hall=hall)
    assert isinstance(first, RankError)
    assert second == "gone"
    assert hall.meetings == 0


def test_after_an_error_all_leave_with_one_exchange() -> None:
    hall = Hall(2)

    def fails(agreement: Agreement) -> None:
        raise KeyError("column 7")

    together(lambda agreement: agreement.exchange("one", 1), fails, hall=hall)
    assert hall.meetings == 1


def test_ranks_must_have_been_asked_the_same() -> None:
    found = together(lambda agreement: agreement.begin({"start": 1}), lambda agreement: agreement.begin({"start": 2}))
    assert [type(each) for each in found] == [InvalidArgumentError] * 2
    assert str(found[1]) == "start=2: must be the same on all ranks, which have 1, 2"


def test_the_setting_is_that_of_the_rank_with_the_least() -> None:
    def setting(budget: int, samples: int, varies: bool) -> Setting:
        return Setting(
            budget_bytes=None,
            held_bytes=budget // 10,
            mode="train",
            name=f"of {budget}",
            data={"train": Extent(samples=samples, varies=varies)},
        )

    found = together(
        lambda agreement: agreement.setting(setting(90, 7, False), 90),
        lambda agreement: agreement.setting(setting(60, 9, True), 60),
    )
    assert found[0] == found[1]
    assert (found[0].name, found[0].budget_bytes, found[0].held_bytes) == ("of 60", 60, 6)
    assert found[0].data == {"train": Extent(samples=7, varies=True)}
    assert found[0].environment == {"ranks": 2, "rank_budgets_bytes": [90, 60]}


def test_only_the_narrowest_rank_is_asked_for_a_guess() -> None:
    asked: list[int] = []

    def guessed(budget: int) -> Callable[[Agreement], Any]:
        def run(agreement: Agreement) -> Any:
            agreement.setting(Setting(budget_bytes=budget, held_bytes=0, mode="train", name=""), budget)
            return agreement.by_narrowest("a guess", lambda: asked.append(budget) or budget)

        return run

    assert together(guessed(90), guessed(60)) == [60, 60]
    assert asked == [60]


def test_the_clock_is_rank_0s(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 7.0])
    monkeypatch.setattr("autobatch.probe.agreement.time.monotonic", lambda: next(times))
    first, second = together(Agreement.clock, Agreement.clock)
    assert first == second


def test_ranks_on_one_device_share_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each for itself would wait for the other, which waits for it."""
    for module in (lock, neighbours):
        monkeypatch.setattr(module, "lock_path", lambda device: tmp_path / "gpu.lock")
    device = FakeDevice(1, lambda n: 0)

    def hold(agreement: Agreement) -> tuple[bool, str]:
        with neighbours.locked(device, agreement):
            other = FileLock(tmp_path / "gpu.lock")
            with pytest.raises(Timeout):
                other.acquire(timeout=0)
            agreement.exchange("inside", None)
            return True, lock.child_environment()[lock.HELD_VARIABLE]

    assert together(hold, hold) == [(True, str(tmp_path / "gpu.lock"))] * 2


def _stranded() -> None:
    raise StrandedError("given up")

"""What a search asks of the place where it runs: how many steps, behind which batches, recorded or not."""

from __future__ import annotations

from typing import Any

import pytest

from autobatch.probe.executor import Setting
from autobatch.probe.foresight import Recorded
from autobatch.probe.inquiry import Inquiry, withheld_of_host
from autobatch.probe.trial import Attempt, TrialRequest
from autobatch.replay.forecast import Forecast
from autobatch.result import Outcome, Trial
from autobatch.units import GIB, MIB


class Place:
    """Everything fits, and every request is kept."""

    where = "nowhere"
    begins_small = True

    def __init__(self) -> None:
        self.requests: list[TrialRequest] = []
        self.suspect: BaseException | None = None

    def run(self, request: TrialRequest) -> Attempt:
        self.requests.append(request)
        return Attempt(trial=Trial(batch_size=request.batch_size, outcome=Outcome.FITS))

    def confirm(self, requests: tuple[TrialRequest, ...]) -> list[Attempt]:
        trial = Trial(batch_size=requests[0].batch_size, outcome=Outcome.OOM)
        return [Attempt(trial=trial, suspect=self.suspect)]


@pytest.fixture
def inquiry() -> Inquiry:
    place: Any = Place()
    setting = Setting(budget_bytes=100, held_bytes=0, mode="train", name="")
    return Inquiry(
        executor=place,
        setting=setting,
        first_size=1,
        steps=3,
        shuffles=0,
        fresh=1,
        capacity_bytes=100,
        least_capacity_bytes=100,
        is_restricted=True,
        on_trial=None,
    )


def asked(inquiry: Inquiry, size: int, foretold: Forecast | None) -> TrialRequest:
    """The request for ``size`` after batches of 1 and 50 have fitted and that was foretold."""
    inquiry._foresight = Recorded(100, 3, lambda own: foretold)
    for known in (1, 50):
        inquiry._ask(known, "train")
    inquiry._foresight.forecast(50)
    inquiry._ask(size, "train")
    return inquiry.executor.requests[-1]  # type: ignore[attr-defined, no-any-return]


def test_as_long_as_it_should_fit_a_trial_is_plain_and_recorded(inquiry: Inquiry) -> None:
    request = asked(inquiry, 60, Forecast(60, 60, 70))
    assert (request.steps, request.sizes_before, request.records) == (3, (), True)


@pytest.mark.parametrize(("size", "afresh"), [(59, False), (60, True), (61, False), (71, False)])
def test_the_largest_that_should_fit_is_tried_as_training_begins(inquiry: Inquiry, size: int, afresh: bool) -> None:
    assert asked(inquiry, size, Forecast(60, 60, 60)).afresh is afresh
    # Where small batches are what decides, the process goes on that has run some.
    assert not asked(inquiry, size, Forecast(60, 60, 70)).afresh


def test_what_should_fail_behind_small_batches_alone_is_asked_there(inquiry: Inquiry) -> None:
    request = asked(inquiry, 61, Forecast(60, 60, 70))
    assert (request.steps, request.sizes_before, request.records) == (3, (1, 1), False)


def test_what_should_fail_by_itself_is_asked_by_itself_and_recorded(inquiry: Inquiry) -> None:
    request = asked(inquiry, 71, Forecast(60, 60, 70))
    assert (request.steps, request.sizes_before, request.records) == (3, (), True)


def test_where_no_small_batches_can_come_before_none_do(inquiry: Inquiry) -> None:
    inquiry.executor.begins_small = False
    assert asked(inquiry, 61, Forecast(60, 60, 70)).sizes_before == ()


def test_a_confirmation_that_fails_for_a_doubtful_reason_is_named(inquiry: Inquiry) -> None:
    """A size that was foretold may have no other run."""
    place: Any = inquiry.executor
    place.suspect = RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED")
    inquiry._confirm(60, "train")
    (doubt,) = inquiry._doubtful()
    assert doubt.startswith("A batch of 60 is taken to run out of memory")
    assert "CUBLAS_STATUS_NOT_INITIALIZED" in doubt


def test_an_evaluation_amid_training_is_confirmed_behind_a_batch_of_training(inquiry: Inquiry) -> None:
    """Where a trial runs one sample: a refusal there is none of a trial."""
    inquiry._trained = 40
    assert inquiry._fresh(60, "eval").history == "a batch of training"
    assert inquiry._fresh(60, "eval").sizes_before == (40,)


@pytest.mark.parametrize("foretold", [None, Forecast(40, 60, 70), Forecast(45, 45, 45)])
def test_a_forecast_that_is_unsure_or_was_wrong_changes_nothing(inquiry: Inquiry, foretold: Forecast | None) -> None:
    """A batch of 50 has fitted where 45 were foretold."""
    request = asked(inquiry, 61, foretold)
    assert (request.steps, request.sizes_before, request.records) == (3, (), True)


def test_without_recordings_a_trial_is_plain(inquiry: Inquiry) -> None:
    inquiry._ask(7, "train")
    request: TrialRequest = inquiry.executor.requests[-1]  # type: ignore[attr-defined]
    assert (request.steps, request.sizes_before, request.records) == (3, (), False)


def test_of_host_memory_something_is_withheld_for_heaps_that_differ() -> None:
    assert withheld_of_host(128 * MIB) == pytest.approx(3 / 128)
    assert withheld_of_host(10 * MIB) == 0.025
    assert withheld_of_host(10 * GIB) == 0.005
    assert withheld_of_host(None) == 0.005

"""The search alone: what it answers, how many sizes it asks, and that it always ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from autobatch.errors import DoesNotFitError, InvalidArgumentError
from autobatch.probe.search import check_arguments, search
from autobatch.result import Measurement, Outcome, Trial

CAPACITY = 10**12


class Oracle:
    """Answers from a predicate and, if given, a peak in bytes; counts, and refuses to be asked twice."""

    def __init__(self, fits: Callable[[int], bool], peak: Callable[[int], float] | None = None) -> None:
        self.fits, self.peak, self.trials = fits, peak, dict[int, Trial]()

    def __call__(self, size: int) -> Trial:
        assert size >= 1
        assert size not in self.trials, f"{size} was asked twice"
        measured = None
        if self.peak is not None:
            peak = int(self.peak(size))
            measured = Measurement(peak_allocated_bytes=peak, peak_reserved_bytes=min(peak, CAPACITY))
        fits = self.fits(size)
        self.trials[size] = Trial(
            batch_size=size, outcome=Outcome.FITS if fits else Outcome.OOM, measurement=measured if fits else None
        )
        return self.trials[size]

    @property
    def failures(self) -> int:
        return sum(not trial.fits for trial in self.trials.values())


def confirmed(size: int) -> Trial:
    return Trial(batch_size=size, outcome=Outcome.FITS)


def up_to(limit: int) -> Oracle:
    return Oracle(lambda n: n <= limit)


@pytest.mark.parametrize("limit", [*range(1, 70), 100, 127, 128, 1000, 4095, 4096, 99_999])
def test_without_peaks_it_is_plain_growth_and_bisection(limit: int) -> None:
    oracle = up_to(limit)
    answer = search(oracle, confirmed, multiple_of=1)
    assert (answer.batch_size, answer.smallest_failure, answer.proof) == (limit, limit + 1, "next_size_failed")
    assert len(oracle.trials) <= 2 * (limit.bit_length() - 1) + 2


def test_nothing_fits_is_an_error_that_carries_the_trial() -> None:
    oracle = up_to(0)
    with pytest.raises(DoesNotFitError) as caught:
        search(oracle, confirmed)
    assert caught.value.trial is oracle.trials[1]


def test_a_cap_is_never_overshot() -> None:
    oracle = up_to(10**6)
    answer = search(oracle, confirmed, max_batch_size=100)
    assert (answer.batch_size, answer.proof, answer.smallest_failure) == (100, "max_batch_size", None)
    assert max(oracle.trials) == 100


def test_bad_arguments_are_refused_before_anything_is_asked() -> None:
    oracle = up_to(10)
    with pytest.raises(InvalidArgumentError) as caught:
        search(oracle, confirmed, multiple_of=8, max_batch_size=4)
    assert caught.value.argument == "max_batch_size"
    assert not oracle.trials
    with pytest.raises(InvalidArgumentError):
        check_arguments(growth=1.0)

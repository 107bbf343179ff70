"""The search where trials are recorded and tell of sizes that were never run, truly or not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.errors import DoesNotFitError
from autobatch.probe.search import search
from autobatch.probe.search.rounding import Rounding
from autobatch.replay.forecast import Forecast
from autobatch.result import FRESH, Outcome, Trial
from tests.unit.test_search import CAPACITY, Oracle, affine, odd_oracles, plain_cost, up_to


class Foretells:
    """A forecast of ``least`` and ``most`` wherever two sizes were recorded, or what ``say`` makes of the size."""

    def __init__(self, oracle: Oracle, say: Any, recorded: Any = lambda size: True) -> None:
        self._oracle, self._say, self._recorded = oracle, say, recorded

    def has(self, size: int) -> bool:
        return self._oracle.trials[size].fits and self._recorded(size)

    def forecast(self, size: int) -> Forecast | None:
        smaller = [n for n in self._oracle.trials if n < size and self.has(n)]
        said = self._say(size) if smaller else None
        return said if said is None or isinstance(said, Forecast) else Forecast(said, said)

    def refutes(self, confirming: Trial) -> bool:
        return confirming.history == FRESH


class Confirms:
    """Runs a size by itself in a fresh process, then behind small batches, where only what ``keeps`` fits."""

    def __init__(self, fits: Callable[[int], bool], keeps: Callable[[int], bool] = lambda size: True) -> None:
        self._fits, self._keeps = fits, keeps
        self.kept: list[int] = []
        self.refused: list[int] = []

    def __call__(self, size: int) -> Trial:
        fits_alone = self._fits(size)
        fits = fits_alone and self._keeps(size)
        (self.kept if fits else self.refused).append(size)
        history = "smaller batches" if fits_alone else FRESH
        return Trial(batch_size=size, outcome=Outcome.FITS if fits else Outcome.OOM, history=history)


def foretold(oracle: Oracle, say: Any, confirm: Any = None, **options: Any) -> Any:
    options = {"multiple_of": 1, "capacity_bytes": CAPACITY, **options}
    return search(oracle, confirm or Confirms(oracle.fits), foresight=Foretells(oracle, say), **options)


@pytest.mark.parametrize("limit", [3, 4, 7, 11, 39, 185, 1000, 50_000])
def test_a_true_forecast_needs_three_trials_and_one_failure(limit: int) -> None:
    """Two small sizes and the one above the answer; and two on the way to an answer a thousand times as large."""
    oracle = affine(limit)
    answer = foretold(oracle, lambda size: limit)
    assert (answer.batch_size, answer.proof, answer.smallest_failure) == (limit, "next_size_failed", limit + 1)
    assert len(oracle.trials) <= (3 if limit < 1500 else 5)
    assert oracle.failures == 1


@pytest.mark.parametrize("limit", [40, 370])
def test_a_forecast_that_is_only_rough_is_tried_itself(limit: int) -> None:
    oracle = affine(limit)
    assert foretold(oracle, lambda size: Forecast(limit, limit, is_rough=True)).batch_size == limit
    assert list(oracle.trials) == [1, 3, limit, limit + 1]
    guessed = affine(limit)
    rough = Forecast(limit, limit, is_rough=True)
    assert foretold(guessed, lambda size: rough, first_guess=limit).batch_size == limit
    assert limit in guessed.trials


def test_one_that_differs_from_the_first_is_tried_itself_unless_it_is_near() -> None:
    oracle = affine(1000)
    assert foretold(oracle, lambda size: {3: 800, 801: 1000}.get(size, 1000)).batch_size == 1000
    assert list(oracle.trials) == [1, 3, 801, 1000, 1001]
    near = affine(1000)
    assert foretold(near, lambda size: 960 if size == 3 else 1000).batch_size == 1000
    assert list(near.trials) == [1, 3, 961, 1001]


@pytest.mark.parametrize("limit", [40, 370, 1400])
def test_a_size_taken_on_trust_that_does_not_fit_is_searched_below(limit: int) -> None:
    """As if it had been tried: not stepped down from, which would give up sizes that fit."""
    oracle = affine(limit)
    confirm = Confirms(oracle.fits)
    answer = foretold(oracle, lambda size: round(1.05 * limit) if size < limit // 3 else limit, confirm)
    assert (answer.batch_size, answer.proof, answer.notes) == (limit, "next_size_failed", ())
    assert (confirm.refused, confirm.kept) == ([round(1.05 * limit)], [limit])
    assert limit in oracle.trials  # one wrong forecast is enough: below it everything is tried
    assert len(oracle.trials) <= 6
    assert oracle.failures <= 2


def test_trust_is_given_once() -> None:
    """A forecast from near was wrong, and so are those after it: each is tried, and one confirmation was lost."""
    oracle, confirm = affine(990), Confirms(lambda size: size <= 990)
    wrong = {3: 960}
    answer = foretold(oracle, lambda size: wrong.get(size, 998 if confirm.refused else 1000), confirm)
    assert answer.batch_size == 990
    assert (confirm.refused, confirm.kept) == ([1000], [990])


def test_a_size_taken_on_trust_that_fits_by_itself_alone_is_stepped_down_from() -> None:
    oracle = affine(300)
    answer = foretold(oracle, lambda size: 300, Confirms(oracle.fits, keeps=lambda size: size < 295))
    assert (answer.batch_size, answer.smallest_failure) == (294, 295)
    assert list(oracle.trials) == [1, 3, 301]
    assert answer.notes[0] == "A batch of 300 did not keep fitting (oom)."


def test_what_fits_beyond_a_forecast_and_is_refused_is_stepped_down_to_the_forecast() -> None:
    """It was right about what keeps fitting; a thirty-third less would give up more."""
    oracle, told = affine(303), Confirms(lambda size: True, keeps=lambda size: size <= 300)
    answer = foretold(oracle, lambda size: 300 if size < 300 else 303, told)
    assert answer.batch_size == 300
    assert (list(oracle.trials), told.refused, told.kept) == ([1, 3, 301, 304], [303], [300])


def test_where_the_time_is_up_when_a_trusted_size_is_refused_it_is_stepped_down_from() -> None:
    """Below it only the small sizes have been tried."""
    oracle = affine(97)
    confirm = Confirms(oracle.fits)

    def clock() -> float:
        return 10.0 if confirm.refused else 0.0

    answer = foretold(oracle, lambda size: 100, confirm, time_limit_s=5, clock=clock)
    assert list(oracle.trials) == [1, 3, 101]
    assert answer.batch_size == 96


def test_where_another_limit_is_just_above_what_is_foretold_it_is_tried() -> None:
    """Such as the end of a command's data, which memory knows nothing of."""
    oracle = Oracle(lambda n: n <= 60, lambda n: (10**9 * n, 10**9 * n), failure=Outcome.LIMIT)
    confirm = Confirms(oracle.fits)
    answer = foretold(oracle, lambda size: 100 if size < 50 else 60, confirm)
    assert (answer.batch_size, answer.smallest_failure) == (60, 61)
    assert list(oracle.trials)[:4] == [1, 3, 101, 100]
    assert confirm.refused == []


def test_a_guess_that_agrees_stands_for_the_forecast() -> None:
    """What is asked is just above it; if that fits, the next forecast is from near."""
    right, low = affine(295), affine(300)
    assert foretold(right, lambda size: 300, first_guess=295).batch_size == 295
    assert list(right.trials) == [2, 5, 296]
    assert foretold(low, lambda size: 300, first_guess=295).batch_size == 300
    assert list(low.trials) == [2, 5, 296, 301]


@pytest.mark.parametrize("told", [Forecast(20, 100), Forecast(20, 20)])
def test_a_failure_that_ran_and_tells_nothing_surely_leaves_the_forecast(told: Forecast) -> None:
    oracle = Oracle(lambda n: n <= 100, lambda n: (10**9 * n, 10**9 * n), failure=Outcome.THRASHED)
    answer = foretold(oracle, lambda size: told if 101 in oracle.trials else 100)
    assert answer.batch_size == 100
    assert list(oracle.trials) == [1, 3, 101]


def test_of_several_forecasts_one_is_stepped_down_to() -> None:
    """To ask for each in turn would be dear."""
    oracle, told = affine(1003), {3: 990, 991: 996, 997: 1003}
    confirm = Confirms(lambda size: True, keeps=lambda size: size <= 960)
    answer = foretold(oracle, lambda size: told[size], confirm)
    assert list(oracle.trials) == [1, 3, 991, 997, 1004]
    assert confirm.refused[:3] == [1003, 996, 965]  # and not 990
    assert 950 <= answer.batch_size <= 960


def test_where_a_trusted_size_and_all_below_are_refused_nothing_fits() -> None:
    with pytest.raises(DoesNotFitError, match="Not even a batch of 1 fits"):
        foretold(affine(100), lambda size: 100, Confirms(lambda size: False))


@pytest.mark.parametrize("limit", [1, 2])
def test_where_there_is_room_for_one_or_two_it_costs_nothing_more(limit: int) -> None:
    oracle = up_to(limit)
    assert foretold(oracle, lambda size: limit).batch_size == limit
    assert len(oracle.trials) <= 3


@pytest.mark.parametrize("off", [0.9, 0.97, 1, 1.03, 1.1])
@pytest.mark.parametrize("limit", [10, 40, 370, 1901])
def test_a_guess_that_is_off_costs_nothing_where_trials_tell_better(off: float, limit: int) -> None:
    oracle = affine(limit)
    answer = foretold(oracle, lambda size: limit, first_guess=max(1, round(off * limit)))
    assert answer.batch_size == limit
    assert len(oracle.trials) <= 4
    assert oracle.failures == 1


def test_where_nothing_was_recorded_the_guess_is_asked_all_the_same() -> None:
    oracle = affine(100)
    foresight = Foretells(oracle, lambda size: 5, recorded=lambda size: False)
    options: dict[str, Any] = {"multiple_of": 1, "capacity_bytes": CAPACITY, "first_guess": 100}
    answer = search(oracle, Confirms(oracle.fits), foresight=foresight, **options)
    assert answer.batch_size == 100
    assert list(oracle.trials)[1] == 100
    assert len(oracle.trials) <= 4


@pytest.mark.parametrize("limit", [40, 370, 1901])
def test_one_that_knows_too_little_from_afar_is_looked_at_from_nearer(limit: int) -> None:
    def say(size: int) -> Forecast:
        is_near = 8 * size >= limit
        told = limit if is_near else round(1.2 * limit)
        return Forecast(told, told, is_from_afar=not is_near)

    oracle = affine(limit)
    assert foretold(oracle, say).batch_size == limit
    assert list(oracle.trials)[2] == round(1.2 * limit) // 4
    assert len(oracle.trials) <= 5
    assert oracle.failures == 1


@pytest.mark.parametrize("off", [0.95, 0.99, 1.01, 1.05])
@pytest.mark.parametrize("limit", [40, 370, 1901])
def test_a_forecast_from_afar_is_made_again_from_near(off: float, limit: int) -> None:
    """It is wrong where kernels change, and right next to a size that was run."""
    oracle = affine(limit)
    answer = foretold(oracle, lambda size: limit if size > 0.4 * limit else round(off * limit))
    assert answer.batch_size == limit
    assert len(oracle.trials) <= 6
    assert oracle.failures <= 2


def test_an_unsure_forecast_is_not_asked() -> None:
    """Its lower end is as unsure; sizes side by side tell more."""
    oracle = affine(300)
    answer = foretold(oracle, lambda size: 300 if size > 3 else Forecast(90, 400))
    assert answer.batch_size == 300
    assert list(oracle.trials) == [1, 3, 4, 301]


def test_a_guess_within_an_unsure_forecast_is_asked() -> None:
    oracle = affine(300)
    answer = foretold(oracle, lambda size: 300 if size > 200 else Forecast(90, 400), first_guess=298)
    assert answer.batch_size == 300
    assert list(oracle.trials) == [2, 5, 298, 301]


def test_of_a_sure_forecast_and_a_guess_a_little_below_the_lower_is_asked() -> None:
    """From afar a forecast can be a hundredth too high, and another search's answer is exact."""
    oracle = affine(300)
    answer = foretold(oracle, lambda size: 300 if size > 200 else 304, first_guess=300)
    assert answer.batch_size == 300
    assert list(oracle.trials) == [2, 5, 301]


def test_a_forecast_above_a_cap_asks_the_cap() -> None:
    oracle = affine(300)
    answer = foretold(oracle, lambda size: 300, max_batch_size=100)
    assert (answer.batch_size, answer.proof) == (100, "max_batch_size")
    assert list(oracle.trials) == [1, 3, 100]


def test_what_is_foretold_is_rounded_down() -> None:
    oracle = affine(1400)
    answer = foretold(oracle, lambda size: 1400, multiple_of="auto")
    assert (answer.batch_size, answer.smallest_failure) == (1392, 1408)
    assert list(oracle.trials) == [1, 3, 1408]


@settings(max_examples=400, deadline=None)
@given(
    oracle=odd_oracles(),
    seed=st.integers(0, 10**9),
    lies=st.sampled_from(["far above", "above", "below", "far below", "anything", "unsure", "now and then"]),
    rounding=st.one_of(st.sampled_from(["auto", "pow2"]), st.integers(1, 48)),
    guess=st.one_of(st.none(), st.integers(1, 10_000)),
)
def test_whatever_is_foretold_the_answer_is_the_limit_and_trials_are_bounded(
    oracle: Oracle, seed: int, lies: str, rounding: int | str, guess: int | None
) -> None:
    sizes, chance = Rounding(rounding), random.Random(seed)
    limit = next(n for n in range(5000, -1, -1) if n == 0 or oracle.fits(n))
    best = sizes.rank(limit)
    if not best:
        return

    def say(size: int) -> Forecast | None:
        least = {
            "far above": size * 1000,
            "above": round(limit * chance.uniform(1, 1.3)) + 1,
            "below": max(size, round(limit * chance.uniform(0.7, 1))),
            "far below": size,
            "anything": size + chance.randrange(1 + 2 * limit),
            "unsure": size,
            "now and then": limit,
        }[lies]
        if lies == "now and then" and chance.random() < 0.5:
            return None
        return Forecast(least, least * 2 if lies == "unsure" else least)

    answer = foretold(oracle, say, multiple_of=rounding, first_guess=guess)
    assert (answer.batch_size, answer.smallest_failure) == (sizes.size(best), sizes.size(best + 1))
    if guess is None and isinstance(rounding, int):
        assert len(oracle.trials) <= plain_cost(best) + 2


@settings(max_examples=300, deadline=None)
@given(
    answers=st.lists(st.booleans(), min_size=1, max_size=40),
    said=st.lists(st.integers(1, 10**6), min_size=1, max_size=40),
    recorded=st.lists(st.booleans(), min_size=1, max_size=40),
    cap=st.one_of(st.none(), st.integers(48, 10_000)),
    avoid_oom=st.booleans(),
)
def test_lies_upon_lies_end_with_a_size_that_was_run(
    answers: list[bool], said: list[int], recorded: list[bool], cap: int | None, avoid_oom: bool
) -> None:
    fits, foretells, kept = itertools.cycle(answers), itertools.cycle(said), itertools.cycle(recorded)
    oracle = Oracle(lambda n: n == 1 or (n < 10**6 and next(fits)), lambda n: (10**6 * n, 10**6 * n))
    foresight, confirm = (
        Foretells(oracle, lambda size: next(foretells), lambda size: next(kept)),
        Confirms(lambda n: n == 1 or (n < 10**6 and next(fits))),
    )
    answer = search(
        oracle, confirm, foresight=foresight, max_batch_size=cap, avoid_oom=avoid_oom, capacity_bytes=CAPACITY
    )
    assert answer.batch_size in confirm.kept
    assert cap is None or max(oracle.trials) <= cap


@pytest.mark.parametrize("off", [1.3, 3, 1000])
@pytest.mark.parametrize("limit", [40, 5000])
def test_avoid_oom_believes_no_forecast_that_has_failed(off: float, limit: int) -> None:
    """One failure, and the peaks decide as where nothing is foretold."""
    oracle = affine(limit, base=0.1)
    answer = foretold(oracle, lambda size: int(off * limit), avoid_oom=True)
    assert oracle.failures <= 1
    assert answer.batch_size >= 0.8 * limit
    assert len(oracle.trials) <= 16


def test_a_guess_where_not_even_a_small_size_fits_asks_for_no_batch_of_none() -> None:
    oracle = up_to(0)
    with pytest.raises(DoesNotFitError):
        foretold(oracle, lambda size: 5, first_guess=1)
    assert list(oracle.trials) == [1]


def test_what_ran_and_did_not_fit_is_taken_into_the_next_forecast() -> None:
    """Between two sizes that ran the end is told better than beyond them."""
    oracle = Oracle(lambda n: n <= 95, lambda n: (10**9 * n, 10**9 * n), failure=Outcome.THRASHED)
    answer = foretold(oracle, lambda size: 95 if 101 in oracle.trials else 100)
    assert answer.batch_size == 95
    assert list(oracle.trials) == [1, 3, 101, 96]


@settings(deadline=None)
@given(limit=st.integers(1, 5000), off=st.floats(0.97, 1.01))
def test_avoid_oom_stays_a_little_below_what_is_foretold(limit: int, off: float) -> None:
    """Without a failure, even if it is foretold a hundredth too high, and near enough if it is right."""
    oracle = affine(limit, base=0.1)
    answer = foretold(oracle, lambda size: max(size, int(off * limit)), avoid_oom=True)
    assert oracle.failures == 0
    assert answer.proof == "memory_model"
    assert answer.batch_size >= 0.94 * limit - 1
    assert len(oracle.trials) <= 6

"""The search alone: what it answers, how many sizes it asks, and that it always ends."""

from __future__ import annotations

import itertools
import math
import pickle
import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.errors import DoesNotFitError, InvalidArgumentError
from autobatch.probe.search import SearchAnswer, search
from autobatch.probe.search.arguments import check_arguments
from autobatch.probe.search.rounding import Rounding
from autobatch.result import PROOFS, Measurement, Outcome, Trial

CAPACITY = 10**12
MIB = 2**20


class Oracle:
    """Answers from a predicate and, if given, peaks in bytes (allocated, reserved); refuses to be asked twice."""

    def __init__(
        self,
        fits: Callable[[int], bool],
        peaks: Callable[[int], tuple[float, float]] | None = None,
        failure: Outcome = Outcome.OOM,
    ) -> None:
        self.fits, self.peaks, self.failure = fits, peaks, failure
        self.trials: dict[int, Trial] = {}

    def __call__(self, size: int) -> Trial:
        assert type(size) is int
        assert size >= 1
        assert size not in self.trials, f"{size} was asked twice"
        fits, measured = self.fits(size), None
        if self.peaks is not None and (fits or self.failure is not Outcome.OOM):
            allocated, reserved = map(int, self.peaks(size))
            measured = Measurement(peak_allocated_bytes=allocated, peak_reserved_bytes=reserved)
        outcome = Outcome.FITS if fits else self.failure
        self.trials[size] = Trial(batch_size=size, outcome=outcome, measurement=measured)
        return self.trials[size]

    @property
    def failures(self) -> int:
        return sum(not trial.fits for trial in self.trials.values())


def confirmed(size: int) -> Trial:
    return Trial(batch_size=size, outcome=Outcome.FITS)


def up_to(limit: int) -> Oracle:
    return Oracle(lambda n: n <= limit)


def affine(limit: int, base: float = 0.2, noise: float = 0.0, seed: int = 0) -> Oracle:
    """Peaks of a fixed part and one that grows with the size, known to within ``noise``; the limit is exact."""
    rng = random.Random(seed)
    slope = (1 - base) * CAPACITY / (limit + rng.random())

    def peaks(size: int) -> tuple[float, float]:
        peak = base * CAPACITY + slope * size * (1 + noise * rng.uniform(-1, 1))
        return peak, peak

    return Oracle(lambda n: n <= limit, peaks)


def plain_cost(limit: int) -> int:
    """Trials that doubling from 1 and bisection need."""
    return 2 * math.floor(math.log2(limit)) + 2


# What it answers


@pytest.mark.parametrize("limit", [*range(1, 70), 100, 127, 128, 1000, 4095, 4096, 99_999])
def test_without_peaks_it_is_plain_growth_and_bisection(limit: int) -> None:
    oracle = up_to(limit)
    answer = search(oracle, confirmed, multiple_of=1, capacity_bytes=CAPACITY)
    assert answer == SearchAnswer(batch_size=limit, proof="next_size_failed", smallest_failure=limit + 1, notes=())
    assert len(oracle.trials) <= plain_cost(limit)


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 100, 1000])
@pytest.mark.parametrize("start", [1, 2, 16, 64, 5000])
def test_any_start_finds_the_same(limit: int, start: int) -> None:
    oracle = up_to(limit)
    assert search(oracle, confirmed, multiple_of=1, start=start).batch_size == limit
    assert next(iter(oracle.trials)) == start


def test_nothing_fits_is_an_error_that_carries_the_trial() -> None:
    oracle = up_to(0)
    with pytest.raises(DoesNotFitError) as caught:
        search(oracle, confirmed, start=16)
    assert caught.value.trial is oracle.trials[1]
    assert pickle.loads(pickle.dumps(caught.value)).trial == oracle.trials[1]


def test_the_smallest_permitted_size_is_the_multiple() -> None:
    oracle = up_to(7)
    with pytest.raises(DoesNotFitError, match="batch of 8"):
        search(oracle, confirmed, multiple_of=8)
    assert list(oracle.trials) == [8]


@pytest.mark.parametrize("cap", [1, 3, 64, 100])
def test_a_cap_is_never_overshot_and_is_the_proof(cap: int) -> None:
    oracle = up_to(10**6)
    answer = search(oracle, confirmed, max_batch_size=cap, start=7)
    assert (answer.batch_size, answer.proof, answer.smallest_failure) == (cap, "max_batch_size", None)
    assert max(oracle.trials) == cap


@pytest.mark.parametrize(("rounding", "answer"), [("auto", 100), (8, 96), ("pow2", 64)])
def test_a_cap_is_rounded_to_a_size_that_was_run(rounding: int | str, answer: int) -> None:
    """A finder that caps after searching returns sizes it never tried."""
    oracle = up_to(10**6)
    assert search(oracle, confirmed, multiple_of=rounding, max_batch_size=100).batch_size == answer
    assert oracle.trials[answer].fits


def test_a_cap_that_does_not_fit_is_no_answer() -> None:
    answer = search(up_to(70), confirmed, max_batch_size=100)
    assert (answer.batch_size, answer.proof, answer.smallest_failure) == (70, "next_size_failed", 71)


def test_exceptions_of_the_workload_fly_unchanged() -> None:
    """A finder that counts any exception as too big reports a shape bug above 50 as "50 fits"."""
    error = KeyError("position_ids")

    def ask(size: int) -> Trial:
        if size > 50:
            raise error
        return confirmed(size)

    with pytest.raises(KeyError) as caught:
        search(ask, confirmed)
    assert caught.value is error


def test_a_limit_other_than_memory_caps_the_search_and_is_said() -> None:
    oracle = Oracle(lambda n: n <= 65, affine(10_000).peaks, failure=Outcome.LIMIT)
    answer = search(oracle, confirmed, multiple_of=1, capacity_bytes=CAPACITY)
    assert (answer.batch_size, answer.proof, answer.smallest_failure) == (65, "next_size_failed", 66)
    assert "66 met a limit other than memory" in answer.notes[-1]
    assert len(oracle.trials) <= plain_cost(65) + 2


@pytest.mark.parametrize("outcome", [Outcome.OVER_HEADROOM, Outcome.THRASHED])
def test_what_runs_and_does_not_fit_is_a_failure(outcome: Outcome) -> None:
    oracle = Oracle(lambda n: n <= 90, affine(100).peaks, failure=outcome)
    assert search(oracle, confirmed, multiple_of=1, capacity_bytes=CAPACITY).batch_size == 90


# Confirmation


def test_peaks_that_hide_their_slope_at_small_sizes_cost_few_trials() -> None:
    """A multilayer perceptron on host memory under 128 MiB, as measured: flat at first, so that the first aim is at
    four thousand; and resident memory, which no limit bounds, above the private data that it does bound."""

    def peaks(size: int) -> tuple[float, float]:
        private = max(29, 20 + 0.243 * size)
        return 2**20 * (private + 23), 2**20 * private

    oracle = Oracle(lambda n: n <= 444, peaks)
    assert search(oracle, confirmed, multiple_of=1, capacity_bytes=128 * 2**20).batch_size == 444
    assert len(oracle.trials) <= 10
    assert sum(oracle.trials) <= 10 * 444


class Confirm:
    def __init__(self, keeps_fitting: Callable[[int], bool]) -> None:
        self.keeps_fitting, self.asked, self.confirmed = keeps_fitting, list[int](), set[int]()

    def __call__(self, size: int) -> Trial:
        self.asked.append(size)
        if not self.keeps_fitting(size):
            return Trial(batch_size=size, outcome=Outcome.OOM, message="in the second step")
        self.confirmed.add(size)
        return Trial(batch_size=size, outcome=Outcome.FITS)


def test_an_answer_that_does_not_keep_fitting_is_stepped_down_to_one_that_is_confirmed() -> None:
    oracle, confirm = up_to(66), Confirm(lambda n: n <= 59)
    answer = search(oracle, confirm, multiple_of=1)
    assert (answer.batch_size, answer.proof, answer.smallest_failure) == (59, "next_size_failed", 60)
    assert answer.batch_size == confirm.asked[-1]
    assert answer.notes[0] == "A batch of 66 fitted once but did not keep fitting (oom: in the second step)."
    assert len(confirm.asked) <= 6
    # A size stepped down to costs no trial besides its confirmation, which runs it too.
    search(undisturbed := up_to(66), confirmed, multiple_of=1)
    assert list(oracle.trials) == list(undisturbed.trials)


@given(limit=st.integers(1, 3000), lost=st.floats(0, 0.3))
def test_stepping_down_loses_little(limit: int, lost: float) -> None:
    solid = max(1, round(limit * (1 - lost)))
    answer = search(up_to(limit), Confirm(lambda n: n <= solid), multiple_of=1)
    assert 0.98 * solid - 5 < answer.batch_size <= solid


@given(limit=st.integers(1, 100_000), lost=st.floats(0, 0.99))
def test_however_far_down_it_is_few_confirmations_lead_there(limit: int, lost: float) -> None:
    """On host memory under 12 MiB an evaluation fitted at 37 and kept fitting at 20: it took 16, one size at a time."""
    solid = max(1, round(limit * (1 - lost)))
    confirm = Confirm(lambda n: n <= solid)
    answer = search(up_to(limit), confirm, multiple_of=1)
    assert len(confirm.asked) <= 20
    assert 0.97 * solid - 1 < answer.batch_size <= solid


def test_what_a_step_down_gave_up_is_halved_until_it_is_little() -> None:
    confirm = Confirm(lambda n: n <= 990)
    answer = search(up_to(1000), confirm, multiple_of=1)
    assert (confirm.asked, answer.batch_size) == ([1000, 969, 984, 992, 988], 988)
    refused = Confirm(lambda n: n <= 980)
    answer = search(up_to(1000), refused, multiple_of=1)
    assert (refused.asked, answer.batch_size, answer.smallest_failure) == ([1000, 969, 984, 976, 980], 980, 984)
    assert "984 did not keep fitting either" in answer.notes[-1]


@given(solid=st.integers(260, 400) | st.integers(401, 100_000), lost=st.floats(0, 0.03))
def test_a_step_down_gives_up_less_than_two_per_cent(solid: int, lost: float) -> None:
    first = int(solid * (1 + lost))
    answer = search(up_to(first), Confirm(lambda n: n <= solid), multiple_of=1)
    assert 0.98 * solid <= answer.batch_size <= solid


@pytest.mark.parametrize("options", [{"avoid_oom": True, "capacity_bytes": CAPACITY}, {"multiple_of": 8}])
def test_nothing_more_is_asked_for_where_it_may_fail_or_gains_little(options: dict[str, Any]) -> None:
    refused: list[int] = []

    def first_is_refused(n: int) -> bool:
        refused.append(n)
        return len(refused) > 1

    confirm = Confirm(first_is_refused)
    answer = search(affine(1000), confirm, **options)
    assert len(confirm.asked) == 2  # the refusal, and the size stepped down to; nothing between is asked for
    assert confirm.asked[-1] == answer.batch_size


def test_confirmation_that_always_fails_ends_in_an_error_and_asks_no_candidate_twice() -> None:
    confirm = Confirm(lambda n: False)
    with pytest.raises(DoesNotFitError, match="in the second step") as caught:
        search(up_to(1000), confirm)
    assert caught.value.trial is not None
    assert caught.value.trial.batch_size == 1
    assert len(confirm.asked) == len(set(confirm.asked))


def test_a_jagged_edge_ends_with_what_kept_fitting() -> None:
    """GPT-2 on 16 GB: 8 and 10 survive, 9 fails in a fresh process."""
    answer = search(up_to(10), Confirm(lambda n: n == 8 or n < 7), multiple_of=1)
    assert (answer.batch_size, answer.smallest_failure) == (8, 9)


# Guesses, time, and no failure at all


@pytest.mark.parametrize("guess", [99, 100, 101])
def test_a_good_first_guess_needs_three_trials(guess: int) -> None:
    oracle = affine(100)
    answer = search(oracle, confirmed, multiple_of=1, capacity_bytes=CAPACITY, first_guess=guess)
    assert answer.batch_size == 100
    assert len(oracle.trials) <= 3


@pytest.mark.parametrize(("off", "failures"), [(0.9, 1), (0.97, 1), (1, 1), (1.03, 2), (1.1, 4)])
@pytest.mark.parametrize("limit", [10, 100, 1000, 10_000])
def test_a_guess_that_is_a_little_off_costs_little(limit: int, off: float, failures: int) -> None:
    oracle = affine(limit, base=0.05)
    answer = search(oracle, confirmed, capacity_bytes=CAPACITY, first_guess=round(off * limit))
    assert answer.batch_size == Rounding("auto").down(limit)
    assert len(oracle.trials) <= 3 + failures
    assert oracle.failures <= failures


@pytest.mark.parametrize("peaks", [True, False])
@given(limit=st.integers(1, 5000), guess=st.integers(1, 5000))
def test_a_bad_first_guess_costs_trials_only(peaks: bool, limit: int, guess: int) -> None:
    oracle = affine(limit) if peaks else up_to(limit)
    assert search(oracle, confirmed, multiple_of=1, capacity_bytes=CAPACITY, first_guess=guess).batch_size == limit
    assert len(oracle.trials) <= 2 * plain_cost(max(limit, guess))


def test_after_the_time_limit_the_largest_that_fitted_is_confirmed() -> None:
    now = itertools.count()
    oracle, confirm = up_to(1000), Confirm(lambda n: True)
    answer = search(oracle, confirm, time_limit_s=5, clock=lambda: next(now))
    assert answer.proof == "time_limit"
    assert answer.batch_size == max(oracle.trials) == confirm.asked[0]
    assert len(oracle.trials) <= 5


def test_the_time_limit_leaves_time_for_one_size_that_fits() -> None:
    now = itertools.count(step=10)
    answer = search(up_to(3), confirmed, start=8, time_limit_s=5, clock=lambda: next(now))
    assert (answer.batch_size, answer.proof, answer.smallest_failure) == (1, "time_limit", 8)


@given(limit=st.integers(1, 5000), base=st.floats(0, 0.45))
def test_avoid_oom_provokes_none(limit: int, base: float) -> None:
    oracle = affine(limit, base)
    answer = search(oracle, confirmed, multiple_of=1, capacity_bytes=CAPACITY, avoid_oom=True)
    assert oracle.failures == 0
    assert answer.proof == "memory_model"
    assert answer.batch_size >= 0.9 * limit - 2 or limit < 20


@given(limit=st.integers(1, 5000), base=st.floats(0, 0.95), short=st.floats(0.5, 1), expected=st.floats(0.5, 1))
def test_avoid_oom_asks_for_nothing_above_its_ceiling(limit: int, base: float, short: float, expected: float) -> None:
    oracle, ceiling = affine(limit, base), max(1, int(expected * limit))
    guess = max(1, int(short * ceiling))
    options: dict[str, Any] = {"first_guess": guess, "ceiling": ceiling, "avoid_oom": True}
    answer = search(oracle, confirmed, multiple_of=1, capacity_bytes=CAPACITY, **options)
    assert oracle.failures == 0
    assert guess <= answer.batch_size <= max(oracle.trials) <= ceiling


def test_avoid_oom_without_peaks_stays_where_it_began() -> None:
    answer = search(up_to(100), confirmed, start=4, avoid_oom=True, capacity_bytes=CAPACITY)
    assert (answer.batch_size, answer.proof) == (4, "memory_model")
    assert "measured no peaks" in answer.notes[-1]


def test_avoid_oom_stops_at_a_cap() -> None:
    answer = search(affine(1000), confirmed, avoid_oom=True, capacity_bytes=CAPACITY, max_batch_size=32)
    assert (answer.batch_size, answer.proof) == (32, "max_batch_size")


# How many sizes it asks


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("noise", [0, 0.001, 0.01, 0.02, 0.05])
@pytest.mark.parametrize("limit", [1, 2, 5, 8, 21, 64, 100, 333, 1000, 5000])
def test_affine_peaks_need_few_trials(limit: int, noise: float, multiple: int) -> None:
    if limit < multiple:
        pytest.skip("nothing to find")
    oracles = [affine(limit, base, noise, seed) for base in (0.0, 0.1, 0.3, 0.5) for seed in range(8)]
    for oracle in oracles:
        answer = search(oracle, confirmed, multiple_of=multiple, capacity_bytes=CAPACITY)
        assert answer.batch_size == limit // multiple * multiple
        assert len(oracle.trials) <= plain_cost(limit // multiple) + 2
    last = math.ceil(math.log2(2 * noise * limit / multiple + 1))
    allowed = 4 + math.ceil(round(math.log(limit, 8), 6)) + last
    assert statistics.median(len(oracle.trials) for oracle in oracles) <= allowed
    assert statistics.median(oracle.failures for oracle in oracles) <= last / 2 + 2


roundings = st.one_of(st.sampled_from(["auto", "pow2"]), st.integers(1, 48))


@st.composite
def odd_oracles(draw: st.DrawFn) -> Oracle:
    """Limits with peaks that are rounded, jump, fall, are noise or lie; or none at all."""
    limit = draw(st.integers(0, 5000))
    base, slope = draw(st.floats(0, 0.95)) * CAPACITY, CAPACITY / max(1, limit)
    step = draw(st.sampled_from([1, 2 * MIB, 20 * MIB, CAPACITY // 50, CAPACITY // 7]))
    jump, kind = draw(st.integers(1, 5000)), draw(st.sampled_from(["affine", "jump", "noise", "flat", "high", "none"]))
    rng = random.Random(draw(st.integers(0, 99)))

    def peaks(size: int) -> tuple[float, float]:
        peak = {
            "affine": base + (1 - base / CAPACITY) * slope * size,
            "jump": slope * size * (0.5 if size < jump else 1),
            "noise": CAPACITY * rng.random(),
            "flat": base,
            "high": CAPACITY * (2 + 1 / size),
        }[kind]
        return max(1, peak * 0.9), max(1, math.ceil(peak / step) * step)

    return Oracle(lambda n: n <= limit, None if kind == "none" else peaks)


@settings(max_examples=400)
@given(oracle=odd_oracles(), rounding=roundings, start=st.integers(1, 300), growth=st.sampled_from([1.3, 2.0, 4.0]))
def test_whatever_the_peaks_say_the_answer_is_the_limit(
    oracle: Oracle, rounding: int | str, start: int, growth: float
) -> None:
    sizes = Rounding(rounding)
    limit = next(n for n in range(5000, -1, -1) if n == 0 or oracle.fits(n))
    options: dict[str, Any] = {"multiple_of": rounding, "start": start, "growth": growth, "capacity_bytes": CAPACITY}
    if not sizes.rank(limit):
        with pytest.raises(DoesNotFitError):
            search(oracle, confirmed, **options)
        return
    answer = search(oracle, confirmed, **options)
    best = sizes.rank(limit)
    assert (answer.batch_size, answer.smallest_failure) == (sizes.size(best), sizes.size(best + 1))
    assert all(sizes.down(size) == size for size in oracle.trials)
    if start == 1 and growth == 2.0 and isinstance(rounding, int):
        assert len(oracle.trials) <= plain_cost(best) + 2


@settings(max_examples=400)
@given(
    answers=st.lists(st.booleans(), min_size=1, max_size=40),
    peaks=st.lists(st.integers(0, 2 * CAPACITY), min_size=1, max_size=40),
    confirmations=st.lists(st.booleans(), min_size=1, max_size=20),
    cap=st.one_of(st.none(), st.integers(48, 10_000)),
    rounding=roundings,
    start=st.integers(1, 100),
    guess=st.one_of(st.none(), st.integers(1, 10_000)),
    avoid_oom=st.booleans(),
)
def test_a_flaky_or_lying_oracle_ends_the_search_with_a_size_that_was_run(
    answers: list[bool],
    peaks: list[int],
    confirmations: list[bool],
    cap: int | None,
    rounding: int | str,
    start: int,
    guess: int | None,
    avoid_oom: bool,
) -> None:
    said, measured, kept = itertools.cycle(answers), itertools.cycle(peaks), itertools.cycle(confirmations)
    oracle = Oracle(lambda n: n < 10**6 and next(said), lambda n: (next(measured), next(measured)))
    confirm = Confirm(lambda n: next(kept))
    options: dict[str, Any] = {"max_batch_size": cap, "multiple_of": rounding, "first_guess": guess}
    try:
        answer = search(oracle, confirm, start=start, avoid_oom=avoid_oom, capacity_bytes=CAPACITY, **options)
    except DoesNotFitError as error:
        refused = error.trial
        answer = None
    if answer is None:
        assert refused is not None
        assert refused.batch_size == Rounding(rounding).size(1)
        return
    # What is confirmed has been run, and longer than a trial runs it; the first candidate has had its trial as well.
    assert answer.batch_size in confirm.confirmed
    assert oracle.trials[confirm.asked[0]].fits
    assert answer.proof in PROOFS
    assert cap is None or max(oracle.trials) <= cap
    assert answer.smallest_failure is None or answer.smallest_failure > answer.batch_size
    assert Rounding(rounding).down(answer.batch_size) == answer.batch_size


# Rounding and arguments


@given(rounding=roundings, size=st.integers(0, 10**7))
def test_ranks_count_the_permitted_sizes(rounding: int | str, size: int) -> None:
    sizes = Rounding(rounding)
    rank = sizes.rank(size)
    assert sizes.down(size) <= size < sizes.size(rank + 1)
    assert rank == 0 or (sizes.size(rank) == sizes.down(size) and sizes.rank(sizes.size(rank)) == rank)


def test_auto_rounding_gives_up_little_and_keeps_small_sizes() -> None:
    sizes = Rounding()
    assert [sizes.down(n) for n in (1, 127, 129, 255, 257, 511, 513, 1023, 1030)] == [
        *(1, 127, 128, 254, 256, 508, 512, 1016, 1024)
    ]
    assert all(sizes.down(n) >= n * (1 - 1 / 64) for n in range(1, 5000))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("start", value) for value in (0, -1, 1.5, "1", True, None)),
        *(("max_batch_size", value) for value in (0, -8, 2.0, "all", True)),
        *(("multiple_of", value) for value in (0, -8, 2.0, "pow3", True, None)),
        *(("growth", value) for value in (1, 1.0, 0.5, math.inf, math.nan, "2", True)),
        *(("capacity_bytes", value) for value in (0, -1, 1.5)),
        *(("first_guess", value) for value in (0, 2.5)),
        *(("ceiling", value) for value in (0, 2.5)),
        *(("avoid_oom", value) for value in (None, 1, "yes")),
        *(("time_limit_s", value) for value in (0, -1, math.nan, "1h", True)),
    ],
)
def test_bad_arguments_are_refused_by_name_before_anything_is_asked(argument: str, value: object) -> None:
    oracle = up_to(10)
    with pytest.raises(InvalidArgumentError) as caught:
        search(oracle, confirmed, **{argument: value})  # type: ignore[arg-type]
    assert (caught.value.argument, caught.value.value) == (argument, value) or value != value
    assert not oracle.trials


def test_a_cap_below_the_multiple_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="max_batch_size=4: must be at least multiple_of, 8"):
        check_arguments(multiple_of=8, max_batch_size=4)

"""What every Device keeps, whatever memory it stands for."""

from __future__ import annotations

import gc

import psutil
import pytest

from autobatch.device.base import Device
from autobatch.device.oom import is_oom
from autobatch.units import MIB
from tests.conformance import conformance_places as places

SMALL, LARGE = 64 * MIB, 512 * MIB


@pytest.fixture(
    params=[
        "fake",
        "host",
        "host_with_holes",
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("accelerator", marks=pytest.mark.gpu),
    ]
)
def place(request: pytest.FixtureRequest) -> places.Place:
    place: places.Place = getattr(places, request.param)()
    place.device.begin()
    place.device.release()
    place.device.reset_peaks()
    return place


def run_out(place: places.Place, size_bytes: int) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        place.use(size_bytes)
    assert is_oom(caught.value), caught.value


def test_is_a_device(place: places.Place) -> None:
    assert isinstance(place.device, Device)


def test_tells_who_it_is(place: places.Place) -> None:
    info = place.device.info()
    assert info.name
    assert info.kind
    assert info.total_bytes is not None
    assert info.free_bytes is not None
    assert 0 < info.free_bytes <= info.total_bytes


def test_can_be_used_in_the_process_where_it_is(place: places.Place) -> None:
    isolation = place.device.isolation()
    assert not isolation.required
    assert isolation.reason
    assert isolation.device == place.device.torch_device


def test_peaks_grow_with_what_is_used(place: places.Place) -> None:
    peaks = []
    for size_bytes in (SMALL, LARGE):
        place.device.release()
        place.device.reset_peaks()
        place.use(size_bytes)
        place.device.synchronize()
        peaks.append(place.device.measure().peak_allocated_bytes)
    assert peaks[1] - peaks[0] == pytest.approx(LARGE - SMALL, rel=0.05)


def test_reset_forgets_the_peak(place: places.Place) -> None:
    place.use(LARGE)
    place.device.release()
    place.device.reset_peaks()
    place.use(SMALL)
    peak_bytes = place.device.measure().peak_allocated_bytes
    assert peak_bytes is not None
    assert peak_bytes < LARGE / 2


def test_reserved_peaks_hold_what_is_used_within_the_budget(place: places.Place) -> None:
    place.use(LARGE)
    reserved_bytes = place.device.measure().peak_reserved_bytes
    if reserved_bytes is None:
        assert not place.device.ends_by_itself  # the host's mark cannot be reset, and was higher before
        return
    assert LARGE <= reserved_bytes <= place.device.budget_bytes()


def test_restriction_is_real_and_ends(place: places.Place) -> None:
    before = place.limit()
    with place.device.restrict(LARGE) as restricted:
        assert restricted or place.device.info().kind == "cpu"  # a heap with holes lets more through, and says so
        assert place.limit() != before
        place.use(LARGE - SMALL)
        run_out(place, LARGE + SMALL)
        place.use(LARGE - SMALL)
    assert place.limit() == before
    place.use(LARGE + SMALL)


def test_restriction_holds_for_what_was_cached_before(place: places.Place) -> None:
    place.use(2 * LARGE)
    with place.device.restrict(LARGE):
        run_out(place, 2 * LARGE)


def test_restriction_ends_when_the_body_fails(place: places.Place) -> None:
    before = place.limit()
    with pytest.raises(KeyError), place.device.restrict(LARGE):
        raise KeyError("a bug of the workload")
    assert place.limit() == before
    with pytest.raises((RuntimeError, MemoryError)), place.device.restrict(LARGE):
        place.use(2 * LARGE)
    assert place.limit() == before
    place.use(2 * LARGE)


def test_a_wider_restriction_inside_a_narrow_one_widens_nothing(place: places.Place) -> None:
    with place.device.restrict(LARGE):
        outer = place.limit()
        with place.device.restrict(4 * LARGE):
            run_out(place, 2 * LARGE)
        assert place.limit() == outer
        run_out(place, 2 * LARGE)


def test_restricting_to_nothing_in_particular_changes_nothing(place: places.Place) -> None:
    before = place.limit()
    with place.device.restrict(None) as restricted:
        assert restricted
        assert place.limit() == before
        place.use(LARGE)
    assert place.limit() == before


def test_the_users_own_limit_is_kept_and_put_back(place: places.Place) -> None:
    with place.user_limit(LARGE):
        own = place.limit()
        for limit_bytes in (SMALL, 4 * LARGE, None):
            with place.device.restrict(limit_bytes):
                run_out(place, 2 * LARGE)
            assert place.limit() == own
        assert place.device.budget_bytes() <= LARGE + SMALL  # the host's own limit says what is left, not what is used


def test_a_limit_given_to_the_device_is_its_budget_and_in_force(place: places.Place) -> None:
    if place.limited is None:
        pytest.skip("a fake is as large as it was made")
    device = place.limited(LARGE)
    device.release()
    assert device.budget_bytes() == LARGE
    assert device.isolation().memory_limit_bytes == LARGE
    for limit_bytes in (None, 4 * LARGE):
        with device.restrict(limit_bytes):
            place.use(LARGE - SMALL)
            run_out(place, LARGE + SMALL)


def test_the_budget_counts_what_is_held_already(place: places.Place) -> None:
    if place.hold is None:
        pytest.skip("nothing can be held here")
    before = place.device.budget_bytes()
    with place.hold(LARGE):
        assert place.device.budget_bytes() == pytest.approx(before, abs=SMALL)


def test_held_bytes_come_back(place: places.Place) -> None:
    before = place.device.held_bytes()
    if place.hold is not None:
        with place.hold(LARGE):
            assert place.device.held_bytes() == before + LARGE
    place.use(SMALL)
    assert place.device.held_bytes() == before


def test_failures_leave_nothing_behind(place: places.Place) -> None:
    held, process = place.device.held_bytes(), psutil.Process()
    resident = []
    for _ in range(2):
        with place.device.restrict(SMALL):
            for _ in range(50):
                run_out(place, LARGE)
        gc.collect()
        place.device.release()
        resident.append(process.memory_info().rss)
    assert place.device.held_bytes() == held
    assert resident[1] <= resident[0] * 1.01


def test_retries_never_fall(place: places.Place) -> None:
    seen = [place.device.retries()]
    with place.device.restrict(LARGE):
        place.use(SMALL)
        seen.append(place.device.retries())
        run_out(place, 2 * LARGE)
        seen.append(place.device.retries())
    if seen[-1] is not None:
        assert seen == sorted(seen)


def test_release_and_synchronize_are_harmless_at_any_time(place: places.Place) -> None:
    for _ in range(3):
        place.device.release()
        place.device.synchronize()
    place.use(SMALL)


def test_streams_are_counted_or_unknown(place: places.Place) -> None:
    place.use(SMALL)
    streams = place.device.streams()
    assert streams is None or streams <= 1


def test_a_recording_tells_the_steps_or_nothing(place: places.Place) -> None:
    """And a failure amid it is the caller's."""
    with place.device.restrict(LARGE):
        with place.device.recording() as run:
            for _ in range(2):
                place.use(SMALL)
                if run is not None:
                    run.step_ended()
            trace = None if run is None else run.finish()
        with place.device.recording():
            run_out(place, 2 * LARGE)
    if trace is not None:
        assert len(trace.steps) == 2
        assert max(trace.sizes) >= SMALL

"""Recorded steps at sizes that were never run: the allocator's rules, how allocations grow, and where memory ends.

Whether the rules are torch's own, tests/gpu/test_replay.py says.
"""

from __future__ import annotations

import pickle
import random
from array import array
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.replay.allocator import CachingAllocator, OutOfMemory
from autobatch.replay.forecast import forecast, peak_reserved_bytes, replay
from autobatch.replay.malloc import Malloc
from autobatch.replay.scaling import scaling
from autobatch.replay.trace import ALLOCATES, Segment, Trace, trace_of
from autobatch.units import GIB, KIB, MIB

# The allocator


@pytest.mark.parametrize(
    ("asked", "reserved"),
    [(1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB)]
    + [(11 * MIB, 12 * MIB), (33 * MIB + 1, 34 * MIB)],
)
def test_a_segment_is_as_large_as_the_allocation_asks_for(asked: int, reserved: int) -> None:
    allocator = CachingAllocator(GIB)
    allocator.allocate(asked, stream=0)
    assert allocator.reserved_bytes == reserved


def test_what_is_left_of_a_block_is_given_out_again() -> None:
    allocator = CachingAllocator(GIB)
    for size in (6 * MIB, 6 * MIB, 6 * MIB):
        allocator.allocate(size, stream=0)
    assert allocator.reserved_bytes == 20 * MIB
    allocator.allocate(3 * MIB, stream=0)  # 2 MiB are left
    assert allocator.reserved_bytes == 40 * MIB


def test_a_large_block_keeps_a_rest_of_up_to_a_mebibyte() -> None:
    """A rest so small would be of no use to other large allocations, and none to small ones."""
    allocator = CachingAllocator(GIB)
    block = allocator.allocate(19 * MIB, stream=0)
    assert block.size == 20 * MIB
    assert allocator.allocate(20 * MIB - MIB - 512, stream=0).size == 20 * MIB - MIB - 512


def test_small_and_large_and_other_streams_share_nothing() -> None:
    allocator = CachingAllocator(GIB)
    allocator.release(allocator.allocate(512, stream=0))
    allocator.allocate(512, stream=1)
    allocator.allocate(2 * MIB, stream=0)
    assert allocator.reserved_bytes == 2 * MIB + 2 * MIB + 20 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    allocator = CachingAllocator(GIB)
    blocks = [allocator.allocate(size * MIB, stream=0) for size in (40, 30, 50)]
    for block in blocks:
        allocator.release(block)
    assert allocator.allocate(29 * MIB + 600 * KIB, stream=0) is blocks[1]


def test_blocks_side_by_side_become_one() -> None:
    allocator = CachingAllocator(20 * MIB)
    blocks = [allocator.allocate(5 * MIB, stream=0) for _ in range(4)]
    for k in (0, 2, 1, 3):
        allocator.release(blocks[k])
    assert allocator.allocate(20 * MIB, stream=0).size == 20 * MIB
    assert allocator.peak_reserved_bytes == 20 * MIB


def test_a_full_cache_is_given_back_before_memory_is_out() -> None:
    allocator = CachingAllocator(100 * MIB)
    allocator.release(allocator.allocate(60 * MIB, stream=0))
    allocator.allocate(70 * MIB, stream=0)
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes, allocator.retries) == (70 * MIB, 70 * MIB, 1)
    with pytest.raises(OutOfMemory):
        allocator.allocate(40 * MIB, stream=0)
    assert allocator.retries == 1


def test_a_segment_of_which_a_part_is_in_use_is_kept() -> None:
    allocator = CachingAllocator(40 * MIB)
    first, second = allocator.allocate(6 * MIB, stream=0), allocator.allocate(6 * MIB, stream=0)
    allocator.release(first)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    allocator.release(second)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_it_begins_with_the_segments_that_are_there() -> None:
    segment = Segment(address=4096, is_small=False, stream=0, blocks=((6 * MIB, True), (14 * MIB, False)))
    allocator = CachingAllocator(GIB, [segment])
    assert allocator.allocate(14 * MIB, stream=0).size == 14 * MIB
    assert allocator.reserved_bytes == 20 * MIB
    allocator.release(allocator.in_use[0])
    allocator.allocate(5 * MIB, stream=0)
    assert allocator.reserved_bytes == 20 * MIB


@given(st.lists(st.tuples(st.integers(1, 30 * MIB), st.integers(0, 10)), max_size=60), st.integers(0, 2))
@settings(max_examples=200, deadline=None)
def test_nothing_is_lost_whatever_the_order(requests: list[tuple[int, int]], streams: int) -> None:
    """Once all is released, an empty cache holds nothing, so every block found its neighbours again."""
    allocator, alive = CachingAllocator(GIB), []
    for size, ends in requests:
        alive.append(allocator.allocate(size, stream=size % (streams + 1)))
        while len(alive) > ends:
            allocator.release(alive.pop(len(alive) // 2))
    for block in alive:
        allocator.release(block)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


# The trace


def entry(action: str, address: int = 0, size: int = 0, stream: int = 0) -> tuple[str, int, int, int]:
    return action, address, size, stream


def test_torchs_records_become_a_trace() -> None:
    blocks = [
        {"address": 100, "size": 512, "state": "active_allocated"},
        {"address": 612, "size": 512, "state": "inactive"},
        {"address": 1124, "size": 1024, "state": "active_awaiting_free"},
    ]
    before = [{"address": 100, "segment_type": "small", "stream": 7, "blocks": blocks}]
    entries = [
        entry("alloc", 5000, 10, 7),
        entry("segment_alloc", 9000, 2 * MIB),
        entry("alloc", 6000, 20, 7),
        entry("free_requested", 5000),
        entry("free_completed", 5000),
        entry("free_completed", 1124),
        entry("free_completed", 77),  # nobody's
        entry("alloc", 5000, 30, 0),
        entry("free_completed", 5000),
        entry("oom"),
    ]
    trace = trace_of(before, entries, [2, 3])
    assert trace.segments == (
        Segment(address=100, is_small=True, stream=7, blocks=((512, True), (512, False), (1024, True))),
    )
    assert list(trace.events) == [ALLOCATES, ALLOCATES, 0, -3, ALLOCATES, 2]
    assert (list(trace.sizes), list(trace.streams), trace.steps) == ([10, 20, 30], [7, 7, 0], (2, 3))
    assert pickle.loads(pickle.dumps(trace)) == trace


def traced(steps: list[list[tuple[str, int]]]) -> Trace:
    """A trace of steps in which ("name", size) allocates and ("name", 0) frees."""
    events, sizes, alive, ends = array("q"), array("q"), dict[str, int](), []
    for step in steps:
        for name, size in step:
            if size:
                alive[name] = len(sizes)
                events.append(ALLOCATES)
                sizes.append(size)
            else:
                events.append(alive.pop(name))
        ends.append(len(sizes))
    return Trace(segments=(), events=events, sizes=sizes, streams=array("q", [0] * len(sizes)), steps=tuple(ends))


def test_more_steps_go_on_as_the_last() -> None:
    """A gradient lives on into the next step, a batch ends between two."""
    first = [("state", 7), ("batch", 1), ("gradient", 2), ("batch", 0)]
    later = [("batch", 1), ("activation", 3), ("gradient", 0), ("gradient", 2), ("activation", 0), ("batch", 0)]
    assert traced([first, later, later]).prolonged(2) == traced([first, later, later, later, later])


@pytest.mark.parametrize(
    "steps",
    [
        [[("a", 1), ("a", 0)]],
        [[("a", 1), ("a", 0)]] * 2,
        [[("a", 2), ("a", 0)], [("a", 1), ("a", 0)], [("a", 2), ("a", 0)]],
        [[("a", 1)], [], []],
        # The last step ends what the one before left, and its own as well: garbage that is collected now and then.
        [[("a", 1)], [("b", 1)], [("c", 1), ("a", 0), ("b", 0), ("c", 0)]],
    ],
)
def test_steps_that_differ_do_not_go_on(steps: list[list[tuple[str, int]]]) -> None:
    assert traced(steps).prolonged(3) == traced(steps)


def test_a_trace_is_cut_at_the_end_of_a_step() -> None:
    step = [("a", 1), ("b", 2), ("a", 0), ("b", 0)]
    assert traced([step, step, step]).shortened(2) == traced([step, step])
    assert traced([step]).shortened(2) == traced([step])


@given(st.integers(0, 10**9))
@settings(max_examples=200, deadline=None)
def test_whatever_the_lifetimes_nothing_is_released_twice(seed: int) -> None:
    chance, alive, events, steps, count = random.Random(seed), list[int](), array("q"), list[int](), 0
    for _ in range(3):
        for _ in range(chance.randrange(5)):
            alive.append(count)
            events.append(ALLOCATES)
            count += 1
            while alive and chance.random() < 0.5:
                events.append(alive.pop(chance.randrange(len(alive))))
        steps.append(count)
    sizes, streams = array("q", [MIB] * count), array("q", [0] * count)
    trace = Trace(segments=(), events=events, sizes=sizes, streams=streams, steps=tuple(steps)).prolonged(4)
    assert replay(trace, trace.sizes, GIB)  # which raises ValueError


# malloc


def test_what_is_large_is_mapped_and_gone_when_it_ends() -> None:
    malloc = Malloc(GIB, mapped_from_bytes=256 * KIB)
    chunk = malloc.allocate(MIB, stream=0)
    assert malloc.peak_reserved_bytes == MIB + 4 * KIB  # what malloc writes before it takes another page
    malloc.release(chunk)
    malloc.allocate(2 * MIB, stream=0)
    assert malloc.peak_reserved_bytes == 2 * MIB + 4 * KIB


def test_a_heap_keeps_what_it_has_had() -> None:
    malloc = Malloc(GIB, mapped_from_bytes=256 * KIB)
    chunks = [malloc.allocate(100 * KIB, stream=0) for _ in range(10)]
    assert MIB * 0.97 < (had := malloc.peak_reserved_bytes) < MIB
    for chunk in chunks:
        malloc.release(chunk)
    malloc.allocate(100 * KIB, stream=0)
    assert malloc.peak_reserved_bytes == had
    malloc.allocate(MIB, stream=0)
    assert malloc.peak_reserved_bytes == had + MIB + 4 * KIB


def test_heap_and_mappings_share_the_memory() -> None:
    malloc = Malloc(3 * MIB, mapped_from_bytes=256 * KIB)
    malloc.allocate(200 * KIB, stream=0)
    malloc.allocate(2 * MIB, stream=0)
    with pytest.raises(OutOfMemory):
        malloc.allocate(MIB, stream=0)


def test_steps_of_the_host_are_replayed_by_malloc_s_rules() -> None:
    step = [("weights", 10 * MIB), ("batch", MIB), ("weights", 0), ("batch", 0)]
    trace = replace(traced([step, step]), mapped_from_bytes=256 * KIB)
    assert peak_reserved_bytes(trace, trace.sizes) == 11 * MIB + 8 * KIB
    assert replay(trace, trace.sizes, 11 * MIB + 8 * KIB)
    assert not replay(trace, trace.sizes, 11 * MIB + 4 * KIB)
    assert trace.shortened(1).prolonged(2).mapped_from_bytes == 256 * KIB


# How allocations grow


def test_sizes_are_fixed_in_proportion_or_between() -> None:
    def sizes(n: int) -> list[tuple[str, int]]:
        return [("weights", 5000), ("batch", 1000 * n), ("both", 70_000 + 3000 * n), ("rounded", 8 * ((n + 3) // 4))]

    seen = scaling(traced([sizes(4)]), 4, traced([sizes(8)]), 8)
    assert seen.sizes(100) == [5000, 100_000, 370_000, 200]
    assert seen.uncertain == (2,)


def test_workspaces_that_only_one_of_two_sizes_has_are_passed_over() -> None:
    def step(n: int) -> list[tuple[str, int]]:
        tensors = [(f"t{k}", (k + 1) * 10_000 * n) for k in range(20)]
        if n == 8:
            tensors[14:14] = [("workspace", 4_000_000), ("counter", 4)]
        if n == 4:
            tensors[5:5] = [("other", 1_000_000)]
        return tensors

    seen = scaling(traced([step(4)]), 4, traced([step(8)]), 8)
    assert seen.uncertain == (14, 15)
    fixed, grown = seen.sizes(80), seen.sizes(80, at_worst=True)
    tensors = [size for name, size in step(80)]
    assert [size for k, size in enumerate(fixed) if k not in seen.uncertain] == tensors
    assert (fixed[14], grown[14]) == (4_000_000, 40_000_000)
    assert [size for k, size in enumerate(grown) if k not in seen.uncertain] == tensors


def test_two_runs_that_have_nothing_in_common_are_all_uncertain() -> None:
    """Not a loop, and not an answer that looks sure."""
    small, large = [(f"s{k}", 10**6) for k in range(200)], [(f"l{k}", 10_000) for k in range(200)]
    seen = scaling(traced([small]), 1, traced([large]), 2)
    assert len(seen.uncertain) == 200
    assert seen.sizes(4) == [10_000] * 200


# Where memory ends


class Program:
    """Steps of allocations that grow with the batch, ending in a random order; optimizer state in the first."""

    def __init__(self, seed: int, count: int) -> None:
        chance = random.Random(seed)
        self.fixed = [chance.choice([0, 0, chance.randrange(1, 8 * MIB)]) for _ in range(count)]
        self.growing = [chance.choice([0, chance.randrange(1, 2 * MIB)]) for _ in range(count)]
        self.order = chance.sample(range(count), count)
        self.kept = chance.sample(range(count), count // 10)

    def trace(self, n: int) -> Trace:
        state = [(f"s{k}", 3 * MIB + k) for k in range(5)]
        step = []
        for k, (fixed, growing) in enumerate(zip(self.fixed, self.growing, strict=True)):
            step.append((f"t{k}", max(1, fixed + growing * n)))
            if k % 3 == 2:
                step += [(f"t{j}", 0) for j in (k - 1, k) if j not in self.kept]
        alive = [k for k in self.order if (f"t{k}", 0) not in step]
        step += [(f"t{k}", 0) for k in alive]
        return traced([[*step, *state], step, step])


@given(st.integers(0, 10**9), st.integers(5, 60), st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_two_small_batches_tell_where_memory_ends(seed: int, count: int, small: int, apart: int) -> None:
    """As a run of each size would: the last that gets through does, and the next does not."""
    program, capacity_bytes = Program(seed, count), 2 * GIB
    sizes = (small + 1, small + 1 + apart)
    traces = [program.trace(size) for size in sizes]
    if not replay(traces[1], traces[1].sizes, capacity_bytes):
        return
    found = forecast(scaling(traces[0], sizes[0], traces[1], sizes[1]), capacity_bytes, smallest=sizes[0])
    if found is None:  # nothing in it grows
        assert not any(program.growing)
        return

    def fits(n: int) -> bool:
        short = program.trace(n)
        trace = short.prolonged(5)
        small_trace = program.trace(sizes[0]).prolonged(5)
        after_small = [*small_trace.sizes[: trace.steps[1]], *trace.sizes[trace.steps[1] :]]
        runs = [(short, short.sizes), (trace, trace.sizes), (trace, after_small)]
        return all(replay(run, run_sizes, capacity_bytes) for run, run_sizes in runs)

    assert found.least <= found.most <= found.alone
    assert fits(found.most) or found.most == sizes[1]
    assert not fits(found.most + 1)


def test_a_forecast_that_depends_on_what_is_uncertain_is_not_sure() -> None:
    def step(n: int) -> list[tuple[str, int]]:
        workspace = [("workspace", 100 * MIB), ("workspace", 0)] if n > 1 else []
        tensors = [(f"t{k}", 4 * MIB * n) for k in range(10)]
        return [*tensors[:5], *workspace, *tensors[5:], *((name, 0) for name, _ in tensors)]

    found = forecast(scaling(traced([step(1)] * 3), 1, traced([step(2)] * 3), 2), 4 * GIB)
    assert found is not None
    assert found.least < 0.7 * found.most
    assert not found.is_sure


def test_what_fits_alone_need_not_fit_behind_small_batches() -> None:
    """What is made amid small batches lies where the large ones would find room."""
    program, capacity_bytes = Program(0, 12), GIB
    found = forecast(scaling(program.trace(1), 1, program.trace(2), 2), capacity_bytes)
    assert found is not None
    assert found.most < found.alone
    large = program.trace(found.alone).prolonged(5)
    small = program.trace(1).prolonged(5)
    assert replay(large, large.sizes, capacity_bytes)
    assert not replay(large, [*small.sizes[: large.steps[1]], *large.sizes[large.steps[1] :]], capacity_bytes)


def test_the_scores_of_all_samples_against_all_grow_with_the_square() -> None:
    """As small as they are where it begins: 4 bytes of one sample, 36 of three."""

    def step(n: int) -> list[tuple[str, int]]:
        return [
            *[(f"t{k}", 64 * KIB * n) for k in range(8)],
            ("scores", 4 * n * n),
            *[(f"u{k}", 1000) for k in range(8)],
        ]

    seen = scaling(traced([step(1)]), 1, traced([step(3)]), 3)
    assert [size for name, size in step(50_000)] == seen.sizes(50_000, at_worst=True)
    found = forecast(seen, 16 * GIB)
    assert found is not None
    assert not found.is_sure
    for n, fits in ((found.least, True), (found.least + 1, False)):
        assert replay(traced([step(n)]), [size for name, size in step(n)], 16 * GIB) is fits


def test_thrashing_is_not_fitting() -> None:
    """Two large tensors in turn, of which only one has room: the cache is given back in every step."""
    step = [("a", 60 * MIB), ("a", 0), ("b", 70 * MIB), ("b", 0), ("c", 80 * MIB), ("c", 0), ("a2", 10 * MIB)]
    later = [*step[:6], ("a2", 0), ("a2", 10 * MIB)]
    trace = traced([step, later, later])
    assert not replay(trace, trace.sizes, 100 * MIB)
    assert replay(trace, trace.sizes, 400 * MIB)


def test_no_end_is_no_forecast() -> None:
    step = [("weights", MIB), ("weights", 0)]
    assert forecast(scaling(traced([step] * 3), 1, traced([step] * 3), 2), GIB) is None

"""The model of the caching allocator against torch's own, and forecasts against what really fits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from autobatch import Workload, find
from autobatch.device import cuda_history
from autobatch.device.cuda import CudaDevice
from autobatch.device.recording import recording
from autobatch.probe.trial import Attempt, TrialRequest, run_trial
from autobatch.replay.allocator import Block, CachingAllocator
from autobatch.replay.forecast import forecast
from autobatch.replay.scaling import scaling
from autobatch.replay.trace import ALLOCATES, Trace
from autobatch.units import GIB, MIB
from tests.gpu.gpt2 import gpt2

pytestmark = pytest.mark.gpu
DEVICE = "cuda:0"


@pytest.fixture(autouse=True)
def _clean_gpu() -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


def words(n: int) -> dict[str, Any]:
    ids = torch.zeros(n, 32, dtype=torch.long, device=DEVICE)
    return {"input_ids": ids, "labels": ids}


def images(n: int) -> tuple[Any, Any]:
    return torch.zeros(n, 3, 64, 64, device=DEVICE), torch.zeros(n, dtype=torch.long, device=DEVICE)


def language_model() -> Workload:
    with torch.device(DEVICE):
        model = gpt2("small")
    return Workload(model, torch.optim.AdamW(model.parameters()), sample=words)


def convolutions() -> Workload:
    with torch.device(DEVICE):
        layers = [nn.Conv2d(3, 64, 7, stride=2), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Workload(model, optimizer, functional.cross_entropy, images, precision="fp16")


def recurrent() -> Workload:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(64, 256, num_layers=2, batch_first=True), nn.Linear(256, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.lstm(x)[0][:, -1])

    with torch.device(DEVICE):
        model = Net()

    def sample(n: int) -> tuple[Any, Any]:
        return torch.zeros(n, 100, 64, device=DEVICE), torch.zeros(n, dtype=torch.long, device=DEVICE)

    return Workload(model, torch.optim.AdamW(model.parameters()), functional.cross_entropy, sample)


WORKLOADS = [language_model, convolutions, recurrent]


def recorded(workload: Workload, size: int, limit_bytes: int) -> Attempt:
    request = TrialRequest(batch_size=size, steps=3, limit_bytes=limit_bytes, records=True)
    return run_trial(workload, CudaDevice(DEVICE), request)


class AtItsPlaces(CachingAllocator):
    """Its segments lie where the driver put torch's: of free blocks of one size, torch 2.11 takes the lowest."""

    def __init__(self, capacity_bytes: int, trace: Trace, addresses: Sequence[int]) -> None:
        super().__init__(capacity_bytes, trace.segments)
        self._addresses = iter(addresses)

    def _take(self, size: int, free: Any) -> Block:
        block = super()._take(size, free)
        block.address = next(self._addresses)
        return block


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the driver put the segments of the last recorded run."""
    taken, finish = list[int](), cuda_history.History.finish

    def telling(history: cuda_history.History) -> dict[str, Any] | None:
        entries = torch.cuda.memory._snapshot()["device_traces"][0]
        taken[:] = [entry["addr"] for entry in entries if entry["action"] == "segment_alloc"]
        return finish(history)

    monkeypatch.setattr(cuda_history.History, "finish", telling)
    return taken


def peaks_bytes(trace: Trace, capacity_bytes: int, addresses: Sequence[int]) -> set[int]:
    """Where the oldest of free blocks of one size is taken, as torch 2.14 does and the model, and where the lowest is.

    They are a segment apart at most, and mostly equal.
    """
    model, placed = CachingAllocator(capacity_bytes, trace.segments), AtItsPlaces(capacity_bytes, trace, addresses)
    return {peak_bytes(trace, model), peak_bytes(trace, placed)}


def peak_bytes(trace: Trace, allocator: CachingAllocator) -> int:
    blocks = list[Block]()
    for event in trace.events:
        if event == ALLOCATES:
            blocks.append(allocator.allocate(trace.sizes[len(blocks)], trace.streams[len(blocks)]))
        else:
            allocator.release(blocks[event] if event >= 0 else allocator.in_use[ALLOCATES - 1 - event])
    return allocator.peak_reserved_bytes


@pytest.mark.parametrize("build", WORKLOADS)
@pytest.mark.parametrize("size", [2, 7, 32])
def test_the_model_reserves_what_torch_does(build: Callable[[], Workload], size: int, addresses: list[int]) -> None:
    """To the byte, given what torch's own allocator was asked for."""
    attempt = recorded(build(), size, 2 * GIB)
    assert attempt.trial.fits
    assert attempt.trace is not None
    assert len(attempt.trace.steps) == 3
    assert attempt.trial.measurement is not None
    assert attempt.trial.measurement.peak_reserved_bytes in peaks_bytes(attempt.trace, 2 * GIB, addresses)


def test_also_where_the_cache_was_given_back(addresses: list[int]) -> None:
    """A limit just below the peak makes torch's allocator retry, and the model as often."""
    workload = language_model()
    free = recorded(workload, 8, 4 * GIB).trial.measurement
    assert free is not None
    assert free.peak_reserved_bytes is not None
    limit_bytes = free.peak_reserved_bytes - 2 * MIB
    before = CudaDevice(DEVICE).retries()
    attempt = recorded(workload, 8, limit_bytes)  # and so in each step, which is thrashing, but runs
    assert attempt.trace is not None
    assert attempt.trial.measurement is not None
    assert CudaDevice(DEVICE).retries() > before
    assert attempt.trial.measurement.peak_reserved_bytes in peaks_bytes(attempt.trace, limit_bytes, addresses)


@pytest.mark.parametrize("build", WORKLOADS)
def test_two_small_batches_tell_what_fits(build: Callable[[], Workload]) -> None:
    """Of memory that eight times the second of them needs. Just above the last of those that fit there can be
    others that do: of the language model 98 to 110 do not and 115 to 120 do, in a process that has run other things.
    """
    workload, sizes = build(), (12, 15)
    attempts = [recorded(workload, size, 2 * GIB) for size in sizes]
    traces = [attempt.trace for attempt in attempts]
    assert traces[0] is not None
    assert traces[1] is not None
    seen = scaling(traces[0], sizes[0], traces[1], sizes[1])
    needed = recorded(workload, 120, 8 * GIB).trial.measurement
    assert needed is not None  # and a little more fits, where the cache can be given back
    assert needed.peak_reserved_bytes is not None
    found = forecast(seen, needed.peak_reserved_bytes, smallest=sizes[0])
    assert found is not None
    assert recorded(workload, int(0.95 * found.most), needed.peak_reserved_bytes).trial.fits
    assert not recorded(workload, int(1.1 * found.most) + 1, needed.peak_reserved_bytes).trial.fits


@pytest.mark.parametrize(("build", "most"), [(language_model, 6), (recurrent, 8), (convolutions, 20)])
def test_a_search_asks_little_more_than_what_is_foretold(build: Callable[[], Workload], most: int) -> None:
    """Convolutions take other workspaces at other sizes, and thrash at some of several hundred."""
    result = find(build(), device=DEVICE, memory_limit="1GiB", multiple_of=1, headroom=0.0, isolate=False)
    assert result.proof in ("next_size_failed", "stepped_down")
    assert len(result.trials) <= most, result
    assert sum(trial.batch_size <= 4 for trial in result.trials) >= 2


def test_avoiding_failures_gives_up_little() -> None:
    limits: dict[str, Any] = {"device": DEVICE, "memory_limit": "1GiB", "multiple_of": 1, "headroom": 0.0}
    most = find(language_model(), isolate=False, **limits).batch_size
    result = find(language_model(), isolate=False, avoid_oom=True, **limits)
    assert result.oom_count == 0
    assert 0.95 * most <= result.batch_size <= most


def test_somebody_elses_history_is_left_alone() -> None:
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=100_000)
    try:
        theirs = torch.zeros(1000, device=DEVICE)
        attempt = recorded(language_model(), 2, 2 * GIB)
        assert attempt.trial.fits
        assert attempt.trace is None
        assert torch._C._cuda_isHistoryEnabled()
        addresses = [event.get("addr") for event in torch.cuda.memory._snapshot()["device_traces"][0]]
        assert theirs.data_ptr() in addresses
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def test_nothing_is_recorded_afterwards() -> None:
    recorded(language_model(), 2, 2 * GIB)
    assert not torch._C._cuda_isHistoryEnabled()
    assert torch.cuda.memory._snapshot()["device_traces"][0] == []


def test_other_settings_of_the_allocator_are_not_modelled() -> None:
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    try:
        with recording(cuda_history.begin(torch, 0)) as history:
            assert history is None
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")


def test_a_history_that_begins_amid_the_steps_is_not_taken_for_ours() -> None:
    """It is short, and so would be what it tells."""
    with recording(cuda_history.begin(torch, 0)) as history:
        assert history is not None
        torch.zeros(1000, device=DEVICE)
        torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=10)
        kept = [torch.zeros(1000, device=DEVICE) for _ in range(20)]
        history.step_ended()
        assert history.finish() is None
    assert len(kept) == 20
    assert not torch._C._cuda_isHistoryEnabled()


def test_a_run_that_empties_the_cache_itself_is_not_foretold() -> None:
    with recording(cuda_history.begin(torch, 0)) as history:
        assert history is not None
        torch.zeros(16 << 20, device=DEVICE)  # a segment of its own, whatever else lives in small ones
        torch.cuda.empty_cache()
        history.step_ended()
        assert history.finish() is None


def test_a_torch_that_tells_otherwise_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing stays switched on."""
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [{}])
    with recording(cuda_history.begin(torch, 0)) as history:
        assert history is None
    assert not torch._C._cuda_isHistoryEnabled()
    monkeypatch.undo()
    with recording(cuda_history.begin(torch, 0)) as history:
        assert history is not None
        monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": []})
        assert history.finish() is None
    monkeypatch.undo()


class InPlace:
    """Allocates in the first step alone."""

    def __init__(self) -> None:
        self.buffers: dict[int, torch.Tensor] = {}

    def step(self, n: int) -> None:
        if n not in self.buffers:
            self.buffers = {n: torch.zeros(n, 1 << 20, device=DEVICE)}
        self.buffers[n].mul_(2)


class Cycles:
    """Leaves garbage that is collected every third step."""

    def __init__(self) -> None:
        self.count = 0

    def step(self, n: int) -> None:
        for _ in range(12):
            cycle: list[Any] = [torch.zeros(n, 1 << 16, device=DEVICE)]
            cycle.append(cycle)
        self.count += 1
        if self.count % 3 == 0:
            gc.collect()


@pytest.mark.parametrize("kind", [InPlace, Cycles])
def test_odd_lifetimes_are_no_error_of_the_workload(kind: Any) -> None:
    odd = kind()
    result = find(odd.step, device=DEVICE, memory_limit="1GiB", isolate=False, state=[])
    assert result.smallest_failure is not None
    assert len(result.trials) <= 20

"""find_executable_batch_size: what accelerate's own does, and a search where that only shrinks."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers

from autobatch.device.host import CHILD_ENVIRONMENT
from autobatch.errors import InvalidArgumentError
from autobatch.integrations.accelerate import executable
from autobatch.integrations.accelerate.executable import _Sizes, find_executable_batch_size
from autobatch.probe.state import fingerprint

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20 MiB."


def theirs() -> Any:
    return pytest.importorskip("accelerate.utils").find_executable_batch_size


@pytest.fixture(params=["ours", "theirs"])
def either(request: pytest.FixtureRequest) -> Any:
    """What accelerate's own does too, shown on both."""
    return find_executable_batch_size if request.param == "ours" else theirs()


def only(*sizes: int, tried: list[int]) -> Callable[..., Any]:
    """A run that takes no step of an optimizer, and has memory for these sizes."""

    def train(batch_size: int, first: Any = None, second: Any = None) -> Any:
        tried.append(batch_size)
        if batch_size not in sizes:
            raise RuntimeError(OUT_OF_MEMORY)
        return batch_size, first, second

    return train


def test_the_first_size_is_run_to_its_end_if_it_fits(either: Any) -> None:
    tried: list[int] = []
    assert either(only(128, tried=tried))() == (128, None, None)
    assert tried == [128]


@pytest.mark.parametrize("form", ["called", "with arguments", "bare"])
def test_it_is_a_decorator_in_every_form(either: Any, form: str) -> None:
    tried: list[int] = []
    train = only(8, tried=tried)
    if form == "called":
        run = either(train, starting_batch_size=8)
    elif form == "with arguments":
        run = either(starting_batch_size=8)(train)
    else:
        run = either()(only(128, tried=tried))
    assert run("one", second=2)[1:] == ("one", 2)
    assert tried == [128 if form == "bare" else 8]


def test_a_size_of_zero_is_none(either: Any) -> None:
    with pytest.raises(RuntimeError, match="No executable batch size found, reached zero"):
        either(starting_batch_size=0)(only(tried=[]))()
    tried: list[int] = []
    with pytest.raises(RuntimeError, match="No executable batch size found, reached zero"):
        either(starting_batch_size=16)(only(tried=tried))()
    assert (tried[0], tried[-1]) == (16, 1)


@pytest.mark.parametrize("named", [False, True])
def test_a_batch_size_in_the_call_is_an_error_that_shows_the_call(either: Any, named: bool) -> None:
    def loop(batch_size: int, first: Any, second: Any) -> None:
        raise AssertionError("it must not run")

    run = either(starting_batch_size=128)(loop)
    with pytest.raises(TypeError) as caught:
        run(batch_size=128, first="hello", second="world") if named else run(128, "hello", "world")
    if not named:
        assert "Batch size was passed into `loop` as the first argument when called" in str(caught.value)


def test_the_call_that_is_shown_is_one_that_works() -> None:
    """Theirs leaves out the quotes."""
    with pytest.raises(TypeError) as caught:
        find_executable_batch_size(only(tried=[]))(128, "hello", "world")
    assert str(caught.value).endswith("call `train(first='hello', second='world')`")


def test_a_call_that_is_wrong_otherwise_says_so_itself() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'third'"):
        find_executable_batch_size(only(tried=[]))(third=3)


@pytest.mark.parametrize("error", [ValueError("Oops"), RuntimeError("size mismatch"), KeyboardInterrupt()])
def test_another_error_is_raised_as_it_is(either: Any, error: BaseException) -> None:
    tried: list[int] = []

    def train(batch_size: int) -> None:
        tried.append(batch_size)
        raise error

    with pytest.raises(type(error)) as caught:
        either(starting_batch_size=16)(train)()
    assert caught.value is error
    assert tried == [16]


def test_a_broken_device_is_not_too_large_a_batch() -> None:
    def train(batch_size: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        find_executable_batch_size(train)()


@pytest.mark.parametrize("form", ["called", "with arguments"])
def test_a_function_that_reduces_decides_alone(either: Any, form: str) -> None:
    tried: list[int] = []
    size = 256

    def less() -> int:
        nonlocal size
        size -= 100
        return size

    train = only(56, tried=tried)
    options = {"starting_batch_size": 256, "reduce_batch_size_fn": less}
    run = either(train, **options) if form == "called" else either(**options)(train)
    assert run()[0] == 56
    assert tried == [256, 156, 56]


def test_a_second_call_begins_where_the_first_ended(either: Any) -> None:
    tried: list[int] = []
    run = either(starting_batch_size=64)(only(1, tried=tried))
    run()
    tried.clear()
    run()
    assert tried == [1]


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("HIP out of memory. Tried", RuntimeError),
        ("MPS backend out of memory (MPS allocated", RuntimeError),
        ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear", RuntimeError),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", RuntimeError),
        ("FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed", RuntimeError),
        ("CUDA out of memory. Tried", torch.OutOfMemoryError),
    ],
)
def test_every_word_for_out_of_memory_is_known(either: Any, message: str, kind: type[RuntimeError]) -> None:
    tried: list[int] = []

    def train(batch_size: int) -> int:
        tried.append(batch_size)
        if batch_size > 1:
            raise kind(message)
        return batch_size

    assert either(starting_batch_size=2)(train)() == 1
    assert tried == [2, 1]


def test_what_only_may_have_been_memory_is_the_cause_in_the_end() -> None:
    def train(batch_size: int) -> None:
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED: a layout")

    with pytest.raises(RuntimeError, match="reached zero") as caught:
        find_executable_batch_size(train, 2)()
    assert "a layout" in str(caught.value.__cause__)


def test_without_steps_the_size_is_halved_and_what_runs_is_the_answer() -> None:
    tried: list[int] = []
    assert find_executable_batch_size(only(8, tried=tried))("hello") == (8, "hello", None)
    assert tried == [128, 64, 32, 16, 8]


class Runs:
    """Runs of ten optimizer steps of a small model, which fit up to ``most`` samples."""

    def __init__(self, most: int, *, from_step: int = 0) -> None:
        self.most, self.from_step = most, from_step
        self.tried: list[tuple[int, int]] = []
        """Each run's size, and the steps that it took."""

    def __call__(self, batch_size: int, steps: int = 10) -> int:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.tried.append((batch_size, 0))
        for step in range(steps):
            model(torch.randn(4, 2)).sum().backward()
            if batch_size > self.most and step >= self.from_step:
                raise RuntimeError(OUT_OF_MEMORY)
            # Noted before, for the hook after a step ends a run.
            self.tried[-1] = (batch_size, step + 1)
            optimizer.step()
            optimizer.zero_grad()
        return batch_size


def searched(runs: Runs, start: int = 256, **options: Any) -> int:
    return find_executable_batch_size(runs, start)(**options)


def test_it_searches_where_accelerate_only_shrinks() -> None:
    ours, own = Runs(37), Runs(37)
    assert searched(ours) == 37
    assert ours.tried == [(256, 0), (128, 0), (64, 0), (32, 3), (45, 0), (37, 3), (40, 0), (37, 10)]
    theirs()(own, 256)()
    failures = [sum(not steps for _, steps in runs.tried) for runs in (ours, own)]
    assert failures == [5, 18]
    assert own.tried[-1][0] <= 37


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("start", [2, 100, 128, 1000])
def test_the_answer_is_near_the_largest_and_in_few_runs(start: int, measured: bool) -> None:
    """For every size that may be the largest, with a third of the memory needed by the model alone."""
    for most in range(1, start):
        sizes, failures, ran = _Sizes(start, None), 0, 0
        while sizes.size > most or sizes.is_open:
            if sizes.size > most:
                failures += 1
                sizes.fail()
            else:
                ran += 1
                sizes.fit(*(most // 2 + sizes.size, round(1.5 * most)) if measured else (None, None))
        assert most - max(1, most // 8) <= sizes.size <= most
        assert failures <= 4 + start.bit_length()
        assert ran <= 5


def test_a_run_that_ends_before_it_is_known_to_fit_is_the_answer() -> None:
    runs = Runs(37)
    assert searched(runs, steps=2) == 32
    assert runs.tried[-1] == (32, 2)


def test_a_run_that_fails_late_is_begun_anew_with_less() -> None:
    runs = Runs(37, from_step=6)
    assert searched(runs) in range(33, 38)
    assert runs.tried[0] == (256, 6)
    assert runs.tried[-1][1] == 10


def test_measured_memory_spares_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 300 of fixed cost and 10 a sample, of 720."""
    peaks: dict[str, int] = {}
    runs = Runs(42)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", peaks.clear)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 300 + 10 * runs.tried[-1][0])
    monkeypatch.setattr(executable, "CudaDevice", type("Card", (), {"budget_bytes": lambda self: 720}))
    monkeypatch.setattr(executable, "random_states", lambda device: [])
    assert searched(runs) >= 38
    assert [size for size, _ in runs.tried[:4]] == [256, 128, 64, 32]
    assert sum(size > 42 for size, _ in runs.tried) == 3
    assert len(runs.tried) <= 6


def test_among_several_ranks_it_shrinks_as_accelerate_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cannot agree amid a failure, so each must go the way that all go."""
    monkeypatch.setattr(executable, "_are_several", lambda: True)
    ours, own = Runs(37), Runs(37)
    assert searched(ours, 64) == theirs()(own, 64)()
    assert ours.tried == own.tried


def test_no_hook_is_left_behind() -> None:
    runs = Runs(37)
    searched(runs)
    runs.most = 1 << 20
    runs(64)
    assert runs.tried[-1] == (64, 10)
    assert not optimizers._global_optimizer_post_hooks


@pytest.mark.parametrize("around", [False, True])
def test_the_last_run_is_what_it_would_have_been_alone(around: bool) -> None:
    """Also where the model is not the function's own: accelerate would train on from what the failed runs left."""

    def bits(start: int) -> Any:
        torch.manual_seed(0)
        random.seed(0)
        model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        wrapped = types.SimpleNamespace(scheduler=schedule)  # as accelerate's is

        def train(batch_size: int, given: Any = model, schedule: Any = wrapped) -> int:
            trained = model if around else given
            for step in range(10):
                trained(torch.randn(4, 2)).sum().backward()
                if batch_size > 37 and step == 2 and random.random() < 2:
                    raise RuntimeError(OUT_OF_MEMORY)
                optimizer.step()
                schedule.scheduler.step()
                optimizer.zero_grad()
            return batch_size

        assert find_executable_batch_size(train, start)(*[] if around else [model], schedule=wrapped) == 37
        return fingerprint(model, optimizer, schedule), random.getstate()

    assert bits(256) == bits(37)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_failed_run_s_memory_is_free_before_the_next(keeps: bool) -> None:
    """Also where somebody keeps the error, as a logger may."""
    alive: list[Any] = []
    kept: list[BaseException] = []

    def train(batch_size: int) -> int:
        assert not [each for each in alive if each() is not None]
        block = torch.zeros(batch_size)
        alive.append(weakref.ref(block))
        cycle: list[Any] = [block]
        cycle.append(cycle)
        try:
            if batch_size > 8:
                raise RuntimeError(OUT_OF_MEMORY)
        except RuntimeError as exc:
            if keeps:
                kept.append(exc)
            raise
        return batch_size

    gc.disable()
    try:
        assert find_executable_batch_size(train, 64)() == 8
    finally:
        gc.enable()
    assert len(alive) == 4


def test_an_end_that_the_function_swallows_is_one_all_the_same() -> None:
    runs = Runs(37)

    def train(batch_size: int) -> Any:
        try:
            return runs(batch_size)
        except RuntimeError:
            raise
        except BaseException:  # noqa: BLE001 - as some loops do, to save something
            return "swallowed"

    assert find_executable_batch_size(train, 256)() == 37


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"function": 3}, "function=3: must be a function of a batch size"),
        ({"function": len, "starting_batch_size": -1}, "starting_batch_size=-1: must be a whole number"),
        ({"function": len, "starting_batch_size": 1.5}, "starting_batch_size=1.5: must be a whole number"),
        ({"function": len, "reduce_batch_size_fn": 7}, "reduce_batch_size_fn=7: must be a function without arguments"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        find_executable_batch_size(**arguments)
    assert said in str(caught.value)


LIMITED = """
import resource, torch
from torch import nn
from autobatch.device.process import status_bytes
from autobatch.integrations.accelerate.executable import find_executable_batch_size
from autobatch.units import MIB

torch.set_num_threads(1)
torch.optim.SGD([nn.Parameter(torch.ones(1))])  # loads what torch loads late
tried = []

@find_executable_batch_size(starting_batch_size=512)
def train(batch_size):
    tried.append(batch_size)
    model = nn.Sequential(nn.Linear(4, 1 << 15), nn.ReLU(), nn.Linear(1 << 15, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(6):
        model(torch.randn(batch_size, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return batch_size

resource.setrlimit(resource.RLIMIT_DATA, (status_bytes()["VmData"] + 64 * MIB, resource.RLIM_INFINITY))
size = train()
halved = min(n for n in tried if n & (n - 1) == 0)  # where halving alone ends: 128, or less as the heap has it
assert tried[:2] == [512, 256] and tried[-1] == size and halved < size < 256, tried
assert len(tried) <= 9, tried
"""


@pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux")
def test_on_host_memory_that_runs_out_really() -> None:
    environment = {**os.environ, **CHILD_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]

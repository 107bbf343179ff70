"""A training function that takes its batch size first, begun anew until it fits: accelerate's decorator, searching."""

from __future__ import annotations

import collections
import functools
import gc
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from autobatch.device.cuda import CudaDevice
from autobatch.device.oom import Tier, classify, forget_frames
from autobatch.errors import InvalidArgumentError
from autobatch.integrations.reach import around, trained
from autobatch.probe.random_numbers import random_states
from autobatch.probe.state import Memento

STEPS = 3
"""Optimizer steps after which a run is known to fit: the first alone creates the optimizer's state."""

_REDUCTION = 0.9  # accelerate's own
_WORTH = 1.05  # a size at most this many times the one that runs is not worth beginning anew
_SPARED = 0.98  # the part of the memory's size up to which a prediction goes


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Any:
    """In the place of ``accelerate.utils.find_executable_batch_size``, to be called as that is.

    ::

        @find_executable_batch_size(starting_batch_size=256)
        def train(batch_size, config):
            ...          # builds model, optimizer and loaders, and trains

        train(config)

    The function is run with ``starting_batch_size``; nothing larger is tried. If that runs out of memory the size is
    halved until a run has taken three optimizer steps. While a larger size is worth trying, that run is ended there and
    the larger one begun: by the memory that the steps took, or where none is measured, as long as the size that failed
    is more than a tenth larger. The run that goes on to its end is the one that is returned. One that takes fewer steps
    is never ended.

    So the function must build what it trains, as accelerate asks for too, and what a run leaves outside, files or a
    tracker's entries, every run leaves. Random numbers are put back before each run, and so are modules, optimizers,
    schedulers and scalers that the function is given or uses from around it, so that the last run is what it would have
    been alone; for that they are copied to host memory. In a process group of several ranks, which cannot agree amid a
    failure, and with ``reduce_batch_size_fn``, no run is ended: sizes shrink as accelerate shrinks them.

    A second call begins with the size at which the first ended.

    Args:
        function: takes the batch size as its first argument; the caller gives the others.
        starting_batch_size: samples of the first run.
        reduce_batch_size_fn: returns the next size after each failure, and alone decides it.

    Returns:
        a function without the first argument; or a decorator, if ``function`` is not given.

    Raises:
        InvalidArgumentError: an argument is wrong.
        TypeError: from the call, if it gives a batch size too.
        RuntimeError: from the call, if no size was left. The error of the last failure is its cause.
        Exception: from the call, what the function raises for a reason other than memory, unchanged.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    _check(function, starting_batch_size, reduce_batch_size_fn)
    sizes = _Sizes(starting_batch_size, reduce_batch_size_fn)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _check_call(function, args, kwargs)
        return _result(lambda size: function(size, *args, **kwargs), sizes, _snapshot(function, args, kwargs))

    return run


class _Sizes:
    """Which size to run next, from those that ran and those that did not."""

    def __init__(self, start: int, reduce: Callable[[], int] | None) -> None:
        self.size, self._reduce = start, reduce
        self._failed: int | None = None
        self._peaks: dict[int, int | None] = {}  # of sizes that fit, in bytes; None where nothing measures them
        self._capacity_bytes: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether a run that fits might give way to a larger one."""
        return self._failed is not None and self.size not in self._peaks

    def fail(self) -> None:
        """The size does not fit: goes on to the next."""
        if self._reduce is not None:
            self.size = self._reduce()
        elif _are_several():
            self.size = int(self.size * _REDUCTION)
        else:
            self._failed = self.size
            self._peaks = {size: peak for size, peak in self._peaks.items() if size < self.size}
            self.size = self._next()

    def fit(self, peak_bytes: int | None, capacity_bytes: int | None) -> bool:
        """The size fits, and took ``peak_bytes``. Goes on to a larger one, or not: whether it does."""
        fits, self._peaks[self.size], self._capacity_bytes = self.size, peak_bytes, capacity_bytes
        self.size = self._next()
        return self.size != fits

    def _next(self) -> int:
        assert self._failed is not None
        if not self._peaks:
            return self._failed // 2
        low = max(self._peaks)
        if self._failed - low <= 1 or low >= _REDUCTION * self._failed:
            return low
        halfway = max(low + 1, math.isqrt(low * self._failed))
        expected = self._expected()
        if expected is None or expected >= self._failed:  # unknown, or known to be too much
            return halfway
        if expected > _WORTH * low:
            return expected
        # What the model alone takes is only known from two sizes: from one, more may fit than is expected.
        return low if len(self._peaks) > 1 else halfway

    def _expected(self) -> int | None:
        """The size that the peaks promise: on a line through the two largest, or through one and nothing."""
        known = sorted((size, peak) for size, peak in self._peaks.items() if peak)
        if self._capacity_bytes is None or not known:
            return None
        (small, least), (large, most) = ((0, 0), *known)[-2:]
        if most <= least:
            return None
        return int(large + (_SPARED * self._capacity_bytes - most) * (large - small) / (most - least))


class _Enough(BaseException):
    """Ends a run that fits, amid the function. No error of the function's, so that it does not handle it as one."""


class _Watch:
    """Ends a run once it is known to fit, if a larger size is worth a run of its own."""

    def __init__(self, sizes: _Sizes) -> None:
        self._sizes, self._steps = sizes, collections.Counter[int]()
        self.has_ended_it = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        if not self._sizes.is_open:
            yield
            return
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        handle = register_optimizer_step_post_hook(self._count)
        try:
            yield
        finally:
            handle.remove()

    def _count(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._steps[id(optimizer)] += 1
        if self._steps[id(optimizer)] != STEPS or not self._sizes.is_open:
            return
        measured = torch.cuda.is_initialized()
        peak_bytes = torch.cuda.max_memory_allocated() if measured else None
        if self._sizes.fit(peak_bytes, CudaDevice().budget_bytes() if measured else None):
            self.has_ended_it = True
            raise _Enough


def _result(run: Callable[[int], Any], sizes: _Sizes, put_back: Callable[[], None]) -> Any:
    """What the first run returns that comes to its end."""
    failure: BaseException | None = None
    while sizes.size > 0:
        watch, ended, failure = _Watch(sizes), None, None
        _release()
        try:
            with watch.watching():
                ended = run(sizes.size)
            if not watch.has_ended_it:
                return ended
        except _Enough:
            pass
        except Exception as exc:  # noqa: BLE001 - classified below: what is not memory is raised unchanged
            failure = exc
        # Outside of the except block, where the traceback would keep the tensors of the run alive.
        if failure is not None and not watch.has_ended_it:
            if classify(failure) in (None, Tier.FATAL):
                raise failure
            sizes.fail()
        if failure is not None:
            forget_frames(failure)
        put_back()
    raise RuntimeError("No executable batch size found, reached zero.") from failure


def _release() -> None:
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()


def _are_several() -> bool:
    """Whether other ranks run the same, which must not be asked: they may wait for this one amid a step."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _snapshot(function: Callable[..., Any], args: Iterable[Any], kwargs: dict[str, Any]) -> Callable[[], None]:
    """Puts back what a run that is begun anew has changed, of what can be known."""
    memento = Memento()
    found = (*args, *kwargs.values(), *around(function))
    inside = (getattr(item, "scheduler", None) for item in found)  # accelerate's own is around torch's
    restores = [memento.capture(item) for item in trained((*found, *inside))]
    random = random_states("cuda" if torch.cuda.is_initialized() else "cpu")

    def put_back() -> None:
        for restore in restores:
            restore()
        for restore_random, state in random:
            restore_random(state)

    return put_back


def _check(function: Any, start: Any, reduce: Any) -> None:
    if not callable(function):
        raise InvalidArgumentError("function", function, "a function of a batch size, or left out")
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        raise InvalidArgumentError("starting_batch_size", start, "a whole number")
    if reduce is not None and not callable(reduce):
        raise InvalidArgumentError("reduce_batch_size_fn", reduce, "a function without arguments, or None")


def _check_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises TypeError where the arguments have a batch size already."""
    signature = inspect.signature(function)
    try:
        signature.bind(0, *args, **kwargs)
        return
    except TypeError:
        pass
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return  # wrong in another way, which the call itself says better
    said = ", ".join(f"{name}={value!r}" for name, value in list(given.items())[1:])
    name = getattr(function, "__name__", type(function).__name__)
    raise TypeError(
        f"Batch size was passed into `{name}` as the first argument when called. The decorator does that by itself: "
        f"call `{name}({said})`"
    )

"""find(): the largest batch size of a workload on a device. Ties the search to trials, state and processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any, Literal

from autobatch.device.base import Device
from autobatch.errors import InvalidArgumentError
from autobatch.probe.advice import limit_notes
from autobatch.probe.building import build
from autobatch.probe.cache import open_cache
from autobatch.probe.command import Command
from autobatch.probe.command_executor import CommandExecutor
from autobatch.probe.executor import Executor, LocalExecutor
from autobatch.probe.fork import forks_are_safe
from autobatch.probe.guess import WITHIN_S, twin_of, virtual_guess
from autobatch.probe.inquiry import FRESH_AT_THE_EDGE, SHUFFLES, SHUFFLES_AT_THE_EDGE, Inquiry, capacity, least
from autobatch.probe.isolation import ChildExecutor, ForkExecutor, is_importable
from autobatch.probe.lock import device_lock
from autobatch.probe.recall import Recall
from autobatch.probe.search_arguments import check_arguments
from autobatch.probe.source import Source, builder_of, check_placed, source_of
from autobatch.probe.state import preserved
from autobatch.probe.worker import check_not_importing_main
from autobatch.probe.workload import Workload
from autobatch.result import BatchSizeResult, Trial
from autobatch.units import parse_bytes
from autobatch.virtual.resolve import resolve_device

NOT_RESTORED = "What the step function changes was not put back: name it in state=[model, optimizer]."


def find(
    workload: Workload | Command | Callable[..., Any],
    *,
    device: str | Device = "auto",
    state: Sequence[Any] = (),
    start: int = 1,
    max_batch_size: int | None = None,
    multiple_of: int | str = "auto",
    growth: float = 2.0,
    headroom: float = 0.05,
    memory_limit: int | str | None = None,
    steps: int = 3,
    avoid_oom: bool = False,
    isolate: bool | Literal["auto"] = "auto",
    time_limit_s: float | None = None,
    first_guess: int | None = None,
    cache: bool | str | os.PathLike[str] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> BatchSizeResult:
    """The largest batch size of ``workload`` that trains on ``device``, found by running it.

    What the caller has is left as it was, bit for bit: parameters, buffers, optimizer, scheduler, random numbers. Of a
    ``step(n)`` that is tried in this process only what ``state`` names is put back.

    Args:
        workload: a :class:`Workload` of live objects; a function without arguments (or with one named ``device``)
            that builds one; or ``step(n)``, a function that trains one step on n samples. A function that can be
            imported by name may run in a child process, and must where the device is a virtual GPU. Or a
            :class:`~autobatch.probe.command.Command`, which is started anew for each trial.
        device: ``"auto"`` (a GPU, else another accelerator, else host memory), a torch device, a Device, or the name
            of a virtual GPU such as ``"a100-40gb"``.
        state: what ``step(n)`` changes and the probe must put back.
        start: the first size tried.
        max_batch_size: nothing larger is tried.
        multiple_of: the sizes allowed: ``"auto"`` gives up at most 1.6 % for a round number, ``"pow2"`` allows powers
            of two, a number its multiples; 1 means every size.
        growth: factor from one size to the next until measured memory allows a larger jump.
        headroom: fraction of the device withheld from the trials and left to training.
        memory_limit: bytes (``"10GiB"``) that the workload may have at most; on the host, what it may add to an idle
            process.
        steps: training steps of a trial, at least 2: the first alone creates the optimizer's state.
        avoid_oom: provoke no failure: approach from below and trust the measured memory.
        isolate: True for trials in a child process, False for this one; ``"auto"`` takes a child where the workload
            can reach one. On host memory (Linux) live objects are tried in forks of this process: there a library that
            is refused memory may crash. ``environment["trials_in"]`` of the result says which it was.
        time_limit_s: seconds after which no larger size is tried.
        first_guess: a size near which the answer is expected: the search begins there. Without one, on a real NVIDIA
            GPU, it begins at the answer of a virtual one, where the workload can reach a child process.
        cache: None for no cache; True, or a folder, to keep the answer there and to look there first. An answer that
            is found there is confirmed by one trial.
        on_trial: called with each :class:`~autobatch.result.Trial` as it ends, those of the confirmation too.

    Raises:
        InvalidArgumentError: an argument is wrong; nothing was touched.
        DeviceError: the device is not there, or broke.
        DoesNotFitError: not even the smallest size fits.
        Exception: whatever the workload raises for a reason other than memory, unchanged.
    """
    check_not_importing_main()
    started_s = time.monotonic()
    rounding = {"multiple_of": multiple_of, "growth": growth, "max_batch_size": max_batch_size, "start": start}
    limits = {"avoid_oom": avoid_oom, "time_limit_s": time_limit_s}
    check_arguments(**rounding, **limits, first_guess=first_guess)  # type: ignore[arg-type]  # it says which are wrong
    _check(headroom=headroom, steps=steps, isolate=isolate, on_trial=on_trial)
    limit_bytes = None if memory_limit is None else parse_bytes(memory_limit, argument="memory_limit")
    answers, source = open_cache(cache), source_of(workload, state)
    place = resolve_device(device, memory_limit_bytes=limit_bytes)
    with device_lock(place), _executor(source, place, isolate) as executor:
        setting = executor.setting()
        inquiry = Inquiry(
            executor=executor,
            setting=setting,
            steps=steps,
            shuffles=SHUFFLES if headroom else SHUFFLES_AT_THE_EDGE,
            fresh=FRESH_AT_THE_EDGE if place.isolation().anew and not headroom else 1,
            capacity_bytes=capacity(setting, limit_bytes, headroom),
            is_restricted=headroom > 0 or limit_bytes is not None or not place.ends_by_itself,
            on_trial=on_trial,
        )
        options: dict[str, Any] = {"multiple_of": multiple_of, "max_batch_size": max_batch_size, "steps": steps}
        options |= {"headroom": headroom, "limit_bytes": limit_bytes, "avoid_oom": avoid_oom}
        options["isolated"] = not isinstance(executor, LocalExecutor)
        budget_bytes = least(setting.budget_bytes, limit_bytes)
        recall = Recall(answers, executor, setting, budget_bytes, start=start, options=options)
        if (known := recall.answer(inquiry.check)) is not None:
            notes = (*known.notes, *limit_notes(limit_bytes, setting.budget_bytes, setting.environment))
            return replace(known, notes=notes, duration_s=time.monotonic() - started_s)
        guess = recall.first_guess or first_guess
        if guess is None and (card := twin_of(place.info(), setting.budget_bytes)) is not None:
            guess, said = virtual_guess(
                source, card, lambda twin: _answer_of(inquiry.elsewhere(twin), rounding | limits)
            )
            recall.notes += [said] if said else []
        found = inquiry.search(rounding | limits, first_guess=guess)
    result = inquiry.result(found, headroom, limit_bytes, time.monotonic() - started_s)
    if isinstance(executor, CommandExecutor):
        result = replace(result, notes=(*result.notes, *executor.notes()))
    if isinstance(executor, LocalExecutor) and isinstance(source, Workload) and not source.stateful:
        result = replace(result, notes=(*result.notes, NOT_RESTORED))
    recall.keep(result)
    notes = (*result.notes, *recall.notes, *limit_notes(limit_bytes, setting.budget_bytes, setting.environment))
    return replace(result, notes=notes)


def _answer_of(inquiry: Inquiry, options: dict[str, Any]) -> int:
    """What a virtual GPU answers, where it is asked for a first guess only."""
    limit_s = options["time_limit_s"]
    within_s = WITHIN_S if limit_s is None else min(WITHIN_S, limit_s)
    return next(iter(inquiry.search(options | {"time_limit_s": within_s}, first_guess=None).values())).batch_size


@contextmanager
def _executor(source: Source, device: Device, isolate: bool | str) -> Iterator[Executor]:
    """The place of the trials; what the caller owns is put back when it is left."""
    if isinstance(source, Command):
        if isolate is False:
            raise InvalidArgumentError(
                "isolate", isolate, "True or 'auto' for a Command, which is a process of its own"
            )
        with closing(CommandExecutor(source, device)) as command:
            yield command
        return
    builder, isolation = builder_of(source), device.isolation()
    must = isolation.required or (isolate is True and not isolation.forks)
    if must and builder is None:
        raise InvalidArgumentError("workload", source, f"a function that builds it, because {isolation.reason}")
    can = isolate is not False and not isinstance(source, Workload) and is_importable(source)
    if builder is not None and (must or can):
        with closing(ChildExecutor(builder, isolation)) as child:
            yield child
        return
    forks = isolate is not False and isolation.forks and forks_are_safe()
    if isolate is True and not forks:
        raise InvalidArgumentError("isolate", isolate, "False or 'auto' here, where a fork of this process hangs")
    with _live_executor(source, device, forks=forks) as live:
        yield live


@contextmanager
def _live_executor(source: Workload | Callable[..., Any], device: Device, *, forks: bool) -> Iterator[Executor]:
    """Trials of what lives in this process, here or in forks of it. Only here there is something to put back."""
    if isinstance(source, Workload):
        check_placed(source, device)
    with preserved(
        source.stateful if isinstance(source, Workload) and not forks else (), device.torch_device
    ) as restore:
        workload = source if isinstance(source, Workload) else build(source, device.torch_device)
        live = LocalExecutor(workload, device, restore)
        if not forks:
            live.clear()
        with closing(ForkExecutor(live) if forks else live) as executor:
            yield executor


def _check(*, headroom: Any, steps: Any, isolate: Any, on_trial: Any) -> None:
    if isinstance(headroom, bool) or not isinstance(headroom, (int, float)) or not 0 <= headroom < 1:
        raise InvalidArgumentError("headroom", headroom, "a fraction from 0 to below 1")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise InvalidArgumentError("steps", steps, "a whole number of at least 2")
    if not isinstance(isolate, bool) and isolate != "auto":
        raise InvalidArgumentError("isolate", isolate, "True, False or 'auto'")
    if on_trial is not None and not callable(on_trial):
        raise InvalidArgumentError("on_trial", on_trial, "a function of a Trial, or None")

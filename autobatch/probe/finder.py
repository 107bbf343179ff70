"""find(): the largest batch size of a workload on a device. Ties the search to trials, state and processes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from autobatch.device.base import Device
from autobatch.errors import DoesNotFitError, InvalidArgumentError
from autobatch.probe.advice import fragmentation_notes
from autobatch.probe.cache import open_cache
from autobatch.probe.command import Command
from autobatch.probe.command_executor import CommandExecutor
from autobatch.probe.data import search_within
from autobatch.probe.executor import Executor, LocalExecutor, Setting
from autobatch.probe.isolation import ChildExecutor, is_importable
from autobatch.probe.lock import device_lock
from autobatch.probe.recall import Recall
from autobatch.probe.search import SearchAnswer, check_arguments
from autobatch.probe.source import Source, builder_of, check_placed, source_of
from autobatch.probe.state import preserved
from autobatch.probe.trial import Attempt, TrialRequest, clean_up
from autobatch.probe.worker import build, check_not_importing_main
from autobatch.probe.workload import Workload
from autobatch.result import BatchSizeResult, Trial
from autobatch.units import format_bytes, parse_bytes
from autobatch.virtual.resolve import resolve_device

CONFIRM_STEPS = 20
"""Steps of a confirming run: enough to meet failures that come late, in the second step or in a later one."""

SHUFFLES, SHUFFLES_AT_THE_EDGE = 8, 20
"""Shuffled orders that an answer must survive where samples are of different lengths. Without headroom no margin covers
an order that was not tried."""

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
    ``step(n)`` in this process only what ``state`` names is put back.

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
            can reach one.
        time_limit_s: seconds after which no larger size is tried.
        first_guess: a size near which the answer is expected: the search begins there.
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
        probe = _Probe(
            executor=executor,
            setting=setting,
            steps=steps,
            shuffles=SHUFFLES if headroom else SHUFFLES_AT_THE_EDGE,
            capacity_bytes=_capacity(setting, limit_bytes, headroom),
            is_restricted=headroom > 0 or limit_bytes is not None or not place.ends_by_itself,
            on_trial=on_trial,
        )
        options: dict[str, Any] = {"multiple_of": multiple_of, "max_batch_size": max_batch_size, "steps": steps}
        options |= {"headroom": headroom, "limit_bytes": limit_bytes, "avoid_oom": avoid_oom}
        options["isolated"] = not isinstance(executor, LocalExecutor)
        budget_bytes = _least(setting.budget_bytes, limit_bytes)
        recall = Recall(answers, executor, setting, budget_bytes, start=start, options=options)
        if (known := recall.answer(probe.check)) is not None:
            return replace(known, duration_s=time.monotonic() - started_s)
        guess = recall.first_guess or first_guess
        found = probe.search(rounding | limits, first_guess=guess)
    result = probe.result(found, headroom, limit_bytes, time.monotonic() - started_s)
    if isinstance(executor, CommandExecutor):
        result = replace(result, notes=(*result.notes, *executor.notes()))
    if isinstance(executor, LocalExecutor) and isinstance(source, Workload) and not source.stateful:
        result = replace(result, notes=(*result.notes, NOT_RESTORED))
    recall.keep(result)
    return replace(result, notes=(*result.notes, *recall.notes))


@dataclass(kw_only=True)
class _Probe:
    """One call of find(), once its device and its workload are there."""

    executor: Executor
    setting: Setting
    steps: int
    shuffles: int
    capacity_bytes: int | None
    is_restricted: bool
    on_trial: Callable[[Trial], None] | None
    trials: list[Trial] = field(default_factory=list)
    confirmation: list[Trial] = field(default_factory=list)
    suspects: dict[int, BaseException] = field(default_factory=dict)
    checked: dict[tuple[int, str], Attempt] = field(default_factory=dict)
    """By size and mode: trials of a remembered answer, which the search need not repeat."""
    trained: int | None = None
    """The batch that training takes, where evaluation comes amid it."""

    def search(self, options: dict[str, Any], *, first_guess: int | None) -> dict[str, SearchAnswer]:
        """An answer for each mode of the workload. Evaluation comes second, for training is what it runs amid."""
        answers: dict[str, SearchAnswer] = {}
        for mode in ("train", "eval") if self.setting.mode == "both" else (self.setting.mode,):
            self.suspects.clear()
            self.trained = answers["train"].batch_size if answers else None
            try:
                answers[mode] = search_within(
                    self.setting.data.get(mode),
                    lambda size, mode=mode: self._ask(size, mode),  # type: ignore[misc]
                    lambda size, mode=mode: self._confirm(size, mode),  # type: ignore[misc]
                    capacity_bytes=self.capacity_bytes,
                    first_guess=self.trained or first_guess,
                    **options,
                )
            except DoesNotFitError as error:
                raise self._explained(error) from None
        return answers

    def result(
        self, answers: dict[str, SearchAnswer], headroom: float, limit_bytes: int | None, duration_s: float
    ) -> BatchSizeResult:
        answer = next(iter(answers.values()))
        result = BatchSizeResult(
            batch_size=answer.batch_size,
            proof=answer.proof,
            smallest_failure=answer.smallest_failure,
            trials=tuple(self.trials),
            confirmation=tuple(self.confirmation),
            eval_batch_size=answers["eval"].batch_size if "eval" in answers else None,
            headroom=headroom,
            budget_bytes=_least(self.setting.budget_bytes, limit_bytes),
            environment={**self.setting.environment, "workload": self.setting.name},
            notes=tuple(note for mode, found in answers.items() for note in _of_mode(mode, found.notes)),
            duration_s=duration_s,
        )
        return replace(result, notes=(*result.notes, *fragmentation_notes(result)))

    def _ask(self, size: int, mode: str) -> Trial:
        # One sample is enough for an evaluation to meet the optimizer's state.
        before = () if self.trained is None else (self._smallest("train"),)
        checked = self.checked.pop((size, mode), None)
        attempt = checked or self.executor.run(self._request(size, mode, self.steps, before))
        if attempt.suspect is not None:
            self.suspects[size] = attempt.suspect
        if checked is None:
            self.trials.append(self._told(attempt.trial))
        return attempt.trial

    def check(self, size: int, mode: str) -> Trial:
        """One trial of a remembered answer, as a fresh start."""
        (attempt,) = self.executor.confirm((self._fresh(size, mode),))
        self.checked[size, mode] = attempt
        self.trials.append(self._told(attempt.trial))
        self.trained = size if (self.setting.mode, mode) == ("both", "train") else None
        return attempt.trial

    def _fresh(self, size: int, mode: str) -> TrialRequest:
        before = () if self.trained is None else (self.trained,)
        return replace(self._request(size, mode, CONFIRM_STEPS, before), history="a fresh start")

    def _confirm(self, size: int, mode: str) -> Trial:
        fresh = self._fresh(size, mode)
        smallest = self._smallest(mode if self.trained is None else "train")
        before = (*fresh.sizes_before, smallest, smallest)
        after_small = replace(fresh, history="smaller batches", sizes_before=before)
        extent = self.setting.data.get(mode)
        seeds = range(self.shuffles if extent is not None and extent.varies else 0)
        shuffled = [replace(fresh, history=f"shuffled epoch {seed + 1}", shuffle_seed=seed) for seed in seeds]
        attempts = self.executor.confirm((fresh, after_small, *shuffled))
        self.confirmation += [self._told(attempt.trial) for attempt in attempts]
        return attempts[-1].trial

    def _smallest(self, mode: str) -> int:
        """The smallest size that ran: one sample, unless the caller started higher (batch norm refuses one)."""
        return min(trial.batch_size for trial in self.trials if trial.fits and trial.mode == mode)

    def _request(self, size: int, mode: str, steps: int, before: tuple[int, ...]) -> TrialRequest:
        limit_bytes = self.capacity_bytes if self.is_restricted else None
        return TrialRequest(batch_size=size, steps=steps, limit_bytes=limit_bytes, mode=mode, sizes_before=before)

    def _told(self, trial: Trial) -> Trial:
        if self.on_trial is not None:
            self.on_trial(trial)
        return trial

    def _explained(self, error: DoesNotFitError) -> BaseException:
        """What to raise when nothing fits: the workload's own error, unless it was surely about memory."""
        size = error.trial.batch_size if error.trial else 1
        if size in self.suspects:
            return self.suspects[size]
        device = self.setting.environment.get("device", "the device")
        what = f"{'an evaluation of ' if error.trial is not None and error.trial.mode == 'eval' else ''}batch {size}"
        held_bytes = self.setting.held_bytes
        message = f"{what} does not fit on {device} in {format_bytes(self.capacity_bytes)}"
        if held_bytes is not None:
            message += f", of which the model alone holds {format_bytes(held_bytes)}"
        if error.trial is not None and error.trial.message:
            message += f": {error.trial.message}"
        return DoesNotFitError(message, error.trial)


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
    builder = builder_of(source)
    isolation = device.isolation()
    if isolation.required or isolate is True:
        if builder is None:
            raise InvalidArgumentError("workload", source, f"a function that builds it, because {isolation.reason}")
        isolate = True
    elif isolate == "auto":
        isolate = not isinstance(source, Workload) and is_importable(source)
    if isolate and builder is not None:
        with closing(ChildExecutor(builder, isolation)) as child:
            yield child
        return
    if isinstance(source, Workload):
        check_placed(source, device)
    with preserved(source.stateful if isinstance(source, Workload) else (), device.torch_device) as restore:
        workload = source if isinstance(source, Workload) else build(source, device.torch_device)
        clean_up(workload, device)
        with closing(LocalExecutor(workload, device, restore)) as local:
            yield local


def _check(*, headroom: Any, steps: Any, isolate: Any, on_trial: Any) -> None:
    if isinstance(headroom, bool) or not isinstance(headroom, (int, float)) or not 0 <= headroom < 1:
        raise InvalidArgumentError("headroom", headroom, "a fraction from 0 to below 1")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise InvalidArgumentError("steps", steps, "a whole number of at least 2")
    if isolate not in (True, False, "auto"):
        raise InvalidArgumentError("isolate", isolate, "True, False or 'auto'")
    if on_trial is not None and not callable(on_trial):
        raise InvalidArgumentError("on_trial", on_trial, "a function of a Trial, or None")


def _capacity(setting: Setting, limit_bytes: int | None, headroom: float) -> int | None:
    """What the trials may have: the budget or the user's limit, less the headroom."""
    budget_bytes = _least(setting.budget_bytes, limit_bytes)
    if budget_bytes is None:
        return None
    capacity_bytes = math.floor(budget_bytes * (1 - headroom))
    held_bytes = setting.held_bytes or 0
    if capacity_bytes <= held_bytes:
        raise DoesNotFitError(
            f"the model alone needs {held_bytes} bytes ({format_bytes(held_bytes)}); {capacity_bytes} bytes "
            f"({format_bytes(capacity_bytes)}) are allowed"
        )
    return capacity_bytes


def _of_mode(mode: str, notes: tuple[str, ...]) -> list[str]:
    """``notes``, said to be about evaluation where they are: training is not to blame for them."""
    return [f"Evaluation: {note[0].lower()}{note[1:]}" if mode == "eval" else note for note in notes]


def _least(*sizes: int | None) -> int | None:
    known = [size for size in sizes if size is not None]
    return min(known) if known else None

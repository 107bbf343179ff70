"""find(): the largest batch size of a workload on a device. Ties the search to trials, state and processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

from autobatch.device.base import Device
from autobatch.device.host import HostDevice
from autobatch.errors import InvalidArgumentError
from autobatch.probe.advice import limit_notes
from autobatch.probe.agreement import Agreement
from autobatch.probe.cache import ResultCache, open_cache
from autobatch.probe.command import Command
from autobatch.probe.command.executor import CommandExecutor
from autobatch.probe.executor import Executor, LocalExecutor, Setting
from autobatch.probe.foresight import RECORDABLE
from autobatch.probe.guess import WITHIN_S, Guess, Twin, short_of, twin_ahead, twin_of, virtual_guess
from autobatch.probe.inquiry import (
    FRESH_AT_THE_EDGE,
    SHUFFLES,
    SHUFFLES_AT_THE_EDGE,
    Inquiry,
    capacity,
    least,
    withheld_of_host,
)
from autobatch.probe.isolation import ForkExecutor
from autobatch.probe.neighbours import locked, shared
from autobatch.probe.places import executor_of
from autobatch.probe.processes.worker import check_not_importing_main
from autobatch.probe.recall import Recall
from autobatch.probe.search.arguments import check_arguments, within_effective_batch
from autobatch.probe.source import Source, source_of
from autobatch.probe.workload import Workload
from autobatch.ranks import Ranks
from autobatch.result import BatchSizeResult, Trial
from autobatch.units import parse_bytes
from autobatch.virtual.resolve import resolve_device

NOT_RESTORED = "What the step function changes was not put back: name it in state=[model, optimizer]."
_NO_CACHE = "Ranks that agree on a size use no cache: it was searched for anew, and is not kept."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """What find() was asked, checked. The names are its own."""

    source: Source
    options: dict[str, Any]
    """Those of the search, by their names."""
    first_size: int
    first_guess: int | None
    headroom: float
    steps: int
    limit_bytes: int | None
    answers: ResultCache | None
    on_trial: Callable[[Trial], None] | None
    started_s: float

    @property
    def identity(self) -> dict[str, Any]:
        """What an answer in the cache depends on, beside the workload and the device."""
        options = {name: self.options[name] for name in ("multiple_of", "max_batch_size", "avoid_oom")}
        return options | {"steps": self.steps, "headroom": self.headroom, "limit_bytes": self.limit_bytes}

    @property
    def of_all_ranks(self) -> dict[str, Any]:
        """What ranks must have been asked alike to go the same way."""
        first = {"first_guess": self.first_guess, "headroom": self.headroom, "steps": self.steps}
        return self.options | first


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
    per_rank: bool = False,
    time_limit_s: float | None = None,
    first_guess: int | None = None,
    cache: bool | str | os.PathLike[str] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> BatchSizeResult:
    """The largest batch size of ``workload`` that trains on ``device``, found by running it.

    What the caller has is left as it was, bit for bit: parameters, buffers, optimizer, scheduler, random numbers. Of a
    ``step(n)`` that is tried in this process only what ``state`` names is put back.

    In an initialised process group of several ranks all of them must call it. They try the same sizes and agree on one
    that fits on each; ``environment["ranks"]`` says how many they were. A model in DistributedDataParallel is tried
    without it. What runs collectives amid a step, as FSDP2 does, needs a function that builds it: the child processes
    of the ranks meet where ``init_process_group()`` finds them, and are replaced when one of them fails.

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
        headroom: fraction of the device withheld from the trials and left to training; on the host never less than
            half a per cent (3 MiB of a small limit), by which processes that do the same differ.
        memory_limit: bytes (``"10GiB"``) that the workload may have at most; on the host, what it may add to an idle
            process. Each rank has its own; without one, ranks of one machine share its memory equally.
        steps: training steps of a trial, at least 2: the first alone creates the optimizer's state.
        avoid_oom: provoke no failure. A virtual GPU of the same size fails in the device's place where the workload
            can be had there; the search stays within its answer, approaches from below and trusts the measured memory.
        isolate: True for trials in a child process, False for this one; ``"auto"`` takes a child where the workload
            can reach one. On host memory (Linux) live objects are tried in forks of this process: there a library that
            is refused memory may crash. ``environment["trials_in"]`` of the result says which it was.
        per_rank: among several ranks, each searches a size of its own on its own device, for devices that are unequal;
            ``environment["rank_sizes"]`` has those of all. A trial can run no collective then.
        time_limit_s: seconds after which no larger size is tried.
        first_guess: a size near which the answer is expected: the search begins there, or where small batches tell
            better (CUDA, ROCm, host memory) with one of two samples, and the guess counts where it agrees with these.
            Without one, on a real NVIDIA GPU, it begins at the answer of a virtual one, where the workload can reach a
            child process.
        cache: None for no cache; True, or a folder, to keep the answer there and to look there first. An answer that
            is found there is confirmed by one trial. Ranks that agree on a size use none.
        on_trial: called with each :class:`~autobatch.result.Trial` as it ends, those of the confirmation too.

    Raises:
        InvalidArgumentError: an argument is wrong; nothing was touched.
        DeviceError: the device is not there, or broke.
        DoesNotFitError: not even the smallest size fits.
        RankError: another rank failed or is gone.
        Exception: whatever the workload raises for a reason other than memory, unchanged.
    """
    check_not_importing_main()
    started_s = time.monotonic()
    together = Agreement(Ranks.here())
    with together.session():
        if isinstance(workload, Command) and workload.effective_batch_size is not None:
            max_batch_size = within_effective_batch(
                workload.effective_batch_size, max_batch_size=max_batch_size, multiple_of=multiple_of
            )
        options: dict[str, Any] = {
            "multiple_of": multiple_of,
            "growth": growth,
            "max_batch_size": max_batch_size,
            "start": start,
            "avoid_oom": avoid_oom,
            "time_limit_s": time_limit_s,
        }
        permitted = check_arguments(**options, first_guess=first_guess)
        _check(headroom=headroom, steps=steps, isolate=isolate, per_rank=per_rank, on_trial=on_trial)
        first = max(1, permitted.rank(start))
        question = _Question(
            source=source_of(workload, state),
            options=options,
            first_size=permitted.size(first if max_batch_size is None else min(first, permitted.rank(max_batch_size))),
            first_guess=first_guess,
            headroom=headroom,
            steps=steps,
            limit_bytes=None if memory_limit is None else parse_bytes(memory_limit, argument="memory_limit"),
            answers=open_cache(cache),
            on_trial=on_trial,
            started_s=started_s,
        )
        together.begin({"per_rank": per_rank} | ({} if per_rank else question.of_all_ranks))
        device = shared(resolve_device(device, memory_limit_bytes=question.limit_bytes), together)
        agreed = Agreement() if per_rank else together
        may_begin_ahead = first_guess is None and not together.ranks.are_several
        with (
            locked(device, together),
            twin_ahead(question.source, device) if may_begin_ahead else nullcontext() as ahead,
            executor_of(question.source, device, isolate, agreed, together) as executor,
        ):
            found = _found(question, device, executor, agreed, together, ahead)
        found = replace(found, notes=(*found.notes, *_notes_of_ranks(question, device, agreed, together)))
        return together.finish_each(found) if per_rank else together.finish(found)


def _found(
    question: _Question,
    device: Device,
    executor: Executor,
    agreed: Agreement,
    together: Agreement,
    ahead: Twin | None,
) -> BatchSizeResult:
    """What the search says, or the cache."""
    source, limit_bytes = question.source, question.limit_bytes
    own = agreed.ask("the workload", executor.setting)[agreed.ranks.rank]
    inquiry = _inquiry(question, device, executor, own, agreed)
    if together.ranks.are_several and isinstance(executor, (LocalExecutor, ForkExecutor)):
        inquiry.look(question.first_size)
    options = {**question.identity, "isolated": not isinstance(executor, LocalExecutor)}
    answers = None if agreed.ranks.are_several else question.answers
    recall = Recall(
        answers, executor, own, least(own.budget_bytes, limit_bytes), start=question.options["start"], options=options
    )
    about_limit = limit_notes(limit_bytes, own.budget_bytes, own.environment)
    if (known := recall.answer(inquiry.check)) is not None:
        notes = (*known.notes, *about_limit)
        return replace(known, notes=notes, duration_s=time.monotonic() - question.started_s)
    first_guess, ceiling = recall.first_guess or question.first_guess, None
    guess, said = None, ""
    if first_guess is None:
        guess, said = agreed.by_narrowest("a first guess", lambda: _guess(question, inquiry, ahead))
    if guess is not None:
        # A GPU that is not there has run it all, kernels' workspaces included: recorded trials would tell no more.
        inquiry.records, inquiry.smallest = False, guess.smallest
        first_guess = guess.batch_size
        if question.options["avoid_oom"]:
            first_guess, ceiling = short_of(first_guess, own.environment), first_guess
    answer = inquiry.search(question.options, first_guess=first_guess, ceiling=ceiling)
    result = inquiry.result(answer, question.headroom, limit_bytes, time.monotonic() - question.started_s)
    if isinstance(executor, CommandExecutor):
        result = executor.completed(result)
    if isinstance(executor, LocalExecutor) and isinstance(source, Workload) and not source.stateful:
        result = replace(result, notes=(*result.notes, NOT_RESTORED))
    recall.keep(result)
    return replace(result, notes=(*result.notes, *recall.notes, *([said] if said else []), *about_limit))


def _inquiry(question: _Question, device: Device, executor: Executor, own: Setting, agreed: Agreement) -> Inquiry:
    """The question on this device: each rank's trials may have what it has itself, and all know what the least is."""
    limit_bytes, headroom = question.limit_bytes, question.headroom
    anew = device.isolation().anew
    withheld = withheld_of_host(least(own.budget_bytes, limit_bytes)) if anew else 0.0
    capacity_bytes = capacity(own, limit_bytes, max(headroom, withheld))
    return Inquiry(
        executor=executor,
        setting=agreed.setting(own, least(own.budget_bytes, limit_bytes)),
        first_size=question.first_size,
        steps=question.steps,
        shuffles=SHUFFLES if headroom else SHUFFLES_AT_THE_EDGE,
        fresh=max(agreed.exchange("fresh starts", FRESH_AT_THE_EDGE if anew and not headroom else 1)),
        capacity_bytes=capacity_bytes,
        least_capacity_bytes=least(*agreed.exchange("the capacity", capacity_bytes)),
        is_restricted=headroom > 0 or limit_bytes is not None or not device.ends_by_itself,
        on_trial=question.on_trial,
        clock=agreed.clock,
        agree_forecast=agreed.forecast,
        records=all(agreed.exchange("recording", own.environment["kind"] in RECORDABLE)),
    )


def _guess(question: _Question, inquiry: Inquiry, ahead: Twin | None) -> tuple[Guess | None, str]:
    """What a virtual GPU of the same size answers, and a sentence about it; None where there can be none."""
    card = twin_of(inquiry.setting, of_virtual=question.options["avoid_oom"])
    if card is None:
        return None, ""
    options = question.options | {"avoid_oom": False}  # what fails there harms nobody
    ahead = ahead if ahead is not None and ahead.stands_for(inquiry.setting) else None
    limit_s = options["time_limit_s"]
    options["time_limit_s"] = WITHIN_S if limit_s is None else min(WITHIN_S, limit_s)

    def search(twin: Executor) -> Guess:
        there = inquiry.elsewhere(twin)
        answers = there.search(options, first_guess=None)
        mode, answer = next(iter(answers.items()))
        ran = [trial.batch_size for trial in there.trials if trial.fits and trial.mode == mode]
        return Guess(batch_size=answer.batch_size, smallest=min(ran))

    return virtual_guess(question.source, card, search, ahead)


def _notes_of_ranks(question: _Question, device: Device, agreed: Agreement, together: Agreement) -> list[str]:
    """What ranks have of the cache, and of a machine that they share."""
    notes = [_NO_CACHE] if agreed.ranks.are_several and question.answers is not None else []
    if together.local_size > 1 and isinstance(device, HostDevice) and question.limit_bytes is None:
        notes.append(f"Each of the {together.local_size} ranks on this machine may have an equal part of its memory.")
    return notes


def _check(*, headroom: Any, steps: Any, isolate: Any, per_rank: Any, on_trial: Any) -> None:
    if isinstance(headroom, bool) or not isinstance(headroom, (int, float)) or not 0 <= headroom < 1:
        raise InvalidArgumentError("headroom", headroom, "a fraction from 0 to below 1")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise InvalidArgumentError("steps", steps, "a whole number of at least 2")
    if not isinstance(isolate, bool) and isolate != "auto":
        raise InvalidArgumentError("isolate", isolate, "True, False or 'auto'")
    if not isinstance(per_rank, bool):
        raise InvalidArgumentError("per_rank", per_rank, "True or False")
    if on_trial is not None and not callable(on_trial):
        raise InvalidArgumentError("on_trial", on_trial, "a function of a Trial, or None")

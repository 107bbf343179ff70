"""A probe as it happens: a table that grows on a terminal, one line a trial elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner

from autobatch.device.base import DeviceInfo
from autobatch.report.table import remark, trials_table
from autobatch.result import BatchSizeResult, Measurement, Trial
from autobatch.training.plan import AccumulationPlan
from autobatch.units import GIB, format_bytes, format_seconds

_REFRESHES_PER_S = 8


class Display(Protocol):
    """Shown while its context lasts; told of every trial as it ends."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def on_trial(self, trial: Trial) -> None: ...


def display_for(console: Console, info: DeviceInfo) -> Display:
    """The display that suits ``console`` and a probe on the device ``info``."""
    if console.is_terminal:
        return _TableDisplay(console, comparable=info.kind != "cpu", timed=not info.virtual)
    return _LineDisplay(console, comparable=info.kind != "cpu", timed=not info.virtual)


class _TableDisplay:
    def __init__(self, console: Console, *, comparable: bool, timed: bool) -> None:
        self._comparable, self._timed = comparable, timed
        self._trials: list[Trial] = []
        self._spinner: Spinner | None = Spinner("dots", "starting")
        self._live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=_REFRESHES_PER_S,
            vertical_overflow="visible",
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> _TableDisplay:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._spinner = None
        self._live.stop()

    def on_trial(self, trial: Trial) -> None:
        self._trials.append(trial)
        if self._spinner is not None:
            self._spinner.update(text="confirming" if trial.history else "searching")
        self._live.refresh()

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._trials:
            parts.append(trials_table(self._trials, comparable=self._comparable, timed=self._timed))
        if self._spinner is not None:
            parts.append(self._spinner)
        return Group(*parts)


class _LineDisplay:
    def __init__(self, console: Console, *, comparable: bool, timed: bool) -> None:
        self._console, self._comparable, self._timed = console, comparable, timed
        self._count = 0

    def __enter__(self) -> _LineDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Every line is out already."""

    def on_trial(self, trial: Trial) -> None:
        self._count += 1
        say(self._console, _trial_line(self._count, trial, comparable=self._comparable, timed=self._timed))


def _trial_line(number: int, trial: Trial, *, comparable: bool, timed: bool) -> str:
    """One trial as ``key=value`` pairs in a fixed order, made to be found with grep.

    A peak of host memory is resident memory and its budget private data, so the two are not shown side by side; a step
    of a virtual GPU computes nothing, so its time is not shown.
    """
    measured = trial.measurement or Measurement(peak_allocated_bytes=None, peak_reserved_bytes=None)
    pairs = {
        "trial": str(number),
        "batch_size": str(trial.batch_size),
        "outcome": trial.outcome.value,
        "mode": trial.mode,
        "peak_gib": _gib(measured.peak_allocated_bytes),
        "budget_gib": _gib(measured.capacity_bytes),
        "step_s": "unknown" if measured.step_time_s is None else f"{measured.step_time_s:.4f}",
        "took_s": f"{trial.duration_s:.2f}",
    }
    if not comparable:
        del pairs["budget_gib"]
    if not timed:
        del pairs["step_s"]
    noticed = remark(trial)
    return " ".join(f"{key}={value}" for key, value in pairs.items()) + (f" ({noticed})" if noticed else "")


def _gib(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else f"{size_bytes / GIB:.3f}"


def say(console: Console, line: str, *, style: str | None = None) -> None:
    """Prints ``line`` as it is: not wrapped, not marked up."""
    console.print(line, style=style, soft_wrap=True, markup=False, highlight=False, emoji=False)


def device_line(info: DeviceInfo, torch_device: str) -> str:
    """Which device it is, in one line."""
    virtual = ", virtual: memory is accounted, nothing is computed" if info.virtual else ""
    sizes = f"{format_bytes(info.total_bytes)}, {format_bytes(info.free_bytes)} free"
    budget = info.details.get("budget")
    return f"Device: {info.name} ({torch_device}{virtual}), {sizes}{f', budget {budget}' if budget else ''}"


def other_lines(info: DeviceInfo) -> list[str]:
    """The other processes on the device, one a line; and that they are unknown, where the driver does not tell."""
    unknown = ["  other processes: unknown"] if info.details.get("others_unknown") else []
    return unknown + [
        f"  another process has {format_bytes(other.used_bytes)}: {other.name or 'unknown'} (pid {other.pid})"
        for other in info.others
    ]


def closing_lines(result: BatchSizeResult, plan: AccumulationPlan | None = None) -> list[str]:
    """What was noticed, the answer, and how to use it: as it is, or in micro-batches as ``plan`` has them."""
    evaluates = result.eval_batch_size and result.trials[0].mode != "eval"
    evaluation = f"; for evaluation: {result.eval_batch_size}" if evaluates else ""
    confirming = f" and {len(result.confirmation)} to confirm" if result.confirmation else ""
    effort = f"{_count(len(result.trials), 'trial')}{confirming}, {_count(result.oom_count, 'failure')}"
    withheld = f", {result.headroom:.0%} of memory left free" if result.headroom else ""
    return [
        *(f"Note: {note}" for note in result.notes),
        f"{result.conclusion}{evaluation}{withheld}. {effort}, {format_seconds(result.duration_s)}",
        *([] if plan is None else [_plan_line(result, plan)]),
        f"  Use it:  {_use(result, plan)}",
    ]


def _plan_line(result: BatchSizeResult, plan: AccumulationPlan) -> str:
    """The plan, and what would fit where its micro-batches are smaller."""
    while_accumulating = " while gradients accumulate" if plan.steps > 1 else ""
    fits = f"; {result.batch_size} fit{while_accumulating}" if result.batch_size != plan.micro_batch_size else ""
    return f"  Plan:    {plan}{fits}"


def _use(result: BatchSizeResult, plan: AccumulationPlan | None) -> str:
    """How to use the answer: the command that was probed, with the numbers in it, or what a script would say."""
    size, steps = (result.batch_size, 1) if plan is None else (plan.micro_batch_size, plan.steps)
    if "command" in result.environment:
        words = str(result.environment["workload"])
        return words.replace("{batch_size}", str(size)).replace("{accumulation_steps}", str(steps))
    loader = f"DataLoader(dataset, batch_size={size})"
    if plan is not None:
        loader += f", {_count(steps, 'accumulation step')}"
    mode = "eval" if result.trials[0].mode == "eval" else "train"
    accumulation = "" if plan is None else f", gradient_accumulation_steps={steps}"
    return f"{loader}  or  TrainingArguments(per_device_{mode}_batch_size={size}{accumulation})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

"""Trials of a training command: every one a fresh start of it, on a GPU, a virtual GPU or host memory."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import platformdirs

from autobatch.device.base import Device
from autobatch.device.fraction import fraction_of
from autobatch.device.process import out_of_memory_kills
from autobatch.errors import InvalidArgumentError, WorkloadFailedError
from autobatch.hook import TRIAL_VARIABLE, python_path
from autobatch.probe.command import Command, tracker_variables
from autobatch.probe.command.run import Ending, TrialFolder, run
from autobatch.probe.command.verdict import SHRANK, attempt_of, is_end_of_data
from autobatch.probe.executor import Setting, describe
from autobatch.probe.isolation import ChildExecutor
from autobatch.probe.trial import Attempt, TrialRequest
from autobatch.probe.workload import Workload
from autobatch.probe.workload.signature import Signature
from autobatch.result import BatchSizeResult
from autobatch.virtual.folders import temporary_folder

_LEAST_BYTES, _FROM = 4, 2**24
"""A sample takes so many bytes at least. From this size on they tell more than the noise of a measurement."""

_PER_PROCESS = "The limit on host memory holds for each process of the command, not for all of them together."
_ONE_HISTORY = "A command can be confirmed after a fresh start alone: smaller batches before it cannot be asked of it."


class CommandExecutor:
    """Runs ``command`` once for each trial and confirmation.

    Raises:
        InvalidArgumentError: if the device is none that a command can be measured on.
    """

    where = "processes of the command"
    begins_small = False

    def __init__(self, command: Command, device: Device) -> None:
        self._kind = device.torch_device.partition(":")[0]
        if self._kind not in ("cuda", "cpu") or sys.platform != "linux":
            raise InvalidArgumentError(
                "device", device.torch_device, "a GPU of torch.cuda or 'cpu', on Linux, for a command"
            )
        self._command, self._device = command, device
        self._isolation = device.isolation()
        self._setting: Setting | None = None
        self._fraction: float | None = None
        self._log = command.log or _new_log()
        try:
            self._log.open("ab").close()
        except OSError as exc:
            raise InvalidArgumentError("log", str(self._log), f"a file that can be written ({exc.strerror})") from exc
        self._fitted: dict[int, int] = {}  # peak bytes by size
        self._ranks = 1  # until the first run has told
        self._noticed: dict[str, None] = {}

    def setting(self) -> Setting:
        if self._setting is None:
            found = self._host_setting() if self._kind == "cpu" else self._gpu_setting()
            environment = {**found.environment, "command": list(self._command.words), "log": str(self._log)}
            environment["effective_batch_size"] = self._command.effective_batch_size
            self._setting = replace(found, held_bytes=None, name=self._command.title, environment=environment)
        return self._setting

    def run(self, request: TrialRequest) -> Attempt:
        started_s, kills = time.monotonic(), out_of_memory_kills()
        accumulation = self._accumulation(request)
        ending = self._run(request, accumulation)
        self._learn_ranks(ending)
        if self._accumulation(request) != accumulation:
            ending = self._run(request, self._accumulation(request))
        attempt = attempt_of(
            request,
            ending,
            kind=self._kind,
            killed=out_of_memory_kills() != kills,
            smaller_fitted=any(size < request.batch_size for size in self._fitted),
        )
        self._note(attempt, ending)
        return replace(attempt, trial=replace(attempt.trial, duration_s=time.monotonic() - started_s))

    def confirm(self, requests: tuple[TrialRequest, ...]) -> list[Attempt]:
        return [self.run(request) for request in requests[:1]]

    def signature(self, batch_size: int) -> Signature:
        return Signature(text=None, reason="nothing tells what a command does from its words")

    def close(self) -> None:
        """Nothing is left: each trial ended what it started."""

    def completed(self, result: BatchSizeResult) -> BatchSizeResult:
        """``result`` with what only the runs have told."""
        environment = {**result.environment, "ranks": self._ranks}
        # Only here: a process that trains live objects knows its data set before it is asked.
        ran = (*result.trials, *result.confirmation)
        next_one = [trial for trial in ran if trial.batch_size == result.smallest_failure]
        ended = result.proof == "next_size_failed" and any(is_end_of_data(trial) for trial in next_one)
        found = replace(result, proof="dataset", smallest_failure=None) if ended else result
        return replace(found, environment=environment, notes=(*result.notes, *self._notes()))

    def _notes(self) -> tuple[str, ...]:
        """What to know of the answer, in sentences."""
        per_process = (_PER_PROCESS,) if self._kind == "cpu" else ()
        log = f"The command's output is in {self._log}."
        return (*self._noticed, *self._command.warnings(), *per_process, _ONE_HISTORY, log)

    def _accumulation(self, request: TrialRequest) -> int:
        """The micro-batches in a step of this run.

        The gradients of the first are alive in the second, and more need no more, as far as the search has to know. But
        some trainers (that of transformers) take the inputs of all to the device first, so the answer is confirmed with
        as many as there will be.
        """
        planned = self._command.accumulation_steps(request.batch_size, self._ranks)
        return planned if request.history else min(2, planned)

    def _learn_ranks(self, ending: Ending) -> None:
        """Notes how many ranks train, as soon as one has made a step."""
        self._ranks = max((report["ranks"] for report in ending.reports if report["steps"]), default=self._ranks)
        effective = self._command.effective_batch_size
        if effective is not None and effective < self._ranks:
            allowed = f"at least {self._ranks}, a sample for each rank of the command"
            raise InvalidArgumentError("effective_batch_size", effective, allowed)

    def _run(self, request: TrialRequest, accumulation: int) -> Ending:
        with temporary_folder("autobatch-trial-") as folder:
            scratch = folder / "scratch"
            scratch.mkdir()
            words = self._command.filled(request.batch_size, scratch, accumulation)
            told = self._told(request, accumulation)
            self._fraction = told["fraction"]
            (folder / "request.json").write_text(json.dumps(told), encoding="utf-8")
            with open(self._log, "ab") as log:
                history = f", confirming after {request.history}" if request.history else ""
                log.write(f"=== batch {request.batch_size}{history}: {' '.join(words)}\n".encode())
                log.flush()
                trial = TrialFolder(folder, log, self._command.verbose)
                # In the search a step has two micro-batches at most: so long may two take.
                within_s = self._command.step_within_s * max(1, accumulation / 2)
                try:
                    return run(words, self._variables(folder), trial, step_within_s=within_s)
                except OSError as exc:
                    raise InvalidArgumentError(
                        "command", self._command.title, f"one that can be run: {exc.strerror or exc}"
                    ) from exc

    def _told(self, request: TrialRequest, accumulation: int) -> dict[str, Any]:
        """What the hook is to do."""
        fraction = None
        if self._kind == "cuda" and request.limit_bytes is not None:
            fraction = fraction_of(request.limit_bytes, int(self.setting().environment["total_bytes"]))
        return {
            "batch_size": request.batch_size,
            "steps": _optimizer_steps(request.steps, accumulation),
            "kind": self._kind,
            "limit_bytes": request.limit_bytes,
            "fraction": fraction,
            "records": request.records,
            # On the host only the recorder tells of memory that was refused and that the command went on without. A
            # run of many steps would fill what it takes itself.
            "notices": self._kind == "cpu" and not request.history,
        }

    def _variables(self, folder: Path) -> Mapping[str, str]:
        variables = {
            **os.environ,
            **self._isolation.environment,
            **tracker_variables(folder / "scratch"),
            "PYTHONPATH": python_path(os.environ),
            "PYTHONUNBUFFERED": "1",  # what is said before a process is lost must not be lost with it
            TRIAL_VARIABLE: str(folder),
        }
        # What chooses its device by itself must choose this one.
        if self._kind == "cpu":
            variables["CUDA_VISIBLE_DEVICES"] = ""
        elif (index := int(self._device.torch_device.partition(":")[2] or 0)) > 0:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            variables["CUDA_VISIBLE_DEVICES"] = seen[index] if index < len(seen) else str(index)
        return variables

    def _gpu_setting(self) -> Setting:
        # In a process of its own, which ends: one of this process would hold memory of the GPU from here on.
        with closing(ChildExecutor(_idle, self._isolation)) as child:
            return child.setting()

    def _host_setting(self) -> Setting:
        budget_bytes = self._isolation.memory_limit_bytes
        with self._device.restrict(budget_bytes):  # says so where a limit is not kept; this process may hold more
            pass
        environment = describe(self._device)
        return Setting(budget_bytes=budget_bytes, held_bytes=None, mode="train", name="", environment=environment)

    def _note(self, attempt: Attempt, ending: Ending) -> None:
        trial = attempt.trial
        if trial.fits:
            measured = trial.measurement
            self._fitted[trial.batch_size] = (measured and measured.peak_allocated_bytes) or 0
            self._check_that_it_grows(trial.batch_size)
        elif SHRANK in trial.message:
            self._noticed[f"At a batch of {trial.batch_size}: {trial.message}."] = None
        allowed = self._fraction
        if allowed is not None and any(report.get("fraction", 0) > 1.001 * allowed for report in ending.reports):
            self._noticed["The command sets a memory fraction of its own, so the headroom was not withheld."] = None

    def _check_that_it_grows(self, size: int) -> None:
        """Without this, the search would never end where the command makes batches of another size than asked."""
        smallest = min(self._fitted)
        grown_bytes = self._fitted[size] - self._fitted[smallest]
        if size >= _FROM and grown_bytes < _LEAST_BYTES * (size - smallest):
            raise WorkloadFailedError(
                f"a batch of {size} took no more memory than one of {smallest}: the command does not seem to make "
                "batches of the size in {batch_size}, or it catches out-of-memory errors itself. "
                f"Its output is in {self._log}",
                size,
            )


def _optimizer_steps(steps: int, accumulation: int) -> int:
    """As many of ``steps`` as take about the micro-batches of two each; three at least, to see whether a run thrashes.

    Otherwise a confirmation would train twenty times the effective batch.
    """
    return min(steps, max(3, -(-2 * steps // accumulation)))


def _idle() -> Workload:
    return Workload.from_step(lambda size: None)


def _new_log() -> Path:
    """A new file in the user's folder for logs, or where that cannot be written, in the one for temporary files."""
    name = time.strftime(f"probe-%Y%m%d-%H%M%S-{os.getpid()}.log")
    with contextlib.suppress(OSError):
        path = platformdirs.user_log_path("autobatch", ensure_exists=True) / name
        path.touch(exist_ok=False)
        return path
    descriptor, path_text = tempfile.mkstemp(prefix="autobatch-", suffix=".log")
    os.close(descriptor)
    return Path(path_text)

"""A training command as the thing to probe: its words, and what can be said of them before anything runs. No torch."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autobatch.errors import InvalidArgumentError
from autobatch.probe.search.arguments import check_count

BATCH_SIZE, ACCUMULATION_STEPS, SCRATCH = "{batch_size}", "{accumulation_steps}", "{scratch}"

TRACKERS = {
    "Weights & Biases": {"WANDB_MODE": "disabled"},
    "Comet": {"COMET_START_ONLINE": "false", "COMET_MODE": "DISABLED"},
    "MLflow": {"MLFLOW_TRACKING_URI": "file://{scratch}/mlruns", "DISABLE_MLFLOW_INTEGRATION": "TRUE"},
    "ClearML": {"CLEARML_OFFLINE_MODE": "1"},
    "Neptune": {"NEPTUNE_MODE": "offline"},
    "SwanLab": {"SWANLAB_MODE": "disabled"},
}
"""Services to which a command may report, and their own variables that keep a trial from being reported."""

_PLACES = (BATCH_SIZE, ACCUMULATION_STEPS, SCRATCH)
_PLACE = re.compile("|".join(map(re.escape, _PLACES)))
_PYTHON = re.compile(r"python[\d.]*(\.exe)?")
_BLIND_FLAGS = {
    "I": "it keeps Python from reading PYTHONPATH, through which autobatch counts the command's steps",
    "E": "it keeps Python from reading PYTHONPATH, through which autobatch counts the command's steps",
    "S": "it keeps Python from importing sitecustomize, through which autobatch counts the command's steps",
}


@dataclass(frozen=True, slots=True)
class Command:
    """A training command, unedited. Give it to :func:`autobatch.find`.

    ``{batch_size}`` stands where the number goes, in one word or in several. ``{scratch}`` is a folder that is new and
    empty in each trial and removed after it: say it where the command is told where to write.
    ``{accumulation_steps}`` stands where the number of micro-batches in a step of the optimizer goes; ``{batch_size}``
    is then the size of one of them.

    Args:
        words: the program and its arguments, such as ``["python", "train.py", "--batch-size", "{batch_size}"]``.
        effective_batch_size: samples of an optimizer step over all ranks, for a command that accumulates gradients.
            Trials hold the gradients of a first micro-batch while a second runs, the confirmation takes as many as
            there will be, and no larger micro-batch than the whole is tried.
        verbose: show the command's output as it comes, on standard error, beside the log file.
        log: the file for that output; None for a new one in the user's folder for logs.
        step_within_s: a command that makes no step for so long is given up.

    Raises:
        InvalidArgumentError: if the words are no command, do not say ``{batch_size}``, cannot be found, or keep
            autobatch out of the processes that they start; if ``{accumulation_steps}`` and an effective batch size do
            not come together.
    """

    words: tuple[str, ...]
    effective_batch_size: int | None = None
    verbose: bool = False
    log: Path | None = None
    step_within_s: float = 600.0

    def __init__(
        self,
        words: Sequence[str],
        *,
        effective_batch_size: int | None = None,
        verbose: bool = False,
        log: str | Path | None = None,
        step_within_s: float = 600.0,
    ) -> None:
        _check(words, step_within_s)
        _check_accumulation(words, effective_batch_size)
        for name, value in (
            ("words", tuple(words)),
            ("effective_batch_size", effective_batch_size),
            ("verbose", bool(verbose)),
            ("log", None if log is None else Path(log)),
            ("step_within_s", float(step_within_s)),
        ):
            object.__setattr__(self, name, value)

    @property
    def title(self) -> str:
        """The command as a shell has it."""
        return " ".join(word if word in _PLACES else _quoted(word) for word in self.words)

    def filled(self, batch_size: int, scratch: Path | str, accumulation_steps: int = 1) -> list[str]:
        """The words with the numbers and the folder put in. Other braces stay as they are."""
        values = {BATCH_SIZE: batch_size, ACCUMULATION_STEPS: accumulation_steps, SCRATCH: scratch}
        # In one pass, so that what is put in is never taken for a place.
        return [_PLACE.sub(lambda place: str(values[place[0]]), word) for word in self.words]

    def accumulation_steps(self, batch_size: int, ranks: int) -> int:
        """The micro-batches of ``batch_size`` samples that an optimizer step takes on each of ``ranks``."""
        return 1 if self.effective_batch_size is None else -(-self.effective_batch_size // (batch_size * ranks))

    def warnings(self) -> tuple[str, ...]:
        """What to know before it runs, in sentences."""
        said = [f"Kept from reporting the trials, through their own variables: {', '.join(TRACKERS)}."]
        if not any(SCRATCH in word for word in self.words):
            said.append(
                "The command writes its files, checkpoints and logs where it always does, zeros under a virtual GPU "
                f"too: say {SCRATCH} where it is told where to write, and each trial gets a folder of its own."
            )
        return tuple(said)


def tracker_variables(scratch: Path) -> dict[str, str]:
    """The variables of :data:`TRACKERS` for a trial whose folder is ``scratch``."""
    known = {name: value for variables in TRACKERS.values() for name, value in variables.items()}
    return {name: value.replace(SCRATCH, str(scratch)) for name, value in known.items()}


def _quoted(word: str) -> str:
    plain = _PLACE.sub("", word)
    return word if not plain or shlex.quote(plain) == plain else shlex.quote(word)


def _check(words: Any, step_within_s: Any) -> None:
    is_list = isinstance(words, Sequence) and not isinstance(words, (str, bytes))
    if not is_list or not words or not all(isinstance(word, str) and "\0" not in word for word in words):
        raise InvalidArgumentError("command", words, "a list of words: the program, then its arguments")
    line = shlex.join(words)
    if not any(BATCH_SIZE in word for word in words):
        raise InvalidArgumentError(
            "command", line, f"one that says {BATCH_SIZE} where the number goes, such as --batch-size {BATCH_SIZE}"
        )
    if isinstance(step_within_s, bool) or not isinstance(step_within_s, (int, float)) or not step_within_s > 0:
        raise InvalidArgumentError("step_within_s", step_within_s, "a positive number of seconds")
    if BATCH_SIZE not in words[0] and shutil.which(words[0]) is None:
        raise InvalidArgumentError("command", line, f"one that can be run: {words[0]} is not found")
    blind = _blind(words)
    if blind is not None:
        flag, reason = blind
        raise InvalidArgumentError("command", line, f"without {flag}: {reason}")


def _check_accumulation(words: Sequence[str], effective_batch_size: Any) -> None:
    says_it = any(ACCUMULATION_STEPS in word for word in words)
    if effective_batch_size is not None:
        check_count("effective_batch_size", effective_batch_size)
    if says_it and effective_batch_size is None:
        raise InvalidArgumentError(
            "effective_batch_size", None, f"the samples of an optimizer step, for the command says {ACCUMULATION_STEPS}"
        )
    if effective_batch_size is not None and not says_it:
        raise InvalidArgumentError(
            "effective_batch_size",
            effective_batch_size,
            f"left out, or the command must say {ACCUMULATION_STEPS} where the number of micro-batches goes, such as "
            f"--gradient-accumulation-steps {ACCUMULATION_STEPS}",
        )


def _blind(words: Sequence[str]) -> tuple[str, str] | None:
    """The word that keeps the start-up hook out of the command's processes, and why; None if there is none."""
    for index, word in enumerate(words):
        name, rest = Path(word).name, words[index + 1 :]
        if name == "env" and rest and rest[0] in ("-i", "-", "--ignore-environment"):
            return f"env {rest[0]}", "it drops the variables through which autobatch reaches the command's processes"
        if _PYTHON.fullmatch(name):
            return next(((flag, _BLIND_FLAGS[letter]) for flag, letter in _letters(rest) if letter in "IES"), None)
    return None


def _letters(words: Sequence[str]) -> list[tuple[str, str]]:
    """The one-letter flags of a Python interpreter, each with the word it is in; ``words`` follow the interpreter."""
    found: list[tuple[str, str]] = []
    waiting = iter(words)
    for word in waiting:
        if not word.startswith("-") or word in ("-", "--"):
            break
        if word.startswith("--"):
            continue
        for position, letter in enumerate(word[1:], start=2):
            if letter in "cm":
                return found
            found.append((word, letter))
            if letter in "WX":  # take a value: the rest of the word, or the next one
                if position == len(word):
                    next(waiting, None)
                break
    return found

"""What the cache knows of one search, and what the search leaves in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from autobatch.probe.cache import Entry, ResultCache
from autobatch.probe.executor import Executor, Setting
from autobatch.result import BatchSizeResult, Trial

MORE_ROOM = 1.01
"""A budget this many times that of the remembered answer may let more fit, so the answer is only a first guess."""

_DEVICE = ("device", "kind", "virtual", "total_bytes", "capability")
_VERSIONS = ("driver", "torch", "cuda", "autobatch")


class Recall:
    """The memory of one call of find(). Without a cache, or for a workload that nothing identifies, it knows nothing.

    Args:
        options: the arguments of find() that decide the answer. ``start`` is not one of them, unless the workload
            makes other samples for it.
    """

    def __init__(
        self,
        cache: ResultCache | None,
        executor: Executor,
        setting: Setting,
        budget_bytes: int | None,
        *,
        start: int,
        options: Mapping[str, Any],
    ) -> None:
        self.first_guess: int | None = None
        """Where to begin the search, if :meth:`answer` had none."""
        self.notes: list[str] = []
        self._cache, self._setting, self._budget_bytes = cache, setting, budget_bytes
        self._question: Mapping[str, Any] | None = None
        if cache is None:
            return
        self._where = executor.where
        signature = executor.signature(start)
        if signature.text is None:
            self.notes.append(f"Not kept in the cache: {signature.reason}.")
            return
        known = setting.environment
        self._question = {
            "workload": {"name": setting.name, "mode": setting.mode, "signature": signature.text},
            "device": {name: known.get(name) for name in _DEVICE},
            "versions": {name: known.get(name) for name in _VERSIONS},
            "options": dict(options),
        }

    def answer(self, check: Callable[[int, str], Trial]) -> BatchSizeResult | None:
        """The remembered answer, if there is one and ``check(size, mode)`` finds that it still fits; else None."""
        if self._cache is None or self._question is None or (entry := self._cache.get(self._question)) is None:
            return None
        found = entry.result
        if more := self._more_room(found):
            self.first_guess = round(found.batch_size * more)
            self.notes.append(f"A batch of {found.batch_size} was found when less memory was free; searched anew.")
            return None
        sizes = {self._setting.mode: found.batch_size}
        if self._setting.mode == "both":
            sizes = {"train": found.batch_size, "eval": found.eval_batch_size or found.batch_size}
        trials = []
        for mode, size in sizes.items():
            trials.append(check(size, mode))
            if not trials[-1].fits:
                self._cache.drop(self._question)
                self.first_guess = found.batch_size
                self.notes.append(f"The cache had an answer of {size}, which does not fit any more; searched anew.")
                return None
        return replace(
            found,
            trials=tuple(trials),
            confirmation=(),
            budget_bytes=self._budget_bytes,
            environment={
                **self._setting.environment,
                "workload": self._setting.name,
                "trials_in": self._where,
            },
            notes=(*found.notes, _origin(entry, len(trials))),
        )

    def keep(self, result: BatchSizeResult) -> None:
        """Keeps what a search found, unless a larger size was left untried for lack of time."""
        if self._cache is not None and self._question is not None and result.proof != "time_limit":
            self._cache.put(self._question, result)

    def _more_room(self, found: BatchSizeResult) -> float | None:
        """How many times the remembered budget there is now, if that is more than it changes by itself."""
        if not self._budget_bytes or not found.budget_bytes:
            return None
        ratio = self._budget_bytes / found.budget_bytes
        return ratio if ratio > MORE_ROOM else None


def _origin(entry: Entry, trials: int) -> str:
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.saved_at_s))
    confirmed = "one trial" if trials == 1 else "one trial for training and one for evaluation"
    return (
        f"From the cache: found on {day} in {entry.result.trial_count} trials, confirmed now by {confirmed} "
        "(cache=None, or --no-cache, searches anew)."
    )

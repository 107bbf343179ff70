"""The search on trials recorded on virtual cards: what it answers there, and what that costs.

``tests/data/oracles_*.json`` hold, for each model and card, trials of three steps in a process that lives on, with
the whole card and with 5 % of it withheld: rows of size, peak allocated and reserved bytes and the allocator's retries
in each step, or the size alone where memory ran out. ``steps_survived`` are rows of size and the steps out of 20 that
were survived in a fresh process, after two steps of one sample, and after a failed attempt at half as much again.
Capacity is the whole card, nothing outside the allocator, compute capability 8.0; AdamW; ResNet-50 in fp16 autocast
with a GradScaler and channels_last, GPT-2 (1024 tokens), BERT-base (512) and ViT-B/16 of transformers in bf16 autocast,
the Llama-like 1.1 B in bf16 with checkpointing (2048).

``tests/data/oracles_cells.json`` holds the project's own cells, recorded by ``benchmarks.record_oracles``; there the
failures of the confirmation are known under the same limit, and are counted.
"""

from __future__ import annotations

import bisect
import itertools
import json
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from autobatch.probe.search import SearchAnswer, search
from autobatch.result import Measurement, Outcome, Trial

DATA = Path(__file__).parent.parent / "data"
CELLS = [
    *((model, f"{gib} GiB") for model in ("resnet50", "gpt2") for gib in (16, 24, 40, 80)),
    *((model, f"{gib} GiB") for model in ("vit", "bert", "llama") for gib in (24, 80)),
]
HEADROOM = 0.05
OWN_CELLS = json.loads((DATA / "oracles_cells.json").read_text(encoding="utf-8"))["cells"]
OWN_TRUTH = json.loads((DATA / "truth_cells.json").read_text(encoding="utf-8"))["cells"]


class Recorded:
    """Trials as they were recorded; between two recorded sizes on a straight line, above all of them no memory."""

    def __init__(self, rows: list[list[Any]]) -> None:
        self.rows = {row[0]: row[1:] for row in rows}
        self.sizes = sorted(self.rows)
        self.trials: list[Trial] = []

    def __call__(self, size: int) -> Trial:
        peaks = self._between(size)
        outcome, measured = Outcome.OOM, None
        if peaks:
            allocated, reserved, retries = peaks
            thrashes = retries if isinstance(retries, bool) else all(retries[1:])
            outcome = Outcome.THRASHED if thrashes else Outcome.FITS
            measured = Measurement(peak_allocated_bytes=allocated, peak_reserved_bytes=reserved)
        self.trials.append(Trial(batch_size=size, outcome=outcome, measurement=measured))
        return self.trials[-1]

    def _between(self, size: int) -> list[Any]:
        if size in self.rows or size > self.sizes[-1]:
            return self.rows.get(size, [])
        after = bisect.bisect(self.sizes, size)
        low, high = self.sizes[after - 1], self.sizes[after]
        if not self.rows[low] or not self.rows[high]:
            return []
        part = (size - low) / (high - low)
        first, second = self.rows[low], self.rows[high]
        return [*(round(a + part * (b - a)) for a, b in zip(first[:2], second[:2], strict=True)), first[2]]


class Survival:
    """What kept fitting, and the two truths: ``solid``, below which all of it did, and ``top``, above which nothing."""

    def __init__(self, rows: list[list[int]], spacing: int) -> None:
        self.all = {size: min(steps) == 20 for size, *steps in rows}
        self.top = max(size for size, *steps in rows if max(steps) == 20)
        self.solid = max(n for n in self.all if all(kept for m, kept in self.all.items() if 0.85 * n <= m <= n))
        self.spacing = spacing

    def __call__(self, size: int) -> Trial:
        near = [kept for other, kept in self.all.items() if abs(other - size) < self.spacing]
        kept = all(near) if near else size < self.solid
        return Trial(batch_size=size, outcome=Outcome.FITS if kept else Outcome.OOM)


@dataclass
class Run:
    answer: SearchAnswer
    trials: int
    failures: int
    survival: Survival


@cache
def load(model: str) -> Any:
    return json.loads((DATA / f"oracles_{model}.json").read_text(encoding="utf-8"))["cells"]


def replay(model: str, card: str, *, withheld: float, **options: Any) -> Run:
    cell = load(model)[card]
    rows = cell["trials"]
    if withheld:
        near = cell["trials_with_headroom"]
        rows = [row for row in rows if row[0] < near[0][0]] + near
    ask = Recorded(rows)
    sizes = sorted(row[0] for row in cell["steps_survived"])
    survival = Survival(cell["steps_survived"], spacing=min(b - a for a, b in itertools.pairwise(sizes)))
    capacity = int(cell["capacity_bytes"] * (1 - withheld))
    answer = search(ask, survival, capacity_bytes=capacity, **options)
    return Run(answer, len(ask.trials) + 1, sum(not trial.fits for trial in ask.trials), survival)


class Confirmed:
    """The recorded confirmations; between two of them the nearer one, and below all of them what fits keeps fitting."""

    def __init__(self, rows: list[list[Any]]) -> None:
        self.rows, self.failures = dict(rows), 0

    def __call__(self, size: int) -> Trial:
        kept = size < min(self.rows) or self.rows[min(self.rows, key=lambda n: abs(n - size))]
        self.failures += not kept
        return Trial(batch_size=size, outcome=Outcome.FITS if kept else Outcome.OOM)


def replay_own(cell: str, setting: str, **options: Any) -> tuple[SearchAnswer, int, int]:
    """The answer, its trials and its failures, those of the confirmation among them."""
    recorded = OWN_CELLS[cell][setting]
    ask, confirm = Recorded(recorded["trials"]), Confirmed(recorded["confirmed"])
    multiple_of = 1 if setting == "exact" else "auto"
    answer = search(ask, confirm, capacity_bytes=recorded["capacity_bytes"], multiple_of=multiple_of, **options)
    failures = sum(trial.outcome is Outcome.OOM for trial in ask.trials) + confirm.failures
    return answer, len(ask.trials) + 1, failures


@pytest.mark.parametrize("cell", OWN_CELLS)
def test_own_cells_exact(cell: str) -> None:
    answer, trials, failures = replay_own(cell, "exact")
    assert 0.97 * OWN_TRUTH[cell]["solid"] <= answer.batch_size <= OWN_TRUTH[cell]["top"]
    assert trials <= 12
    assert failures <= 4


@pytest.mark.parametrize("cell", OWN_CELLS)
def test_own_cells_with_the_defaults(cell: str) -> None:
    answer, trials, failures = replay_own(cell, "defaults")
    assert 0.85 * OWN_TRUTH[cell]["solid"] <= answer.batch_size <= OWN_TRUTH[cell]["top"]
    assert trials <= 9
    assert failures <= 2


@pytest.mark.parametrize(("setting", "most_trials", "most_failures"), [("exact", 9, 2), ("defaults", 7, 1)])
def test_medians_of_own_cells(setting: str, most_trials: int, most_failures: int) -> None:
    runs = [replay_own(cell, setting) for cell in OWN_CELLS]
    assert len(runs) == 14
    assert statistics.median(trials for _, trials, _ in runs) <= most_trials
    assert statistics.median(failures for *_, failures in runs) <= most_failures


@pytest.mark.parametrize(("model", "card"), CELLS)
def test_exact_answers_are_between_the_truths(model: str, card: str) -> None:
    run = replay(model, card, withheld=0.0, multiple_of=1)
    assert 0.97 * run.survival.solid <= run.answer.batch_size <= run.survival.top
    assert run.trials <= 12
    assert run.failures <= 4


@pytest.mark.parametrize(("model", "card"), CELLS)
def test_default_answers_are_cheap_and_large(model: str, card: str) -> None:
    run = replay(model, card, withheld=HEADROOM)
    assert 0.88 * run.survival.solid <= run.answer.batch_size <= run.survival.top
    assert run.trials <= 9
    assert run.failures <= 2


def test_medians() -> None:
    exact = [replay(*cell, withheld=0.0, multiple_of=1) for cell in CELLS]
    default = [replay(*cell, withheld=HEADROOM) for cell in CELLS]
    assert statistics.median(r.trials for r in exact) <= 9
    assert statistics.median(r.failures for r in exact) <= 2
    assert statistics.median(r.trials for r in default) <= 7.5
    assert statistics.median(r.failures for r in default) <= 1


@pytest.mark.parametrize(("model", "card"), CELLS)
def test_avoid_oom_provokes_none_on_recorded_cards(model: str, card: str) -> None:
    run = replay(model, card, withheld=HEADROOM, avoid_oom=True)
    assert run.failures == 0
    assert run.answer.batch_size >= 0.8 * run.survival.solid


def test_avoid_oom_provokes_none_on_own_cells() -> None:
    """The confirmation's included. Of ResNet-50 10 % more fits once the allocator has given memory back, which no
    peak below tells; of a Llama that fills 24 GiB at one sample (the optimizer's step), nothing tells the slope."""
    parts = {}
    for cell in OWN_CELLS:
        answer, _, failures = replay_own(cell, "exact", avoid_oom=True)
        assert failures == 0
        parts[cell] = answer.batch_size / OWN_TRUTH[cell]["solid"]
    assert min(part for cell, part in parts.items() if cell != "llama-24") >= 0.85
    assert statistics.median(parts.values()) >= 0.94


@pytest.mark.parametrize(
    ("off", "typical_trials", "typical_failures"),
    [(0.9, 4.5, 1), (0.97, 4, 1), (1, 3, 1), (1.03, 4, 2), (1.1, 6, 3)],
)
def test_a_guess_that_is_a_little_off_costs_little(off: float, typical_trials: float, typical_failures: int) -> None:
    runs = []
    for cell in OWN_CELLS:
        answer = replay_own(cell, "defaults")[0].batch_size
        again, trials, failures = replay_own(cell, "defaults", first_guess=round(off * answer))
        assert again.batch_size >= answer
        assert trials <= 7
        assert failures <= (2 if off < 1.1 else 4)
        runs.append((trials, failures))
    assert statistics.median(trials for trials, _ in runs) <= typical_trials
    assert statistics.median(failures for _, failures in runs) <= typical_failures


@pytest.mark.parametrize(("model", "card"), CELLS)
def test_a_guess_from_a_slightly_different_card_needs_few_trials(model: str, card: str) -> None:
    answer = replay(model, card, withheld=HEADROOM).answer.batch_size
    run = replay(model, card, withheld=HEADROOM, first_guess=answer)
    assert run.trials <= 5
    assert run.answer.batch_size >= answer

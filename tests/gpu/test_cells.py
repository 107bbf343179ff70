"""The fourteen cells: real models on virtual cards, each answer held against the truth and against survival.

The truth (``tests/data/truth_cells.json``) was found by ``benchmarks/truth.py``, without the search.
"""

from __future__ import annotations

import statistics
from contextlib import closing
from typing import Any

import pytest

from autobatch import find
from autobatch.probe.isolation import ChildExecutor
from autobatch.probe.trial import TrialRequest
from autobatch.virtual.device import VirtualGPU
from benchmarks.answers import SETTINGS, answer, truth
from benchmarks.cells import CELLS, Cell

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(1800)]

MOST = {"exact": (8, 2), "defaults": (8, 2)}
MEDIANS = {"exact": (6, 1), "defaults": (6, 1)}


@pytest.fixture(scope="module", params=SETTINGS)
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """An answer for every cell, in one setting."""
    return [answer(cell, request.param) for cell in CELLS]


def test_answers_are_near_the_truth_and_never_above(rows: list[dict[str, Any]]) -> None:
    if rows[0]["setting"] == "exact":
        assert {row["cell"]: row["ratio"] for row in rows if row["ratio"] < 0.97} == {}
    assert {row["cell"]: row["answer"] for row in rows if row["answer"] > row["top"]} == {}


def test_trials_and_failures(rows: list[dict[str, Any]]) -> None:
    setting = rows[0]["setting"]
    trials, failures = [row["trials"] for row in rows], [row["failures"] for row in rows]
    assert max(trials) <= MOST[setting][0], rows
    assert max(failures) <= MOST[setting][1], rows
    assert statistics.median(trials) <= MEDIANS[setting][0], rows
    assert statistics.median(failures) <= MEDIANS[setting][1], rows


@pytest.mark.parametrize("off", [0.9, 0.97, 1.03, 1.1])
def test_a_guess_that_is_off_costs_nothing(rows: list[dict[str, Any]], off: float) -> None:
    """Two small batches tell better: most cells need three trials, of which one fails."""
    if rows[0]["setting"] == "exact":
        pytest.skip("with the defaults")
    trials, failures = [], []
    for cell, row in zip(CELLS, rows, strict=True):
        result = find(cell.build, device=cell.card, first_guess=max(1, round(off * row["answer"])))
        trials.append(len(result.trials))
        failures.append(sum(not trial.fits for trial in result.trials))
    assert statistics.median(trials) == 3
    assert max(trials) <= 4
    assert max(failures) <= 1


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_nothing_fails_where_failures_are_to_be_avoided(cell: Cell) -> None:
    """And 0.95 of solid is found all the same, without further headroom."""
    result = find(cell.build, device=cell.card, avoid_oom=True, headroom=0.0, multiple_of=1)
    assert [trial for trial in (*result.trials, *result.confirmation) if not trial.fits] == []
    assert result.batch_size >= 0.95 * truth()[cell.name]["solid"]


def test_answers_survive(rows: list[dict[str, Any]]) -> None:
    """20 steps, in a fresh process, after two steps of one sample, and in a process that has done both."""
    cells = {cell.name: cell for cell in CELLS}
    assert [row["cell"] for row in rows if not _survives(cells[row["cell"]], row["answer"])] == []


def _survives(cell: Cell, size: int) -> bool:
    fresh = TrialRequest(batch_size=size, steps=20)
    after_small = TrialRequest(batch_size=size, steps=20, sizes_before=(1, 1))
    device = VirtualGPU(cell.card)  # as long as it is there, so is the card
    with closing(ChildExecutor(cell.build, device.isolation())) as executor:
        executor.setting()
        same_process = [executor.run(fresh).trial.fits]
        return all([*same_process, *(a.trial.fits for a in executor.confirm((fresh, after_small)))])

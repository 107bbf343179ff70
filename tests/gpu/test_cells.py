"""The fourteen cells: real models on virtual cards, each answer held against the truth and against survival.

The truth (``tests/data/truth_cells.json``) was found by ``benchmarks/truth.py``, without the search.
"""

from __future__ import annotations

import statistics
from contextlib import closing
from typing import Any

import pytest

from autobatch.probe.isolation import ChildExecutor
from autobatch.probe.trial import TrialRequest
from autobatch.virtual.device import VirtualGPU
from benchmarks.answers import SETTINGS, answer
from benchmarks.cells import CELLS, Cell

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(1800)]

MOST = {"exact": (12, 4), "defaults": (9, 2)}
MEDIANS = {"exact": (9, 2), "defaults": (7, 1)}


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

"""tune() of a loop around an Accelerator on two ranks: one answer, and the gradients of the whole batch."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

import pytest

from tests.distributed import tunes
from tests.distributed.launch import Job

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux"),
]


@pytest.fixture(autouse=True, scope="module")
def _versions() -> None:
    print(f"accelerate {version('accelerate')}, torch {version('torch')}")


@pytest.mark.parametrize("splits", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_get_the_same_numbers_and_train_on(two: Job, splits: bool) -> None:
    """The second has less memory, so that it decides."""
    first, second = two.results(tunes.accelerate, limits=[56, 28], effective=256, splits=splits)
    check_alike(first, second)
    micro, steps = first["size"], 128 // first["size"]
    assert 8 <= micro < 128
    assert first["micro_batches"] == [micro]
    assert first["set"] == [micro * 2 if splits else micro, steps, micro * 2]
    assert first["notes"][-2:] == [
        f"An optimizer step is 256 = {micro} samples x {steps} steps x 2 ranks.",
        f"The batch size of a rank was set on the loader, {micro}, and gradient_accumulation_steps on the "
        f"accelerator, {steps}.",
    ]
    assert first["windows"] == first["distinct"] == [256, 256]


def check_alike(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["kept"]
    assert second["kept"]
    assert first["set"] == second["set"]
    assert first["notes"] == second["notes"]
    assert first["weights"] == second["weights"]
    assert first["error"] < 1e-5
    assert second["error"] < 1e-5
    assert first["windows"] == second["windows"]


@pytest.mark.slow
def test_without_an_effective_batch_a_step_is_what_fits_on_both(two: Job) -> None:
    first, second = two.results(tunes.accelerate, limits=[28, 56], effective=None)
    check_alike(first, second)
    assert first["set"] == [first["size"], 1, first["size"] * 2]
    assert set(first["windows"]) == {first["size"] * 2}


@pytest.mark.parametrize(("effective", "nearest"), [(1, "2"), (33, "32 or 34")])
def test_a_batch_that_ranks_cannot_share_is_refused_on_both(two: Job, effective: int, nearest: str) -> None:
    for rank in two.run(tunes.accelerate_with, effective=effective):
        assert rank["error"] == "UnsupportedTrainerError"
        assert rank["message"] == (
            f"effective_batch_size={effective}: must be a multiple of 2, the ranks, which take equal shares; "
            f"nearest: {nearest}"
        )

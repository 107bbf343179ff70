"""tune() of an engine of Ignite on two ranks: one answer, and the gradients of the whole batch."""

from __future__ import annotations

import sys
from importlib.metadata import version

import pytest

from tests.distributed import tunes
from tests.distributed.launch import Job
from tests.distributed.test_tune_accelerate import check_alike

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux"),
]


@pytest.fixture(autouse=True, scope="module")
def _versions() -> None:
    print(f"pytorch-ignite {version('pytorch-ignite')}, torch {version('torch')}")


@pytest.mark.parametrize("wrapped", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_accumulator_on_two_ranks_takes_windows_of_all(two: Job, wrapped: bool) -> None:
    """The first has less memory, so that it decides."""
    options = {"limits": [28, 56], "effective": 256, "kind": "accumulated", "wrapped": wrapped}
    first, second = two.results(tunes.ignite, **options)
    check_alike(first, second)
    micro = first["size"]
    assert 8 <= micro < 128
    assert first["set"] == [128, micro]
    assert first["micro_batches"] == [micro]
    assert first["windows"] == first["distinct"] == [256, 256]
    assert first["notes"][-1].endswith("The loader's batch size on each rank was set to 128.")


@pytest.mark.parametrize("effective", [pytest.param(16, marks=pytest.mark.slow), None])
def test_a_process_function_with_a_wrapped_model_gets_a_batch_size(two: Job, effective: int | None) -> None:
    first, second = two.results(tunes.ignite, limits=[56, 28], effective=effective, kind="supervised")
    check_alike(first, second)
    micro = 8 if effective else first["size"]
    assert first["set"] == [micro, None]
    assert set(first["windows"]) == {2 * micro}


def test_what_fits_on_no_rank_at_once_is_refused_on_both(two: Job) -> None:
    for rank in two.run(tunes.ignite, limits=[56, 28], effective=512, kind="supervised"):
        assert rank["error"] == "UnsupportedTrainerError"
        assert "effective_batch_size=512 takes 256 samples at once, and " in rank["message"]

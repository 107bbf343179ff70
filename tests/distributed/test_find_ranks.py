"""find() across ranks of a gloo job, with real limits on host memory: nobody hangs, and all say the same."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from autobatch.units import MIB
from tests.distributed import probes
from tests.distributed.launch import Job

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="host memory is limited on Linux"),
]


@pytest.mark.parametrize("limits", [[400, 264], pytest.param([264, 400], marks=pytest.mark.slow)])
def test_two_ranks_agree_on_what_fits_the_smaller(two: Job, limits: list[int]) -> None:
    check_agreed(two.results(probes.search, limits=limits, per_sample=[1, 1]), 240, limits)


@pytest.mark.slow
def test_four_ranks_agree_on_what_fits_the_smallest(four: Job) -> None:
    limits = [400, 400, 264, 400]
    check_agreed(four.results(probes.search, limits=limits, per_sample=[1] * 4), 240, limits)


def check_agreed(found: list[Any], size: int, limits: list[int]) -> None:
    assert [rank["size"] for rank in found] == [size] * len(limits)
    assert found[0]["failures"] > 0
    assert all(rank == found[0] for rank in found)  # the whole result, measurements and times too
    assert found[0]["ranks"] == len(limits)
    assert found[0]["budgets"] == [limit * MIB for limit in limits]


def test_only_rank_1_ever_runs_out(two: Job) -> None:
    """Rank 0 would fit twice as much: it is the other's failures that it learns."""
    found = two.results(probes.search, limits=[416, 416], per_sample=[1, 2])
    check_agreed(found, 160, [416, 416])


def test_each_rank_has_its_own_size_if_asked(two: Job) -> None:
    found = two.results(probes.search, limits=[400, 264], per_sample=[1, 1], per_rank=True)
    assert [rank["size"] for rank in found] == [360, 240]
    assert [rank["sizes"] for rank in found] == [[360, 240]] * 2
    assert [rank["ranks"] for rank in found] == [None, None]


def test_a_machine_s_memory_is_shared(two: Job) -> None:
    for rank in two.results(probes.search_freely):
        assert "Each of the 2 ranks on this machine may have an equal part of its memory." in rank["notes"]
        for budget in rank["budgets"]:
            assert budget == pytest.approx(0.4 * rank["available"], rel=0.1)


def test_not_even_the_smallest_size_fits_is_everybody_s_error(two: Job) -> None:
    found = two.run(probes.search, limits=[400, 400], per_sample=[1, 100])
    assert [rank["error"] for rank in found] == ["DoesNotFitError"] * 2
    assert found[0]["message"] == found[1]["message"]
    own = two.run(probes.search, limits=[400, 400], per_sample=[1, 100], per_rank=True)
    assert [rank["error"] for rank in own] == ["DoesNotFitError"] * 2
    assert own[0]["message"].startswith("on rank 1, batch 40 does not fit")


@pytest.mark.parametrize("at", [40, 80])
def test_an_error_of_one_rank_is_raised_there_and_named_elsewhere(two: Job, at: int) -> None:
    first, second = two.run(probes.fail, at=at)
    assert (second["error"], second["message"]) == ("KeyError", "'column 7'")
    assert (first["error"], first["message"]) == ("RankError", "rank 1 failed: KeyError: 'column 7'")


def test_a_wrong_argument_on_one_rank_ends_all(two: Job) -> None:
    first, second = two.run(probes.search_with, options=[{}, {"headroom": 2}])
    assert second["error"] == "InvalidArgumentError"
    assert first["message"].startswith("rank 1 failed: InvalidArgumentError: headroom=2")


@pytest.mark.parametrize(
    ("name", "values"), [("start", [40, 80]), ("per_rank", [False, True]), ("time_limit_s", [9, 8])]
)
def test_ranks_must_be_asked_the_same(two: Job, name: str, values: list[Any]) -> None:
    for value, rank in zip(values, two.run(probes.search_with, options=[{name: v} for v in values]), strict=True):
        assert rank["error"] == "InvalidArgumentError"
        assert rank["message"].startswith(f"{name}={value!r}: must be the same on all ranks")


def test_a_limit_of_time_ends_all_ranks_at_one_size(two: Job) -> None:
    found = two.results(probes.search_with, options=[{"time_limit_s": 0.2}] * 2)
    assert found[0] == found[1]


@pytest.mark.parametrize("who", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_rank_makes_the_others_fail_at_once(who: int) -> None:
    """The others go on living, so that no end of theirs tells one that waits for another than the dead."""
    job = Job(4)
    try:
        found = job.run(probes.die, within_s=60, who=who)
        assert found.pop(who) == {"code": -9}
        for rank in found:
            assert rank["error"] == "RankError"
            assert "one of them is gone or silent" in rank["message"]
    finally:
        job.close()


def test_a_wrapped_model_is_tried_by_each_rank_alone_and_trains_on(two: Job) -> None:
    first, second = two.results(probes.search_wrapped, limits=[120, 60])
    assert first["all"] == second["all"]
    assert first["kept"]
    assert second["kept"]
    assert first["weights"] == second["weights"]  # the reducer works as if nothing had been tried
    assert first["where"] == "forks of this process"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (probes.search_step_with_collective, "a step that runs a collective (c10d.allreduce_.default)"),
        (probes.search_live_shards, "a live model that is sharded over the ranks"),
        (probes.search_static, "DistributedDataParallel(static_graph=True)"),
    ],
)
def test_what_could_hang_in_this_process_is_refused(two: Job, function: Any, said: str) -> None:
    for rank in two.run(function):
        assert rank["error"] == "InvalidArgumentError"
        assert said in rank["message"]


def test_a_sharded_model_of_which_one_rank_runs_out_amid_collectives(two: Job) -> None:
    first, second = two.results(probes.search_sharded)
    assert first == second
    assert (first["size"], first["where"]) == (32, "child processes of each rank")
    assert first["failures"] > 0


@pytest.mark.parametrize(
    ("odd", "error", "said"),
    [
        pytest.param("error", "KeyError", "column 7", marks=pytest.mark.slow),
        ("killed", "WorkloadFailedError", "the child process was killed by SIGKILL"),
    ],
)
def test_a_sharded_model_of_which_one_rank_fails_amid_collectives(two: Job, odd: str, error: str, said: str) -> None:
    first, second = two.run(probes.search_sharded, within_s=60, odd=odd)
    assert second["error"] == error
    assert said in second["message"]
    assert first["error"] == "RankError"
    assert said in first["message"]

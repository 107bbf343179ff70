"""Trainer across ranks of a gloo job: one run, whoever takes part."""

from __future__ import annotations

from pathlib import Path

import pytest

from autobatch.training.checkpoint import newest
from tests.distributed import scenarios
from tests.distributed.launch import Job

pytestmark = pytest.mark.distributed


def test_ranks_train_what_one_process_trains(one: Job, two: Job) -> None:
    """Every sample once an epoch at the exact effective batch, also where ranks have sizes of their own."""
    alone = one.results(scenarios.fitted, folder=None, micro=[7], dropout=0.0, stop_at=None)[0]
    assert alone["samples"] == [7, 7, 7, 2] * 2
    for micro, plan in (
        ([2, 2], "7 = 2 ranks of 3 or 4 samples, each in at most 2 steps of at most 2"),
        ([1, 3], None),
    ):
        each = two.results(scenarios.fitted, folder=None, micro=micro, dropout=0.0, stop_at=None)
        assert each[0]["hash"] == each[1]["hash"]
        assert each[0]["samples"] == alone["samples"]
        assert each[0]["plan"] == plan
        for rank in each:
            assert rank["weights"] == pytest.approx(alone["weights"], abs=1e-9)
            assert rank["losses"] == pytest.approx(alone["losses"], abs=1e-9)
            assert [samples for _, samples in rank["eval"]] == [11, 11]
            assert [loss for loss, _ in rank["eval"]] == pytest.approx([loss for loss, _ in alone["eval"]], abs=1e-9)


@pytest.mark.parametrize(("micro", "stop_at"), [([2, 2], 2), ([2, 2], 4), ([1, 3], 6)])
def test_a_run_of_ranks_goes_on_bit_for_bit(two: Job, tmp_path: Path, micro: list[int], stop_at: int) -> None:
    whole = two.results(scenarios.fitted, folder=None, micro=micro, dropout=0.3, stop_at=None)
    folder = str(tmp_path / "run")
    two.results(scenarios.fitted, folder=folder, micro=micro, dropout=0.3, stop_at=stop_at)
    assert len(newest(Path(folder))) == 2
    again = two.results(scenarios.fitted, folder=folder, micro=micro, dropout=0.3, stop_at=None)
    assert [rank["hash"] for rank in again] == [rank["hash"] for rank in whole]
    assert [rank["losses"] for rank in again] == [rank["losses"] for rank in whole]


@pytest.mark.parametrize(("kind", "stop_at"), [("fsdp", 3), ("fsdp", 4), ("fsdp with buffers", 6)])
def test_a_sharded_run_goes_on_bit_for_bit(two: Job, tmp_path: Path, kind: str, stop_at: int) -> None:
    """Its checkpoint is whole, and each rank takes its part; buffers are each rank's own."""
    options = {"micro": [2, 2], "dropout": 0.3, "kind": kind}
    whole = two.results(scenarios.fitted, folder=None, stop_at=None, **options)
    folder = str(tmp_path / "run")
    two.results(scenarios.fitted, folder=folder, stop_at=stop_at, **options)
    again = two.results(scenarios.fitted, folder=folder, stop_at=None, **options)
    assert [rank["hash"] for rank in again] == [rank["hash"] for rank in whole]
    assert [rank["losses"] for rank in again] == [rank["losses"] for rank in whole]


@pytest.mark.parametrize(("begins", "goes_on"), [("fsdp", ""), ("", "fsdp")])
def test_a_sharded_run_may_go_on_whole_and_the_other_way_round(
    one: Job, two: Job, tmp_path: Path, begins: str, goes_on: str
) -> None:
    """With one process or with two: a checkpoint is of no number of ranks."""
    alone = one.results(scenarios.fitted, folder=None, micro=[7], dropout=0.0, stop_at=None)[0]
    jobs = {"": (one, [4]), "fsdp": (two, [2, 2])}
    folder = str(tmp_path / "run")
    for kind, stop_at in ((begins, 3), (goes_on, None)):
        job, micro = jobs[kind]
        each = job.results(scenarios.fitted, folder=folder, micro=micro, dropout=0.0, stop_at=stop_at, kind=kind)
    assert each[0]["weights"] == pytest.approx(alone["weights"], abs=1e-9)


@pytest.mark.parametrize("at", [0, 1])
def test_a_part_of_a_sharded_checkpoint_that_fails_on_one_rank_is_known_to_all(
    two: Job, tmp_path: Path, at: int
) -> None:
    """Before any rank waits for the others' shards."""
    told = two.run(scenarios.unmade, folder=str(tmp_path / "run"), at=at, within_s=60.0)
    assert (told[at]["error"], told[at]["message"]) == ("ValueError", "nothing to save")
    other = told[1 - at]
    assert (other["error"], other["message"]) == ("RankError", f"rank {at} failed: ValueError: nothing to save")


def test_one_rank_is_asked_to_end_and_all_do_after_the_same_window(two: Job, tmp_path: Path) -> None:
    assert two.results(scenarios.terminated, folder=str(tmp_path)) == [3143, 3143]
    assert newest(tmp_path)[0].name == "window-00000003"


@pytest.mark.parametrize("what", ["dataset", "effective_batch_size", "eval_dataset", "seed", "checkpoint"])
def test_what_the_ranks_are_given_differently_is_named(two: Job, what: str) -> None:
    for outcome in two.run(scenarios.unlike, what=what, within_s=60.0):
        assert outcome["error"] == "InvalidArgumentError", outcome
        assert outcome["message"].startswith(f"{what}=")
        assert "must be the same on all ranks, which have" in outcome["message"]


def test_an_evaluation_that_fails_on_one_rank_is_known_to_all(two: Job) -> None:
    zero, one = two.run(scenarios.evaluated, within_s=60.0)
    assert (one["error"], one["message"]) == ("ValueError", "an unreadable sample")
    assert (zero["error"], zero["message"]) == ("RankError", "rank 1 failed: ValueError: an unreadable sample")

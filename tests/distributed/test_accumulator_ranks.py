"""Accumulation across ranks of a gloo job: one window, whoever has its samples."""

from __future__ import annotations

import pytest

from tests.distributed import scenarios
from tests.distributed.launch import Job

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp"])
@pytest.mark.parametrize(
    ("job", "ends"), [("two", [7, 12]), pytest.param("four", [2, 3, 11, 12], marks=pytest.mark.slow)]
)
def test_gradients_of_uneven_ranks_are_the_full_batchs(
    kind: str, job: str, ends: list[int], request: pytest.FixtureRequest
) -> None:
    ranks: Job = request.getfixturevalue(job)
    assert max(ranks.results(scenarios.difference, kind=kind, ends=ends, size=3, seed=1)) <= 1e-12


def test_a_rank_without_a_sample(two: Job) -> None:
    assert max(two.results(scenarios.difference, kind="plain", ends=[5, 5], size=2, seed=2)) <= 1e-12


def test_a_mean_of_the_ranks_means_is_another_gradient(two: Job) -> None:
    """The control: counted by samples, ragged texts on two ranks are off by far more than rounding."""
    assert min(two.results(scenarios.difference, kind="plain", ends=[7, 12], size=3, seed=1, counted=False)) > 1e-3


def test_accelerates_causal_example_on_two_ranks(two: Job) -> None:
    assert two.results(scenarios.accelerates_example, counted=True) == [[0.2117, 0.3172]] * 2
    for control in two.results(scenarios.accelerates_example, counted=False):
        assert control == pytest.approx([0.1622, 0.3667], abs=2e-4)  # the last digit depends on the order of adding


def test_one_rank_runs_out_and_all_repeat_the_window_bit_for_bit(two: Job) -> None:
    recovered = two.results(scenarios.trained, fail_at=[0, 2, 0, 3], sizes=[])
    sizes = recovered[1]["used"]
    assert sizes == [8, 4, 4, 2]
    assert [rank["told"] for rank in recovered] == [[1, 3]] * 2
    by_hand = two.results(scenarios.trained, fail_at=[], sizes=sizes)
    assert [rank["hash"] for rank in by_hand] == [rank["hash"] for rank in recovered]
    assert [rank["chance"] for rank in by_hand] == [rank["chance"] for rank in recovered]
    larger = two.results(scenarios.trained, fail_at=[], sizes=[8] * 4)
    assert larger[0]["hash"] != by_hand[0]["hash"]  # with batch norm and dropout the size is to be seen


@pytest.mark.parametrize(
    ("how", "own", "others"),
    [
        ("error", "ValueError: a shape bug", "RankError: rank 1 failed in window 1: a shape bug"),
        ("batch", "InvalidArgumentError: batch=", "RankError: rank 1 failed in window 1: batch="),
        ("memory", "DoesNotFitError: in window 1 not even one sample fits on rank 1", None),
        ("step", "ValueError: a broken step", "RankError: rank 1 failed: ValueError: a broken step"),
        ("dies", None, "RankError: gathering with the other ranks failed, one of them is gone or silent"),
    ],
)
def test_where_one_rank_fails_the_others_say_so_and_none_hangs(
    doomed: Job, how: str, own: str | None, others: str | None
) -> None:
    zero, one = doomed.run(scenarios.one_fails, how=how, within_s=60.0)
    if own is None:
        assert one["code"] == -9
    else:
        assert f"{one['error']}: {one['message']}".startswith(own)
    assert f"{zero['error']}: {zero['message']}".startswith(others or str(own))


def test_buffers_are_those_of_rank_0(two: Job) -> None:
    plain, ddp = (two.results(scenarios.buffers, kind=kind) for kind in ("plain", "ddp"))
    assert plain[0] == plain[1] == ddp[0] == ddp[1]


def test_what_cannot_be_brought_together_is_refused(two: Job) -> None:
    unequal = two.run(scenarios.unequal_models)
    assert {outcome["error"] for outcome in unequal} == {"RankError"}
    assert (
        "('weight', (3, 6), 'torch.float32') here, ('weight', (2, 6), 'torch.float32') on rank 0"
        in unequal[1]["message"]
    )
    assert all("sparse gradients" in outcome["message"] for outcome in two.run(scenarios.sparse))


@pytest.mark.parametrize("samples", [[8, 0], [8, 2], [8, 8]])
def test_where_another_rank_runs_out_a_micro_batch_is_halved_and_no_more(two: Job, samples: list[int]) -> None:
    assert two.results(scenarios.halved, samples=samples) == [4, 4]


@pytest.mark.parametrize("kind", ["plain", "ddp"])
def test_weights_of_the_loss_are_one_on_all_ranks(two: Job, kind: str) -> None:
    one, other = two.results(scenarios.loss_weights, kind=kind)
    assert one == other
    assert {outcome["error"] for outcome in two.run(scenarios.loss_weights, kind="fsdp")} == {"RankError"}


def test_a_micro_batch_without_a_term_leaves_a_sharded_model_its_numbers(two: Job) -> None:
    one, other = two.results(scenarios.masked)
    assert one == other
    assert all(value == value for value in one)

"""How an effective batch is accumulated."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch import InvalidArgumentError, plan_accumulation


@given(st.integers(1, 5000), st.integers(1, 600), st.integers(1, 16))
def test_every_size_is_met_exactly_in_the_fewest_steps(effective: int, fits: int, ranks: int) -> None:
    effective = max(effective, ranks)
    plan = plan_accumulation(effective_batch_size=effective, micro_batch_size=fits, world_size=ranks)
    full = plan.steps - bool(plan.remainder)
    assert plan.micro_batch_size * full * ranks + plan.remainder == effective
    assert 0 <= plan.remainder < plan.micro_batch_size * ranks
    assert 1 <= plan.micro_batch_size <= fits
    assert plan.steps == -(-effective // (fits * ranks))


@pytest.mark.parametrize(
    ("effective", "fits", "ranks", "equation"),
    [
        (96, 50, 1, "96 = 48 samples x 2 steps"),
        (7, 4, 1, "7 = 4 samples x 1 step + 3 samples x 1 step"),
        (8, 4, 1, "8 = 4 samples x 2 steps"),
        (4096, 100, 8, "4096 = (86 samples x 2 steps + 85 samples x 4 steps) x 8 ranks"),
        (4096, 128, 8, "4096 = 128 samples x 4 steps x 8 ranks"),
        (7, 4, 2, "7 = 2 ranks of 3 or 4 samples, each in at most 1 step of at most 4"),
        (7, 3, 7, "7 = 1 sample x 1 step x 7 ranks"),
        (5, 2, 1, "5 = 2 samples x 2 steps + 1 sample x 1 step"),
        (None, 30, 2, "60 = 30 samples x 1 step x 2 ranks"),
    ],
)
def test_the_equation_names_every_factor(effective: int | None, fits: int, ranks: int, equation: str) -> None:
    plan = plan_accumulation(effective_batch_size=effective, micro_batch_size=fits, world_size=ranks)
    assert str(plan) == equation


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"effective_batch_size": 0}, "effective_batch_size"),
        ({"effective_batch_size": 2.5}, "effective_batch_size"),
        ({"effective_batch_size": 3, "world_size": 4}, "effective_batch_size"),
        ({"micro_batch_size": True}, "micro_batch_size"),
        ({"world_size": 0}, "world_size"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{argument}="):
        plan_accumulation(**{"effective_batch_size": 8, "micro_batch_size": 2, **change})

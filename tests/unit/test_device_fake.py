"""The fake device that ships for users' tests."""

from __future__ import annotations

import subprocess
import sys

import pytest

from autobatch.device.oom import is_oom
from autobatch.testing import FakeDevice


def test_a_step_fits_up_to_the_capacity_and_not_above() -> None:
    device = FakeDevice(1000, lambda n: 100 + 10 * n)
    device.step(90)
    assert device.measure().peak_allocated_bytes == 1000
    with pytest.raises(MemoryError) as caught:
        device.step(91)
    assert is_oom(caught.value)
    assert device.steps == [90, 91]


def test_the_function_may_raise_what_it_likes() -> None:
    def peak(n: int) -> int:
        raise KeyError("a bug of the workload")

    with pytest.raises(KeyError):
        FakeDevice(1000, peak).step(1)


def test_it_can_refuse_to_be_made_smaller() -> None:
    device = FakeDevice(1000, lambda n: n, shrinkable=False)
    with device.restrict(10) as restricted:
        assert not restricted
        device.step(1000)


def test_it_counts_the_retries_it_is_told() -> None:
    device = FakeDevice(1000, lambda n: n, retries=lambda n: int(n > 900))
    for n in (900, 950, 1000):
        device.step(n)
    assert device.retries() == 2


def test_needs_no_torch() -> None:
    code = (
        "import sys; from autobatch.testing import FakeDevice; FakeDevice(9, lambda n: n).step(1); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

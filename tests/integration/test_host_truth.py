"""On real host memory, the answer is held against what survives in fresh processes."""

from __future__ import annotations

import pytest

from autobatch import Outcome, find
from autobatch.device.host import HostDevice
from autobatch.probe.isolation import ChildExecutor
from autobatch.probe.trial import TrialRequest
from autobatch.units import MIB
from tests.workloads import host

pytestmark = pytest.mark.slow


def survives(builder: object, size: int, limit_bytes: int) -> list[bool]:
    """Whether 20 steps of ``size`` end well in fresh processes, and in one that has run smaller batches: what some
    kernels keep for each size is 1.6 % of 512 MiB (attention on a processor with AMX) or 2.3 % (convolutions).
    """
    outcomes = []
    for before in ((), (), (1, 1)):
        executor = ChildExecutor(builder, HostDevice(memory_limit_bytes=limit_bytes).isolation())
        try:
            executor.setting()
            request = TrialRequest(batch_size=size, steps=20, limit_bytes=limit_bytes, sizes_before=before)
            outcomes.append(executor.run(request).trial.outcome is Outcome.FITS)
        finally:
            executor.close()
    return outcomes


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("builder", "limit_bytes"),
    [(host.mlp, 512 * MIB), (host.attention, 512 * MIB), (host.convolutions, 512 * MIB)],
)
def test_the_answer_is_within_two_per_cent_of_the_truth_and_never_above(builder: object, limit_bytes: int) -> None:
    result = find(builder, device="cpu", memory_limit=limit_bytes, headroom=0, multiple_of=1)
    print(result)
    assert all(survives(builder, result.batch_size, limit_bytes))
    above = result.batch_size + max(1, int(0.02 * result.batch_size)) + 1
    assert not all(survives(builder, above, limit_bytes))

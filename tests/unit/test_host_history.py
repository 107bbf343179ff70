"""What torch allocates on the host, as its profiler tells it.

In child processes, for malloc's settings have to be there before one starts.
"""

from __future__ import annotations

import os
import subprocess
import sys

from autobatch.device.host import CHILD_ENVIRONMENT

BEGIN = """
import torch
from autobatch.device.host_history import begin
from autobatch.device.recording import recording

older = [torch.ones(1000) for _ in range(3)]

def step(n):
    older and older.pop()
    batch = torch.empty(n, 1000)
    product = batch.exp()
    del batch
    return product.sum()

"""


def run(code: str, environment: dict[str, str] | None = None) -> str:
    """What a child prints, errors too."""
    child = subprocess.run(
        [sys.executable, "-c", BEGIN + code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(CHILD_ENVIRONMENT if environment is None else environment)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout
    return child.stdout


def test_each_allocation_is_told_with_its_end_and_nothing_is_said_of_it() -> None:
    said = run(
        "with recording(begin(torch)) as seen:\n"
        "    for _ in range(2):\n"
        "        step(7)\n"
        "        seen.step_ended()\n"
        "    trace = seen.finish()\n"
        "print(list(trace.sizes), list(trace.events), trace.steps, trace.mapped_from_bytes)\n"
        "print(torch._C._autograd._profiler_enabled())"
    )
    sizes, events = [28000, 28000, 4] * 2, [-1, -1, 0, -1, 1, 2, -1, -1, 3, -1, 4, 5]
    assert sorted(said.splitlines()) == sorted(["False", f"{sizes} {events} (3, 6) 262144"])


def test_what_other_processes_see_is_no_private_data() -> None:
    """As the batches are that a loader's workers send."""
    said = run(
        "with recording(begin(torch)) as seen:\n"
        "    torch.empty(1000, 1000).share_memory_().mul_(2)\n"
        "    torch.empty(5)\n"
        "    seen.step_ended()\n"
        "    print(list(seen.finish().sizes))"
    )
    assert said == "[4000000, 8, 4, 20]\n"  # the product has a scalar of its own, and that a copy


def test_malloc_that_changes_its_threshold_as_it_goes_is_not_recorded() -> None:
    unset = dict.fromkeys(CHILD_ENVIRONMENT, "")
    assert run("with recording(begin(torch)) as seen: print(seen)", unset) == "None\n"


def test_who_profiles_already_is_left_alone() -> None:
    said = run(
        "with torch.autograd.profiler.profile() as own:\n"
        "    with recording(begin(torch)) as seen: print(seen)\n"
        "    step(7)\n"
        "print(any('exp' in event.key for event in own.key_averages()))"
    )
    assert [line for line in said.splitlines() if line in ("None", "True", "False")] == ["None", "True"]


def test_who_profiles_amid_it_is_not_disturbed_and_nothing_is_told() -> None:
    said = run(
        "with recording(begin(torch)) as seen:\n"
        "    with torch.autograd.profiler.profile() as own: step(7)\n"
        "    seen.step_ended()\n"
        "    print(seen.finish())\n"
        "print(any('exp' in event.key for event in own.key_averages()))"
    )
    assert [line for line in said.splitlines() if line in ("None", "True", "False")] == ["None", "True"]


def test_a_torch_that_has_it_otherwise_records_nothing() -> None:
    assert run("del torch._C._profiler.ProfilerConfig\nwith recording(begin(torch)) as seen: print(seen)") == "None\n"


def test_the_recorder_is_no_part_of_what_the_workload_may_have() -> None:
    """Its thread alone has a stack of 8 MiB."""
    said = run(
        "from autobatch.device.host import HostDevice\n"
        "from autobatch.probe.trial import TrialRequest, run_trial\n"
        "from autobatch.probe.workload import Workload\n"
        "import resource\n"
        "workload, MIB = Workload.from_step(lambda n: torch.ones(n << 18).sum()), 1 << 20\n"
        "device, before = HostDevice(), resource.getrlimit(resource.RLIMIT_DATA)\n"
        "for records in (False, True, True, False):\n"
        "    request = TrialRequest(batch_size=15, steps=2, limit_bytes=20 * MIB, records=records)\n"
        "    attempt = run_trial(workload, device, request)\n"
        "    peak = attempt.trial.measurement.peak_reserved_bytes\n"
        "    print(attempt.trial.outcome.name, attempt.trace is not None, 14 * MIB < (peak or 15 * MIB) < 18 * MIB)\n"
        "request = TrialRequest(batch_size=30, steps=2, limit_bytes=20 * MIB, records=True)\n"
        "print(run_trial(workload, device, request).trial.outcome.name)\n"
        "print(resource.getrlimit(resource.RLIMIT_DATA) == before)"
    )
    assert said.splitlines() == [
        "FITS False True",
        "FITS True True",
        "FITS True True",
        "FITS False True",
        "OOM",
        "True",
    ]


def test_the_user_s_own_limit_is_as_it_was() -> None:
    said = run(
        "from autobatch.device.host import HostDevice\n"
        "import resource\n"
        "device = HostDevice()\n"
        "for own in ((1 << 40, 1 << 41), (1 << 40, 1 << 40)):\n"  # of the second nothing can be more
        "    resource.setrlimit(resource.RLIMIT_DATA, own)\n"
        "    with device.recording() as seen:\n"
        "        step(7)\n"
        "    print(seen is not None, resource.getrlimit(resource.RLIMIT_DATA) == own)"
    )
    assert said == "True True\n" * 2

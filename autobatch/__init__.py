"""Finds the largest training batch that fits a GPU, quickly, and leaves what you have as it was.

::

    import autobatch

    result = autobatch.find(build_workload, device="a100-40gb")
    print(result.batch_size)

Importing this package imports no torch: each name is loaded when it is first used, so that a virtual GPU can be
attached before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from autobatch import errors
from autobatch.errors import (
    AutobatchError,
    CheckpointError,
    DeviceCorruptedError,
    DeviceError,
    DeviceNotFoundError,
    DeviceQueryError,
    DoesNotFitError,
    IntegrationError,
    InvalidArgumentError,
    MissingDependencyError,
    RankError,
    SearchError,
    UnsupportedTrainerError,
    WorkloadFailedError,
)
from autobatch.result import BatchSizeResult, Measurement, Outcome, Trial

if TYPE_CHECKING:
    from autobatch.device.oom import is_oom
    from autobatch.integrations.tuning import tune
    from autobatch.probe.command import Command
    from autobatch.probe.finder import find
    from autobatch.probe.workload import Workload
    from autobatch.training.accumulator import Accumulator
    from autobatch.training.learning_rate import scale_lr
    from autobatch.training.noise import NoiseScale
    from autobatch.training.plan import AccumulationPlan, plan_accumulation
    from autobatch.training.trainer import Trainer
    from autobatch.virtual.device import VirtualGPU

__version__ = "0.1.0"

_HOMES = {
    "find": "autobatch.probe.finder",
    "Command": "autobatch.probe.command",
    "Workload": "autobatch.probe.workload",
    "Accumulator": "autobatch.training.accumulator",
    "AccumulationPlan": "autobatch.training.plan",
    "Trainer": "autobatch.training.trainer",
    "plan_accumulation": "autobatch.training.plan",
    "NoiseScale": "autobatch.training.noise",
    "scale_lr": "autobatch.training.learning_rate",
    "tune": "autobatch.integrations.tuning",
    "VirtualGPU": "autobatch.virtual.device",
    "is_oom": "autobatch.device.oom",
}

__all__ = [
    "AccumulationPlan",
    "Accumulator",
    "AutobatchError",
    "BatchSizeResult",
    "CheckpointError",
    "Command",
    "DeviceCorruptedError",
    "DeviceError",
    "DeviceNotFoundError",
    "DeviceQueryError",
    "DoesNotFitError",
    "IntegrationError",
    "InvalidArgumentError",
    "Measurement",
    "MissingDependencyError",
    "NoiseScale",
    "Outcome",
    "RankError",
    "SearchError",
    "Trainer",
    "Trial",
    "UnsupportedTrainerError",
    "VirtualGPU",
    "Workload",
    "WorkloadFailedError",
    "__version__",
    "errors",
    "find",
    "is_oom",
    "plan_accumulation",
    "scale_lr",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

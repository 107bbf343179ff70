"""What ``autobatch probe`` can be pointed at.

A target is a frozen record that builds a :class:`~autobatch.probe.workload.Workload` when it is called with a device.
It pickles and needs no torch, so that it can be made here and called in the process where the trials run.
"""

from __future__ import annotations

from autobatch.cli.targets.common import ModelOptions, Target, refuse
from autobatch.cli.targets.function import FunctionTarget, function_target
from autobatch.cli.targets.hf import HFTarget
from autobatch.cli.targets.timm import TimmTarget
from autobatch.cli.targets.torchvision import TorchvisionTarget
from autobatch.errors import InvalidArgumentError

__all__ = ["FunctionTarget", "HFTarget", "ModelOptions", "Target", "TimmTarget", "TorchvisionTarget", "parse_target"]

_ALLOWED = "hf:NAME, torchvision:NAME, timm:NAME, FILE.py:FUNCTION or MODULE:FUNCTION"


def parse_target(text: str, options: ModelOptions) -> Target:
    """The target that ``text`` names, trained as ``options`` say.

    Raises:
        InvalidArgumentError: if ``text`` is no target, names a file or function that does not exist, or an option
            means nothing to a target of its kind.
    """
    kind, colon, name = text.rpartition(":")
    if not colon or not kind or not name:
        raise InvalidArgumentError("target", text, _ALLOWED)
    kind, _, rest = text.partition(":")
    if kind == "hf":
        return HFTarget(rest, options)
    if kind in ("torchvision", "timm"):
        for option in ("seq_len", "task"):
            refuse(options, option, f"{kind}: targets")
        return TorchvisionTarget(rest, options) if kind == "torchvision" else TimmTarget(rest, options)
    return function_target(text, options)

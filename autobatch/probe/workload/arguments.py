"""What a Workload may be given: wrong arguments are named before anything is run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autobatch.errors import InvalidArgumentError

MODES = ("train", "eval", "both")
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", *AUTOCAST_DTYPES)


def check_model(model: Any, optimizer: Any, scheduler: Any, scaler: Any) -> None:
    """Raises InvalidArgumentError for the first that is not what its name says."""
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError("model", model, "a torch.nn.Module")
    for argument, value, method in (("scheduler", scheduler, "state_dict"), ("scaler", scaler, "unscale_")):
        if value is not None and not hasattr(value, method):
            raise InvalidArgumentError(argument, value, f"a torch {argument}, or None")
    for each in optimizers_of(optimizer):
        if not hasattr(each, "step"):
            raise InvalidArgumentError("optimizer", each, "a torch optimizer, a list of them, or None")
        if isinstance(each, torch.optim.LBFGS):
            raise InvalidArgumentError("optimizer", "LBFGS", "one that steps without a closure; for it, give step(n)")


def optimizers_of(optimizer: Any) -> tuple[Any, ...]:
    """One optimizer, several or None, in their order."""
    if optimizer is None:
        return ()
    return tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)


def check_functions(**functions: Any) -> None:
    """Raises InvalidArgumentError for the first that is neither a function nor None."""
    for argument, value in functions.items():
        if value is not None and not callable(value):
            raise InvalidArgumentError(argument, value, "a function, or None")


def check_options(
    *,
    precision: Any = None,
    max_grad_norm: Any = None,
    accumulate: Any = False,
    keep_outputs: Any = 0,
    extra_state: Any = (),
    mode: Any = "train",
    name: Any = None,
) -> None:
    """Raises InvalidArgumentError for the first that is wrong."""
    if precision is not None and precision not in PRECISIONS:
        raise InvalidArgumentError("precision", precision, f"one of {', '.join(PRECISIONS)}, or None")
    if max_grad_norm is not None and not (isinstance(max_grad_norm, (int, float)) and max_grad_norm > 0):
        raise InvalidArgumentError("max_grad_norm", max_grad_norm, "a positive number, or None")
    if not isinstance(accumulate, bool):
        raise InvalidArgumentError("accumulate", accumulate, "True or False, whether gradients are accumulated")
    if isinstance(keep_outputs, bool) or not isinstance(keep_outputs, int) or keep_outputs < 0:
        raise InvalidArgumentError("keep_outputs", keep_outputs, "a whole number from 0 on")
    if not isinstance(extra_state, (list, tuple)):
        raise InvalidArgumentError("extra_state", extra_state, "a list of what a step changes")
    if mode not in MODES:
        raise InvalidArgumentError("mode", mode, f"one of {', '.join(MODES)}")
    if name is not None and not isinstance(name, str):
        raise InvalidArgumentError("name", name, "text, or None")

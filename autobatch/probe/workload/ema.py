"""The averaged copy of the weights that some training keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from autobatch.errors import InvalidArgumentError


def update_of(ema: Any) -> Callable[[nn.Module], Any] | None:
    """What brings ``ema`` up to date with a model after a step; None without one.

    Raises:
        InvalidArgumentError: if nothing of ``ema`` does.
    """
    methods = [getattr(ema, name, None) for name in ("update_parameters", "update")]
    update = next((method for method in methods if callable(method)), ema)
    if update is None or (callable(update) and not isinstance(update, nn.Module)):
        return update
    raise InvalidArgumentError("ema", ema, "an object with update_parameters(model), or a function of the model")

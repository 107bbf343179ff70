"""A GradScaler amid trials: before their steps, and after one that failed."""

from __future__ import annotations

from typing import Any

import torch


def forget_step(scaler: Any) -> None:
    """Lets a scaler forget the step that it is in the middle of: after an error it would refuse to unscale again.

    Nothing public of torch does so: ``load_state_dict`` leaves it, and ``update`` needs a step that came to its end.
    Anything but a GradScaler is left alone.
    """
    if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
        scaler._per_optimizer_states.clear()


def scale_by_one(scaler: Any) -> None:
    """Lets a scaler multiply by one, so that gradients overflow only if they would in single precision.

    A step whose gradients overflow is left out, and training's first often are, while the scale comes down from 65536:
    a trial of such steps would never meet the optimizer's state. Anything but a GradScaler is left alone.
    """
    if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
        scaler.load_state_dict({**scaler.state_dict(), "scale": 1.0})

"""A GradScaler after a step that failed."""

from __future__ import annotations

from typing import Any

import torch


def forget_step(scaler: Any) -> None:
    """Lets a scaler forget the step that it is in the middle of: after an error it would refuse to unscale again.

    Nothing public of torch does so: ``load_state_dict`` leaves it, and ``update`` needs a step that came to its end.
    Anything but a GradScaler is left alone.
    """
    if isinstance(scaler, torch.amp.GradScaler):
        scaler._per_optimizer_states.clear()

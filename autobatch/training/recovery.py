"""Running out of memory in the middle of a window: what is put back, and who is told."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from autobatch.device.local import resolve_local
from autobatch.probe.random_numbers import random_states


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """A window that ran out of memory and is repeated with smaller micro-batches."""

    window: int
    """Which one, counted from 0."""
    micro_batch_size: int
    """The samples of a micro-batch that did not fit."""
    next_micro_batch_size: int
    """Those that the window is repeated with."""
    message: str
    """The first line of the error."""


OnRecovery = Callable[[Recovery], None]


class Snapshot:
    """Random numbers and buffers at the start of a window. Whatever else forward and backward change is gradients."""

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self._random = random_states(str(device))
        self._buffers = [(buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers()]

    def restore(self) -> None:
        """Puts everything back, in place."""
        for put_back, state in self._random:
            put_back(state)
        with torch.no_grad():
            for buffer, saved in self._buffers:
                buffer.copy_(saved)


def forget(failure: BaseException, device: torch.device) -> None:
    """Lets go of what a failed step left alive, and gives the device its cached memory back.

    To be called outside the ``except`` block: inside, the traceback keeps the tensors of the step alive.
    """
    linked: BaseException | None = failure
    while linked is not None:
        traceback.clear_frames(linked.__traceback__)
        linked = linked.__cause__ or linked.__context__
    gc.collect()
    resolve_local(str(device)).release()

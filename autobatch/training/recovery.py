"""Running out of memory in the middle of a window: what is put back, and who is told."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from autobatch.device.local import resolve_local
from autobatch.device.oom import forget_frames
from autobatch.probe.random_numbers import random_states
from autobatch.probe.state import Memento


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
    """Random numbers and buffers at the start of a window. Whatever else forward and backward change is gradients.

    The copies are on the host, where they take nothing of what a step needs.
    """

    def __init__(self, modules: Iterable[nn.Module], devices: Iterable[torch.device]) -> None:
        self._random = [state for device in devices for state in random_states(str(device))]
        memento = Memento()
        parts = [part for module in modules for part in module.modules()]
        generators = [item for part in parts for item in vars(part).values() if isinstance(item, torch.Generator)]
        self._restores = [memento.capture(item) for item in (*[part._buffers for part in parts], *generators)]

    def restore(self) -> None:
        """Puts everything back, also a buffer that was replaced by another."""
        for put_back, state in self._random:
            put_back(state)
        for restore in self._restores:
            restore()


def forget(failure: BaseException | None, device: torch.device) -> None:
    """Lets go of what a failed step left alive, and gives the device its cached memory back.

    To be called outside the ``except`` block: inside, the traceback keeps the tensors of the step alive.
    """
    if failure is not None:
        forget_frames(failure)
    gc.collect()
    resolve_local(str(device)).release()

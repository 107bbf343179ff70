"""What the processes of trials can raise in their prober, and the traceback that comes with it."""

from __future__ import annotations

from autobatch.device.oom import Tier
from autobatch.errors import WorkloadFailedError


class ChildTraceback(Exception):
    """The cause of an error that a child process raised: its traceback there, as text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n\n{self.text}"


class WorkerLostError(Exception):
    """A worker died or hangs. ``tier`` is what its end says about memory, if anything."""

    def __init__(self, message: str, tier: Tier | None) -> None:
        super().__init__(message)
        self.tier = tier


class SilenceError(WorkloadFailedError):
    """A child process said nothing for too long."""


class StrandedError(Exception):
    """A trial was given up because another rank's had failed: this one waited for it, or lost touch with it."""

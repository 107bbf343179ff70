"""Every error autobatch raises by itself.

::

    AutobatchError
    ├── InvalidArgumentError (ValueError)     an argument is wrong; nothing was touched
    ├── DeviceError                           the place where the memory is
    │   ├── DeviceNotFoundError               no such device, or nothing to make it from
    │   ├── DeviceQueryError                  it is there and does not answer
    │   └── DeviceCorruptedError              its context is broken: only a new process helps
    ├── SearchError                           the search has no answer
    │   ├── DoesNotFitError                   not even the smallest permitted batch fits
    │   └── WorkloadFailedError               the workload failed for a reason of its own, in a child process
    ├── IntegrationError                      a trainer of somebody else's
    │   ├── MissingDependencyError (ImportError)
    │   └── UnsupportedTrainerError
    ├── RankError                             the ranks of a distributed job cannot agree
    └── CheckpointError                       a checkpoint cannot be used, or not be written

An error of the user's own workload is never wrapped when it can be raised as it was.
All of them pickle: they cross process borders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autobatch.result import Trial


class AutobatchError(Exception):
    """The root: ``except AutobatchError`` catches everything this package raises by itself."""


class AutobatchWarning(UserWarning):
    """Something went on otherwise than asked, and without harm to the answer."""


class InvalidArgumentError(AutobatchError, ValueError):
    """An argument is wrong. Raised before any device is touched.

    The message names the argument, the value it had and what is allowed; all three are attributes.
    """

    def __init__(self, argument: str, value: Any, allowed: str) -> None:
        super().__init__(argument, value, allowed)
        self.argument, self.value, self.allowed = argument, value, allowed

    def __str__(self) -> str:
        return f"{self.argument}={self.value!r}: must be {self.allowed}"

    def __reduce__(self) -> tuple[Any, ...]:
        # The value may be anything, a live object too; across a process border its repr must do.
        value = self.value if isinstance(self.value, (str, int, float, bool, type(None))) else repr(self.value)
        return type(self), (self.argument, value, self.allowed)


class DeviceError(AutobatchError):
    """Something about the place where the memory is."""


class DeviceNotFoundError(DeviceError):
    """The named device does not exist here, or what it needs is not installed."""


class DeviceQueryError(DeviceError):
    """The device exists and does not answer a question about itself."""


class DeviceCorruptedError(DeviceError):
    """The device's context is broken (an illegal access, a device-side assert): only a new process helps."""


class SearchError(AutobatchError):
    """The search ended without an answer."""


class DoesNotFitError(SearchError):
    """Not even the smallest permitted batch fits. ``trial`` is the one that showed it."""

    def __init__(self, message: str, trial: Trial | None = None) -> None:
        super().__init__(message, trial)
        self.message, self.trial = message, trial

    def __str__(self) -> str:
        return self.message


class WorkloadFailedError(SearchError):
    """The workload failed by itself in a child process, with an error that cannot cross to this one.

    ``batch_size`` is the size that was tried, ``traceback_text`` the child's own traceback.
    """

    def __init__(self, message: str, batch_size: int | None = None, traceback_text: str = "") -> None:
        super().__init__(message, batch_size, traceback_text)
        self.message, self.batch_size, self.traceback_text = message, batch_size, traceback_text

    def __str__(self) -> str:
        return self.message


class IntegrationError(AutobatchError):
    """Something about a trainer of another library."""


class MissingDependencyError(IntegrationError, ImportError):
    """An optional library is not installed; the message names the extra that brings it."""


class UnsupportedTrainerError(IntegrationError):
    """No integration knows this trainer, or it is set up in a way that cannot be tuned. Nothing was touched."""


class RankError(AutobatchError):
    """The ranks of a distributed job cannot agree, or one of them failed or is gone.

    ``rank`` is the one that failed for a reason of its own, which its own process raises; None where it is not that.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message, rank)
        self.message, self.rank = message, rank

    def __str__(self) -> str:
        return self.message


class CheckpointError(AutobatchError):
    """A checkpoint cannot be used, and nothing of it was loaded; or it cannot be written."""

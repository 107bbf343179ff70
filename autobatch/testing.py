"""For tests, yours too: a device that is a plain function.

::

    device = FakeDevice(16 * GIB, lambda n: 2 * GIB + n * 100 * MIB)
    result = autobatch.find(device.step, device=device)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from autobatch.device.base import DeviceInfo, Isolation
from autobatch.result import Measurement


class FakeDevice:
    """A device of ``capacity_bytes`` on which a step of n samples needs ``peak(n)`` bytes.

    Give :meth:`step` to what is under test as its training step. Needs neither torch nor any hardware.

    Args:
        peak: bytes at the peak of a step. It is called once for each step, so it may count, vary or raise.
        retries: how often the allocator frees and retries in a step of n samples, where it fits.
        shrinkable: False for a device that cannot be made smaller, so that peaks have to be compared.
        streams: on how many streams there is memory when it runs out.
    """

    torch_device = "cpu"
    ends_by_itself = True

    def __init__(
        self,
        capacity_bytes: int,
        peak: Callable[[int], int],
        *,
        retries: Callable[[int], int] = lambda n: 0,
        shrinkable: bool = True,
        streams: int = 1,
    ) -> None:
        self.steps: list[int] = []
        """The sizes that were stepped, failures included, in their order."""
        self._capacity_bytes = self._limit_bytes = capacity_bytes
        self._peak, self._retries_of, self._shrinkable = peak, retries, shrinkable
        self._peak_bytes = self._retries = 0
        self._streams = streams

    def step(self, n: int) -> None:
        """One step on ``n`` samples; raises :class:`MemoryError` if it needs more than there is."""
        self.steps.append(n)
        needed_bytes = self._peak(n)
        if needed_bytes > self._limit_bytes:
            raise MemoryError(f"fake device out of memory: {needed_bytes} of {self._limit_bytes} bytes")
        self._peak_bytes = max(self._peak_bytes, needed_bytes)
        self._retries += self._retries_of(n)

    def info(self) -> DeviceInfo:
        return DeviceInfo(
            name="fake device", kind="fake", total_bytes=self._capacity_bytes, free_bytes=self._capacity_bytes
        )

    def isolation(self) -> Isolation:
        return Isolation(required=False, reason="a fake lives in the process that made it", device="cpu")

    def budget_bytes(self) -> int:
        return self._limit_bytes

    def begin(self, found: Any = None) -> None:
        """Nothing to note: steps are counted by themselves."""

    def held_bytes(self) -> int:
        return 0

    @contextmanager
    def restrict(self, limit_bytes: int | None) -> Iterator[bool]:
        before_bytes = self._limit_bytes
        if self._shrinkable and limit_bytes is not None:
            self._limit_bytes = min(before_bytes, limit_bytes)
        try:
            yield self._shrinkable or limit_bytes is None
        finally:
            self._limit_bytes = before_bytes

    def synchronize(self) -> None:
        """Nothing runs behind one's back."""

    def release(self) -> None:
        """Nothing is cached."""

    def reset_peaks(self) -> None:
        self._peak_bytes = 0

    def retries(self) -> int:
        return self._retries

    def streams(self) -> int:
        return self._streams

    def recording(self) -> AbstractContextManager[None]:
        """None: a fake allocates nothing."""
        return nullcontext()

    def measure(self) -> Measurement:
        return Measurement(peak_allocated_bytes=self._peak_bytes, peak_reserved_bytes=self._peak_bytes)

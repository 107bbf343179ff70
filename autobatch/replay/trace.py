"""What a training step asked of the allocator, in its order."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

ALLOCATES = -1
"""The event that takes the next allocation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Memory that the allocator has from the driver: blocks that follow each other, each ``(bytes, is in use)``."""

    address: int
    is_small: bool
    stream: int
    blocks: tuple[tuple[int, bool], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The allocations and frees of a few steps, in their order, from a known beginning."""

    segments: tuple[Segment, ...]
    """What there was before the first event."""
    events: array[int]
    """``ALLOCATES`` for the next allocation; k for the end of the k-th; below ``ALLOCATES``, for that of a block that
    was in use at the beginning: the first such block is -2, the next -3."""
    sizes: array[int]
    """Bytes of each allocation, as they were asked for."""
    streams: array[int]
    """On which stream."""
    steps: tuple[int, ...]
    """How many allocations there had been when each step ended."""
    mapped_from_bytes: int | None = None
    """For an allocation of the host: from how many bytes on malloc maps it by itself. None for one of a GPU."""

    def last_step(self) -> range:
        """The allocations of the last step."""
        return range(self.steps[-2] if len(self.steps) > 1 else 0, len(self.sizes))

    def shortened(self, steps: int) -> Trace:
        """The same up to the end of so many steps."""
        if len(self.steps) <= steps:
            return self
        count = self.steps[steps - 1]
        end = self._allocations()[count]
        return replace(
            self,
            events=self.events[:end],
            sizes=self.sizes[:count],
            streams=self.streams[:count],
            steps=self.steps[:steps],
        )

    def prolonged(self, more: int) -> Trace:
        """The same with ``more`` steps like the last; unchanged if the last two are not alike."""
        last = self.last_step()
        if len(self.steps) < 3 or self.steps[-1] != len(self.sizes) or not last:
            return self
        former = range(self.steps[-3], last.start)
        if any(listed[former.start : former.stop] != listed[last.start :] for listed in (self.sizes, self.streams)):
            return self
        allocations = self._allocations()
        before = self.events[allocations[former.start] : allocations[last.start]]
        # What ends between the last step and the next one is not on record; what did so before the last step is.
        between = self.events[allocations[former.stop - 1] + 1 : allocations[last.start]]
        ended = array("q", (event + len(last) for event in between if event >= former.start))
        step = self.events[allocations[last.start] : allocations[-1] + 1] + ended
        tail = {event for event in self.events[allocations[-1] + 1 :] if event >= 0}
        if _within(before, former.start) != _within(step, last.start) or not tail <= set(ended):
            return self
        events = self.events[: allocations[last.start]] + step
        for again in range(1, more + 1):
            shift = again * len(last)
            events.extend(e if e == ALLOCATES else e + shift for e in step if e == ALLOCATES or e >= former.start)
        return replace(
            self,
            events=events,
            sizes=self.sizes + self.sizes[last.start :] * more,
            streams=self.streams + self.streams[last.start :] * more,
            steps=(*self.steps, *(self.steps[-1] + len(last) * again for again in range(1, more + 1))),
        )

    def _allocations(self) -> list[int]:
        """Where in the events each allocation is."""
        return [at for at, event in enumerate(self.events) if event == ALLOCATES]


def _within(events: array[int], start: int) -> list[int]:
    """The allocations of a step and the ends of its own, counted from its first."""
    return [event if event == ALLOCATES else event - start for event in events if event == ALLOCATES or event >= start]


def trace_of(
    before: Sequence[Mapping[str, Any]],
    entries: Iterable[tuple[str, int, int, int]],
    steps: Sequence[int],
    *,
    begins_empty: bool = False,
    mapped_from_bytes: int | None = None,
) -> Trace:
    """The trace that torch's own records are.

    Args:
        before: the segments at the beginning, as ``torch.cuda.memory_snapshot()`` gives them, of one device.
        entries: what happened since: ``action``, ``addr``, ``size`` and ``stream`` of each of the ``device_traces`` in
            ``torch.cuda.memory._snapshot()``.
        steps: how many allocations there had been at the end of each step.
        begins_empty: for a beginning that holds a batch already, and so is another for each size. What is in use there
            is then allocated in the order of its addresses.
        mapped_from_bytes: as a :class:`Trace` has it.
    """
    segments, in_use = list[Segment](), dict[int, int]()
    events, sizes, streams = array("q"), array("q"), array("q")
    for segment in before:
        used = [block for block in segment["blocks"] if block["state"] != "inactive"]
        if begins_empty:
            for block in used:
                in_use[block["address"]] = len(sizes)
                events.append(ALLOCATES)
                sizes.append(block["requested_size"])
                streams.append(segment["stream"])
            continue
        in_use |= {block["address"]: ALLOCATES - 1 - len(in_use) - k for k, block in enumerate(used)}
        blocks = tuple((block["size"], block["state"] != "inactive") for block in segment["blocks"])
        segments.append(
            Segment(
                address=segment["address"],
                is_small=segment["segment_type"] == "small",
                stream=segment["stream"],
                blocks=blocks,
            )
        )
    first = len(sizes)
    for action, address, size, stream in entries:
        if action == "alloc":
            in_use[address] = len(sizes)
            events.append(ALLOCATES)
            sizes.append(size)
            streams.append(stream)
        elif action == "free_completed" and (ended := in_use.pop(address, None)) is not None:
            events.append(ended)
    ends = tuple(first + count for count in steps)
    return Trace(
        segments=tuple(segments),
        events=events,
        sizes=sizes,
        streams=streams,
        steps=ends,
        mapped_from_bytes=mapped_from_bytes,
    )

"""What a training step asked of the caching allocator, in its order."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ALLOCATES = -1
"""The event that takes the next allocation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Memory that the allocator has from the driver: blocks that follow each other, each ``(bytes, is in use)``."""

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

    def __len__(self) -> int:
        return len(self.events)

    def last_step(self) -> range:
        """The allocations of the last step."""
        return range(self.steps[-2] if len(self.steps) > 1 else 0, len(self.sizes))

    def prolonged(self, more: int) -> Trace:
        """The same with ``more`` steps like the last; unchanged if the last two are not alike."""
        last = self.last_step()
        if len(self.steps) < 3 or self.steps[-1] != len(self.sizes):
            return self
        former = range(self.steps[-3], last.start)
        if self.sizes[former.start : former.stop] != self.sizes[last.start :]:
            return self
        allocations = [k for k, event in enumerate(self.events) if event == ALLOCATES]
        # What ends between the last step and the next one is not on record; what did so before the last step is.
        between = self.events[allocations[former.stop - 1] + 1 : allocations[last.start]]
        ended = [event + len(last) for event in between if event >= former.start]
        events = self.events[: allocations[-1] + 1] + array("q", ended)
        step = events[allocations[last.start] :]
        for again in range(1, more + 1):
            shift = again * len(last)
            events.extend(e if e == ALLOCATES else e + shift for e in step if e == ALLOCATES or e >= former.start)
        return Trace(
            segments=self.segments,
            events=events,
            sizes=self.sizes + self.sizes[last.start :] * more,
            streams=self.streams + self.streams[last.start :] * more,
            steps=(*self.steps, *(self.steps[-1] + len(last) * again for again in range(1, more + 1))),
        )


def trace_of(before: Sequence[Mapping[str, Any]], entries: Iterable[Mapping[str, Any]], steps: Sequence[int]) -> Trace:
    """The trace that torch's own records are.

    Args:
        before: the segments at the beginning, as ``torch.cuda.memory_snapshot()`` gives them, of one device.
        entries: what happened since, as ``device_traces`` of ``torch.cuda.memory._snapshot()`` has it.
        steps: how many allocations there had been at the end of each step.
    """
    segments, in_use = [], dict[int, int]()
    for segment in before:
        blocks = []
        for block in segment["blocks"]:
            is_used = block["state"] != "inactive"
            blocks.append((block["size"], is_used))
            if is_used:
                in_use[block["address"]] = ALLOCATES - 1 - len(in_use)
        segments.append(
            Segment(is_small=segment["segment_type"] == "small", stream=segment["stream"], blocks=tuple(blocks))
        )
    events, sizes, streams = array("q"), array("q"), array("q")
    for entry in entries:
        if entry["action"] == "alloc":
            in_use[entry["addr"]] = len(sizes)
            events.append(ALLOCATES)
            sizes.append(entry["size"])
            streams.append(entry["stream"])
        elif entry["action"] == "free_completed" and (ended := in_use.pop(entry["addr"], None)) is not None:
            events.append(ended)
    return Trace(segments=tuple(segments), events=events, sizes=sizes, streams=streams, steps=tuple(steps))

"""A search within what a data set has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from autobatch.errors import InvalidArgumentError
from autobatch.probe.search import SearchAnswer, search
from autobatch.probe.search.bracket import Ask


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What a search needs to know of a data set."""

    samples: int
    varies: bool
    """Whether its samples are of different lengths."""
    ends: str = "dataset"
    """The proof of an answer that is all there is: ``max_batch_size`` where it was not the data set that ended."""

    def cap(self, max_batch_size: int | None, multiple_of: int | str) -> int:
        """The largest batch to ask for: what the data set has, or the caller's own cap.

        Raises:
            InvalidArgumentError: if ``multiple_of`` permits no batch that the data set can fill.
        """
        if isinstance(multiple_of, int) and multiple_of > self.samples:
            raise InvalidArgumentError("multiple_of", multiple_of, f"at most {self.samples}, the samples there are")
        return self.samples if max_batch_size is None else min(self.samples, max_batch_size)


def search_within(extent: Extent | None, ask: Ask, confirm: Ask, **options: Any) -> SearchAnswer:
    """:func:`~autobatch.probe.search.search`, of no more samples than there are; None is as many as are asked for."""
    asked_most = options["max_batch_size"]
    if extent is not None:
        options["max_batch_size"] = extent.cap(asked_most, options["multiple_of"])
    answer = search(ask, confirm, **options)
    if extent is not None and answer.proof == "max_batch_size" and options["max_batch_size"] != asked_most:
        return replace(answer, proof=extent.ends)
    return answer

"""The samples of an epoch in windows and micro-batches: the same in every run of the same seed, from any window on."""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from autobatch.errors import InvalidArgumentError
from autobatch.probe.random_numbers import random_states
from autobatch.training.split import parts_of


class Feed:
    """A data set, as one rank of a run takes it.

    What draws random numbers to load a sample finds them seeded by the place in the run, so that a run that goes on
    in the middle of an epoch sees what one that never stopped does, with any number of workers.

    Args:
        dataset: with a length, and samples by number.
        effective_batch_size: samples of a window over all ranks; the last of an epoch may have fewer.
        micro_batch_sizes: of each rank; each takes a share of the window in proportion.
        rank: which of them this is.
        collate_fn: makes a batch of a list of samples; torch's own if None.
        shuffle: False takes the samples in their own order.
        drop_last: leave out a last window that would have fewer samples.
        seed: of the order and of what is drawn to load samples.
        workers: processes that load them; 0 for this one.

    Raises:
        InvalidArgumentError: if ``dataset`` has no length or no samples.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        effective_batch_size: int,
        micro_batch_sizes: Sequence[int],
        rank: int,
        collate_fn: Callable[[list[Any]], Any] | None,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        workers: int,
    ) -> None:
        self.samples = count_samples(dataset)
        self._dataset, self._collate, self._workers = dataset, collate_fn or default_collate, workers
        self._most, self._sizes, self._rank = effective_batch_size, tuple(micro_batch_sizes), rank
        self._shuffle, self._drop_last, self._seed = shuffle, drop_last, seed

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return self.samples // self._most if self._drop_last else -(-self.samples // self._most)

    @property
    def order(self) -> dict[str, int]:
        """What decides which samples a window of an epoch has."""
        return {
            "samples": self.samples,
            "effective_batch_size": self._most,
            "shuffle": int(self._shuffle),
            "drop_last": int(self._drop_last),
            "seed": self._seed,
        }

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Any]]:
        """The micro-batches of each window of ``epoch``, from window ``start`` on; none where a rank has no sample."""
        order = self._permutation(epoch)
        places = [(window, part) for window in range(start, self.windows) for part in self._parts(order, window)]
        loader: DataLoader[Any] = DataLoader(
            _Parts(self._dataset, self._collate, (self._seed, epoch, self._rank)),
            batch_size=None,
            sampler=[(window, *part) for window, part in places],
            num_workers=self._workers,
            collate_fn=_as_it_is,
            worker_init_fn=heed_one_sigterm_less,
            generator=torch.Generator(),  # else it would draw from the numbers that training draws from
        )
        loaded = iter(loader)
        for window in range(start, self.windows):
            with _kept() if self._workers == 0 else contextlib.nullcontext():
                batches = [next(loaded) for _ in self._parts(order, window)]
            yield batches

    def _permutation(self, epoch: int) -> Sequence[int]:
        if not self._shuffle:
            return range(self.samples)
        generator = torch.Generator().manual_seed(_number(self._seed, epoch))
        order: list[int] = torch.randperm(self.samples, generator=generator).tolist()
        return order

    def _parts(self, order: Sequence[int], window: int) -> list[tuple[int, Sequence[int]]]:
        """This rank's micro-batches of ``window``: their numbers and the samples in them."""
        whole = order[window * self._most : (window + 1) * self._most]
        before, own = sum(self._sizes[: self._rank]), self._sizes[self._rank]
        ends = [round(len(whole) * size / sum(self._sizes)) for size in (before, before + own)]
        mine = whole[ends[0] : ends[1]]
        return [(number, mine[part]) for number, part in enumerate(parts_of(len(mine), own))]


class _Parts(Dataset[Any]):
    """Micro-batches by the window, the number and the samples of each."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], seeds: tuple[int, int, int]) -> None:
        self._dataset, self._collate, self._seeds = dataset, collate, seeds

    def __getitem__(self, place: tuple[int, int, Sequence[int]]) -> Any:
        window, number, indices = place
        _seed(_number(*self._seeds, window, number))
        return self._collate([self._dataset[index] for index in indices])


def count_samples(dataset: Any) -> int:
    """How many samples ``dataset`` has.

    Raises:
        InvalidArgumentError: if it is no data set with a length and samples by number, or is empty.
    """
    allowed = "a data set with a length and samples by number"
    if isinstance(dataset, (IterableDataset, DataLoader, Mapping)) or not hasattr(dataset, "__getitem__"):
        raise InvalidArgumentError("dataset", type(dataset).__name__, allowed)
    try:
        samples = len(dataset)
    except TypeError as exc:
        raise InvalidArgumentError("dataset", type(dataset).__name__, allowed) from exc
    if not samples:
        raise InvalidArgumentError("dataset", f"{type(dataset).__name__} of no samples", "one with samples")
    return samples


def _seed(number: int) -> None:
    """Seeds the generators that samples may be loaded with. A worker has them for itself."""
    random.seed(number)
    torch.default_generator.manual_seed(number)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(number % 2**32)


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Puts the generators of this process back afterwards: training draws from them too."""
    before = random_states("cpu")
    try:
        yield
    finally:
        for put_back, state in before:
            put_back(state)


def _number(*parts: int) -> int:
    """A number for a place in the run, with nothing in common with those of its neighbours."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def heed_one_sigterm_less(worker: int) -> None:
    """For a process that loads samples: SIGTERM often goes to the whole group, and it is the run that heeds it.

    A second one, such as from whoever waits for this process, ends it.
    """

    def heed_the_next(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, heed_the_next)


def _as_it_is(batch: Any) -> Any:
    return batch

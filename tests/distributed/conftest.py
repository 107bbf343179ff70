"""Ranks that the tests of a module share; those in which a rank dies have ranks of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.launch import Job


@pytest.fixture(scope="module")
def one() -> Iterator[Job]:
    yield from ranks(1)


@pytest.fixture(scope="module")
def two() -> Iterator[Job]:
    yield from ranks(2)


@pytest.fixture(scope="module")
def four() -> Iterator[Job]:
    yield from ranks(4)


@pytest.fixture
def doomed() -> Iterator[Job]:
    yield from ranks(2)


def ranks(size: int) -> Iterator[Job]:
    job = Job(size)
    yield job
    job.close()

"""Ranks that the tests of a module share; those in which a rank dies have ranks of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.launch import Job, end_server


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    """Later tests of this process look for children that should not be there."""
    yield
    end_server()


@pytest.fixture(scope="module")
def one(server: None) -> Iterator[Job]:
    yield from ranks(1)


@pytest.fixture(scope="module")
def two(server: None) -> Iterator[Job]:
    yield from ranks(2)


@pytest.fixture(scope="module")
def four(server: None) -> Iterator[Job]:
    yield from ranks(4)


@pytest.fixture
def doomed() -> Iterator[Job]:
    yield from ranks(2)


def ranks(size: int) -> Iterator[Job]:
    job = Job(size)
    yield job
    job.close()

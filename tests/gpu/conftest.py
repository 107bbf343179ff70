"""What several tests on the session's GPU begin with."""

from __future__ import annotations

import contextlib

import pytest

from autobatch.units import GIB, MIB


@pytest.fixture
def little_memory():
    """64 MiB for this process, and what it has cached given back."""
    with _at_most(64 * MIB, beside_what_it_has=True):
        yield


@pytest.fixture
def two_gib():
    """2 GiB for this process, beside what it has."""
    with _at_most(2 * GIB, beside_what_it_has=True):
        yield


@pytest.fixture
def card_of_24_gb():
    """A card of 24 GiB, as far as this process goes."""
    with _at_most(24 * GIB):
        yield


@contextlib.contextmanager
def _at_most(limit_bytes: int, *, beside_what_it_has: bool = False):
    import torch  # not before a virtual GPU is attached

    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_reserved() if beside_what_it_has else 0
    torch.cuda.set_per_process_memory_fraction(min(1.0, (held + limit_bytes) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()

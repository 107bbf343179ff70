"""What several tests on the session's GPU begin with."""

from __future__ import annotations

import contextlib
import gc

import pytest

from autobatch.units import GIB, MIB


@pytest.fixture
def little_memory():
    """64 MiB for this process, and what it has cached given back."""
    with _at_most(64 * MIB, beside_what_it_has=True):
        yield


@pytest.fixture
def card_of_24_gb():
    """A card of 24 GiB, as far as this process goes."""
    with _at_most(24 * GIB):
        yield


@contextlib.contextmanager
def _at_most(limit_bytes: int, *, beside_what_it_has: bool = False):
    import torch  # not before a virtual GPU is attached

    if beside_what_it_has:
        # cuBLAS's workspaces stay, one for each thread: 8 MiB on an A100, but 32 on an H100.
        weight = torch.ones(8, 8, device="cuda", requires_grad=True)
        (weight @ weight).sum().backward()
        del weight
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_reserved() if beside_what_it_has else 0
    torch.cuda.set_per_process_memory_fraction(min(1.0, (held + limit_bytes) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.fixture
def deterministic(monkeypatch):
    """An operator whose result may differ from run to run is an error, and so is one that has no other way."""
    import torch  # not before a virtual GPU is attached

    # What torch insists on; a process has one stream here, on which cuBLAS is deterministic anyway.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.fixture
def left_as_found():
    """The memory that this process may have is what it was, and what it has cached is given back."""
    import torch  # not before a virtual GPU is attached

    fraction = torch.cuda.get_per_process_memory_fraction()
    yield
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.get_per_process_memory_fraction() == fraction

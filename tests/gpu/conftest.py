"""What several tests on the session's GPU begin with."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest

from autobatch.units import GIB, MIB
from tests.gpu.machines import Forks, Machine


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Programs on virtual GPUs that find torch imported: ``forks.run(code, **machine.environment())``."""
    folder = tmp_path_factory.mktemp("forks")
    forks = Forks(folder, Machine(folder).environment())
    yield forks
    forks.close()


@pytest.fixture
def little_memory():
    """64 MiB for this process, beside what it has, and what it has cached given back."""
    from tests.gpu.values import room_for, warm  # not before a virtual GPU is attached

    warm()
    with room_for(64 * MIB):
        yield


@pytest.fixture
def card_of_24_gb():
    with card_of(24 * GIB):
        yield


@pytest.fixture
def card_of_2_gb():
    with card_of(2 * GIB):
        yield


@contextlib.contextmanager
def card_of(size_bytes: int) -> Iterator[None]:
    """A card of that size, as far as this process goes."""
    import torch  # not before a virtual GPU is attached

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, size_bytes / total))
    yield
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

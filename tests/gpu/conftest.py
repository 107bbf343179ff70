"""What several tests on the session's GPU begin with."""

from __future__ import annotations

import pytest

from autobatch.units import MIB


@pytest.fixture
def little_memory():
    """64 MiB for this process, and what it has cached given back."""
    import torch  # not before a virtual GPU is attached

    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * MIB) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)

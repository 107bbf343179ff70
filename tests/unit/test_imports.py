"""Large imports make no work for the collector, and are put back as they were."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys

import pytest

from autobatch.imports import without_collections

COMMAND = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 1000))
from autobatch.imports import imports_of_a_command
with imports_of_a_command():
    print(gc.isenabled())
print(gc.isenabled(), gc.get_freeze_count())
"""


@pytest.mark.parametrize("collects", [True, False])
def test_whether_garbage_is_collected_is_as_it_was_also_after_an_error(collects: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with contextlib.suppress(ImportError), without_collections():
            was_enabled = gc.isenabled()
            raise ImportError
        assert not was_enabled
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()


def test_a_command_leaves_what_it_imported_uncollected_at_its_end_and_no_sooner() -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["False", "True 0", "True"]

"""Under ``autobatch run``: at its end, each process writes down what its own torch used."""

from __future__ import annotations

import atexit
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any  # importing it would cost more than the rest of this module


def start(load: Callable[[str], Any]) -> None:
    atexit.register(_write_usage, load("hook/report").write_report)


def _write_usage(write_report: Callable[[str, dict[str, Any]], None]) -> None:
    cuda = sys.modules.get("torch.cuda")
    folder = os.environ.get("AUTOBATCH_RUN_REPORTS", "")
    if cuda is not None and cuda.is_initialized() and os.path.isdir(folder):
        write_report(folder, {"pid": os.getpid(), "command": list(sys.orig_argv), "cards": _cards(cuda)})


def _cards(cuda: Any) -> dict[str, Any]:
    cards: dict[str, Any] = {}
    for index in range(cuda.device_count()):
        stats = cuda.memory_stats(index)
        cards[str(cuda.get_device_properties(index).uuid)] = {
            "peak_allocated_bytes": stats.get("allocated_bytes.all.peak"),
            "peak_reserved_bytes": stats.get("reserved_bytes.all.peak"),
            "retries": stats.get("num_alloc_retries"),
            "out_of_memory": stats.get("num_ooms"),
        }
    return cards

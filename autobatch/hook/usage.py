"""Under ``autobatch run``: at its end, each process writes down what its own torch used."""

from __future__ import annotations

import atexit
import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any  # importing it would cost more than the rest of this module


def start() -> None:
    atexit.register(_write_usage)


def _write_usage() -> None:
    cuda = sys.modules.get("torch.cuda")
    folder = os.environ.get("AUTOBATCH_RUN_REPORTS", "")
    # Without the folder the run has ended before this process, and nobody asks any more.
    if cuda is None or not cuda.is_initialized() or not os.path.isdir(folder):
        return
    usage = {"pid": os.getpid(), "command": list(sys.orig_argv), "cards": _cards(cuda)}
    path = os.path.join(folder, f"{os.getpid()}.json")
    try:
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump(usage, file)
        os.replace(path + ".part", path)
    except OSError as error:
        print(f"autobatch: this process's use of the GPU could not be written: {error}", file=sys.stderr)


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

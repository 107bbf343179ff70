"""How a process of somebody else's command tells what it knows: a file of its own in the folder of who asked."""

from __future__ import annotations

import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any  # importing it would cost more than the rest of this module


def write_report(folder: str, report: dict[str, Any], kind: str = "json") -> None:
    """Writes ``report`` as JSON to ``PID.json`` in ``folder``, or to another ``kind`` of file, whole or not at all.

    Without the folder nobody asks any more: whoever made it has ended before this process.
    """
    if not os.path.isdir(folder):
        return
    path = os.path.join(folder, f"{os.getpid()}.{kind}")
    try:
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump(report, file)
        os.replace(path + ".part", path)
    except OSError as error:
        if os.path.isdir(folder):
            print(f"autobatch: what this process used could not be written: {error}", file=sys.stderr)

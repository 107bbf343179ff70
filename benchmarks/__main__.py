"""``make bench``: every measurement that needs no GPU, written to ``benchmarks/results``. It takes an hour or two."""

from __future__ import annotations

import json
import time

from benchmarks import answers, peers
from benchmarks.cells import CELLS
from benchmarks.peers import KINDS
from benchmarks.records import RESULTS

_HOLDS = {
    "answers": "answers_virtual.json: what autobatch answers in every cell, against the truth",
    "virtual": "peers_virtual.json, rows: the peers in the same cells",
    "growth": "peers_virtual.json, growth: trials by the size of the card",
    "tune": "peers_tune.json: tune() and the finders of the libraries whose trainers it is for, in those trainers",
    "host": "peers_host.json: the peers on host memory under a limit",
}


def _answers() -> str:
    rows = [answers.answer(cell, setting) for cell in CELLS for setting in answers.SETTINGS]
    (RESULTS / "answers_virtual.json").write_text(json.dumps(rows, indent=1) + "\n")
    return answers.summary(rows)


def main() -> None:
    for name, holds in _HOLDS.items():
        started_s = time.monotonic()
        print(f"\n{RESULTS / holds}", flush=True)
        print(_answers() if name == "answers" else peers.tables(peers.run(name, RESULTS / KINDS[name].file)))
        print(f"({time.monotonic() - started_s:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

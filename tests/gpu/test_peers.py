"""The comparison with the peers runs, on one tiny workload, and its rows have every field."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.gpu import place_of
from benchmarks.peers import KINDS, cell_of
from benchmarks.records import RESULTS, as_text
from benchmarks.searches import ALL, PEERS
from benchmarks.tables import growth_table, table

pytestmark = pytest.mark.gpu

FIELDS = {
    "cell", "solid", "ratio", "peer", "answer", "seconds", "seconds_confirming", "trials", "failures", "retries",
    "samples", "samples_confirming", "asked", "changed", "survives_same", "survives_fresh",
}  # fmt: skip
QUICK = ("autobatch", "autobatch live", "doubling", "Lightning binsearch", "accelerate", "toma")
_PROGRAM = """
import json
from benchmarks.measure import Place
from benchmarks.peers import rows_here
from tests.workloads.peers import tiny
from autobatch.units import MIB
from tests.gpu.test_peers import QUICK

place = Place(device="cuda:0", limit_bytes=64 * MIB)
print(json.dumps(rows_here("tiny", tiny, place, QUICK, find_truth=True)))
"""


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    """A row of each peer. In a process of its own, because what forks must not have touched the GPU."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=os.environ, stdout=subprocess.PIPE, text=True, timeout=280, check=True
    )
    return {row["peer"]: row for row in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.slow
def test_every_peer_answers_and_every_field_is_there(rows: dict[str, dict]) -> None:
    assert list(rows) == [name for name in QUICK if PEERS[name].takes("tiny")]
    assert {name: row["error"] for name, row in rows.items() if "error" in row} == {}
    assert {name: FIELDS ^ set(row) for name, row in rows.items() if FIELDS ^ set(row)} == {}
    assert rows["doubling"]["solid"] >= max(row["answer"] for row in rows.values() if row["survives_fresh"])


@pytest.mark.slow
def test_what_a_peer_does_is_counted(rows: dict[str, dict]) -> None:
    for name in ("doubling", "toma", "accelerate", "Lightning binsearch"):
        row = rows[name]
        assert row["trials"] == len(row["asked"]), name
        assert row["failures"] == sum(text.endswith("x") for text in row["asked"]) > 0, name
        assert row["samples"] >= 3 * sum(int(text) for text in row["asked"] if not text.endswith("x")), name
    assert rows["doubling"]["asked"][:3] == ["1", "2", "4"]
    assert rows["toma"]["asked"][:3] == ["2048x", "1024x", "512x"]
    assert rows["autobatch"]["samples_confirming"] >= 40 * rows["autobatch"]["answer"]


@pytest.mark.slow
def test_what_a_peer_changes_is_seen(rows: dict[str, dict]) -> None:
    assert "optimizer state" in rows["doubling"]["changed"]
    assert [rows[name]["changed"] for name in ("autobatch", "autobatch live")] == [[], []]


@pytest.mark.slow
def test_rows_become_json_and_a_table(rows: dict[str, dict]) -> None:
    results = {"environment": {"torch": "x"}, "rows": list(rows.values())}
    assert json.loads(as_text(results)) == results
    lines = table([*results["rows"], {"peer": "toma", "cell": "other", "error": "a reason"}]).splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[-1].startswith("| toma |")
    assert lines[-1].endswith("| 1 of 2 |")
    assert growth_table(results["rows"]).splitlines()[-1].startswith("| tiny |")


@pytest.mark.parametrize("kind", KINDS)
def test_the_results_are_there_and_were_measured_by_these_peers(kind: str) -> None:
    results = json.loads((RESULTS / KINDS[kind].file).read_text())
    assert {"torch", "device", "virtual", "libraries", "date"} <= set(results["environment"])
    wanted = {(peer, cell) for peer in KINDS[kind].peers for cell in KINDS[kind].cells if takes(peer, cell)}
    assert {(row["peer"], row["cell"]) for row in results[KINDS[kind].part]} == wanted


def takes(peer: str, cell: str) -> bool:
    return ALL[peer].takes(cell.rpartition("-")[0])


def test_an_unknown_cell_is_named() -> None:
    for name in ("gpt2", "gpt3-16", "gpt2-0", "gpt2-all"):
        with pytest.raises(ValueError, match=f"no cell is called '{name}'"):
            place_of(name)
    for name in ("gpt2", "gpt3-16", "gpt2-all"):
        with pytest.raises(ValueError, match=f"no cell is called '{name}'"):
            cell_of(name)

"""The table of a result, and the display that grows on a terminal."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from autobatch.device.base import DeviceInfo, GpuProcess
from autobatch.report.live import device_line, display_for, other_lines
from autobatch.report.table import remark, result_table, trials_table
from autobatch.result import BatchSizeResult, Measurement, Outcome, Trial
from autobatch.units import GIB

GPU = DeviceInfo(name="NVIDIA A100", kind="cuda", total_bytes=40 * GIB, free_bytes=38 * GIB, virtual=True)
HOST = DeviceInfo(name="host memory", kind="cpu", details={"budget": "8.00 GiB, the limit given"})


def trial(size: int, outcome: Outcome = Outcome.FITS, peak_gib: float | None = 1.0, **rest: object) -> Trial:
    peak_bytes = None if peak_gib is None else int(peak_gib * GIB)
    measured = Measurement(peak_allocated_bytes=peak_bytes, peak_reserved_bytes=peak_bytes, capacity_bytes=4 * GIB)
    return Trial(batch_size=size, outcome=outcome, measurement=measured, duration_s=0.5, **rest)


def terminal(width: int = 120) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=width, legacy_windows=False, color_system="standard"), out


def drawn(table: object) -> list[str]:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


def test_a_row_says_size_outcome_peak_and_time():
    header, row = drawn(trials_table([trial(8)], comparable=True, timed=False))
    assert header.split() == ["batch", "outcome", "peak", "of", "the", "budget", "peak", "took"]
    assert row.split()[:2] == ["8", "fits"]
    assert "1.00 GiB" in row
    assert "500 ms" in row


@pytest.mark.parametrize(("peak_gib", "cells"), [(1.0, 6), (2.0, 12), (4.0, 24), (9.0, 24)])
def test_the_bar_is_the_peak_against_the_budget(peak_gib, cells):
    console, out = terminal()
    console.print(trials_table([trial(8, peak_gib=peak_gib)], comparable=True, timed=False))
    filled = re.search(r"\x1b\[32m(━+)", out.getvalue())
    assert filled is not None
    assert len(filled[1]) == cells


def test_an_unknown_peak_is_unknown_and_not_an_empty_bar():
    assert drawn(trials_table([trial(8, peak_gib=None)], comparable=True, timed=False))[1].count("unknown") == 2


def test_shuffled_epochs_that_a_size_survived_are_one_row_and_a_refusal_is_its_own():
    survived = [trial(8, peak_gib=peak, history=f"shuffled epoch {peak}") for peak in (1, 3, 2)]
    refused = trial(8, Outcome.OOM, history="shuffled epoch 4")
    rows = drawn(trials_table([trial(8), *survived, refused], comparable=True, timed=False))[1:]
    assert len(rows) == 3
    assert "3.00 GiB" in rows[1]
    assert "1.5 s" in rows[1]
    assert "confirmed after 3 shuffled epochs" in rows[1]
    assert "not confirmed after shuffled epoch 4" in rows[2]


def test_host_peaks_are_not_held_against_the_budget():
    assert "budget" not in drawn(trials_table([trial(8)], comparable=False, timed=True))[0]


def test_the_table_of_a_result_has_the_confirmation_too():
    result = BatchSizeResult(
        batch_size=8,
        proof="next_size_failed",
        smallest_failure=9,
        trials=(trial(8), trial(9, Outcome.OOM, message="CUDA out of memory")),
        confirmation=(trial(8, history="a fresh start"), trial(8, Outcome.THRASHED, message="it crawls")),
        environment={"kind": "cuda", "virtual": True},
    )
    rows = drawn(result_table(result))[1:]
    assert [row.split()[0] for row in rows] == ["8", "9", "8", "8"]
    assert "out of memory" in rows[1]
    assert "CUDA" not in rows[1]
    assert " confirmed after a fresh start" in rows[2]
    assert remark(trial(8, Outcome.OOM, history="smaller batches")) == "not confirmed after smaller batches"
    assert "it crawls" in rows[3]


def test_on_a_terminal_the_table_grows_and_stays():
    console, out = terminal()
    with display_for(console, GPU) as display:
        display.on_trial(trial(1))
        after_one = out.getvalue()
        display.on_trial(trial(2, Outcome.OOM))
    assert "fits" in after_one
    assert "out of memory" not in after_one
    last_frame = out.getvalue()[len(after_one) :].rpartition("outcome")[2]
    assert "fits" in last_frame
    assert "out of memory" in last_frame
    assert "searching" not in last_frame


def test_an_error_leaves_the_rows_and_takes_the_spinner_away():
    console, out = terminal()
    with contextlib.suppress(RuntimeError), display_for(console, GPU) as display:
        display.on_trial(trial(1))
        raise RuntimeError
    assert "searching" not in out.getvalue().rpartition("outcome")[2]
    assert out.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_the_device_line_says_that_a_gpu_is_virtual():
    assert device_line(GPU, "cuda:0") == (
        "Device: NVIDIA A100 (cuda:0, virtual: memory is accounted, nothing is computed), 40.00 GiB, 38.00 GiB free"
    )
    assert device_line(HOST, "cpu").endswith("budget 8.00 GiB, the limit given")


def test_other_processes_are_named():
    info = DeviceInfo(name="x", kind="cuda", others=(GpuProcess(pid=7, name=None, used_bytes=None),))
    assert other_lines(info) == ["  another process has unknown: unknown (pid 7)"]
    untold = replace(info, others=(), details={"others_unknown": True})
    assert other_lines(untold) == ["  other processes: unknown"]


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([trial(9, Outcome.OOM, history="a fresh start")], "8 (9 does not fit)"),
        ([trial(9, history="a fresh start"), trial(9, Outcome.OOM, history="x")], "8 (9 did not keep fitting)"),
    ],
)
def test_what_never_fitted_did_not_stop_to(runs, said):
    """A size that was foretold to fit has no run but its confirmation."""
    found = BatchSizeResult(
        batch_size=8, proof="next_size_failed", smallest_failure=9, trials=(trial(8),), confirmation=tuple(runs)
    )
    assert said in str(found)

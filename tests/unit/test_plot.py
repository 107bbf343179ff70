"""Pictures: one is drawn for every kind of result, and what cannot be drawn is refused before."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from autobatch.errors import InvalidArgumentError, MissingDependencyError
from autobatch.report.plot import check_plot, plot_frontier, plot_result
from autobatch.result import BatchSizeResult, Measurement, Outcome, Trial
from autobatch.units import GIB

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the extra plot")
BEGINNINGS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def trial(size: int, outcome: Outcome = Outcome.FITS, *, measured: bool = True, **rest: Any) -> Trial:
    peak_bytes = GIB + size * GIB // 4
    measurement = Measurement(
        peak_allocated_bytes=peak_bytes, peak_reserved_bytes=peak_bytes + GIB // 8, capacity_bytes=10 * GIB
    )
    return Trial(batch_size=size, outcome=outcome, measurement=measurement if measured else None, **rest)


def result(*trials: Trial, **rest: Any) -> BatchSizeResult:
    values: dict[str, Any] = {"headroom": 0.05, "budget_bytes": 11 * GIB, "environment": {"kind": "cuda"}} | rest
    return BatchSizeResult(batch_size=30, proof="next_size_failed", smallest_failure=36, trials=trials, **values)


SEARCH = (trial(1), trial(10), trial(30), trial(36, Outcome.OOM))


@needs_matplotlib
@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf", ".PNG"])
def test_a_picture_of_each_kind(tmp_path: Path, ending: str):
    path = tmp_path / f"plot{ending}"
    plot_result(result(*SEARCH), path)
    assert path.read_bytes().startswith(BEGINNINGS[ending.lower()])


def words(tmp_path: Path, drawn: BatchSizeResult) -> str:
    """The text of the picture; an svg that does not turn letters into curves has it."""
    import matplotlib

    path = tmp_path / "plot.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_result(drawn, path)
    return path.read_text()


@needs_matplotlib
def test_measured_peaks_fit_budget_and_failures_are_named(tmp_path: Path):
    text = words(tmp_path, result(*SEARCH))
    for word in (
        "allocated",
        "reserved",
        "fit, allocated",
        "fit, reserved",
        "budget",
        "less 5% headroom",
        "out of memory",
    ):
        assert f">{word}</text>" in text


@needs_matplotlib
def test_both_modes_are_told_apart(tmp_path: Path):
    text = words(tmp_path, result(*SEARCH, trial(40, mode="eval"), trial(60, Outcome.LIMIT, mode="eval")))
    assert ">allocated (eval)</text>" in text
    assert ">does not fit (eval)</text>" in text


@needs_matplotlib
def test_on_the_host_peaks_are_not_held_against_the_budget(tmp_path: Path):
    text = words(tmp_path, result(*SEARCH, environment={"kind": "cpu"}))
    assert "budget" not in text
    assert "fit, allocated" not in text


@needs_matplotlib
@pytest.mark.parametrize(
    "trials",
    [
        (trial(30),),
        (trial(30, measured=False),),
        (trial(30, history="a fresh start"),),
        (trial(36, Outcome.OOM), trial(30, measured=False)),
    ],
    ids=["one", "unmeasured", "recalled", "failure"],
)
def test_few_trials_are_drawn_too(tmp_path: Path, trials: tuple[Trial, ...]):
    plot_result(result(*trials, budget_bytes=None), tmp_path / "plot.png")


@needs_matplotlib
def test_a_frontier(tmp_path: Path):
    path = tmp_path / "frontier.png"
    plot_frontier("seq_len", [(1024, 4), (512, 8), (4096, None)], "gpt2", path)
    assert path.read_bytes().startswith(BEGINNINGS[".png"])


@pytest.mark.parametrize("name", ["plot", "plot.jpg", "plot.png.txt", ".png"])
def test_another_ending_is_refused_by_name(name: str):
    with pytest.raises(InvalidArgumentError, match=r"plot=.*must be a file that ends in \.png, \.svg or \.pdf"):
        check_plot(Path(name))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"autobatch-torch\[plot\]"):
        check_plot(Path("plot.png"))

"""What the comparison of a GPU with its virtual twin says of two recorded histories."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.records import as_text, file_for
from benchmarks.twin_cases import CASES
from benchmarks.twin_sides import place_of, read, write
from benchmarks.twins import compare, events_of, first_difference, table, twin

CASE = CASES["lstm"]
BUILDING = [("segment_alloc", 2048), ("alloc", 512)]
STEP = [("alloc", 1024), ("alloc", 256), ("free_completed", 256), ("free_completed", 1024)]


def recorded(*steps: list[tuple[str, int]], peaks: tuple[int, ...] = (), **more: Any) -> dict[str, Any]:
    """A record with these events in its steps, and 2048 bytes reserved."""
    events = [[action, size, 0] for step in steps for action, size in step]
    marks = [sum(action == "alloc" for step in steps[: n + 1] for action, _ in step) for n in range(len(steps))]
    figures = [[peak, 2048, 512, 0] for peak in peaks or [1792] * len(steps)]
    return {"steps": figures, "marks": marks, "events": events, "places": ["linear < x.py:1 f"], "error": None, **more}


def test_equal_histories_have_no_difference() -> None:
    row = compare(CASE, recorded(BUILDING, STEP, seconds=1.5), recorded(BUILDING, STEP, seconds=0.5))
    assert row["equal"]
    assert row["first_difference"] is row["error"] is None
    assert (row["case"], row["allocator"], row["seconds"]) == ("lstm", "native", [1.5, 0.5])
    assert (row["worst_allocated"], row["worst_reserved"]) == (0.0, 0.0)
    assert (row["events"], row["allocations"]) == ([6, 6], [3, 3])
    assert row["steps"] == [[[1792, 2048, 512, 0]]] * 2


def test_the_first_event_that_differs_is_told_with_its_place() -> None:
    other = [("alloc", 1024), ("alloc", 768), *STEP[2:]]
    found = first_difference(recorded(BUILDING, STEP, STEP, STEP), recorded(BUILDING, STEP, other, STEP))
    place = "linear < x.py:1 f"
    assert found == {
        "event": 7,
        "steps": [2],
        "real": {"action": "alloc", "size_bytes": 256, "place": place},
        "virtual": {"action": "alloc", "size_bytes": 768, "place": place},
    }


def test_a_workspace_more_in_one_step_leaves_the_others_equal() -> None:
    more = [("alloc", 4096), ("free_completed", 4096), *STEP]
    found = first_difference(recorded(BUILDING, more, STEP, STEP), recorded(BUILDING, STEP, STEP, STEP))
    assert found is not None
    assert (found["event"], found["steps"]) == (2, [1])


def test_an_event_without_counterpart_differs() -> None:
    found = first_difference(recorded(BUILDING, STEP), recorded(BUILDING, STEP, STEP))
    assert found is not None
    assert (found["event"], found["steps"], found["real"]) == (6, [2], None)
    assert found["virtual"]["size_bytes"] == 1024


def test_the_order_of_frees_in_a_row_is_no_difference() -> None:
    turned = [*STEP[:2], *STEP[:1:-1]]
    assert first_difference(recorded(BUILDING, STEP), recorded(BUILDING, turned)) is None
    apart = [STEP[0], ("free_completed", 1024), STEP[1], ("free_completed", 256)]
    assert first_difference(recorded(BUILDING, STEP), recorded(BUILDING, apart)) is not None
    assert events_of(recorded(turned)) == events_of(recorded(STEP))


def test_the_step_furthest_from_the_real_one_is_told() -> None:
    row = compare(CASE, recorded(BUILDING, STEP, STEP, peaks=(1000, 1000, 1000)), recorded(BUILDING, STEP, STEP))
    assert row["worst_allocated"] == 0.792
    real, virtual = (recorded(BUILDING, STEP, STEP, peaks=peaks) for peaks in ((500, 1000, 1000), (500, 1010, 950)))
    row = compare(CASE, real, virtual)
    assert not row["equal"]
    assert row["worst_allocated"] == -0.05
    assert [len(step) for step in row["steps"]] == [1, 2, 2]


@pytest.mark.parametrize("real", [{"error": "ended with -9: no words"}, {"steps": [], "marks": [], "error": "x"}])
def test_a_side_that_failed_is_an_error_and_no_difference(real: dict[str, Any]) -> None:
    row = compare(CASE, real, recorded(BUILDING, STEP))
    assert row["error"] == {"real": real["error"]}
    assert not row["equal"]
    assert row["first_difference"] is row["worst_allocated"] is None
    assert json.loads(as_text({"rows": [row]})) == {"rows": [row]}
    assert table([row]).splitlines()[-1] == f"| lstm | native | - | - | real: {real['error']} |"


def test_the_table_has_a_line_for_each_case() -> None:
    other = [("alloc", 768), *STEP[1:]]
    rows = [compare(CASES[name], recorded(BUILDING, STEP), recorded(BUILDING, STEP)) for name in CASES]
    rows.append(compare(CASE, recorded(BUILDING, STEP), recorded(BUILDING, other, peaks=(1792, 896))))
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(CASES) + 1
    assert lines[2].endswith("| equal | equal | none of 6 |")
    told = "2 of 6: alloc 1024 / alloc 768 (linear < x.py:1 f), in steps 1"
    assert lines[-1] == f"| lstm | native | -50.00 % | equal | {told} |"


def test_a_place_names_operators_the_backward_node_and_lines() -> None:
    frames = [
        ("libc10_cuda.so", 1, "??"),
        ("libtorch.so", 2, "at::_ops::empty_like::call(at::Tensor const&)"),
        ("libtorch.so", 3, "at::_ops::empty_like::redispatch(at::Tensor const&)"),
        ("libtorch.so", 4, "torch::autograd::generated::GeluBackward0::apply(std::vector<at::Tensor>&&)"),
        ("/site-packages/torch/nn/functional.py", 5, "gelu"),
        ("/site-packages/torch/nn/modules/module.py", 6, "_call_impl"),
        ("/home/me/model.py", 7, "forward"),
    ]
    place = place_of([dict(zip(("filename", "line", "name"), frame, strict=True)) for frame in frames])
    assert place == "empty_like < GeluBackward0 < functional.py:5 gelu < model.py:7 forward"
    assert place_of([]) == ""


def test_a_record_is_read_as_it_was_written(tmp_path: Any) -> None:
    write(tmp_path / "real-lstm.json.gz", recorded(STEP))
    assert read(tmp_path / "real-lstm.json.gz") == recorded(STEP)
    assert read(tmp_path / "virtual-lstm.json.gz") == {"error": "not done when the run ended"}


def test_the_twin_has_the_figures_of_the_gpu() -> None:
    known = {"title": "NVIDIA H200", "total_bytes": 150_109_880_320, "capability": [9, 0], "multiprocessors": 132}
    card = twin(known)
    assert (card.title, card.total_bytes, card.outside_bytes) == ("NVIDIA H200", 150_109_880_320, 0)
    assert (card.capability, card.multiprocessors) == ((9, 0), 132)
    assert file_for("twins", {"device": "NVIDIA H200", "virtual": False}).name == "twins_nvidia_h200.json"
    assert file_for("twins", {"device": "NVIDIA H200", "virtual": True}).name == "twins_nvidia_h200_virtual.json"

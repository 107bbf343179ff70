import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from autobatch.errors import DeviceNotFoundError, DeviceQueryError, InvalidArgumentError
from autobatch.units import GIB, MIB
from autobatch.virtual import build, state
from autobatch.virtual.catalog import Card
from autobatch.virtual.state import create_state, read_state, refuse_allocations

DRIVER = Path(build.__file__).with_name("driver")
linux = pytest.mark.skipif(sys.platform != "linux", reason="virtual GPUs need Linux")


def card(**changes):
    figures = {
        "name": "test",
        "title": "Test GPU",
        "total_bytes": 8 * GIB,
        "outside_bytes": 300 * MIB,
        "capability": (8, 6),
        "multiprocessors": 82,
        "sources": {},
    }
    return Card(**(figures | changes))


@linux
def test_a_new_machine_is_idle(tmp_path):
    create_state(tmp_path / "state", [card(), card(title="Another")])
    first, second = read_state(tmp_path / "state")
    assert (first.title, second.title) == ("Test GPU", "Another")
    assert (first.total_bytes, first.outside_bytes, first.used_bytes) == (8 * GIB, 300 * MIB, 0)
    assert first.processes == second.processes == ()
    assert first.uuid.startswith("GPU-")
    assert first.uuid != second.uuid


@linux
def test_the_file_is_the_users_alone_and_nothing_else_is_left(tmp_path):
    create_state(tmp_path / "state", [card()])
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@linux
def test_a_place_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(OSError, match="state"):
        create_state(tmp_path / "state", [card()])
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("cards", [[], [card()] * 65])
def test_number_of_cards(tmp_path, cards):
    with pytest.raises(InvalidArgumentError, match="1 to 64"):
        create_state(tmp_path / "state", cards)
    assert list(tmp_path.iterdir()) == []


@linux
@pytest.mark.parametrize(
    "changes", [{"title": "x" * 96}, {"title": "a\0b"}, {"total_bytes": 300 * MIB}, {"outside_bytes": -1}]
)
def test_cards_that_cannot_be(tmp_path, changes):
    with pytest.raises(InvalidArgumentError):
        create_state(tmp_path / "state", [card(**changes)])
    assert list(tmp_path.iterdir()) == []


def test_allocations_are_counted_from_one(tmp_path):
    with pytest.raises(InvalidArgumentError, match="fail_allocation=0"):
        create_state(tmp_path / "state", [card()], fail_allocation=0)
    create_state(tmp_path / "state", [card()])
    for wrong in ({"after": -1}, {"after": 0.5}, {"after": 1, "count": 0}):
        with pytest.raises(InvalidArgumentError, match=f"{list(wrong)[-1]}="):
            refuse_allocations(tmp_path / "state", **wrong)


def test_other_platforms_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(state.sys, "platform", "darwin")
    with pytest.raises(DeviceNotFoundError, match="need Linux, and this is darwin"):
        create_state(tmp_path / "state", [card()])


@linux
@pytest.mark.parametrize("spoil", ["missing", "empty", "long", "magic", "version", "no cards"])
def test_what_is_no_state_cannot_be_read(tmp_path, spoil):
    path = tmp_path / "state"
    create_state(path, [card()])
    data = bytearray(path.read_bytes())
    if spoil == "missing":
        path.unlink()
    else:
        places = {"magic": 0, "version": 8, "no cards": 12}
        if spoil in places:
            data[places[spoil]] ^= 1
        path.write_bytes({"empty": b"", "long": data + b"x"}.get(spoil, bytes(data)))
    with pytest.raises(DeviceQueryError, match="state"):
        read_state(path)


def enter(path, **fields):
    """Adds an entry, as the driver would."""
    data = bytearray(path.read_bytes())
    whole = state._State.from_buffer(data)
    for name, value in fields.items():
        setattr(whole.entries[whole.entry_count], name, value)
    whole.entry_count += 1
    del whole
    path.write_bytes(data)


@linux
def test_the_living_count_and_the_dead_keep_their_peaks(tmp_path):
    path = tmp_path / "state"
    create_state(path, [card(), card()])
    me = {"pid": os.getpid(), "started": state.start_time(os.getpid()), "status": 1}
    enter(path, **me, card=1, used_bytes=5, peak_bytes=9, refused=2)
    enter(path, **me | {"started": me["started"] - 1}, used_bytes=7, peak_bytes=8)  # another that had the same number
    enter(path, **me | {"status": 2}, card=1, used_bytes=0, peak_bytes=3)  # reaped
    first, second = read_state(path)
    assert (first.used_bytes, second.used_bytes) == (0, 5)
    assert [(p.alive, p.used_bytes, p.peak_bytes) for p in first.processes] == [(False, 0, 8)]
    assert [(p.alive, p.used_bytes, p.peak_bytes) for p in second.processes] == [(True, 5, 9), (False, 0, 3)]
    assert second.processes[0].refused_allocations == 2


@linux
def test_a_zombie_is_gone():
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert state.start_time(process.pid) is None
    assert state.start_time(process.pid) is None
    assert state.start_time(os.getpid()) > 0


@linux
def test_the_layout_is_the_drivers(tmp_path):
    """The C compiler's own offsets and sizes, against those that ctypes uses."""
    records = {"state": state._State, "state_card": state._Card, "state_entry": state._Entry}
    lines = []
    for name, record in records.items():
        lines += [f'printf("{name}.{field} %zu\\n", offsetof(struct {name}, {field}));' for field, _ in record._fields_]
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
    constants = ("STATE_VERSION", "MAX_CARDS", "MAX_ENTRIES", "ENTRY_ALIVE")
    lines += [f'printf("{name} %zu\\n", (size_t){name});' for name in constants]
    lines.append('printf("%s", STATE_MAGIC STATE_VARIABLE);')
    source = tmp_path / "layout.c"
    source.write_text(
        '#include <stdio.h>\n#include "state.h"\nint main(void) {\n' + "\n".join(lines) + "\nreturn 0; }\n"
    )
    subprocess.run([*build.compiler(), f"-I{DRIVER}", str(source), "-o", str(tmp_path / "layout")], check=True)
    printed = subprocess.run([str(tmp_path / "layout")], capture_output=True, check=True).stdout
    expected = []
    for name, record in records.items():
        expected += [f"{name}.{field} {getattr(record, field).offset}" for field, _ in record._fields_]
        expected.append(f"{name} {ctypes.sizeof(record)}")
    expected += [f"STATE_VERSION {state.STATE_VERSION}", f"MAX_CARDS {state.MAX_CARDS}"]
    expected += [f"MAX_ENTRIES {state._MAX_ENTRIES}", f"ENTRY_ALIVE {state._ALIVE}"]
    assert printed == "\n".join(expected).encode() + b"\n" + state._MAGIC + state.STATE_VARIABLE.encode()

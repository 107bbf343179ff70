"""``autobatch run`` from the outside: the command line, real commands, what is printed and what is left behind."""

import importlib.util
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from autobatch.units import parse_bytes

RUN = [sys.executable, "-m", "autobatch", "run"]
MIB = 2**20


class Row:
    """One line of the table that is printed at the end."""

    def __init__(self, line):
        sizes = r"([\d.]+ \w+|unknown)"
        columns = re.compile(
            rf"autobatch: +(\d+) +(\d+) +{sizes} +{sizes} +{sizes} +(\d+|unknown) +(\d+|unknown)  (.*)"
        )
        card, pid, *figures, self.process = columns.fullmatch(line).groups()
        self.card, self.pid = int(card), int(pid)
        self.allocated, self.reserved, self.driver = map(self._size, figures[:3])
        self.retries, self.ooms = [None if text == "unknown" else int(text) for text in figures[3:]]

    @staticmethod
    def _size(text):
        return {"unknown": None, "0 B": 0}[text] if text in ("unknown", "0 B") else parse_bytes(text)


class Done:
    def __init__(self, done):
        self.exit_code, self.stdout, self.stderr = done.returncode, done.stdout, done.stderr
        lines = self.stderr.splitlines()
        heads = [index for index, line in enumerate(lines) if re.match(r"autobatch: +GPU +pid", line)]
        self.rows = [Row(line) for line in lines[heads[0] + 1 :]] if heads else []


def run(*arguments, variables=(), stdin=None, folder=None):
    done = subprocess.run(
        [*RUN, *map(str, arguments)],
        env=os.environ | dict(variables),
        cwd=folder,
        capture_output=True,
        text=True,
        input=stdin,
        timeout=240,
        check=False,
    )
    return Done(done)


def script(tmp_path, code):
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(code))
    return path


@pytest.mark.parametrize(
    ("command", "exit_code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143)]
)
def test_passes_the_exit_code_on(command, exit_code):
    assert run("--gpu", "t4", "--", "sh", "-c", command).exit_code == exit_code


def test_a_command_that_is_not_there():
    done = run("--gpu", "t4", "--", "no-such-command")
    assert done.exit_code == 127
    assert done.stderr == "autobatch: command not found: no-such-command\n"


def test_a_command_that_cannot_be_executed(tmp_path):
    path = script(tmp_path, "")
    path.chmod(0o755)  # neither a program nor a script that names its interpreter
    done = run("--gpu", "t4", "--", path)
    assert done.exit_code == 126
    assert "cannot be run" in done.stderr
    done = run("--gpu", "t4", "--", "/etc/passwd")
    assert (done.exit_code, done.stderr) == (126, "autobatch: /etc/passwd cannot be run: it is not executable\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "a100", "--", "true"], "a100-40gb"),
        (["--gpu", "memory=24GiB", "--", "true"], "capability"),
        (["--gpu", "v100-16gb", "--", "true"], "no kernels below 7.5"),
        (["--gpu", "t4", "--count", "0", "--", "true"], "--count"),
        (["--gpu", "t4", "--gpu", "l4", "--count", "33", "--", "true"], "--count"),
        (["--gpu", "t4"], "COMMAND"),
        (["--", "true"], "--gpu"),
    ],
)
def test_bad_usage_is_one_clear_error(arguments, said):
    done = run(*arguments)
    assert done.exit_code in (2, 3)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is not None, reason="a compiler is installed beside torch")
def test_without_a_compiler_it_says_what_to_install(tmp_path):
    variables = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    done = run("--gpu", "t4", "--", sys.executable, "-c", "", variables=variables)
    assert done.exit_code == 3
    assert "need a C compiler" in done.stderr
    assert "ziglang" in done.stderr
    assert not list(tmp_path.glob("autobatch-gpu-*"))


def test_the_commands_own_options_and_streams_are_its_own():
    code = "import sys; print(sys.argv[1:]); print(sys.stdin.read().upper())"
    done = run("--gpu", "t4", sys.executable, "-c", code, "--count", "3", "--", "--gpu", stdin="typed")
    assert done.stdout == "['--count', '3', '--', '--gpu']\nTYPED\n"


def test_warns_that_values_are_zero_and_files_are_real(tmp_path):
    path = tmp_path / "checkpoint"
    done = run("--gpu", "t4", "--", "touch", path)
    assert path.exists()
    assert "every value computed there is zero" in done.stderr
    assert "writes its files" in done.stderr
    assert "no process used a GPU" in done.stderr


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A run of one process, on a card for which torch has no kernels, and the folder for what is there meanwhile."""
    folder, runtime = tmp_path_factory.mktemp("used"), tmp_path_factory.mktemp("runtime")
    path = script(
        folder,
        """
        from autobatch.cli.devices import identify
        from autobatch.device.local import resolve_local

        # As `autobatch probe` describes its device: without a context, so from what the driver's library tells.
        print("virtual:", identify(resolve_local("cuda:0")).virtual)

        import torch
        a = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
        del a
        b = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        try:
            torch.empty(30 << 30, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            print("name:", torch.cuda.get_device_name())
        print("capability:", torch.cuda.get_device_capability())
        """,
    )
    card = "memory=24GiB,capability=7.0,outside=100MiB,name=mine"
    variables = {"XDG_RUNTIME_DIR": str(runtime)}
    options = ["--gpu", card, "--any-capability"]
    done = run(*options, "--", sys.executable, path.name, folder=folder, variables=variables)
    assert done.exit_code == 0, done.stderr
    return done, runtime


def test_any_capability_allows_a_card_without_kernels(used):
    assert "capability: (7, 0)\n" in used[0].stdout


def test_leaves_no_file_behind(used):
    assert list(used[1].iterdir()) == []


def test_tells_what_the_process_used(used):
    assert "name: mine\n" in used[0].stdout
    [row] = used[0].rows
    assert (row.card, row.retries, row.ooms) == (0, 1, 1)
    assert (row.allocated, row.reserved) == (512 * MIB, 512 * MIB)
    assert row.driver == 612 * MIB
    assert row.process == f"{Path(sys.executable).name} train.py"


def test_a_probe_in_it_says_in_its_first_line_that_the_gpu_is_virtual(used):
    assert used[0].stdout.startswith("virtual: True\n")


@pytest.fixture(scope="module")
def ended():
    """A run of processes that cannot say what they used: forks of one that has imported torch, and an isolated one."""
    forks = """
        import os, torch
        def end(how):
            pid = os.fork()
            if pid == 0:
                a = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
                how()
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        end(lambda: os._exit(3))
        end(lambda: os.kill(os.getpid(), 9))
    """
    isolated = "import sys, torch; a = torch.empty(1 << 28, dtype=torch.uint8, device='cuda'); sys.exit(5)"
    shell = ["sh", "-c", '$0 -c "$1" && exec $0 -I -c "$2"', sys.executable, textwrap.dedent(forks), isolated]
    done = run("--gpu", "memory=24GiB,capability=8.6,outside=100MiB", "--", *shell)
    assert (done.exit_code, done.stdout) == (5, "3\n-9\n")
    return done.rows


@pytest.mark.parametrize("place", [0, 1, 2], ids=["os._exit", "SIGKILL", "isolated"])
def test_the_driver_tells_of_a_process_that_cannot(ended, place):
    assert len(ended) == 3
    row = ended[place]
    assert (row.allocated, row.reserved, row.retries, row.ooms) == (None, None, None, None)
    assert row.driver == 356 * MIB
    assert "unknown" in row.process


def test_a_process_that_outlives_the_command(tmp_path):
    child = f"""
        import os, time, torch
        held = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        print("holding", flush=True)
        while not os.path.exists("{tmp_path}/end"):
            time.sleep(0.05)
    """
    path = script(tmp_path, child)
    parent = f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "{path}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        print(child.stdout.readline(), child.pid)
    """
    done = run(
        "--gpu", "memory=8GiB,capability=8.6,outside=100MiB", "--", sys.executable, "-c", textwrap.dedent(parent)
    )
    (tmp_path / "end").touch()
    assert done.exit_code == 0
    [row] = done.rows
    assert (row.driver, row.allocated) == (356 * MIB, None)
    assert row.process == "unknown: it is still running"


def test_the_users_own_start_up_code_and_paths_stay(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['STARTED'] = 'theirs'")
    code = "import os; print(os.environ['STARTED'], os.environ['PYTHONPATH'].split(':')[1:])"
    done = run("--gpu", "t4", "--", sys.executable, "-c", code, variables={"PYTHONPATH": str(tmp_path)})
    assert done.stdout == f"theirs ['{tmp_path}']\n"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A run of four processes, one after the other, of which the last two are shown the second card alone."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "use.py").write_text(
        "import sys, torch\n"
        "index, mebibytes = map(int, sys.argv[1:])\n"
        "from autobatch.cli.devices import identify\n"
        "from autobatch.device.local import resolve_local\n"
        "print(torch.cuda.device_count(), identify(resolve_local(f'cuda:{index}')).virtual)\n"
        "torch.empty(mebibytes << 20, dtype=torch.uint8, device=f'cuda:{index}')\n"
    )
    (folder / "ask.py").write_text(
        "import pynvml\npynvml.nvmlInit()\nprint(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(1)))\n"
    )
    shell = """
        $0 use.py 0 100 && $0 use.py 1 200 || exit
        CUDA_VISIBLE_DEVICES=1 $0 use.py 0 300 || exit
        CUDA_VISIBLE_DEVICES=$($0 ask.py) $0 use.py 0 400
    """
    done = run("--gpu", "t4", "--gpu", "l4", "--", "sh", "-c", shell, sys.executable, folder=folder)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "2 True\n2 True\n1 True\n1 True\n"
    return done.rows


def test_children_share_the_cards_and_are_told_apart(shared):
    assert [(row.card, row.allocated) for row in shared[:2]] == [(0, 100 * MIB), (1, 200 * MIB)]
    assert len({row.pid for row in shared}) == 4


@pytest.mark.parametrize(("place", "mebibytes"), [(2, 300), (3, 400)], ids=["index", "uuid"])
def test_hidden_cards_keep_their_place_in_the_table(shared, place, mebibytes):
    assert (shared[place].card, shared[place].allocated) == (1, mebibytes * MIB)


def test_no_card_is_visible_where_the_user_hides_all():
    code = "import torch; print(torch.cuda.is_available())"
    done = run("--gpu", "t4", "--", sys.executable, "-c", code, variables={"CUDA_VISIBLE_DEVICES": ""})
    assert (done.stdout, done.rows) == ("False\n", [])


def test_spawned_loader_workers_have_the_gpu(tmp_path):
    path = script(
        tmp_path,
        """
        import torch
        from torch.utils.data import DataLoader, Dataset

        class Devices(Dataset):
            def __len__(self): return 2
            def __getitem__(self, index): return torch.cuda.is_available()

        if __name__ == "__main__":
            loader = DataLoader(Devices(), num_workers=1, multiprocessing_context="spawn", pin_memory=True)
            print([bool(available) for available in loader])
        """,
    )
    done = run("--gpu", "t4", "--", sys.executable, path)
    assert (done.exit_code, done.stdout) == (0, "[True, True]\n")


RANK = """
import os, torch, torch.distributed as dist
rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1024, 1024).cuda())
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(2):
    model(torch.randn(8, 1024, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.distributed
def test_torchrun_with_nccl_one_rank_a_card(tmp_path):
    torchrun = Path(sys.executable).with_name("torchrun")
    path = script(tmp_path, RANK)
    done = run("--gpu", "t4", "--count", "2", "--", torchrun, "--standalone", "--nproc-per-node", 2, path)
    assert done.exit_code == 0, done.stderr
    ranks = [row for row in done.rows if row.allocated]
    assert [row.card for row in ranks] == [0, 1]
    # Parameters, gradients, DDP's bucket and two moments, 4 MiB each, and cuBLAS's workspace.
    assert all(20 * MIB < row.allocated < 60 * MIB for row in ranks)


@pytest.mark.slow
@pytest.mark.distributed
def test_accelerate_launch(tmp_path):
    pytest.importorskip("accelerate")
    accelerate = Path(sys.executable).with_name("accelerate")
    code = """
        import torch
        from accelerate import Accelerator

        accelerator = Accelerator(mixed_precision="bf16")
        model = torch.nn.Linear(1024, 1024)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        accelerator.backward(model(torch.randn(8, 1024, device=accelerator.device)).sum())
        optimizer.step()
        print(f"{accelerator.device} {accelerator.num_processes}\\n", end="")  # one write: two ranks share the terminal
        accelerator.end_training()
    """
    command = [accelerate, "launch", "--num_processes", 2, "--multi_gpu", "--mixed_precision", "bf16"]
    done = run("--gpu", "l4", "--count", "2", "--", *command, script(tmp_path, code))
    assert done.exit_code == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:-1]) == ["cuda:0 2", "cuda:1 2"]


COUNTS_SIGNALS = """
import signal, sys, time
received = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: received.append(number))
print("ready", flush=True)
while not received:
    time.sleep(0.05)
time.sleep(0.5)
print(*received, flush=True)
sys.exit(40 + len(received))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_forwards_signals_once(number):
    command = [*RUN, "--gpu", "t4", "--", sys.executable, "-c", COUNTS_SIGNALS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read().split() == [str(int(number))]
    assert process.returncode == 41


def test_ctrl_c_at_a_terminal_reaches_the_command_once():
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*RUN, "--gpu", "t4", "--", sys.executable, "-c", COUNTS_SIGNALS])
    said = b""
    deadline = time.monotonic() + 60
    pressed = False
    while time.monotonic() < deadline:
        try:
            said += os.read(terminal, 1024)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if b"ready" in said and not pressed:
            os.write(terminal, b"\x03")
            pressed = True
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 41, said

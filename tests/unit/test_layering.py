"""The house keeps its order: read from the imports, so that no module has to run for it."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import autobatch

PACKAGE = Path(autobatch.__file__).parent
LAYERS = (
    ("errors", "hook", "imports"),
    ("units",),
    ("replay", "result"),
    ("device",),
    ("virtual",),
    ("ranks",),
    ("probe",),
    ("training",),
    ("integrations", "report"),
    ("cli",),
    ("__init__", "__main__", "testing", "pytest_plugin"),  # doors: they see the whole house
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}

# A trainer of somebody else's stands in its own file. Models for the command line are made where its targets are.
TRAINERS = {"transformers", "lightning", "pytorch_lightning", "accelerate", "ignite"}
MODELS = {"transformers", "timm", "torchvision"}

WITHOUT_TORCH = (
    "__init__",
    "cli/__init__",
    "device/base",
    "device/fraction",
    "device/cuda_history",
    "device/host",
    "device/host_history",
    "device/local",
    "device/nvml",
    "device/oom",
    "device/process",
    "cli/cache",
    "cli/sweep",
    "errors",
    "imports",
    "probe/processes/ahead",
    "probe/processes/messages",
    "probe/cache",
    "probe/lock",
    "probe/search/__init__",
    "probe/search/arguments",
    "probe/search/settling",
    "probe/search/sweep",
    "probe/search/within",
    "pytest_plugin",
    "replay/allocator",
    "replay/forecast",
    "replay/malloc",
    "replay/scaling",
    "replay/trace",
    "report/plot",
    "result",
    "testing",
    "units",
    "virtual/attach",
    "virtual/build",
    "virtual/catalog",
    "virtual/state",
)


# What the folders in probe/ may import of it, beside themselves.
IN_PROBE = {
    "search": set[str](),
    "workload": {"search"},
    "processes": {"workload", "trial", "executor", "lock"},
    "command": {"search", "workload", "trial", "executor", "processes", "isolation"},
}


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def part_of(module: str) -> str:
    """The layer's name that ``device/cuda`` or ``units`` belongs to."""
    return module.split("/")[0]


def imports(node: ast.AST, *, at_import_only: bool) -> Iterator[str]:
    """The dotted names that a module imports; those for type checkers are none."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if at_import_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"a relative import: {ast.unparse(child)}"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child, at_import_only=at_import_only)


@functools.cache
def imported(path: Path, *, at_import_only: bool = False) -> frozenset[str]:
    return frozenset(imports(ast.parse(path.read_text()), at_import_only=at_import_only))


def own_modules(names: frozenset[str]) -> Iterator[str]:
    """Those of our own modules that are among the imported names, as ``device/cuda``."""
    for name in names:
        head, *rest = name.split(".")
        if head != "autobatch":
            continue
        # `from autobatch.device import cuda` names a module, `from autobatch.device.cuda import CudaDevice` a class.
        for parts in (rest, rest[:-1]):
            if (PACKAGE.joinpath(*parts)).with_suffix(".py").is_file() and parts:
                yield "/".join(parts)
                break
            if PACKAGE.joinpath(*parts, "__init__.py").is_file():
                yield "/".join([*parts, "__init__"])
                break


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_imports_go_downwards_only(path: Path) -> None:
    part = part_of(module_of(path))
    assert part in HEIGHT, f"{part} has no layer: give it one here and in the design"
    for module in own_modules(imported(path)):
        other = part_of(module)
        if module == "__init__":  # the version, which needs nothing
            continue
        assert other == part or HEIGHT[other] < HEIGHT[part], f"{part} imports {module}, which is not below it"


@pytest.mark.parametrize("folder", IN_PROBE)
def test_the_folders_in_probe_stand_on_one_another(folder: str) -> None:
    for path in (PACKAGE / "probe" / folder).glob("*.py"):
        for module in own_modules(imported(path)):
            if module.startswith("probe/"):
                other = module.split("/")[1]
                assert other in {folder, *IN_PROBE[folder]}, f"{module_of(path)} imports {module}"


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_other_peoples_trainers_stay_in_their_integration(path: Path) -> None:
    module = module_of(path)
    for name in {name.split(".")[0] for name in imported(path)} & (TRAINERS | MODELS):
        integration = module.startswith(f"integrations/{name.removeprefix('pytorch_')}/")
        model = name in MODELS and module.startswith("cli/targets")
        assert integration or model, f"{module} imports {name}"


def closure(module: str) -> dict[str, str]:
    """Every module of ours that importing ``module`` imports, with the one that asked for it."""
    asked, waiting = {module: "you"}, [module]
    while waiting:
        current = waiting.pop()
        path = PACKAGE / f"{current}.py"
        parents = [f"{'/'.join(current.split('/')[:depth])}/__init__" for depth in range(1, current.count("/") + 1)]
        for needed in ("__init__", *parents, *own_modules(imported(path, at_import_only=True))):
            if needed not in asked:
                asked[needed] = current
                waiting.append(needed)
    return asked


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_imports_no_torch(module: str) -> None:
    for needed, by in closure(module).items():
        names = {name.split(".")[0] for name in imported(PACKAGE / f"{needed}.py", at_import_only=True)}
        assert not names & {"torch", *TRAINERS, *MODELS}, f"{needed}, imported by {by}, imports {names & {'torch'}}"


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_and_its_command_leaves_torch_alone() -> None:
    run("import sys, autobatch, autobatch.cli; assert 'torch' not in sys.modules")


def test_imports_where_unix_modules_are_missing() -> None:
    """As on Windows: third-party packages are imported first, since they look at the platform and we stand on Linux."""
    names = [module_of(path).replace("/", ".").removesuffix(".__init__") for path in sources()]
    skipped = ("__main__", "hook.start.sitecustomize", "integrations.", "__init__")  # run, or need an extra
    wanted = ["autobatch", *(f"autobatch.{name}" for name in names if not name.startswith(skipped))]
    run(
        "import importlib, multiprocessing.util, subprocess, sys, tempfile\n"
        "import click, filelock, platformdirs, psutil, pynvml, pytest, rich.live, torch\n"
        "for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {wanted!r}:\n"
        "    importlib.import_module(name)\n"
    )


@pytest.mark.parametrize(
    "module",
    [
        "device/cuda_history",
        "device/host_history",
        "device/oom",
        "device/process",
        "imports",
        *(module_of(path) for path in sources() if part_of(module_of(path)) == "hook"),
    ],
)
def test_what_runs_in_a_command_s_own_interpreter_needs_the_standard_library_alone(module: str) -> None:
    """The hook loads the first five by their files, so that no import of theirs would be found."""
    names = imported(PACKAGE / f"{module}.py", at_import_only=True)
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "__future__"}


def test_make_looks_for_tests_with_a_gpu_where_they_are() -> None:
    """Elsewhere neither `make test` nor `make gpu` would run them."""
    root = Path(__file__).parents[2]
    named = re.search(r"^GPU_TESTS := (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert named
    searched = [root / path for path in named[1].split()]
    for path in (root / "tests").rglob("*.py"):
        marks = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        if marks & {"pytest.mark.gpu", "pytest.mark.gpu_values"}:
            assert any(path.is_relative_to(place) for place in searched), path

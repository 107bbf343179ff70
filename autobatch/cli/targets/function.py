"""``FILE.py:FUNCTION`` and ``MODULE:FUNCTION``: a function of the user's that returns a Workload."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from autobatch.cli.targets.common import ModelOptions, checkpoint_activations, nearest
from autobatch.errors import InvalidArgumentError

if TYPE_CHECKING:
    from autobatch.probe.workload import Workload

# What can be changed of a workload that is there; everything else only the function itself can do.
_APPLICABLE = ("precision", "grad_checkpointing", "compile", "mode", "effective_batch_size")


@dataclass(frozen=True, slots=True)
class FunctionTarget:
    """A function by its address. It is given ``device``, and every option of the command that it has a name for."""

    text: str
    folder: str
    """Where the imports of the file or module begin, as in ``python FILE``."""
    module: str
    """The file's absolute path, or the module's name."""
    function: str
    options: ModelOptions

    @property
    def title(self) -> str:
        return self.text

    def import_modules(self) -> None:
        _import(self.module, self.folder)

    def __call__(self, device: str) -> Workload:
        from autobatch.probe.workload import Workload

        build = self._resolve()
        accepted = _accepted(build)
        given = {name: value for name, value in _given(self.options).items() if accepted is None or name in accepted}
        for name in _given(self.options).keys() - given.keys() - set(_APPLICABLE):
            raise self._refused(name)
        if accepted is None or "device" in accepted:
            given["device"] = device
        if lacking := [name for name in _required(build) if name not in given]:
            raise InvalidArgumentError(
                "target", self.text, f"a function that needs no more than `device` and options; it needs {lacking[0]!r}"
            )
        workload = build(**given)
        if not isinstance(workload, Workload):
            kind = type(workload).__name__
            raise InvalidArgumentError("target", self.text, f"a function that returns a Workload; it returned {kind}")
        _apply(workload, {name: value for name, value in _given(self.options).items() if name not in given})
        if self.options.effective_batch_size is not None:
            self._accumulate(workload, told="effective_batch_size" in given)
        return workload

    def _accumulate(self, workload: Workload, *, told: bool) -> None:
        """Makes trials hold the gradients of a first micro-batch. Of a step function that is told, it is the affair."""
        if workload.mode == "eval":
            value = self.options.effective_batch_size
            raise InvalidArgumentError("effective_batch_size", value, "left out: an evaluation accumulates nothing")
        if workload.step is None:
            workload.accumulate = True
        elif not told:
            raise self._refused("effective_batch_size")

    def _resolve(self) -> Callable[..., Any]:
        module = _import(self.module, self.folder)
        found: Any = module
        for part in self.function.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            raise InvalidArgumentError("target", self.text, f"a function of {self.module}")
        build: Callable[..., Any] = found
        return build

    def _refused(self, name: str) -> InvalidArgumentError:
        value = getattr(self.options, name)
        return InvalidArgumentError(
            name, value, f"left out, or a parameter {name!r} of {self.function}(), which decides it"
        )


def function_target(text: str, options: ModelOptions) -> FunctionTarget:
    """The target that ``text`` names. The file is read and not run: that is for the process of the trials.

    Raises:
        InvalidArgumentError: if there is no such file, module or function.
    """
    place, _, function = text.rpartition(":")
    if place.endswith(".py") or "/" in place or "\\" in place:
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise InvalidArgumentError("target", text, f"a file that exists; there is no {path}")
        _check_defined(text, path, function)
        return FunctionTarget(text, str(path.parent), str(path), function, options)
    source = _module_path(text, place)
    if source is not None:
        _check_defined(text, source, function)
    return FunctionTarget(text, str(Path.cwd()), place, function, options)


def _module_path(text: str, module: str) -> Path | None:
    """The source of ``module``, or None where it is not a plain file. Imports its parent packages at most."""
    _extend_import_path(str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise InvalidArgumentError("target", text, f"FILE.py:FUNCTION or a module that exists; there is no {module!r}")
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def _check_defined(text: str, path: Path, function: str) -> None:
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError:
        return  # the user's own error, which is shown when the file is run
    names = set(_names(tree.body))
    if "*" not in names and function.split(".")[0] not in names:
        raise InvalidArgumentError(
            "target", text, f"a function of {path.name}; nearest to {function!r}: {nearest(function, names, few=True)}"
        )


def _names(body: list[ast.stmt]) -> Iterator[str]:
    """Names that ``body`` binds: functions, classes, imports and variables, inside ``if`` and ``try`` too."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield statement.name
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in statement.names)
        else:
            yield from (
                node.id
                for node in ast.walk(statement)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            )
            for inner in ("body", "orelse", "finalbody"):
                yield from _names(getattr(statement, inner, []))


def _import(module: str, folder: str) -> ModuleType:
    _extend_import_path(folder)
    if not module.endswith(".py"):
        return importlib.import_module(module)
    name = _file_module(module)
    if name in sys.modules:  # a worker finds what its server has run
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, module)
    if spec is None or spec.loader is None:
        raise InvalidArgumentError("target", module, "a Python file")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    try:
        spec.loader.exec_module(loaded)
    except BaseException:
        del sys.modules[name]
        raise
    return loaded


def _file_module(path: str) -> str:
    """The module that the file at ``path`` is, or becomes when it is run: the same one in every process.

    Its own name, so that loader workers and pickles find its classes, unless that is another's or cannot be imported.
    """
    name = Path(path).stem
    present = sys.modules.get(name)
    if getattr(present, "__file__", None) == path or (present is None and name.isidentifier()):
        return name
    return f"autobatch_target_{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"


def _extend_import_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _accepted(build: Callable[..., Any]) -> set[str] | None:
    """Names of the parameters that ``build`` takes by keyword; None if it takes any."""
    parameters = inspect.signature(build).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _required(build: Callable[..., Any]) -> list[str]:
    """Names of the parameters that a call of ``build`` cannot leave out."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(build).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variable]


def _given(options: ModelOptions) -> dict[str, Any]:
    values = ((field.name, getattr(options, field.name)) for field in fields(options))
    return {name: value for name, value in values if value not in (None, False)}


def _apply(workload: Workload, options: dict[str, Any]) -> None:
    """Changes a finished workload: its precision and mode, checkpointing and compilation of its model."""
    import torch

    for name, value in options.items():
        if name == "mode":
            workload.mode = value
        elif name == "effective_batch_size":
            continue  # also where the function takes it
        elif not hasattr(workload, "model"):
            raise InvalidArgumentError(name, value, "left out: of this workload only a step function is known")
        elif name == "precision":
            workload.precision = value
            if value == "fp16" and workload.scaler is None:
                workload.scaler = torch.amp.GradScaler(workload.device.type)
        elif name == "grad_checkpointing":
            checkpoint_activations(workload.model)
        else:
            workload.model.compile()

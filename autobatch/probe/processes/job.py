"""What the server of trials is told, and the environment in which it starts. Needs no torch."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Mapping
from multiprocessing import spawn
from typing import Any

from autobatch.device.base import Isolation
from autobatch.errors import InvalidArgumentError
from autobatch.probe.lock import child_environment
from autobatch.probe.processes.messages import Job

RENDEZVOUS_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"),
)
"""What a launcher such as torchrun tells a rank, and ``init_process_group()`` reads."""


def job_of(builder: Callable[..., Any], isolation: Isolation, *, meets: bool = False) -> Job:
    """What a server has to know to try what ``builder`` builds.

    Args:
        builder: picklable by reference.
        isolation: what the device says its child needs.
        meets: whether the workers are told where to meet those of other ranks.

    Raises:
        InvalidArgumentError: if ``builder`` cannot be found by name in another process.
    """
    payload = _by_reference(builder)
    # Where the workload is elsewhere, there is no reason to run the main script's imports once more.
    main = {name: value for name, value in spawn.get_preparation_data("autobatch").items() if name in _OF_MAIN}
    return Job(
        payload=payload,
        main=main if b"__main__" in payload else {},
        variables=child_environment(),
        device=isolation.device,
        memory_limit_bytes=isolation.memory_limit_bytes,
        meets=meets,
    )


def beginning(isolation: Isolation) -> tuple[dict[str, str], dict[str, Any]]:
    """The whole environment in which a server starts, and where it finds modules."""
    paths: dict[str, Any] = spawn.get_preparation_data("autobatch")
    left_out = {*_OF_MAIN, "authkey"}  # which refuses to be pickled, and nothing here needs it
    return {**_without_job(os.environ), **isolation.environment}, {
        name: value for name, value in paths.items() if name not in left_out
    }


_OF_MAIN = ("init_main_from_path", "init_main_from_name")

_WITHOUT_A_FILE = (
    "a function in a file that can be imported, because trials run in a process of their own; for what a notebook or "
    "`python -c` defines, call autobatch.VirtualGPU('a100-40gb').attach() before torch is imported, and give "
    "device='cuda'"
)


def _by_reference(builder: Callable[..., Any]) -> bytes:
    allowed = (
        "importable by name, because trials run in a process of their own: a function at the top of a module "
        "(or of a script, under `if __name__ == '__main__'`), not a lambda, a local function or a live Workload"
    )
    try:
        payload = pickle.dumps(builder)
    except Exception as exc:
        raise InvalidArgumentError("workload", builder, allowed) from exc
    main = getattr(sys.modules["__main__"], "__file__", None)  # "<stdin>" for a script that is piped in
    if b"__main__" in payload and (main is None or not os.path.exists(main)):
        raise InvalidArgumentError("workload", builder, _WITHOUT_A_FILE)
    return payload


def is_importable(builder: Callable[..., Any]) -> bool:
    """Whether another process can find ``builder`` by its name, and there can be one."""
    if not hasattr(os, "fork"):
        return False
    try:
        _by_reference(builder)
    except InvalidArgumentError:
        return False
    return True


def _without_job(variables: Mapping[str, str]) -> dict[str, str]:
    """``variables`` without a launcher's rendezvous: a child that went there would be taken for this rank itself."""
    several = int(variables.get("WORLD_SIZE") or 1) > 1
    return {name: value for name, value in variables.items() if not (several and name in RENDEZVOUS_VARIABLES)}

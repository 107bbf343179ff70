"""The pytest option ``--virtual-gpu``: the tests of a session see a GPU that is not there.

Values on it are zero, so only tests about memory, shapes and control flow mean anything there.
"""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("autobatch").addoption(
        "--virtual-gpu",
        metavar="NAME",
        help="give the test process this virtual GPU, such as a100-40gb or memory=24GiB,capability=8.6",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    # Before any conftest: the first of them to import torch would make it too late.
    name = early_config.known_args_namespace.virtual_gpu
    if name is not None:
        attach(name)


def attach(name: str) -> None:
    """Gives the present process the virtual GPU ``name``, and says why in pytest's way if that cannot be."""
    from autobatch.errors import AutobatchError
    from autobatch.virtual.device import VirtualGPU

    try:
        VirtualGPU(name).attach()
    except AutobatchError as exc:
        raise pytest.UsageError(f"virtual GPU: {exc}") from exc


def pytest_report_header() -> str | None:
    if "AUTOBATCH_VIRTUAL_STATE" not in os.environ:  # most sessions, which must not pay for imports
        return None
    from autobatch.virtual.attach import present_state
    from autobatch.virtual.state import read_state

    if (state_path := present_state()) is None:
        return None
    return f"GPU: {', '.join(card.title for card in read_state(state_path))} (virtual: every value is zero)"

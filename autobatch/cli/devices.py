"""``autobatch devices``: every place of memory here, or every GPU that a virtual one can be."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from autobatch.cli.errors import traceback_option
from autobatch.cli.tables import print_table
from autobatch.imports import imports_of_a_command
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from autobatch.device.base import Device, DeviceInfo
    from autobatch.virtual.catalog import Card


@click.command()
@click.option("--virtual", is_flag=True, help="List the GPUs that a virtual one can be, with their figures.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, sizes in bytes; null is unknown.")
@traceback_option
def devices(virtual: bool, as_json: bool) -> None:
    """Show every GPU and the host's memory: total, free, and which processes use the rest.

    GPUs are shown as their driver sees them, and as torch does: `cuda:0` is what to give to --device. A GPU that torch
    cannot use has no such name.

    \b
    Examples:
      autobatch devices
      autobatch devices --virtual
      autobatch devices --json
    """
    if virtual:
        from autobatch.virtual.catalog import cards

        if as_json:
            click.echo(json.dumps([dataclasses.asdict(card) for card in cards()], indent=2))
        else:
            print_table(_catalog_table(cards()))
            click.echo("outside: what a process takes beside torch's allocator. Your own: memory=24GiB,capability=8.6")
        return
    with imports_of_a_command():
        found, torch_view = local_devices(), torch_versions()
    if as_json:
        click.echo(json.dumps({"devices": [_plain(info) for info in found], "torch": torch_view}, indent=2))
        return
    print_table(_device_table(found))
    click.echo(_torch_line(torch_view))


def identify(device: Device) -> DeviceInfo:
    """Who ``device`` is, without a context on it: one in this process would take memory from the trials in another."""
    from autobatch.device.base import DeviceInfo
    from autobatch.device.nvml import list_gpus
    from autobatch.virtual.attach import present_state

    kind = device.torch_device.partition(":")[0]
    if kind != "cuda" or device.isolation().required:
        return device.info()
    for gpu in list_gpus():
        if device.torch_device == torch_name(gpu):
            return dataclasses.replace(gpu, virtual=present_state() is not None)
    import torch

    # Of GPUs that differ only CUDA knows the order.
    name, virtual = torch.cuda.get_device_name(device.torch_device), present_state() is not None
    return DeviceInfo(name=name, kind=kind, virtual=virtual)


def local_devices() -> list[DeviceInfo]:
    """Every GPU the driver knows, every further device of torch's, and the host."""
    from autobatch.device.local import local_names, resolve_local
    from autobatch.device.nvml import list_gpus

    gpus = list_gpus()
    known = {torch_name(gpu) for gpu in gpus}
    further = [resolve_local(name).info() for name in local_names() if name not in known]
    uuids = {info.uuid for info in further if info.uuid}
    # Where only CUDA knows the order of several GPUs, torch's description is the one with a number.
    return [gpu for gpu in gpus if gpu.uuid not in uuids] + further


def torch_versions() -> dict[str, Any]:
    """What torch says of itself: its version, what it was built for, the devices it can use."""
    import torch

    from autobatch.device.local import local_names

    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "devices": local_names(),
    }


def torch_name(info: DeviceInfo) -> str | None:
    """What torch calls the device; None where torch does not number it."""
    if info.kind == "cpu":
        return "cpu"
    kind = "cuda" if info.kind == "rocm" else info.kind
    return None if info.index is None else f"{kind}:{info.index}"


def _plain(info: DeviceInfo) -> dict[str, Any]:
    return {**dataclasses.asdict(info), "details": dict(info.details), "torch_device": torch_name(info)}


def _device_table(found: list[DeviceInfo]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("device", no_wrap=True)
    table.add_column("name")
    for title in ("total", "free", "capability", "driver"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("used by others")
    for info in found:
        table.add_row(
            torch_name(info) or "not torch's",
            info.name,
            format_bytes(info.total_bytes),
            format_bytes(info.free_bytes),
            *(("", "") if info.kind == "cpu" else (info.capability or "unknown", info.driver or "unknown")),
            _others(info),
        )
    return table


def _others(info: DeviceInfo) -> str:
    if info.kind == "cpu":
        return ""
    if info.details.get("others_unknown"):
        return "unknown"
    rows = [f"{format_bytes(p.used_bytes)}  {p.name or 'unknown'} (pid {p.pid})" for p in info.others]
    return "\n".join(rows) or "nobody"


def _torch_line(view: dict[str, Any]) -> str:
    built = f"CUDA {view['cuda']}" if view["cuda"] else f"ROCm {view['rocm']}" if view["rocm"] else "the CPU alone"
    return f"torch {view['version']}, built for {built}, can use: {', '.join(view['devices'])}"


def _catalog_table(cards: tuple[Card, ...]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("--gpu", no_wrap=True)
    table.add_column("name")
    for title in ("memory", "outside", "capability", "SMs"):
        table.add_column(title, justify="right", no_wrap=True)
    for card in cards:
        table.add_row(
            card.name,
            card.title,
            format_bytes(card.total_bytes),
            format_bytes(card.outside_bytes),
            f"{card.capability[0]}.{card.capability[1]}",
            str(card.multiprocessors),
        )
    return table

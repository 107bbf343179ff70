"""``autobatch run``: any command, on GPUs that are not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from autobatch.virtual.catalog import Card, find_card
from autobatch.virtual.host import check_kernels, untested_torch
from autobatch.virtual.launch import run_command
from autobatch.virtual.state import MAX_CARDS
from autobatch.virtual.usage import format_usage

_NOT_EXECUTABLE, _NOT_FOUND = 126, 127  # as a shell has it


@click.command(name="run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--gpu", multiple=True, required=True, metavar="NAME", help="The virtual GPU; may be repeated.")
@click.option("--count", type=click.IntRange(1, MAX_CARDS), default=1, help="That many of each --gpu.")
@click.option("--any-capability", is_flag=True, help="Also GPUs for which this torch has no kernels.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def run(ctx: click.Context, gpu: tuple[str, ...], count: int, any_capability: bool, command: tuple[str, ...]) -> None:
    """Run COMMAND, and every process it starts, on virtual GPUs.

    The command's exit code is passed on. At its end, what each process used is printed on standard error.

    \b
        autobatch run --gpu a100-40gb -- python train.py --batch-size 64
    """
    cards = _cards(gpu, count, any_capability=any_capability)
    if shutil.which(command[0]) is None:
        if Path(command[0]).exists():
            _say(f"{command[0]} cannot be run: it is not executable")
            ctx.exit(_NOT_EXECUTABLE)
        _say(f"command not found: {command[0]}")
        ctx.exit(_NOT_FOUND)
    _say(
        f"virtual {', '.join(card.title for card in cards)}: every value computed there is zero, and times mean nothing"
    )
    _say("The command writes its files, checkpoints and logs where it always does")
    try:
        report = run_command(command, cards)
    except OSError as exc:
        _say(f"{command[0]} cannot be run: {exc.strerror or exc}")
        ctx.exit(_NOT_EXECUTABLE)
    for line in format_usage(report.usage) if report.usage else ["no process used a GPU"]:
        _say(line)
    ctx.exit(report.exit_code)


def _cards(gpus: tuple[str, ...], count: int, *, any_capability: bool) -> list[Card]:
    cards = [find_card(name) for name in gpus for _ in range(count)]
    if len(cards) > MAX_CARDS:
        raise click.BadParameter(f"{len(cards)} GPUs, and a process can have {MAX_CARDS} at most", param_hint="--count")
    if said := untested_torch():
        _say(said)
    for card in cards if not any_capability else []:
        check_kernels(card)
    return cards


def _say(line: str) -> None:
    click.echo(f"autobatch: {line}", err=True)

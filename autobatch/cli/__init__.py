"""The command line: ``autobatch`` and ``python -m autobatch``.

Each command is imported when it is called, so that ``autobatch --help`` needs nothing but click.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

import click

from autobatch import __version__
from autobatch.cli.errors import exit_codes

_COMMANDS = {
    "probe": ("autobatch.cli.probe:probe", "Find the largest batch of a model, a function of yours or any command."),
    "devices": ("autobatch.cli.devices:devices", "Show every GPU and the host: memory, and who uses it."),
    "cache": ("autobatch.cli.cache:cache", "List or clear the answers that were kept."),
    "run": ("autobatch.cli.run:run", "Run any command on a GPU that is not there."),
}


class _LazyCommands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError):  # replaced by one that is no text file
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a name is no reason to fail
        with exit_codes(ctx):
            return super().invoke(ctx)


@click.group(cls=_LazyCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="autobatch")
def main() -> None:
    """Find the largest training batch that fits a GPU, also one that you do not have.

    \b
    Examples:
      autobatch probe hf:gpt2 --seq-len 1024 --gpu a100-40gb
      autobatch probe -- python train.py --batch-size {batch_size}
      autobatch devices --virtual

    `autobatch COMMAND --help` explains a command.
    """

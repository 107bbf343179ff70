"""What ``autobatch probe`` does with the words after ``--``: a training command in the place of a TARGET."""

from __future__ import annotations

from typing import Any

import click

from autobatch.cli.targets import ModelOptions
from autobatch.errors import InvalidArgumentError
from autobatch.probe.command import Command

_WORDS_KEY = "autobatch.command"


class AfterDashes(click.Command):
    """A command of ours that keeps the words after ``--`` for :func:`command_of`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            place = args.index("--")
            ctx.meta[_WORDS_KEY] = args[place + 1 :]
            args = args[:place]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[OPTIONS]", "(TARGET | -- COMMAND...)"]


def command_of(
    ctx: click.Context, target: str | None, options: ModelOptions, *, count: int, about_commands: dict[str, Any]
) -> Command | None:
    """The command after ``--``; None if there is none, and then there is a target.

    Args:
        about_commands: options that only a command has, for :class:`~autobatch.probe.command.Command`.

    Raises:
        InvalidArgumentError: if an option was given that means nothing to a command, or to a target.
        UsageError: if there is neither, or both.
    """
    words: list[str] | None = ctx.meta.get(_WORDS_KEY)
    if (words is None) == (target is None):
        raise click.UsageError("give a TARGET, or a command after --" + ("" if target is None else ", not both"), ctx)
    if words is None:
        for name, given in about_commands.items():
            if given:
                raise InvalidArgumentError(name, given, "left out: it is about a command after --")
        if count > 1:
            raise InvalidArgumentError(
                "count", count, "left out: a TARGET trains on one GPU, a command after -- on more"
            )
        return None
    for name in ModelOptions.__dataclass_fields__:
        value: Any = getattr(options, name)
        if value not in (None, False) and name != "effective_batch_size":
            raise InvalidArgumentError(
                name, value, "left out: it means nothing to a command, which has its own options"
            )
    return Command(words, effective_batch_size=options.effective_batch_size, **about_commands)

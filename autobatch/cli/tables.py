"""How a command prints a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_PIPE_WIDTH = 1000


def print_table(table: Table) -> None:
    """Prints ``table`` to the terminal's width. A pipe has none: there a line stays a line."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(table)

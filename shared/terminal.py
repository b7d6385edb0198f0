"""What commands print: tables for people, lines with tabs for a pipe, JSON for programs.

Imported by every command, so it imports little itself: Rich only once there is a table to draw.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: Any) -> None:
    """Print a value as one line of JSON; what JSON has no word for as text."""
    typer.echo(json.dumps(value, default=str))


def print_table(head: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> None:
    """Print a table for people; with a pipe at the other end, lines with tabs."""
    if not sys.stdout.isatty():
        for row in [head, *rows] if head else rows:
            typer.echo("\t".join(" ".join(cell.split()) for cell in row))
        return
    from rich.table import Column, Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    # Folded, never cut: an id is there to be copied.
    columns = [Column(name, overflow="fold") for name in head or ("", "")]
    table = Table(*columns, show_header=head is not None)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def console(*, stderr: bool = False) -> Console:
    """Return Rich's console; colours and progress bars only show in a terminal."""
    from rich.console import Console  # noqa: PLC0415

    return Console(stderr=stderr)


def note(line: str) -> None:
    """Say something to the person at the terminal; stdout belongs to the answer."""
    typer.echo(f"sluice: {line}", err=True)


def split(names: str) -> list[str]:
    """Read a list with commas between its names."""
    return [name.strip() for name in names.split(",") if name.strip()]


def money(nano_usd: int | None) -> str:
    """Write an amount in dollars; nothing for none."""
    return "" if nano_usd is None else f"${nano_usd / 1e9:.6f}"


def moment(time: datetime | None) -> str:
    """Write a time; nothing for none."""
    return "" if time is None else time.isoformat(timespec="milliseconds")


def age(since: datetime | None) -> str:
    """Write how long ago something was, in its largest unit; nothing for none."""
    if since is None:
        return ""
    seconds = max(0.0, (datetime.now(UTC) - since).total_seconds())
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"

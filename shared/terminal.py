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


class Coloured(str):
    """A cell of a table that has a colour in a terminal."""

    __slots__ = ("colour",)
    colour: str

    def __new__(cls, cell: str, colour: str) -> Coloured:
        """Give a cell a colour of Rich's."""
        made = super().__new__(cls, cell)
        made.colour = colour
        return made


def print_json(value: Any) -> None:
    """Print a value as one line of JSON; what JSON has no word for as text."""
    typer.echo(json.dumps(value, default=str))


def print_table(head: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> None:
    """Print a table for people; with a pipe at the other end, lines with tabs.

    For people, only sentences are broken over lines: an id or a name is there to be copied. Columns
    with nothing in them are left out.
    """
    if not sys.stdout.isatty():
        for row in [head, *rows] if head else rows:
            typer.echo("\t".join(" ".join(cell.split()) for cell in row))
        return
    from rich.table import Column, Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    screen = console()
    if head is None:
        names, cells = ["", ""], [list(row) for row in rows]
    else:
        names, cells = fit(head, [list(row) for row in rows], screen.width)
    columns = [
        # Beneath the first cell stands what found no room; it is as wide as what is above.
        Column(name, overflow="fold", width=_first_width(name, column))
        if head is not None and number == 0
        else Column(name, overflow="fold", no_wrap=not any(map(_is_prose, column)))
        for number, (name, column) in enumerate(zip(names, _columns(names, cells), strict=True))
    ]
    apart = any("\n" in row[0] for row in cells)
    table = Table(*columns, show_header=head is not None, show_lines=apart)
    for row in cells:
        table.add_row(*(Text(cell, getattr(cell, "colour", "")) for cell in row))
    screen.print(table)


#: Least width of a column of sentences, in characters.
_PROSE_WIDTH = 20
#: What Rich draws for each column beside its text, and once for the table.
_FRAME_WIDTH, _EDGE_WIDTH = 3, 1


def fit(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> tuple[list[str], list[list[str]]]:
    """Make a table fit without breaking a word: return its head and its rows.

    Columns that are empty are left out. From the right, what finds no room goes beneath the first
    cell of its row, by name.
    """
    columns = _columns(head, rows)
    shown = [n for n in range(len(head)) if n == 0 or not rows or any(columns[n])]
    beneath: list[int] = []

    def needed() -> int:
        first = _first_width(head[0], [*columns[0], "\n"] if beneath else columns[0])
        widths = [first, *(_width(head[n], columns[n]) for n in shown[1:])]
        return sum(widths) + _FRAME_WIDTH * len(widths) + _EDGE_WIDTH

    while len(shown) > 1 and needed() > width:
        beneath.insert(0, shown.pop())
    fitted = []
    for row in rows:
        more = ", ".join(f"{head[n]} {row[n]}" for n in beneath if row[n])
        first = f"{row[0]}\n{more}" if more else row[0]
        fitted.append([first, *(row[n] for n in shown[1:])])
    return [head[n] for n in shown], fitted


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[row[n] for row in rows] for n in range(len(head))]


def _is_prose(cell: str) -> bool:
    """Whether a cell may be broken over lines, between its words."""
    return len(cell) > _PROSE_WIDTH and len(cell.split()) > 2


def _first_width(name: str, column: Sequence[str]) -> int:
    """Return the width of the first column, beneath whose cells other columns may stand."""
    widths = [len(cell.partition("\n")[0]) for cell in column]
    return max([len(name), *widths, _PROSE_WIDTH if any("\n" in cell for cell in column) else 0])


def _width(name: str, column: Sequence[str]) -> int:
    """Return the least width of a column."""
    widths = [
        _PROSE_WIDTH if _is_prose(cell) else max(map(len, cell.splitlines()), default=0)
        for cell in column
    ]
    return max([len(name), *widths])


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
    return span((datetime.now(UTC) - since).total_seconds())


def span(seconds: float) -> str:
    """Write how long something takes, in its largest unit."""
    seconds = max(0.0, seconds)
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"

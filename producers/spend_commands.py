"""Commands for spending: `sluice spend report`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sluicegate.shared.connecting import connection
from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.terminal import AsJson, note, print_json, print_table

if TYPE_CHECKING:
    from sluicegate.producers.spend import SpendReport

app = typer.Typer(pretty_exceptions_enable=False)
spend = typer.Typer(no_args_is_help=True, help="Spend: what was paid, for what, what it saved.")
app.add_typer(spend, name="spend")


@spend.command("report", epilog="Example: sluice spend report --by model --from 2026-11-01")
def report(
    *,
    by: Annotated[
        Literal["provider", "model", "use_case", "account", "day"],
        typer.Option(help="What each row stands for."),
    ] = "use_case",
    first: Annotated[
        str | None,
        typer.Option("--from", metavar="DAY", help="First day; the month's if not given."),
    ] = None,
    last: Annotated[
        str | None, typer.Option("--to", metavar="DAY", help="Last day; today if not given.")
    ] = None,
    account: Annotated[
        str | None, typer.Option(help="Name or id: only its spending, in its own time zone.")
    ] = None,
    time_zone: Annotated[
        str | None,
        typer.Option(metavar="ZONE", help="Where days begin, for all accounts; UTC if not given."),
    ] = None,
    as_json: AsJson = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV, amounts in exact dollars.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw spend by day and use case: a .png or .svg file."),
    ] = None,
) -> None:
    """Report what was spent in some days: requests, tokens, cost, saving, latency, forecast."""
    from sluicegate.producers.spend import read_day, spend_report

    if as_json and as_csv:
        raise InvalidJob("csv", "is another shape than --json; leave one of the two away")
    if plot is not None:
        from sluicegate.producers.spend_plot import check_plot

        check_plot(plot)
    first_day = None if first is None else read_day("from", first)
    last_day = None if last is None else read_day("to", last)
    with connection() as line:
        found = spend_report(
            line,
            by=by,
            first_day=first_day,
            last_day=last_day,
            account=account,
            time_zone=time_zone,
            daily=plot is not None,
        )
    _print(found, as_json=as_json, as_csv=as_csv)
    if plot is not None:
        from sluicegate.producers.spend_plot import draw

        draw(found, plot)


def _print(found: SpendReport, *, as_json: bool, as_csv: bool) -> None:
    from sluicegate.producers import spend_display

    if as_json:
        print_json(spend_display.as_json(found))
    elif as_csv:
        head, rows = spend_display.csv_table(found)
        csv.writer(sys.stdout, lineterminator="\n").writerows([head, *rows])
    elif found.rows:
        print_table(*spend_display.table(found))
    for sentence in spend_display.sentences(found):
        note(sentence)

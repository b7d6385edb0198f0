"""Commands for budgets: `sluice budget set|show|clear`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from sluicegate.shared.connecting import connection, transaction
from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.terminal import AsJson, note, print_json, print_table, split

if TYPE_CHECKING:
    from sluicegate.producers.budgeting import Limit
    from sluicegate.shared.budgets import Budget

app = typer.Typer(pretty_exceptions_enable=False)
budget = typer.Typer(
    no_args_is_help=True, help="Budgets: what an account may spend in a day and a month."
)
app.add_typer(budget, name="budget")

Who = Annotated[str, typer.Argument(metavar="ACCOUNT", help="Its name or its id.")]
UseCase = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Only what its jobs of this use case cost."),
]


@budget.command("set", epilog="Example: sluice budget set default --daily 25 --monthly 500")
def set_one(
    account: Who,
    *,
    use_case: UseCase = None,
    daily: Annotated[
        str | None, typer.Option(metavar="USD", help="Limit of a day, in dollars, such as 25.50.")
    ] = None,
    monthly: Annotated[
        str | None, typer.Option(metavar="USD", help="Limit of a calendar month, in dollars.")
    ] = None,
    no_daily: Annotated[bool, typer.Option("--no-daily", help="Take the daily one away.")] = False,
    no_monthly: Annotated[
        bool, typer.Option("--no-monthly", help="Take the monthly one away.")
    ] = False,
    thresholds: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENTS", help="Where alerts are raised: 80,100 at first; '' for nowhere."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set what an account may spend; what is not given stays as it is. Shows what holds now.

    Days and months are those of the account's time zone. What was spent since they began counts.
    """
    from sluicegate.producers.budgeting import setting

    work = setting(
        account,
        use_case=use_case,
        daily=_limit("daily", daily, none=no_daily),
        monthly=_limit("monthly", monthly, none=no_monthly),
        thresholds=None if thresholds is None else _percents(thresholds),
    )
    with transaction() as line:
        now_set = work(line)
    _show([now_set], as_json=as_json)


@budget.command("show", epilog="Example: sluice budget show default")
def show(
    account: Annotated[
        str | None,
        typer.Argument(metavar="[ACCOUNT]", help="Its name or its id; all if not given."),
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Show budgets: what is spent, held by calls under way, and left, and for how many more jobs.

    How many is an estimate, by what jobs of the account have cost lately.
    """
    from sluicegate.producers.budgeting import reading

    work = reading(account)
    with connection() as line:
        found = work(line)
    _show(found, as_json=as_json)
    if not found:
        note(f"{'there is' if account is None else account + ' has'} no budget")


@budget.command("clear", epilog="Example: sluice budget clear default")
def clear(account: Who, *, use_case: UseCase = None) -> None:
    """Take a budget away: nothing limits that spending any more."""
    from sluicegate.producers.budgeting import clearing
    from sluicegate.shared.budgets import name_budget

    work = clearing(account, use_case)
    with transaction() as line:
        work(line)
    note(f"{account} has no {name_budget(use_case)} any more")


def _limit(field: str, given: str | None, *, none: bool) -> Limit:
    if none and given is not None:
        raise InvalidJob(field, f"is either an amount or, with --no-{field}, none")
    if none:
        return None
    return ... if given is None else given


def _percents(given: str) -> list[int]:
    try:
        return [int(percent.removesuffix("%")) for percent in split(given)]
    except ValueError:
        raise InvalidJob(
            "thresholds", f"{given!r} is not a list of percents such as 80,100"
        ) from None


def _show(found: Sequence[Budget], *, as_json: bool) -> None:
    from sqlalchemy import func, select

    from sluicegate.producers import budget_display
    from sluicegate.shared.budgets import typical_costs

    with connection() as line:
        now = line.execute(select(func.now())).scalar_one()
        costs = {one: typical_costs(line, one) for one in {budget.account_id for budget in found}}
    if as_json:
        print_json({"budgets": [budget_display.as_json(one, costs, now) for one in found]})
    elif found:
        print_table(budget_display.HEAD, budget_display.table(found, costs, now))

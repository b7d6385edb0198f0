"""Commands for accounts: `sluice account add|list|show|set`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sluicegate.shared.connecting import connection
from sluicegate.shared.errors import NothingToChange
from sluicegate.shared.terminal import AsJson, money, print_json, print_table

if TYPE_CHECKING:
    from sluicegate.shared.accounts import Account

app = typer.Typer(pretty_exceptions_enable=False)
account = typer.Typer(no_args_is_help=True, help="Accounts: on whose behalf jobs run.")
app.add_typer(account, name="account")

Who = Annotated[str, typer.Argument(metavar="NAME", help="Its name or its id.")]


@account.command("add", epilog="Example: sluice account add acme --time-zone Europe/Berlin")
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What jobs will call it.")],
    *,
    time_zone: Annotated[
        str, typer.Option(metavar="ZONE", help="Where its days and months turn.")
    ] = "UTC",
    as_json: AsJson = False,
) -> None:
    """Add an account."""
    from sluicegate.shared.accounts import add_account

    with connection() as line:
        added = add_account(line, name, time_zone)
    _tell(added, as_json=as_json)


@account.command("list", epilog="Example: sluice account list --json")
def list_all(*, as_json: AsJson = False) -> None:
    """List all accounts."""
    from sluicegate.shared.accounts import list_accounts

    with connection() as line:
        found = list_accounts(line)
    if as_json:
        print_json({"accounts": [_as_json(one) for one in found]})
        return
    print_table(
        ("name", "id", "time zone", "active"),
        [(one.name, str(one.id), one.time_zone, "yes" if one.is_active else "no") for one in found],
    )


@account.command("show", epilog="Example: sluice account show default")
def show(name: Who, *, as_json: AsJson = False) -> None:
    """Show an account: its jobs, what they cost, and what it has of its own."""
    from sluicegate.shared.accounts import figures, find_account

    with connection() as line:
        found = find_account(line, name)
        its = figures(line, found)
    if as_json:
        print_json(
            {
                **_as_json(found),
                "jobs": dict(its.jobs),
                "cost_month_nano_usd": its.cost_month_nano_usd,
                "cost_nano_usd": its.cost_nano_usd,
                "providers": list(its.providers),
                "keys": list(its.keys),
            }
        )
        return
    print_table(
        None,
        [
            ("name", found.name),
            ("id", str(found.id)),
            ("time zone", found.time_zone),
            ("active", "yes" if found.is_active else "no"),
            ("jobs", ", ".join(f"{count} {state}" for state, count in its.jobs.items()) or "none"),
            ("cost this month", money(its.cost_month_nano_usd)),
            ("cost in all", money(its.cost_nano_usd)),
            ("own providers", ", ".join(its.providers) or "none"),
            ("own keys", ", ".join(its.keys) or "none"),
        ],
    )


@account.command("set", epilog="Example: sluice account set default --time-zone Europe/Berlin")
def set_some(
    name: Who,
    *,
    time_zone: Annotated[
        str | None, typer.Option(metavar="ZONE", help="Where its days and months turn.")
    ] = None,
    active: Annotated[
        bool | None, typer.Option("--active/--inactive", help="Whether it may submit jobs.")
    ] = None,
    rename: Annotated[
        str | None, typer.Option(metavar="NAME", help="What jobs will call it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change an account. Clients that run see it within ten seconds."""
    from sluicegate.shared.accounts import set_account

    if (time_zone, active, rename) == (None, None, None):
        raise NothingToChange
    with connection() as line:
        changed = set_account(line, name, name=rename, time_zone=time_zone, is_active=active)
    _tell(changed, as_json=as_json)


def _tell(one: Account, *, as_json: bool) -> None:
    if as_json:
        print_json(_as_json(one))
        return
    state = "active" if one.is_active else "inactive"
    typer.echo(f"{one.name}\t{one.id}\t{one.time_zone}\t{state}")


def _as_json(one: Account) -> dict[str, Any]:
    return {
        "id": str(one.id),
        "name": one.name,
        "time_zone": one.time_zone,
        "is_active": one.is_active,
    }

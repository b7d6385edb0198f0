"""Commands for accounts: `sluice account add|list`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated

import typer

from sluicegate.shared.connecting import connection
from sluicegate.shared.terminal import AsJson, print_json, print_table

app = typer.Typer(pretty_exceptions_enable=False)
account = typer.Typer(help="Accounts: on whose behalf jobs run.")
app.add_typer(account, name="account")


@account.command("add", epilog="Example: sluice account add acme --time-zone Europe/Berlin")
def add(
    name: Annotated[str, typer.Argument(help="What jobs will call it.")],
    time_zone: Annotated[str, typer.Option(help="Where its days and months turn.")] = "UTC",
) -> None:
    """Add an account."""
    from sluicegate.shared.accounts import add_account

    with connection() as line:
        added = add_account(line, name, time_zone)
    typer.echo(f"{added.name}\t{added.id}\t{added.time_zone}")


@account.command("list", epilog="Example: sluice account list --json")
def list_all(*, as_json: AsJson = False) -> None:
    """List all accounts."""
    from sluicegate.shared.accounts import list_accounts

    with connection() as line:
        found = list_accounts(line)
    if as_json:
        accounts = [
            {
                "id": str(one.id),
                "name": one.name,
                "time_zone": one.time_zone,
                "is_active": one.is_active,
            }
            for one in found
        ]
        print_json({"accounts": accounts})
        return
    print_table(
        ("name", "id", "time zone", "active"),
        [(one.name, str(one.id), one.time_zone, "yes" if one.is_active else "no") for one in found],
    )

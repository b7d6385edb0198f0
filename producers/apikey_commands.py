"""Commands for the keys of the HTTP producer: `sluice apikey create|list|revoke`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sluicegate.shared.connecting import connection, transaction
from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.terminal import AsJson, age, moment, note, print_json, print_table

if TYPE_CHECKING:
    from sluicegate.shared.api_keys import ApiKey

app = typer.Typer(pretty_exceptions_enable=False)
apikey = typer.Typer(
    no_args_is_help=True, help="API keys: who may call over HTTP, and for which account."
)
app.add_typer(apikey, name="apikey")


@apikey.command("create", epilog="Example: sluice apikey create crm --account default")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What you will know it by.")],
    *,
    account: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose it is, by name or id.")
    ] = None,
    service: Annotated[
        bool,
        typer.Option(
            "--service", help="Nobody's: each request names its account in X-Sluice-Account."
        ),
    ] = False,
    role: Annotated[
        Literal["user", "owner", "admin"],
        typer.Option(help="user: its own jobs; owner: all of the account; admin: everything."),
    ] = "user",
    expires: Annotated[
        str | None, typer.Option(metavar="DATE", help="Until when it opens, as 2027-01-14.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key, and show it, this once."""
    from sluicegate.shared.api_keys import create_key
    from sluicegate.shared.audit import command_actor

    if (account is None) != service and role != "admin":
        raise InvalidJob("account", "give either --account or, for a back end's key, --service")
    if account is not None and service:
        raise InvalidJob("account", "a service key has none; take --account or --service away")
    with transaction() as line:
        made, token = create_key(
            line,
            name,
            role=role,
            account=account,
            created_by=command_actor().name,
            expires_at=None if expires is None else _time(expires),
        )
    plain = token.get_secret_value()
    if as_json:
        print_json({**_as_json(made), "key": plain})
        return
    typer.echo(plain)
    note(f"this is the key of {made.name}, {_whose(made)}; it is not shown again")


@apikey.command("list", epilog="Example: sluice apikey list --json")
def list_all(
    *,
    account: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this account's, by name or id.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List API keys, and none of them itself: whose they are, and when they were last used."""
    from sluicegate.shared.accounts import account_id_of
    from sluicegate.shared.api_keys import list_keys

    with connection() as line:
        found = list_keys(line, account_id_of(line, account))
    if as_json:
        print_json({"keys": [_as_json(one) for one in found]})
        return
    print_table(
        ("name", "id", "begins with", "account", "role", "state", "used", "expires"),
        [
            (
                *(one.name, str(one.id), one.hint, one.account or "any", one.role, one.state()),
                f"{age(one.last_used_at)} ago" if one.last_used_at else "never",
                moment(one.expires_at),
            )
            for one in found
        ],
    )


@apikey.command("revoke", epilog="Example: sluice apikey revoke crm")
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Its id or its name.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Have an API key open nothing any more, within seconds; it stays in the list."""
    from sluicegate.shared.api_keys import find_key, revoke_key

    with transaction() as line:
        revoked = revoke_key(line, find_key(line, key).id)
    if as_json:
        print_json(_as_json(revoked))
        return
    note(f"the key {revoked.name} ({revoked.hint}…), {_whose(revoked)}, is revoked")


def _whose(key: ApiKey) -> str:
    if key.account is not None:
        return f"{key.role} of {key.account}"
    return f"{key.role} of the account that each request names"


def _time(given: str) -> datetime:
    try:
        time = datetime.fromisoformat(given)
    except ValueError:
        raise InvalidJob("expires", f"{given!r} is not a date such as 2027-01-14") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _as_json(key: ApiKey) -> dict[str, Any]:
    return {
        "id": str(key.id),
        "name": key.name,
        "role": key.role,
        "account": key.account,
        "hint": key.hint,
        "state": key.state(),
        "created_at": moment(key.created_at),
        "created_by": key.created_by,
        "expires_at": moment(key.expires_at) or None,
        "revoked_at": moment(key.revoked_at) or None,
        "last_used_at": moment(key.last_used_at) or None,
    }

"""Commands for accounts: `sluice account add|list|show|set`, and those for what they hold."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sluicegate.producers.account_data_commands import data
from sluicegate.shared.connecting import connection, transaction
from sluicegate.shared.errors import NothingToChange, SettingsError
from sluicegate.shared.terminal import AsJson, money, note, print_json, print_table, split

if TYPE_CHECKING:
    from sluicegate.shared.accounts import Account
    from sluicegate.shared.secrets import Secret

app = typer.Typer(pretty_exceptions_enable=False)
account = typer.Typer(no_args_is_help=True, help="Accounts: on whose behalf jobs run.")
app.add_typer(account, name="account")
account.add_typer(data)

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
    from sluicegate.shared.webhooks import webhook_of

    with connection() as line:
        found = find_account(line, name)
        its = figures(line, found)
        webhook = webhook_of(line, found.id)
    alert_url = webhook and webhook.url
    if as_json:
        print_json(
            {
                **_as_json(found),
                "jobs": dict(its.jobs),
                "cost_month_nano_usd": its.cost_month_nano_usd,
                "cost_nano_usd": its.cost_nano_usd,
                "providers": list(its.providers),
                "keys": list(its.keys),
                "alert_url": alert_url,
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
            ("alerts posted to", alert_url or "nowhere"),
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
    alert_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Where its alerts are posted to, beginning with https://."
        ),
    ] = None,
    alert_secret_stdin: Annotated[
        bool,
        typer.Option(
            "--alert-secret-stdin",
            help="Read what they are signed with from standard input, instead of making it.",
        ),
    ] = False,
    clear: Annotated[
        str | None, typer.Option(metavar="NAME", help="Take away what it has: alert-url.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change an account. Clients that run see it within ten seconds.

    With --alert-url a new secret is made and shown, this once. Each alert is posted as JSON with
    the headers Sluice-Alert-Id, Sluice-Timestamp and Sluice-Signature. To verify one: the signature
    is "v1=" and the HMAC-SHA256, in hexadecimal digits, of the timestamp, a dot and the body as it
    came, with the secret as the key. Compare in constant time, refuse what is older than five
    minutes, and take an id only once: a post may be repeated. `sluice alerts test` tries it out.
    """
    from sluicegate.shared.accounts import find_account, set_account
    from sluicegate.shared.settings import get_settings
    from sluicegate.shared.webhooks import Webhook, check_url, set_webhook, webhook_of

    if not alert_secret_stdin and (time_zone, active, rename, alert_url, clear) == (None,) * 5:
        raise NothingToChange
    for what in split(clear or ""):
        if what != "alert-url":
            raise SettingsError(f"clear: {what!r} cannot be; there is alert-url")
    if clear and (alert_url or alert_secret_stdin):
        raise SettingsError("clear: the alert URL is either set or taken away")
    if alert_url is not None:
        check_url(alert_url, private=get_settings().alert_private_urls)
    secret = _alert_secret(given=alert_secret_stdin) if alert_url or alert_secret_stdin else None
    token = secret and _encrypted(secret)
    with transaction() as line:
        found = find_account(line, name)
        if token:
            before = webhook_of(line, found.id)
            url = alert_url or (before and before.url)
            if not url:
                raise SettingsError(f"{found.name} has no alert URL; set it with --alert-url")
            set_webhook(line, found.id, Webhook(url=url, secret_encrypted=token))
        elif clear:
            set_webhook(line, found.id, None)
        changed = set_account(line, found.name, name=rename, time_zone=time_zone, is_active=active)
    shown = None if alert_secret_stdin else secret
    _tell(changed, as_json=as_json, secret=shown)


def _alert_secret(*, given: bool) -> Secret:
    """Read the secret from standard input, or make one; raises SettingsError."""
    from sluicegate.shared.secrets import Secret
    from sluicegate.shared.webhooks import MAX_SECRET_CHARS, check_secret, new_secret

    if not given:
        return new_secret()
    if sys.stdin.isatty():
        typed = typer.prompt("Alert secret", hide_input=True)
    else:
        typed = sys.stdin.read(MAX_SECRET_CHARS + 2)
    return check_secret(Secret(typed.strip()))


def _encrypted(secret: Secret) -> str:
    from sluicegate.shared.secrets import Keyring
    from sluicegate.shared.settings import get_settings

    keyring = Keyring.of(get_settings())
    if not keyring.fingerprints:
        raise SettingsError(
            "SLUICE_ENCRYPTION_KEYS is not set, and what alerts are signed with is never stored in "
            "the clear; run `sluice secrets new-key` and set it for the sweep too"
        )
    return keyring.encrypt(secret)


def _tell(one: Account, *, as_json: bool, secret: Secret | None = None) -> None:
    shown = secret and secret.get_secret_value()
    if as_json:
        print_json(_as_json(one) | ({"alert_secret": shown} if shown else {}))
        return
    state = "active" if one.is_active else "inactive"
    typer.echo(f"{one.name}\t{one.id}\t{one.time_zone}\t{state}")
    if shown:
        typer.echo(f"alert secret\t{shown}")
        note("alerts are signed with this secret; it is not shown again")


def _as_json(one: Account) -> dict[str, Any]:
    return {
        "id": str(one.id),
        "name": one.name,
        "time_zone": one.time_zone,
        "is_active": one.is_active,
    }

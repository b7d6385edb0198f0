"""Commands for alerts: `sluice alerts list|ack|test`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sluicegate.shared.connecting import connection, transaction
from sluicegate.shared.errors import NotFound, SettingsError, SluiceError
from sluicegate.shared.terminal import AsJson, moment, note, print_json, print_table

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy import Connection

    from sluicegate.shared.alerts import Alert

app = typer.Typer(pretty_exceptions_enable=False)
alerts = typer.Typer(
    no_args_is_help=True, help="Alerts: budgets that run out, accounts without a provider."
)
app.add_typer(alerts, name="alerts")

Of = Annotated[str | None, typer.Option(metavar="NAME", help="Only those of this account.")]

_LOOK_S = 0.2


@alerts.command("list", epilog="Example: sluice alerts list --all --account default")
def list_some(
    *,
    account: Of = None,
    closed: Annotated[
        bool,
        typer.Option("--all/--open", help="Also those that somebody has seen, or that are over."),
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The newest so many.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List alerts, newest first: what happened, whether it was told, and whether its URL took it.

    An alert is open until somebody acknowledges it, or what it is about is over, such as the day or
    the month of its budget.
    """
    from sluicegate.shared.alerts import list_alerts

    with connection() as line:
        account_id = None if account is None else _find(line, account)[0]
        found = list_alerts(line, account_id=account_id, closed=closed, limit=limit)
    if as_json:
        print_json({"alerts": [_as_json(one) for one in found]})
        return
    print_table(
        ("id", "at", "account", "message", "state", "told", "posted"),
        [
            (
                *(str(one.id), moment(one.created_at), one.account or "", one.message),
                *(_state(one), "yes" if one.told_at else "not yet", _posted(one)),
            )
            for one in found
        ],
    )


@alerts.command("ack", epilog="Example: sluice alerts ack --all --account default")
def ack(
    ids: Annotated[
        list[int] | None, typer.Argument(metavar="ID...", help="Which, as `alerts list` has them.")
    ] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
    account: Of = None,
    as_json: AsJson = False,
) -> None:
    """Say that you have seen alerts: they are not open any more."""
    from sluicegate.shared.alerts import acknowledge, unknown_alerts

    if every == bool(ids):
        raise SettingsError("name the ids of alerts, or --all")
    with transaction() as line:
        account_id = None if account is None else _find(line, account)[0]
        if ids and (unknown := unknown_alerts(line, ids)):
            raise NotFound(f"there is no alert {', '.join(map(str, unknown))}")
        seen = acknowledge(line, ids or None, account_id)
    if as_json:
        print_json({"acknowledged": seen})
        return
    typer.echo(f"{len(seen)} acknowledged")


@alerts.command("test", epilog="Example: sluice alerts test --account default")
def try_out(
    *,
    account: Annotated[str, typer.Option(metavar="NAME", help="Whose way of being told.")],
    wait: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, max=600, help="How long to wait for the outcome."),
    ] = 30,
    as_json: AsJson = False,
) -> None:
    """Raise an alert that says nothing, and see whether the channel and the URL get it.

    Exits with 1 if they did not within the time.
    """
    from sluicegate.shared.alerts import alert_key, find_alert, raise_test
    from sluicegate.shared.settings import get_settings
    from sluicegate.shared.webhooks import webhook_of

    give_up_at = time.monotonic() + wait
    with connection() as line:
        account_id, name = _find(line, account)
        alert_id = raise_test(line, account_id, name)
        webhook = webhook_of(line, account_id)
        while True:
            raised = find_alert(line, alert_id)
            if raised is None:
                raise NotFound(f"alert {alert_id} is gone")
            done = raised.told_at is not None and (webhook is None or raised.posted_at is not None)
            if done or raised.post_error is not None or time.monotonic() >= give_up_at:
                break
            time.sleep(_LOOK_S)
    key = get_settings().redis_prefix + alert_key(account_id)
    if as_json:
        print_json(_as_json(raised) | {"channel": key})
    else:
        print_table(
            None,
            [
                ("alert", str(alert_id)),
                ("told on", key if raised.told_at else "not yet"),
                ("posted", _posted(raised) if webhook else "the account has no alert URL"),
            ],
        )
    if done:
        return
    if raised.told_at is None:
        note("is a sweep running? `sluice doctor` says")
    raise SluiceError(f"alert {alert_id} has not come everywhere; `sluice alerts list --all`")


def _find(line: Connection, account: str) -> tuple[UUID, str]:
    from sluicegate.shared.accounts import find_account

    found = find_account(line, account)
    return found.id, found.name


def _state(one: Alert) -> str:
    if one.is_open:
        return "open"
    return "acknowledged" if one.acked_at else "over"


def _posted(one: Alert) -> str:
    """Say in a few words what became of the post, or why it was not taken."""
    from sluicegate.shared.alerts import Posting

    words = {
        Posting.NONE: "",
        Posting.POSTED: "yes",
        Posting.WAITING: "not yet",
        Posting.GIVEN_UP: "given up",
    }
    tries = f" after {one.post_tries} tries" if one.post_tries > 1 else ""
    return words[one.posting] + (f"{tries}: {one.post_error}" if one.post_error else tries)


def _as_json(one: Alert) -> dict[str, Any]:
    times = ("window_started_at", "window_resets_at", "created_at", "resolved_at", "acked_at")
    return {
        "id": one.id,
        "kind": one.kind,
        "account": one.account,
        "provider": one.provider,
        "use_case": one.use_case,
        "window": one.window,
        "threshold_percent": one.threshold,
        "message": one.message,
        **{name: moment(getattr(one, name)) or None for name in times},
        "is_open": one.is_open,
        "told_at": moment(one.told_at) or None,
        "posting": one.posting.value,
        "posted_at": moment(one.posted_at) or None,
        "post_tries": one.post_tries,
        "post_due_at": moment(one.post_due_at) or None,
        "post_error": one.post_error,
    }

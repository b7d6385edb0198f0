"""Commands for the audit: `sluice audit list`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sluicegate.shared.connecting import connection
from sluicegate.shared.terminal import AsJson, moment, print_json, print_table

if TYPE_CHECKING:
    from sluicegate.shared.audit import AuditEntry

app = typer.Typer(pretty_exceptions_enable=False)
audit = typer.Typer(no_args_is_help=True, help="The audit: who changed what, and when.")
app.add_typer(audit, name="audit")


@audit.command("list", epilog="Example: sluice audit list --since 7d --what provider")
def list_all(
    *,
    since: Annotated[
        str | None, typer.Option(help="Changed since: 30s, 15m, 1h, 2d ago, or a time.")
    ] = None,
    who: Annotated[
        str | None, typer.Option(metavar="ACTOR", help="By this one, as cli:root or key:ID.")
    ] = None,
    what: Annotated[
        str | None,
        typer.Option(metavar="WHAT", help="Of this kind, such as provider, or of this name or id."),
    ] = None,
    account: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of what is this account's, by name or id.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The newest so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List what was changed, newest first: providers, keys, accounts, budgets, pauses, prices.

    Changes by hand are there, too, in the name of the database's user. Secrets show as ***.
    """
    from sluicegate.producers.listing import read_since
    from sluicegate.shared.accounts import account_id_of
    from sluicegate.shared.audit import read_audit

    begin = None if since is None else read_since(since)
    if isinstance(begin, timedelta):
        begin = datetime.now(UTC) - begin
    with connection() as line:
        found = read_audit(
            line,
            account_id=account_id_of(line, account),
            who=who,
            what=what,
            since=begin,
            limit=limit,
        )
    if as_json:
        print_json({"changes": [_as_json(one) for one in found]})
        return
    print_table(
        ("at", "who", "what", "account", "change"),
        [
            (
                *(moment(one.at), one.actor, f"{one.kind.replace('_', ' ')} {one.subject}".strip()),
                *(one.account or "", _change(one)),
            )
            for one in found
        ],
    )


def _change(entry: AuditEntry) -> str:
    """Write a change for people."""
    if entry.before is None and entry.after is None:
        return f"{entry.action} (erased)"
    if entry.action != "change":
        shown = entry.after or entry.before or {}
        set_ = (f"{name} {_value(value)}" for name, value in shown.items() if value is not None)
        return f"{entry.action}: {', '.join(set_)}"
    before: Mapping[str, Any] = entry.before or {}
    after: Mapping[str, Any] = entry.after or {}
    moves = (f"{name} {_value(before.get(name))} -> {_value(after[name])}" for name in after)
    return ", ".join(moves)


def _value(value: object) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _as_json(entry: AuditEntry) -> dict[str, Any]:
    return {
        "number": entry.number,
        "at": moment(entry.at),
        "actor": entry.actor,
        "request_id": entry.request_id,
        "action": entry.action,
        "kind": entry.kind,
        "subject": entry.subject,
        "subject_id": entry.subject_id,
        "account": entry.account,
        "before": entry.before,
        "after": entry.after,
    }

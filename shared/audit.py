"""The audit: who changed what, from what to what. Triggers write it, see migration 0007.

Whoever changes something says who he is, on the connection that he does it with; of a change by
hand the triggers note the database's user. Secrets stand there as `***`.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, get_args
from uuid import UUID

from sqlalchemy import Connection, func, or_, select

from sluicegate.shared.tables import accounts, audit_entries

Action = Literal["add", "change", "remove"]
Kind = Literal[
    "account",
    "api_key",
    "budget",
    "pause",
    "price_list",
    "provider",
    "provider_key",
    "use_case",
]
KINDS: Final[tuple[str, ...]] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who changes something."""

    #: `key:<id>`, `jwt:<subject>`, `sandbox`, or `cli:<user of the operating system>`.
    name: str
    #: Of the HTTP request that asks for it.
    request_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One change."""

    #: Grows; the newest has the highest.
    number: int
    at: datetime
    actor: str
    request_id: str | None
    action: Action
    kind: Kind
    #: The name of what was changed, and its id if it has one.
    subject: str
    subject_id: str | None
    #: Whose that is; None: everybody's.
    account: str | None
    #: Columns of the row; of a change those that changed. None: there was, or is, no row.
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None


def command_actor() -> Actor:
    """Return who runs this command."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # In a container the user may have no name.
        user = str(os.getuid())
    return Actor(name=f"cli:{user}")


def sign(connection: Connection, actor: Actor, *, for_transaction: bool = True) -> None:
    """Have the changes of this transaction, or of all of this connection, bear this name."""
    connection.execute(
        select(
            func.set_config("sluicegate.actor", actor.name, for_transaction),
            func.set_config("sluicegate.request_id", actor.request_id or "", for_transaction),
        )
    )


def read_audit(
    connection: Connection,
    *,
    limit: int,
    account_id: UUID | None = None,
    who: str | None = None,
    what: str | None = None,
    since: datetime | None = None,
    below: int | None = None,
) -> list[AuditEntry]:
    """Return the newest changes, newest first.

    account_id: only of what is this account's. who: by this actor. what: of this kind, or of what
    has this name or id. below: of those with a lower number than this.
    """
    columns = audit_entries.c
    names = ("number", "at", "actor", "request_id", "action", "kind", "subject", "subject_id")
    query = (
        select(
            *(columns[name] for name in names),
            accounts.c.name.label("account"),
            columns.before,
            columns.after,
        )
        .outerjoin_from(audit_entries, accounts, accounts.c.id == columns.account_id)
        .order_by(columns.number.desc())
        .limit(limit)
    )
    if account_id is not None:
        query = query.where(columns.account_id == account_id)
    if who is not None:
        query = query.where(columns.actor == who)
    if what is not None:
        query = query.where(
            or_(columns.kind == what, columns.subject == what, columns.subject_id == what)
        )
    if since is not None:
        query = query.where(columns.at >= since)
    if below is not None:
        query = query.where(columns.number < below)
    return [AuditEntry(**row._mapping) for row in connection.execute(query)]

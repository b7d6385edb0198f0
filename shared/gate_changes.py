"""Levers and pauses as operators pull them, the trail of all changes of the gates, and alerts.

A change works on a connection whose transaction is the caller's, and so does its line in the trail.
Afterwards `catalogue.announce` tells the processes that run; the sweep wakes the jobs that a change
lets go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from sqlalchemy import Connection, Row, cast, delete, func, insert, select, true, update
from sqlalchemy import Text as TextType
from sqlalchemy.dialects.postgresql import insert as upsert

from sluicegate.shared.errors import NotFound
from sluicegate.shared.tables import (
    accounts,
    alerts,
    gate_changes,
    llm_providers,
    pauses,
    use_cases,
)

Lever = Literal["auto", "forced_open", "disabled"]
PauseKind = Literal["provider", "account", "use_case"]

#: The Postgres channel on which a change is told: it wakes the sweep, which wakes jobs.
GATE_CHANNEL: Final = "sluice_gates"

#: The kind of alert for an account that does without a provider.
SUSPENDED: Final = "suspended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """What is stopped: no new call for it until it is resumed."""

    kind: PauseKind
    #: The name of the provider, account or use case.
    name: str
    #: Whose provider row it is; None: everybody's.
    account: str | None
    since: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class GateChange:
    """One line of the trail."""

    number: int
    at: datetime
    kind: Literal["breaker", "suspension", "pause", "lever", "budget"]
    #: Each None where the change is not about one.
    provider: str | None
    account: str | None
    use_case: str | None
    before: str
    after: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """An account that does without a provider, until somebody has seen to it."""

    kind: str
    message: str
    since: datetime


def set_pause(
    connection: Connection, kind: PauseKind, subject: UUID | str, *, paused: bool
) -> bool:
    """Stop something or let it go on; return whether that changed anything.

    `subject` is the id of a provider row or account, or the name of a use case.
    """
    columns = pauses.c
    values = {"kind": kind, "subject": str(subject)}
    changed = connection.scalar(
        upsert(pauses).values(values).on_conflict_do_nothing().returning(columns.kind)
        if paused
        else delete(pauses)
        .where(columns.kind == kind, columns.subject == str(subject))
        .returning(columns.kind)
    )
    if changed is None:
        return False
    states = ("running", "paused") if paused else ("paused", "running")
    record_change(connection, "pause", {_COLUMNS[kind]: subject}, *states)
    return True


#: Which column of the trail names what is paused.
_COLUMNS: Final = {"provider": "provider_id", "account": "account_id", "use_case": "use_case"}


def list_pauses(connection: Connection) -> list[Pause]:
    """Return all that is stopped, the newest first."""
    columns, owner = pauses.c, accounts.alias("owner")
    rows = connection.execute(
        select(
            columns.kind,
            func.coalesce(llm_providers.c.name, accounts.c.name, columns.subject).label("name"),
            owner.c.name.label("account"),
            columns.created_at.label("since"),
        )
        .outerjoin_from(
            pauses,
            llm_providers,
            (columns.kind == "provider") & (cast(llm_providers.c.id, TextType) == columns.subject),
        )
        .outerjoin(
            accounts,
            (columns.kind == "account") & (cast(accounts.c.id, TextType) == columns.subject),
        )
        .outerjoin(owner, owner.c.id == llm_providers.c.account_id)
        .order_by(columns.created_at.desc(), columns.kind, columns.subject)
    )
    return [Pause(**row._mapping) for row in rows]


def check_use_case(connection: Connection, name: str) -> None:
    """Raise NotFound unless there is this use case, in use or not."""
    known = connection.scalars(select(use_cases.c.name).order_by(use_cases.c.name)).all()
    if name not in known:
        raise NotFound(f"there is no use case {name!r}; there are {', '.join(known)}")


def pull_lever(connection: Connection, row: Row[Any], lever: Lever) -> bool:
    """Set the lever of a provider row that is locked; return whether that changed anything.

    Back to `auto` is a reset of all there is at the row: it is told and recorded in any case.
    """
    changed = bool(row.breaker != lever)
    if changed:
        connection.execute(
            update(llm_providers)
            .where(llm_providers.c.id == row.id)
            .values(breaker=lever, updated_at=func.now())
        )
    if changed or lever == "auto":
        record_change(connection, "lever", {"provider_id": row.id}, row.breaker, lever)
    return changed


def last_changes(
    connection: Connection, kind: Literal["breaker", "lever"]
) -> dict[UUID, tuple[str, datetime]]:
    """Return, by provider row, what it last changed to, and when."""
    row, change = llm_providers.c, gate_changes.c
    last = (
        select(change.after, change.at)
        .where(change.provider_id == row.id, change.kind == kind)
        .order_by(change.number.desc())
        .limit(1)
        .lateral()
    )
    found = connection.execute(
        select(row.id, last.c.after, last.c.at).join_from(llm_providers, last, true())
    )
    return {one.id: (one.after, one.at) for one in found}


def trail(
    connection: Connection, *, provider_id: UUID | None = None, limit: int
) -> list[GateChange]:
    """Return the newest changes, of one provider row or of all there is, newest first."""
    columns = gate_changes.c
    query = (
        select(
            *(columns[name] for name in ("number", "at", "kind", "use_case")),
            *(columns[name] for name in ("before", "after", "reason")),
            llm_providers.c.name.label("provider"),
            accounts.c.name.label("account"),
        )
        .outerjoin_from(gate_changes, llm_providers, llm_providers.c.id == columns.provider_id)
        .outerjoin(
            accounts,
            accounts.c.id == func.coalesce(columns.account_id, llm_providers.c.account_id),
        )
        .order_by(columns.number.desc())
        .limit(limit)
    )
    if provider_id is not None:
        query = query.where(columns.provider_id == provider_id)
    return [GateChange(**row._mapping) for row in connection.execute(query)]


def list_alerts(connection: Connection, *, limit: int) -> list[Alert]:
    """Return the alerts about suspensions that are not over, the oldest first."""
    columns = alerts.c
    rows = connection.execute(
        select(columns.kind, columns.message, columns.created_at.label("since"))
        .where(columns.kind == SUSPENDED, columns.resolved_at.is_(None))
        .order_by(columns.created_at, columns.id)
        .limit(limit)
    )
    return [Alert(**row._mapping) for row in rows]


def end_suspensions(
    connection: Connection, provider_id: UUID, account_id: UUID | None = None
) -> int:
    """Resolve the alerts about suspensions at a provider row, of an account or (None) of all.

    Returns how many there were.
    """
    columns = alerts.c
    query = update(alerts).where(
        columns.kind == SUSPENDED,
        columns.provider_id == provider_id,
        columns.resolved_at.is_(None),
    )
    if account_id is not None:
        query = query.where(columns.account_id == account_id)
    return int(connection.execute(query.values(resolved_at=func.now())).rowcount)


def record_change(
    connection: Connection, kind: str, about: Mapping[str, UUID | str], before: str, after: str
) -> None:
    """Add a line to the trail, about the columns that are named, and wake the sweep."""
    change = {"kind": kind, **about, "before": before, "after": after, "reason": "by command"}
    connection.execute(insert(gate_changes).values(change))
    connection.execute(select(func.pg_notify(GATE_CHANNEL, "")))

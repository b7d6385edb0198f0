"""Alerts: what an account or an operator is told, where it is told, and who has seen it.

Rows are raised by what finds a reason: a settlement that reaches a threshold of a budget, the
recorder that hears of a suspension, `sluice alerts test`. A trigger wakes the sweep, which tells
each of them once on the account's alert channel, a Redis Stream, and posts it to the account's URL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

import orjson
from sqlalchemy import Connection, func, insert, select, text, update

from sluicegate.shared.tables import alerts

#: The Postgres channel on which a trigger says that there is a new one: it wakes the sweep.
ALERT_CHANNEL: Final = "sluice_alerts"

#: The field of a stream's entry that holds the alert, the JSON of `payload`.
ALERT_FIELD: Final = b"a"

#: Alerts that a stream holds at most; all of them are in Postgres.
ALERTS_KEPT: Final = 1000

#: The kind of alert that tries out how an account is told.
TEST: Final = "test"

# A window is a day or a month where the account is, however long that is there.
_RESETS_AT = """timezone(coalesce(c.time_zone, 'UTC'),
    date_trunc(a."window", timezone(coalesce(c.time_zone, 'UTC'), a.window_started_at))
    + ('1 ' || a."window")::interval)"""

#: What is told of row `a` of `alerts`, and where the names in it come from.
FACTS: Final = f"""a.id, a.kind, a.account_id, c.name AS account, p.name AS provider, a.use_case,
    a."window", a.window_started_at, {_RESETS_AT} AS window_resets_at, a.threshold, a.message,
    a.created_at"""
NAMES: Final = """LEFT JOIN accounts c ON c.id = a.account_id
    LEFT JOIN llm_providers p ON p.id = a.provider_id"""

#: Nobody has seen it, and it still matters: a budget's alert is over when its window is.
_IS_OPEN = f"""a.resolved_at IS NULL AND a.acked_at IS NULL
    AND (a."window" IS NULL OR {_RESETS_AT} > now())"""

_LIST = f"""
SELECT {FACTS}, {_IS_OPEN} AS is_open, a.resolved_at, a.acked_at, a.told_at, a.posted_at,
    a.post_tries, a.post_due_at, a.post_error
FROM alerts a {NAMES}
WHERE (CAST(:account_id AS uuid) IS NULL OR a.account_id = :account_id)
  AND (CAST(:id AS bigint) IS NULL OR a.id = :id)
  AND (:closed OR {_IS_OPEN})
ORDER BY a.id DESC LIMIT :limit
"""


class Posting(StrEnum):
    """How far an alert has come on its way to the account's URL."""

    NONE = "none"  # the account has no URL, or had none then
    WAITING = "waiting"  # to be tried, for the first time or again
    POSTED = "posted"
    GIVEN_UP = "given_up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One alert, and how far it was delivered."""

    id: int
    kind: str
    #: None: it is about no account.
    account_id: UUID | None
    #: Names; None for none, or for a row that is gone.
    account: str | None
    provider: str | None
    #: Of a budget: None is all use cases together.
    use_case: str | None
    window: str | None
    window_started_at: datetime | None
    window_resets_at: datetime | None
    #: Percents of the limit.
    threshold: int | None
    message: str
    created_at: datetime
    is_open: bool
    resolved_at: datetime | None
    acked_at: datetime | None
    #: When it was written to the alert channel; None: it waits for the sweep, or for Redis.
    told_at: datetime | None
    posted_at: datetime | None
    post_tries: int
    post_due_at: datetime | None
    #: Why the last try failed.
    post_error: str | None

    @property
    def posting(self) -> Posting:
        """How far it has come on its way to the account's URL."""
        if self.posted_at is not None:
            return Posting.POSTED
        if self.post_due_at is not None:
            return Posting.WAITING
        return Posting.GIVEN_UP if self.post_error is not None else Posting.NONE


def alert_key(account_id: UUID | None) -> str:
    """Name of the account's alert channel, a Redis Stream, without the prefix.

    None: that of the alerts which are about no account.
    """
    return "alerts" if account_id is None else f"alerts:{account_id}"


def payload(row: Any) -> bytes:
    """Return what is told of an alert, from a row with its `FACTS`: one JSON object.

    Times are RFC 3339 in UTC; what an alert is not about is null.
    """
    return orjson.dumps(
        {
            "id": row.id,
            "kind": row.kind,
            "account": row.account,
            "account_id": row.account_id,
            "provider": row.provider,
            "use_case": row.use_case,
            "window": row.window,
            "window_started_at": row.window_started_at,
            "window_resets_at": row.window_resets_at,
            "threshold_percent": row.threshold,
            "message": row.message,
            "created_at": row.created_at,
        }
    )


def list_alerts(
    connection: Connection, *, account_id: UUID | None = None, closed: bool = False, limit: int
) -> list[Alert]:
    """Return alerts, the newest first: the open ones, or with `closed` those that are over too."""
    found = connection.execute(
        text(_LIST), {"account_id": account_id, "closed": closed, "id": None, "limit": limit}
    )
    return [Alert(**row._mapping) for row in found]


def find_alert(connection: Connection, alert_id: int) -> Alert | None:
    """Return one alert, open or not; None: there is none."""
    values = {"account_id": None, "closed": True, "id": alert_id, "limit": 1}
    row = connection.execute(text(_LIST), values).one_or_none()
    return None if row is None else Alert(**row._mapping)


def acknowledge(
    connection: Connection, ids: Sequence[int] | None, account_id: UUID | None = None
) -> list[int]:
    """Note that somebody has seen these alerts, None: all; of one account, None: of any.

    Returns the ids of those that had not been seen.
    """
    columns = alerts.c
    unseen = select(columns.id).where(columns.acked_at.is_(None))
    if ids is not None:
        unseen = unseen.where(columns.id.in_(ids))
    if account_id is not None:
        unseen = unseen.where(columns.account_id == account_id)
    # Locked by their keys, as everybody does who waits for several.
    held = unseen.order_by(columns.id).with_for_update(key_share=True).cte("held")
    query = update(alerts).where(columns.id == held.c.id).values(acked_at=func.now())
    return sorted(connection.scalars(query.returning(columns.id)))


def unknown_alerts(connection: Connection, ids: Sequence[int]) -> list[int]:
    """Return those of these ids that no alert has."""
    known = set(connection.scalars(select(alerts.c.id).where(alerts.c.id.in_(ids))))
    return [one for one in ids if one not in known]


def raise_test(connection: Connection, account_id: UUID, account: str) -> int:
    """Raise an alert that says nothing, and is over already; return its id."""
    message = f"this is a test of the alerts of account {account}"
    raised = connection.scalar(
        insert(alerts)
        .values(kind=TEST, account_id=account_id, message=message, resolved_at=func.now())
        .returning(alerts.c.id)
    )
    assert raised is not None
    return int(raised)

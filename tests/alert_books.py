"""A database with accounts and alerts, and the channels that they are told on."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import redis
from sqlalchemy import Engine

from sluicegate.shared.settings import Settings

#: As a settlement raises it.
RAISE = """
INSERT INTO alerts (kind, account_id, use_case, "window", window_started_at, threshold, message)
SELECT 'budget', id, %(use_case)s, 'day', %(started_at)s::timestamptz, %(threshold)s,
       format('%%s has spent %%s%%%%', name, %(threshold)s)
FROM accounts WHERE name = %(account)s
ON CONFLICT (account_id, use_case, "window", window_started_at, threshold)
    WHERE "window" IS NOT NULL DO NOTHING
RETURNING id
"""
TODAY = "2026-11-23T05:00:00Z"


class Books:
    """A database with accounts and alerts, and the channels that they are told on."""

    def __init__(self, settings: Settings, engine: Engine, client: redis.Redis) -> None:
        self.settings = settings
        self.engine = engine
        self.redis = client
        self.rows(
            "INSERT INTO accounts (id, name, time_zone) VALUES"
            " (gen_random_uuid(), 'acme', 'America/New_York'),"
            " (gen_random_uuid(), 'zeta', 'Asia/Kolkata')"
        )
        #: By name; there is one called default, too.
        self.ids: dict[str, UUID] = {
            row.name: row.id for row in self.rows("SELECT id, name FROM accounts")
        }

    def rows(self, statement: str, **values: Any) -> list[Any]:
        with self.engine.connect() as connection:
            result = connection.exec_driver_sql(statement, values)
            return list(result.all()) if result.returns_rows else []

    def add(self, account: str = "acme", **changes: Any) -> int | None:
        """Raise an alert; return its id, None if there is one already."""
        values = {"use_case": None, "started_at": TODAY, "threshold": 80} | changes
        raised = self.rows(RAISE, account=account, **values)
        return raised[0].id if raised else None

    def add_many(self, number: int) -> None:
        """Raise so many alerts for each account."""
        self.rows(
            "INSERT INTO alerts (kind, account_id, message, resolved_at)"
            " SELECT 'test', id, n::text, now() FROM accounts, generate_series(1, %(number)s) n",
            number=number,
        )

    def key(self, account: str | UUID | None = "acme") -> str:
        """Name an account's channel in Redis."""
        id_ = self.ids[account] if isinstance(account, str) else account
        name = "alerts" if id_ is None else f"alerts:{id_}"
        return self.settings.redis_prefix + name

    def entries(self, account: str | UUID | None = "acme") -> list[tuple[int, dict[str, Any]]]:
        """Read an account's channel: the numbers of the entries, and what they tell."""
        found: Any = self.redis.xrange(self.key(account))
        return [(int(id_.split(b"-")[0]), json.loads(fields[b"a"])) for id_, fields in found]

    def told(self, account: str | UUID | None = "acme") -> list[int]:
        """Ids of the alerts on an account's channel."""
        return [alert["id"] for _, alert in self.entries(account)]

"""An audit of the ledger: held against itself, against Redis, and against the provider's bill.

Every sum here is made anew from attempts and entries, by statements that the product does not know.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self
from uuid import UUID

import orjson
import redis
from sqlalchemy import Row, create_engine
from sqlalchemy.exc import OperationalError

from sluicegate.shared.accounts import add_account, find_account
from sluicegate.shared.budgets import Budget, WindowName, set_budget
from sluicegate.shared.database import BY_SIZE
from sluicegate.shared.redis_client import make_async_redis
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import Database
from sluicegate.workers.sweep.reconciler import Drift, Reconciler
from tests.harness import Rig
from tests.polling import eventually

#: Every window of every budget, and beside it what it should say: the entries and the open
#: reservations of the attempts that were dispatched in it, and by how much single ones of them
#: came to more than they had reserved.
_WINDOWS = """
WITH booked AS (
    SELECT attempt_id, sum(amount_nano_usd)::bigint AS amount FROM cost_entries GROUP BY 1
), calls AS (
    SELECT a.account_id, a.use_case, a.dispatched_at, a.reserved_nano_usd AS reserved,
           a.state = 'dispatching' AS is_open, coalesce(booked.amount, 0) AS amount
    FROM attempts a LEFT JOIN booked ON booked.attempt_id = a.id
)
SELECT b.account_id, b.use_case, w.name, w.cap, w.started_at, w.resets_at, w.spent, w.held,
       entries.booked, open_.reserved, open_.overrun, b.time_zone
FROM budgets b
CROSS JOIN LATERAL (VALUES
    ('day', b.day_limit_nano_usd, b.day_started_at, b.day_resets_at,
     b.day_spent_nano_usd, b.day_held_nano_usd),
    ('month', b.month_limit_nano_usd, b.month_started_at, b.month_resets_at,
     b.month_spent_nano_usd, b.month_held_nano_usd)
) AS w(name, cap, started_at, resets_at, spent, held)
CROSS JOIN LATERAL (
    SELECT coalesce(sum(e.amount_nano_usd), 0)::bigint AS booked FROM cost_entries e
    WHERE e.account_id = b.account_id AND (b.use_case IS NULL OR e.use_case = b.use_case)
      AND e.dispatched_at >= w.started_at
) entries
CROSS JOIN LATERAL (
    SELECT coalesce(sum(c.reserved) FILTER (WHERE c.is_open), 0)::bigint AS reserved,
           coalesce(sum(greatest(0, c.amount - c.reserved)) FILTER (WHERE NOT c.is_open), 0)::bigint
               AS overrun
    FROM calls c
    WHERE c.account_id = b.account_id AND (b.use_case IS NULL OR c.use_case = b.use_case)
      AND c.dispatched_at >= w.started_at
) open_
WHERE %(account_id)s::uuid IS NULL OR b.account_id = %(account_id)s
ORDER BY b.id, w.name
"""

_COPIES = """
SELECT b.id, b.account_id, b.use_case, b.version,
       b.day_limit_nano_usd AS day_limit, b.day_spent_nano_usd AS day_spent,
       b.day_held_nano_usd AS day_held, b.day_resets_at,
       b.month_limit_nano_usd AS month_limit, b.month_spent_nano_usd AS month_spent,
       b.month_held_nano_usd AS month_held, b.month_resets_at
FROM budgets b
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A job for which more was booked than the provider billed: nobody knows what a call cost."""

    job_id: UUID
    #: Of its attempts that are booked as estimates.
    booked_nano_usd: int
    #: For those of its calls that no attempt knows of.
    billed_nano_usd: int


@dataclass(slots=True)
class Watch:
    """What was seen of budgets while calls were under way, one snapshot after the other."""

    snapshots: int = 0
    #: Of these, how many had reservations in them.
    busy: int = 0
    #: Windows that did not add up, or were more than full.
    wrong: list[Row[Any]] = field(default_factory=list)


class Audit:
    """Accounts with budgets, and what must hold of them; a context."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._engine = create_engine(
            settings.database_dsn, pool_pre_ping=True, isolation_level="AUTOCOMMIT"
        )
        self._redis = redis.Redis.from_url(settings.redis_dsn)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._redis.close()
        self._engine.dispose()

    # Accounts

    def add_account(self, name: str) -> UUID:
        """Add an account where it is about noon: no window of its turns during a test."""
        with self._engine.connect() as line:
            return add_account(line, name, noon_zone()).id

    def account_id(self, account: str) -> UUID:
        """Return the id of an account."""
        with self._engine.connect() as line:
            return find_account(line, account).id

    def set_budget(
        self,
        account: str,
        *,
        use_case: str | None = None,
        thresholds: Sequence[int] | None = None,
        **limits: int | None,
    ) -> Budget:
        """Set a budget's limits, in nano-USD."""
        named: dict[WindowName, int | None] = {
            name: limits[name] for name in ("day", "month") if name in limits
        }
        with self._engine.connect() as line:
            line.execution_options(isolation_level="READ COMMITTED")
            with line.begin():
                return set_budget(
                    line,
                    find_account(line, account),
                    use_case=use_case,
                    limits=named,
                    thresholds=thresholds,
                )

    def rows(self, statement: str, **values: Any) -> list[Row[Any]]:
        """Run a statement."""
        with self._engine.connect() as line:
            return list(line.exec_driver_sql(statement, values).all())

    @contextmanager
    def locking(self, account_id: UUID) -> Iterator[None]:
        """Hold the account's budgets, so that whoever reserves or settles has to wait."""
        with self._engine.connect() as line:
            line.execution_options(isolation_level="READ COMMITTED")
            with line.begin():
                line.exec_driver_sql(
                    "SELECT FROM budgets WHERE account_id = %(id)s ORDER BY id FOR UPDATE",
                    {"id": account_id},
                )
                yield

    # Against itself

    def windows(self, account_id: UUID | None = None) -> list[Row[Any]]:
        """Return every window of an account's budgets, or of all, and what it should say."""
        return self.rows(_WINDOWS, account_id=account_id)

    @contextmanager
    def watching(self, account_id: UUID) -> Iterator[Watch]:
        """Look at an account's budgets all the while, on a connection of its own.

        At the end of the `with` every snapshot must have added up, and none may have been more
        than full: what is spent and held is at most the limit and what single calls overran.
        """
        watch, over = Watch(), threading.Event()

        def look() -> None:
            while not over.is_set():
                try:
                    windows = self.windows(account_id)
                except OperationalError:
                    continue  # Postgres is being restarted
                watch.snapshots += 1
                watch.busy += any(one.held for one in windows)
                watch.wrong += [one for one in windows if not _adds_up(one) or _is_overfull(one)]
                over.wait(0.02)

        thread = threading.Thread(target=look, name="watch")
        thread.start()
        try:
            yield watch
        finally:
            over.set()
            thread.join(30)
        assert watch.wrong == []
        assert watch.busy > 0, "nothing was seen under way"

    # At rest

    def check_rest(self) -> None:
        """No reservation is left, every budget is its entries' sum, and Redis has the same.

        Waits for what the sweep has to put right.
        """
        eventually(self._no_call_is_open, 60)
        windows = self.windows()
        assert windows
        for window in windows:
            assert (window.held, window.reserved) == (0, 0), window
            assert window.spent == window.booked, window
        eventually(self._redis_agrees)
        assert self.reconcile()[0].repaired == 0

    def _no_call_is_open(self) -> bool:
        (row,) = self.rows("SELECT count(*) AS n FROM attempts WHERE state = 'dispatching'")
        assert row.n == 0, f"{row.n} attempts are open"
        return True

    def _redis_agrees(self) -> bool:
        ours = {str(row.id): _as_copy(row) for row in self.rows(_COPIES)}
        assert self.copies() == ours
        return True

    def copies(self) -> dict[str, dict[str, Any]]:
        """Return the copies of all budgets that Redis has, by the budget's id."""
        found: dict[str, dict[str, Any]] = {}
        for key in self._redis.scan_iter(match=f"{self._settings.redis_prefix}budget:1:*"):
            fields: Any = self._redis.hgetall(key)
            found |= {name.decode(): orjson.loads(copy) for name, copy in fields.items()}
        return found

    def reconcile(self, at_once: int = 1) -> list[Drift]:
        """Run rounds of the reconciler, all at the same time."""
        return asyncio.run(self._reconcile(at_once))

    async def _reconcile(self, at_once: int) -> list[Drift]:
        settings = self._settings
        database = Database(settings, application_name="audit", size=at_once, planner=BY_SIZE)
        client = make_async_redis(settings)
        try:
            rounds = [
                Reconciler(db=database, client=client, prefix=settings.redis_prefix).round()
                for _ in range(at_once)
            ]
            return list(await asyncio.gather(*rounds))
        finally:
            await client.aclose()
            await database.close()

    # Against the provider

    def check_bill(self, rig: Rig, job_ids: Sequence[UUID]) -> list[Difference]:
        """Hold what was booked for these jobs, all there were, against the sandbox's own bill.

        They are equal to the nano-dollar but for attempts that are booked as estimates: those make
        the differences that are returned, and nothing else does.
        """
        eventually(lambda: rig.sandbox.bill()["in_flight"] == 0)
        rig.check_books(job_ids)
        calls, attempts = rig.calls(job_ids), rig.attempts(job_ids)
        differences = []
        for job_id in job_ids:
            billed = {one["request_id"]: one["billed_nano_usd"] for one in calls[job_id]}
            guessed = []
            for attempt in attempts[job_id]:
                if attempt.kind == "actual" or attempt.state == "corrected":
                    assert attempt.booked == billed.pop(attempt.request_id), attempt
                elif attempt.kind == "estimate":
                    assert attempt.booked == attempt.reserved_nano_usd, attempt
                    guessed.append(attempt)
                else:
                    assert attempt.booked == 0, attempt
            unknown = [amount for amount in billed.values() if amount]
            assert len(unknown) <= len(guessed), (job_id, unknown, guessed)
            if guessed:
                differences.append(
                    Difference(
                        job_id=job_id,
                        booked_nano_usd=sum(attempt.booked for attempt in guessed),
                        billed_nano_usd=sum(unknown),
                    )
                )
        explained = sum(one.booked_nano_usd - one.billed_nano_usd for one in differences)
        bill = rig.sandbox.bill()["billed_nano_usd"]
        assert rig.booked_nano_usd(job_ids) - bill == explained, differences
        return differences


def noon_zone() -> str:
    """Name a time zone where it is between 11:30 and 12:30, or an hour from that."""
    # In these names west is positive.
    ahead_h = 12 - datetime.now(UTC).hour
    return f"Etc/GMT{-ahead_h:+d}"


def _adds_up(window: Row[Any]) -> bool:
    return bool(window.spent == window.booked and window.held == window.reserved)


def _is_overfull(window: Row[Any]) -> bool:
    if window.cap is None:
        return False
    return bool(window.spent + window.held > window.cap + window.overrun)


def _as_copy(row: Row[Any]) -> dict[str, Any]:
    """Return what the copy of a row of `budgets` has to be."""
    values = dict(row._mapping)
    for window in ("day", "month"):
        at: datetime = values.pop(f"{window}_resets_at")
        values[f"{window}_resets_us"] = round(at.timestamp() * 1_000_000)
    return values | {"id": str(row.id), "account_id": str(row.account_id)}

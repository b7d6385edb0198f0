"""The ledger's statements without workers: attempts are opened, settled and lost by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self
from uuid import UUID

import redis.asyncio
from sqlalchemy import Connection, Engine

from sluicegate.shared.accounts import add_account, find_account
from sluicegate.shared.admission.budget_copies import BudgetCopies
from sluicegate.shared.budgets import Budget, WindowName, list_budgets, set_budget
from sluicegate.shared.database import BY_KEY, make_engine
from sluicegate.shared.ids import new_id
from sluicegate.shared.redis_client import make_async_redis
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import Database
from sluicegate.workers.budget_copying import BudgetCopying
from sluicegate.workers.dispatch import Attempt, Dispatcher
from sluicegate.workers.ledger import Copy, Full
from sluicegate.workers.replies import Replies
from sluicegate.workers.settlement import Settlement, settle_all
from sluicegate.workers.sweep.reconciler import Drift, Reconciler
from sluicegate.workers.sweep.rescuer import resolve_lost

_ADD = """
INSERT INTO jobs (id, account_id, use_case, lane, queue, state, fence, worker_id, max_attempts,
                  deadline_at, published_at, request_hash)
SELECT t.id, %(account_id)s, %(use_case)s, 'interactive', 'general.openai', 'running', 1,
       %(worker_id)s, 5, now() + interval '1 day', now(), ''
FROM unnest(%(ids)s::uuid[]) AS t(id)
"""
_ENTER = """
INSERT INTO workers (id, name, pool, lane, queues)
VALUES (%(id)s, 'w', 'openai', 'interactive', '{general.openai}')
"""

#: What has a time that windows go by.
_DATED = (
    ("attempts", ("dispatched_at",)),
    ("cost_entries", ("dispatched_at",)),
    (
        "budgets",
        ("day_started_at", "day_resets_at", "month_started_at", "month_resets_at"),
    ),
)


def untold(_copies: Sequence[Copy]) -> None:
    """Tell nobody: whoever looks for the copies in Redis finds none."""


class Books:
    """Connections, and one worker's row; an async context."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings.model_copy(update={"spacing_s": 0})
        self.engine: Engine = make_engine(settings, application_name="test")
        self.db = Database(settings, application_name="test", size=8, planner=BY_KEY)
        self.redis: redis.asyncio.Redis = make_async_redis(settings)
        self.replies = Replies(self.settings, self.redis)
        self.copying = BudgetCopying(client=self.redis, settings=self.settings)
        self.copies = BudgetCopies(self.redis, settings.redis_prefix)
        self.dispatcher = Dispatcher(db=self.db, max_items=100, spacing_s=0, told=self.copying.told)
        self.worker_id = new_id()

    async def __aenter__(self) -> Self:
        await self.enter()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection."""
        await self.copying.finish(10)
        await self.replies.close()
        await self.db.close()
        await self.redis.aclose()
        self.engine.dispose()

    async def enter(self) -> None:
        """Begin a worker's life."""
        self.worker_id = new_id()
        await self.db.execute(_ENTER, id=self.worker_id)

    async def die(self) -> None:
        """End it; a new one begins."""
        await self.db.execute("DELETE FROM workers WHERE id = %(id)s", id=self.worker_id)
        await self.enter()

    def account(self, name: str, time_zone: str = "UTC") -> UUID:
        """Add an account."""
        with self.engine.connect() as connection:
            return add_account(connection, name, time_zone).id

    @contextmanager
    def change(self) -> Iterator[Connection]:
        """Open a transaction, as commands do."""
        with self.engine.connect() as line:
            line.execution_options(isolation_level="READ COMMITTED")
            with line.begin():
                yield line

    def set_budget(
        self, account: str, *, use_case: str | None = None, **limits: int | None
    ) -> Budget:
        """Set a budget's limits, in nano-USD."""
        named: dict[WindowName, int | None] = {
            name: limits[name] for name in ("day", "month") if name in limits
        }
        with self.change() as line:
            return set_budget(line, find_account(line, account), use_case=use_case, limits=named)

    def budget(self, account: str, use_case: str | None = None) -> Budget:
        """Return a budget as it is."""
        with self.engine.connect() as line:
            account_id = find_account(line, account).id
            (found,) = (one for one in list_budgets(line, account_id) if one.use_case == use_case)
        return found

    async def wish(
        self, account_id: UUID, reserves: Sequence[int], use_case: str = "general"
    ) -> list[Attempt]:
        """Make running jobs, and the attempts that are to be opened for them."""
        ids = [new_id() for _ in reserves]
        await self.db.execute(
            _ADD, ids=ids, account_id=account_id, use_case=use_case, worker_id=self.worker_id
        )
        return [
            Attempt(
                attempt_id=new_id(),
                job_id=job_id,
                worker_id=self.worker_id,
                fence=1,
                number=1,
                provider_id=new_id(),
                provider="p",
                model="m",
                reserved_nano_usd=reserve,
                baseline_reserved_nano_usd=reserve,
            )
            for job_id, reserve in zip(ids, reserves, strict=True)
        ]

    async def open(self, attempts: Sequence[Attempt]) -> list[Full | bool]:
        """Open them in one statement."""
        return list(await asyncio.gather(*map(self.dispatcher.open, attempts)))

    async def settle(self, attempts: Sequence[Attempt], cost: int | None) -> None:
        """End them in one statement: at this cost each, or (None) as calls that never left."""
        settlements: list[Settlement] = [
            {
                "job_id": attempt.job_id,
                "fence": attempt.fence,
                "job_state": "failed",
                "body": {"state": "failed"},
                "attempt_id": attempt.attempt_id,
                "attempt_state": "void" if cost is None else "succeeded",
            }
            | ({} if cost is None else {"kind": "actual", "amount_nano_usd": cost})
            for attempt in attempts
        ]
        await settle_all(self.db, settlements, self.copying.told)

    async def resolve(self) -> None:
        """Resolve what names dead workers."""
        await resolve_lost(self.db, self.replies, self.copying.told)

    async def reconcile(self) -> Drift:
        """Run a round of the reconciler."""
        return await Reconciler(
            db=self.db, client=self.redis, prefix=self.settings.redis_prefix
        ).round()

    async def age(self, by: timedelta) -> None:
        """Let so much time pass, by moving the past back."""
        for table, columns in _DATED:
            moved = ", ".join(f"{column} = {column} - %(by)s" for column in columns)
            await self.db.execute(f"UPDATE {table} SET {moved}", by=by)

    async def rows(self, statement: str, **values: Any) -> list[Any]:
        """Run a statement."""
        return await self.db.execute(statement, **values)

"""Dispatch: recording an attempt, with its reservation, before its call leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any
from uuid import UUID

from sluicegate.shared.coalescing import Coalescer
from sluicegate.shared.statements import Database, through_disconnects
from sluicegate.workers import ledger
from sluicegate.workers.failpoints import failpoint
from sluicegate.workers.ledger import Full, Told

_WANTED = """wanted AS (
    SELECT * FROM json_to_recordset(%(items)s::json) AS t(
        n int, attempt_id uuid, job_id uuid, worker_id uuid, fence bigint, number smallint,
        provider_id uuid, provider text, model text,
        reserved_nano_usd bigint, baseline_reserved_nano_usd bigint)
)"""

# Locks go workers, jobs, budgets, each by key; the attempts are new. A job that was lost on the way
# (another fence, or no worker row any more) gets no attempt, so no call is made for it. The second
# branch answers a repeat: attempt ids are made by the worker, so the same statement twice opens
# them once.
_DISPATCH = f"""
WITH me AS (
    SELECT id FROM workers WHERE id = ANY(%(worker_ids)s::uuid[]) ORDER BY id FOR KEY SHARE
), {_WANTED}, held AS (
    SELECT wanted.*, j.account_id, j.use_case
    FROM wanted JOIN jobs j ON j.id = wanted.job_id JOIN me ON me.id = wanted.worker_id
    WHERE j.fence = wanted.fence AND j.state = 'running'
    ORDER BY j.id
    FOR NO KEY UPDATE OF j
), {ledger.ROOM}, opened AS (
    INSERT INTO attempts (id, job_id, fence, number, worker_id, account_id, use_case, provider_id,
                          provider, model, state, reserved_nano_usd, baseline_reserved_nano_usd,
                          dispatched_at)
    SELECT attempt_id, job_id, fence, number, worker_id, account_id, use_case, provider_id,
           provider, model, 'dispatching', reserved_nano_usd, baseline_reserved_nano_usd,
           coalesce((SELECT at FROM moment WHERE moment.account_id = held.account_id), now())
    FROM held WHERE held.n <> ALL(ARRAY(SELECT n FROM full_))
    ON CONFLICT (id) DO NOTHING
    RETURNING id, account_id, use_case, reserved_nano_usd
), {ledger.HOLD.format(source="opened")}, refused AS ({ledger.FULL}
)
SELECT id AS attempt_id, NULL::json AS problem, NULL::json AS budget FROM opened
UNION ALL
SELECT a.id, NULL, NULL FROM wanted JOIN attempts a ON a.id = wanted.attempt_id
WHERE a.state = 'dispatching'
UNION ALL
SELECT wanted.attempt_id, refused.problem, NULL FROM refused JOIN wanted USING (n)
UNION ALL
SELECT NULL, NULL, {ledger.COPY} FROM after b
"""

# The server may begin a dispatch whose connection was lost at any later time, as long as its bytes
# lie somewhere. An attempt that is `void` by then it does not open, and holds nothing for it. Where
# it is under way, this one waits for its jobs' locks, and leaves what it has opened as it is: a
# conflict is told by the row as it is now, which this statement's own snapshot may not have. Locks
# go jobs, attempts.
_CLOSE = f"""
WITH {_WANTED}, job AS (
    SELECT wanted.*, j.account_id, j.use_case
    FROM wanted JOIN jobs j ON j.id = wanted.job_id
    ORDER BY j.id
    FOR NO KEY UPDATE OF j
), closed AS (
    INSERT INTO attempts (id, job_id, fence, number, worker_id, account_id, use_case, provider_id,
                          provider, model, state, reserved_nano_usd, baseline_reserved_nano_usd,
                          ended_at)
    SELECT attempt_id, job_id, fence, number, worker_id, account_id, use_case, provider_id,
           provider, model, 'void', reserved_nano_usd, baseline_reserved_nano_usd, now()
    FROM job WHERE (SELECT count(*) FROM job) >= 0
    ON CONFLICT (id) DO UPDATE SET state = attempts.state
    RETURNING id, state
)
SELECT id FROM closed WHERE state = 'dispatching'
"""

# Whether there would be room, for what the copy in Redis has refused: only Postgres says that a job
# fails.
_LOOK = f"""
WITH held AS (
    SELECT * FROM json_to_recordset(%(items)s::json) AS t(
        n int, account_id uuid, use_case text, reserved_nano_usd bigint)
), {ledger.LOOK}, refused AS ({ledger.FULL}
)
SELECT refused.n, refused.problem, NULL::json AS budget FROM refused
UNION ALL
SELECT NULL, NULL, {ledger.COPY} FROM budget b
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One paid call: which job, at which provider row, and what it may cost at most."""

    attempt_id: UUID
    job_id: UUID
    worker_id: UUID
    fence: int
    number: int
    provider_id: UUID
    #: The row's catalogue name.
    provider: str
    model: str
    reserved_nano_usd: int
    baseline_reserved_nano_usd: int


#: `dataclasses.asdict` copies deeply, at 28 µs an attempt instead of 1.
_COLUMNS = tuple(field.name for field in fields(Attempt))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    account_id: UUID
    use_case: str
    reserved_nano_usd: int


class Dispatcher:
    """Opens attempts. One that is not opened was refused, and its call must not be made.

    `told` hears of every budget that has changed, or was looked at.
    """

    def __init__(self, *, db: Database, max_items: int, spacing_s: float, told: Told) -> None:
        self._db = db
        self._told = told
        #: Attempts whose dispatch lost its connection, so that the server may begin it yet; as long
        #: as somebody waits to hear of them.
        self._astray: set[UUID] = set()
        self._open = Coalescer[Attempt, "Full | bool"](
            statement=self._open_many, max_items=max_items, spacing_s=spacing_s
        )
        self._look = Coalescer[_Wish, "Full | None"](
            statement=self._look_many, max_items=max_items, spacing_s=spacing_s
        )

    async def open(self, attempt: Attempt) -> Full | bool:
        """Record the attempt; False if the job is no longer this worker's, `Full` without room.

        Waits through any outage of Postgres: an attempt that may or may not be recorded could be
        resolved by nobody as long as this worker lives.
        """
        try:
            return await self._open(attempt)
        finally:
            self._astray.discard(attempt.attempt_id)

    async def look(self, account_id: UUID, use_case: str, reserved_nano_usd: int) -> Full | None:
        """Return the budget that has no room for such an attempt just now, if there is one."""
        wish = _Wish(account_id=account_id, use_case=use_case, reserved_nano_usd=reserved_nano_usd)
        return await self._look(wish)

    async def _open_many(self, attempts: Sequence[Attempt]) -> list[Full | bool]:
        items = [
            {name: getattr(attempt, name) for name in _COLUMNS} | {"n": n}
            for n, attempt in enumerate(attempts)
        ]
        worker_ids = list({attempt.worker_id for attempt in attempts})

        async def note_astray() -> None:
            # Beyond this call: after a conflict, or with a neighbour's bad value, it is repeated.
            self._astray.update(attempt.attempt_id for attempt in attempts)

        rows = await through_disconnects(
            lambda: self._db.execute(_DISPATCH, items, worker_ids=worker_ids),
            give_up_after_s=None,
            on_disconnect=note_astray,
        )
        ledger.tell(rows, self._told)
        opened = {row.attempt_id for row in rows if row.problem is None and row.budget is None}
        if astray := self._astray - opened:
            # Of the others, a repeat may have found its own reservation in the way.
            opened |= await self._close([item for item in items if item["attempt_id"] in astray])
        failpoint("opened")
        full = {row.attempt_id: Full.read(row.problem) for row in rows if row.problem is not None}
        return [
            attempt.attempt_id in opened or full.get(attempt.attempt_id, False)
            for attempt in attempts
        ]

    async def _close(self, items: Sequence[Mapping[str, Any]]) -> set[UUID]:
        """See to it that these attempts are not opened any more; return those that are open."""
        if not items:
            return set()
        rows = await through_disconnects(
            lambda: self._db.execute(_CLOSE, items), give_up_after_s=None
        )
        return {row.id for row in rows}

    async def _look_many(self, wishes: Sequence[_Wish]) -> list[Full | None]:
        # Each by itself: they are asked about, not let in.
        items = [
            {"account_id": wish.account_id, "use_case": wish.use_case, "n": n,
             "reserved_nano_usd": wish.reserved_nano_usd}
            for n, wish in enumerate(wishes)
        ]  # fmt: skip
        rows = await through_disconnects(
            lambda: self._db.execute(_LOOK, items), give_up_after_s=None
        )
        ledger.tell(rows, self._told)
        full = {row.n: Full.read(row.problem) for row in rows if row.problem is not None}
        return [full.get(n) for n in range(len(wishes))]

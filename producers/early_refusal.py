"""Refusing a job before it is stored, where a budget is full by what is spent already.

The copies in Redis are asked, with one command and not for each job; only if one of them looks full
is Postgres, and only what Postgres says refuses a job. What is not refused here workers decide on.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, cast
from uuid import UUID
from zoneinfo import ZoneInfo

import orjson
import redis
import redis.asyncio
from sqlalchemy import Row

from sluicegate.producers.submission import Draft
from sluicegate.shared import budgets
from sluicegate.shared.admission.keys import budgets_key
from sluicegate.shared.catalogue import Catalogue, Provider
from sluicegate.shared.errors import BudgetExceeded
from sluicegate.shared.jobs import Lane, dollars

#: How long a client goes on with an account that had room.
ROOM_S: Final = 0.5
_ROOMS_KEPT: Final = 10_000
#: After Redis did not answer, how long nobody waits for it here.
_AWAY_S: Final = 5.0

#: The window that keeps the job out longest, if there is one and the job is a new one.
FULL: Final = f"""
WITH budget AS (
    SELECT b.* FROM budgets b
    WHERE b.account_id = %(account_id)s AND (b.use_case IS NULL OR b.use_case = %(use_case)s)
), {budgets.WINDOWS}
SELECT a.name AS account, w.use_case, w.name AS "window", w.cap, w.spent, w.resets_at, w.time_zone
FROM windows w JOIN accounts a ON a.id = w.account_id
WHERE w.spent + %(least)s > w.cap
  AND NOT EXISTS (SELECT FROM jobs j WHERE j.account_id = %(account_id)s
                                       AND j.idempotency_key = %(idempotency_key)s)
ORDER BY w.resets_at DESC, w.use_case NULLS FIRST, w.name
LIMIT 1
"""

Execute = Callable[..., Sequence[Row[Any]]]
AsyncExecute = Callable[..., Awaitable[Sequence[Row[Any]]]]


class EarlyRefusal:
    """Looks at the budgets of the accounts that one client submits for."""

    def __init__(self, prefix: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._prefix = prefix
        self._clock = clock
        self._away_until = 0.0
        self._room_until: dict[tuple[UUID, str], float] = {}

    def check(
        self,
        draft: Draft,
        client: redis.Redis,
        catalogue: Callable[[], Catalogue],
        execute: Execute,
    ) -> None:
        """Raise `BudgetExceeded` if a budget has no room for the job by what is spent."""
        if not self._asks(draft):
            return
        try:
            copies = cast("list[bytes]", client.hvals(self._key(draft)))
        except (redis.RedisError, OSError):
            self._note_away()
            return
        least = looks_full(draft, copies, catalogue()) if copies else None
        if least is None:
            self._note_room(draft)
        else:
            tell(execute(FULL, **_values(draft, least)))

    async def check_async(
        self,
        draft: Draft,
        client: redis.asyncio.Redis,
        catalogue: Callable[[], Awaitable[Catalogue]],
        execute: AsyncExecute,
    ) -> None:
        """Do as `check`, on the event loop."""
        if not self._asks(draft):
            return
        try:
            copies = cast("list[bytes]", await client.hvals(self._key(draft)))
        except (redis.RedisError, OSError):
            self._note_away()
            return
        least = looks_full(draft, copies, await catalogue()) if copies else None
        if least is None:
            self._note_room(draft)
        else:
            tell(await execute(FULL, **_values(draft, least)))

    def _asks(self, draft: Draft) -> bool:
        if draft.lane is Lane.BULK:
            return False  # it waits in Postgres until the window turns
        room_until = self._room_until.get((draft.account_id, draft.use_case), 0.0)
        return self._clock() >= max(room_until, self._away_until)

    def _key(self, draft: Draft) -> str:
        return budgets_key(self._prefix, draft.account_id)

    def _note_room(self, draft: Draft) -> None:
        if len(self._room_until) >= _ROOMS_KEPT:
            self._room_until.clear()
        self._room_until[draft.account_id, draft.use_case] = self._clock() + ROOM_S

    def _note_away(self) -> None:
        self._away_until = self._clock() + _AWAY_S


def looks_full(draft: Draft, copies: Iterable[bytes], catalogue: Catalogue) -> int | None:
    """Return what the job costs at least, in nano-USD, if by these copies that is too much.

    That is nothing where a provider is free: an account may have nothing left and use that one.
    """
    least = 0 if any(map(_is_free, catalogue.providers)) else 1
    now_us = time.time_ns() // 1000
    for packed in copies:
        try:
            copy: dict[str, Any] = orjson.loads(packed)
        except orjson.JSONDecodeError:
            return least  # Postgres is asked
        if copy["use_case"] not in (None, draft.use_case):
            continue
        for window in budgets.WINDOW_NAMES:
            limit = copy[f"{window}_limit"]
            if limit is None or now_us >= copy[f"{window}_resets_us"]:
                continue
            if copy[f"{window}_spent"] + least > limit:
                return least
    return None


def tell(rows: Sequence[Row[Any]]) -> None:
    """Raise `BudgetExceeded` if `FULL` has found something."""
    for row in rows:
        limit, spent = dollars(row.cap), dollars(row.spent)
        resets_at = row.resets_at.astimezone(ZoneInfo(row.time_zone))
        raise BudgetExceeded(
            f"the {budgets.name_budget(row.use_case, row.window)} of account {row.account}, "
            f"{budgets.dollars(row.cap)}, is full: {budgets.dollars(row.spent)} is spent; it "
            f"resets at {resets_at:%Y-%m-%d %H:%M} ({row.time_zone})",
            account=row.account,
            use_case=row.use_case,
            window=row.window,
            limit=limit,
            spent=spent,
            resets_at=resets_at,
        )


def _values(draft: Draft, least: int) -> Mapping[str, Any]:
    return {
        "account_id": draft.account_id,
        "use_case": draft.use_case,
        "idempotency_key": draft.idempotency_key,
        "least": least,
    }


def _is_free(row: Provider) -> bool:
    return row.price_override is not None and not any(row.price_override.values())

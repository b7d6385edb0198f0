"""The journal: settlements that Postgres could not take, kept in Redis until it can.

A paid answer must not hang on one process' memory. The settler appends it here when Postgres is
away and removes it once it is booked; the sweep drains what a worker left behind, before it looks
for dead workers. Settling is idempotent, so an entry that is drained twice does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast
from uuid import UUID

import orjson
import redis.asyncio
from redis.exceptions import RedisError

from sluicegate.shared.coalescing import run_apart
from sluicegate.shared.queues import JOURNAL_FIELD, JOURNAL_KEY
from sluicegate.shared.statements import Database
from sluicegate.workers.ledger import Told
from sluicegate.workers.settlement import Settled, Settlement, settle_all

log = logging.getLogger(__name__)

KEY = JOURNAL_KEY
_BATCH = 200


class Journal:
    """One Redis Stream for the whole fleet."""

    def __init__(self, *, client: redis.asyncio.Redis, prefix: str) -> None:
        self._client = client
        self._key = prefix + KEY
        self._ids: dict[tuple[UUID | None, UUID], bytes] = {}

    async def append(self, settlements: Sequence[Settlement]) -> None:
        """Keep settlements; if Redis is away too, they stay in memory alone, and we say so."""
        pipeline = self._client.pipeline(transaction=False)
        for settlement in settlements:
            pipeline.execute_command(
                "XADD", self._key, "*", JOURNAL_FIELD, orjson.dumps(settlement)
            )
        try:
            ids = await pipeline.execute()
        except (RedisError, OSError) as error:
            log.error(
                "neither Postgres nor Redis answers (%s): %d results are in memory alone",
                type(error).__name__,
                len(settlements),
            )
            return
        for settlement, id_ in zip(settlements, ids, strict=True):
            self._ids[_name(settlement)] = id_

    async def forget(self, settlements: Sequence[Settlement]) -> None:
        """Remove what this process appended and has booked since."""
        ids = [
            id_
            for settlement in settlements
            if (id_ := self._ids.pop(_name(settlement), None)) is not None
        ]
        await self._delete(ids)

    async def drain(self, db: Database, told: Told) -> list[tuple[Settlement, Settled]]:
        """Book everything that is kept; return what moved, for its events and messages.

        `told` hears of the budgets that were charged. Raises a connection error if Postgres is
        away; nothing is removed then.
        """
        moved: list[tuple[Settlement, Settled]] = []
        start = "-"
        while True:
            entries = cast(
                "list[tuple[bytes, dict[bytes, bytes]]]",
                await self._client.xrange(self._key, min=start, max="+", count=_BATCH),
            )
            if not entries:
                return moved
            settlements = [_decode(fields[JOURNAL_FIELD]) for _, fields in entries]
            outcomes = await self._settle(db, settlements, told)
            booked = []
            for (id_, _), settlement, outcome in zip(entries, settlements, outcomes, strict=True):
                if isinstance(outcome, BaseException):
                    log.error("a journaled settlement is refused by Postgres and stays: %s", id_)
                    continue
                booked.append(id_)
                if outcome.moved:
                    moved.append((settlement, outcome))
            await self._delete(booked)
            start = "(" + entries[-1][0].decode()

    async def _settle(
        self, db: Database, settlements: Sequence[Settlement], told: Told
    ) -> list[Settled | BaseException]:
        outcomes: list[Settled | BaseException] = []
        # One by one would be slow, all at once may name a job twice: a repeat of the same
        # attempt settles nothing, so only the rare second entry of a job goes by itself.
        for settlement in settlements:
            outcomes += await run_apart(lambda items: settle_all(db, items, told), [settlement])
        return outcomes

    async def _delete(self, ids: Sequence[bytes]) -> None:
        if not ids:
            return
        try:
            await self._client.xdel(self._key, *ids)
        except (RedisError, OSError) as error:
            log.warning(
                "Redis is away (%s): journal entries will be drained again, harmlessly",
                type(error).__name__,
            )


def _name(settlement: Settlement) -> tuple[UUID | None, UUID]:
    return settlement.get("attempt_id"), settlement["job_id"]


def _decode(data: bytes) -> Settlement:
    settlement: dict[str, Any] = orjson.loads(data)
    for name in ("job_id", "attempt_id"):
        if settlement.get(name):
            settlement[name] = UUID(settlement[name])
    return settlement

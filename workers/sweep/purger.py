"""The purger: removes requests, answers and reply channels of jobs that ended long ago."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import redis.asyncio

from sluicegate.shared.events import reply_key
from sluicegate.shared.purging import PURGE_BATCH, PURGE_DUE
from sluicegate.shared.statements import Database

log = logging.getLogger(__name__)

#: Between two rounds, as a share of the retention and in seconds at most.
_PAUSE_SHARE: Final = 0.1
_PAUSE_MAX_S: Final = 60.0

_FIRST: Final = (datetime(1970, 1, 1, tzinfo=UTC), UUID(int=0))


class Purger:
    """One round purges all that are due, batch by batch; safe to run twice at once.

    retention_s: how long after its end a job's request and answer are kept. A result that waits in
    the outbox of a shared channel is kept until all groups have acknowledged it.
    """

    def __init__(
        self, *, db: Database, client: redis.asyncio.Redis, prefix: str, retention_s: float
    ) -> None:
        self._db = db
        self._client = client
        self._prefix = prefix
        self._retention_s = retention_s
        self._pause_s = min(_PAUSE_MAX_S, retention_s * _PAUSE_SHARE)
        self._next_at = 0.0

    async def round(self) -> int:
        """Purge what is due and return how many jobs that were; nothing in between two rounds.

        Raises if a server is away. Channels that Redis did not remove end by themselves.
        """
        now = asyncio.get_running_loop().time()
        if now < self._next_at:
            return 0
        purged = 0
        after, after_id = _FIRST
        while True:
            (row,) = await self._db.execute(
                PURGE_DUE, retention_s=self._retention_s, after=after, after_id=after_id
            )
            purged += len(row.purged)
            if row.purged:
                keys = [self._prefix + reply_key(job_id) for job_id in row.purged]
                await self._client.unlink(*keys)
            if row.seen < PURGE_BATCH:
                break
            after, after_id = row.last_at, row.last_id
        self._next_at = now + self._pause_s
        if purged:
            log.info("%d requests and answers were purged", purged)
        return purged

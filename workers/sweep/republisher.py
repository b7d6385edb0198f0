"""The republisher: publishes again what the broker has lost.

A queued row is no proof of a lost message: its message may wait behind a million others. So a row
counts as lost only if the later of its `published_at` and `run_at` is `lost_after_s` older than the
oldest message that waits in its queue or lies unclaimed with a worker; or than now, where there is
none. All these times are Postgres' own: messages and worker rows carry the rows' values.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

import orjson
import redis.asyncio

from sluicegate.shared.celery_app import PUBLISHED_AT, JobMessage
from sluicegate.shared.statements import Database
from sluicegate.workers.sweep.endings import to_messages

log = logging.getLogger(__name__)

_BATCH = 1000

_UNCLAIMED = """
SELECT now() AS now, q.name, (
    SELECT min(w.oldest_unclaimed_at) FROM workers w WHERE q.name = ANY(w.queues)) AS oldest
FROM unnest(%(queues)s::text[]) AS q(name)
"""

_REPUBLISH = f"""
WITH lost AS (
    SELECT id FROM jobs
    WHERE state = 'queued' AND queue = %(queue)s
      AND greatest(published_at, run_at)
          < %(oldest)s::timestamptz - %(lost_after_s)s * interval '1 second'
    ORDER BY greatest(published_at, run_at) LIMIT {_BATCH}
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE jobs j SET published_at = now(), fence = j.fence + 1
FROM lost WHERE j.id = lost.id
RETURNING j.id, j.run_at, j.fence, j.published_at
"""


class Republisher:
    """One round looks at every queue; safe to run twice at once."""

    def __init__(
        self,
        *,
        db: Database,
        client: redis.asyncio.Redis,
        prefix: str,
        lost_after_s: float,
        chunk_size: int,
    ) -> None:
        self._db = db
        self._client = client
        self._prefix = prefix
        self._lost_after_s = lost_after_s
        self._chunk_size = chunk_size

    async def round(self, queues: list[str]) -> list[JobMessage]:
        """Return messages for the rows whose message is lost; raises if a server is away."""
        # The queues are read before the rows: a message that is taken in between makes its row
        # look older than what waits, never younger, and lies with a worker that reports it.
        pipeline = self._client.pipeline(transaction=False)
        for queue in queues:
            pipeline.lindex(self._prefix + queue, -1)
        tails = dict(zip(queues, await pipeline.execute(), strict=True))
        messages: list[JobMessage] = []
        for row in await self._db.execute(_UNCLAIMED, queues=queues):
            times = [row.now, row.oldest, _published_at(tails[row.name])]
            oldest = min(time for time in times if time is not None)
            messages += await self._republish(row.name, oldest)
        return messages

    async def _republish(self, queue: str, oldest: datetime) -> list[JobMessage]:
        rows = await self._db.execute(
            _REPUBLISH, queue=queue, oldest=oldest, lost_after_s=self._lost_after_s
        )
        if rows:
            log.warning("%d messages of %s were lost and are published again", len(rows), queue)
        return to_messages(queue, rows, self._chunk_size)


def _published_at(message: Any) -> datetime | None:
    """Read when the oldest waiting message was published; None if it is not one of ours."""
    if message is None:
        return None
    try:
        found = datetime.fromisoformat(orjson.loads(message)["headers"][PUBLISHED_AT])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)

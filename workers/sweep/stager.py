"""The stager: moves jobs that are due from Postgres to the broker, a few minutes' work at a time.

Parked jobs cost no worker any memory. Bulk jobs begin parked: the broker holds `ahead_jobs` of
each bulk queue and Postgres the rest, first in, first out.
"""

from __future__ import annotations

from sluicegate.shared.celery_app import JobMessage
from sluicegate.workers.statements import Database
from sluicegate.workers.sweep.endings import to_messages

# A count that stops counting where the answer is known.
_LOOK = """
SELECT q.name,
       (SELECT count(*) FROM (
            SELECT FROM jobs WHERE queue = q.name AND state = 'queued'
            LIMIT %(ahead)s) w) AS waiting
FROM unnest(%(queues)s::text[]) AS q(name)
WHERE EXISTS (
    SELECT FROM jobs WHERE queue = q.name AND state = 'parked' AND run_at <= now())
"""

_STAGE = """
WITH due AS (
    SELECT id FROM jobs
    WHERE queue = %(queue)s AND state = 'parked' AND run_at <= now()
    ORDER BY run_at, id LIMIT %(room)s
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE jobs j
SET state = 'queued', fence = j.fence + 1, published_at = now(), refused = '{}'
FROM due WHERE j.id = due.id
RETURNING j.id, j.run_at, j.fence, j.published_at
"""


class Stager:
    """One round stages what there is room for; safe to run twice at once."""

    def __init__(self, *, db: Database, ahead_jobs: int, chunk_size: int) -> None:
        self._db = db
        self._ahead_jobs = ahead_jobs
        self._chunk_size = chunk_size

    async def round(self, queues: list[str]) -> list[JobMessage]:
        """Queue the parked jobs of these queues that are due; return the messages to publish."""
        looked = await self._db.execute(_LOOK, queues=queues, ahead=self._ahead_jobs)
        messages: list[JobMessage] = []
        for row in looked:
            room = self._ahead_jobs - row.waiting
            if room > 0:
                messages += await self._stage(row.name, room)
        return messages

    async def _stage(self, queue: str, room: int) -> list[JobMessage]:
        rows = await self._db.execute(_STAGE, queue=queue, room=room)
        return to_messages(queue, rows, self._chunk_size)

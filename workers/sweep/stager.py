"""The stager: moves jobs that are due from Postgres to the broker, a few minutes' work at a time.

Parked jobs cost no worker any memory. Bulk jobs begin parked: the broker holds `ahead_jobs` of
each bulk queue and Postgres the rest, first in, first out. What is paused stays in Postgres.
"""

from __future__ import annotations

from typing import Any, Final

from sluicegate.shared.celery_app import JobMessage
from sluicegate.shared.jobs import Lane
from sluicegate.shared.queues import parse_queue
from sluicegate.shared.statements import Database
from sluicegate.workers.sweep.endings import to_messages

#: How long jobs of what is paused are put off; `resume` wakes them before that.
_PUT_OFF_S: Final = 300
#: Of one queue in one round, so that those that are put off do not keep the other queues waiting.
_STATEMENTS: Final = 10
#: Of a queue of the interactive lane that is full, this part a round is for parked jobs.
_SHARE_OF_PARKED: Final = 20

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

# What is read leaves the front of the queue: it is staged, or, where an operator has paused its
# account or use case, put off. So a statement reads no more than it stages and puts off, however
# much is paused. The lock keeps a `resume` waiting until what was put off can be seen, and woken.
_STAGE = f"""
WITH paused AS (
    SELECT kind, subject FROM pauses WHERE kind <> 'provider' FOR KEY SHARE
), due AS (
    SELECT id, account_id, use_case FROM jobs
    WHERE queue = %(queue)s AND state = 'parked' AND run_at <= now()
    ORDER BY run_at, id LIMIT %(room)s
    FOR NO KEY UPDATE SKIP LOCKED
), plan AS (
    SELECT due.id, nullif(concat_ws('; ',
        (SELECT 'the use case ' || due.use_case || ' is paused' FROM paused
         WHERE kind = 'use_case' AND subject = due.use_case),
        (SELECT 'the account is paused' FROM paused
         WHERE kind = 'account' AND subject = due.account_id::text)
    ), '') AS held_back
    FROM due
)
UPDATE jobs j
SET state = CASE WHEN plan.held_back IS NULL THEN 'queued' ELSE 'parked' END,
    fence = j.fence + 1, held_back = plan.held_back,
    published_at = CASE WHEN plan.held_back IS NULL THEN now() ELSE j.published_at END,
    run_at = CASE WHEN plan.held_back IS NULL THEN j.run_at
                  ELSE now() + interval '{_PUT_OFF_S} seconds' END
FROM plan WHERE j.id = plan.id
RETURNING j.id, j.run_at, j.fence, j.published_at, j.state
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
            messages += await self._stage(row.name, self._room(row.name, row.waiting))
        return messages

    def _room(self, queue: str, waiting: int) -> int:
        room = self._ahead_jobs - waiting
        if parse_queue(queue).lane is Lane.BULK:
            return room
        # Fresh interactive jobs never park: if they come faster than they are done, those that had
        # to wait once would wait until that is over.
        return max(room, self._ahead_jobs // _SHARE_OF_PARKED, 1)

    async def _stage(self, queue: str, room: int) -> list[JobMessage]:
        staged: list[Any] = []
        for _ in range(_STATEMENTS):
            wanted = room - len(staged)
            if wanted <= 0:
                break
            rows = await self._db.execute(_STAGE, queue=queue, room=wanted)
            staged += [row for row in rows if row.state == "queued"]
            if len(rows) < wanted:
                break
        return to_messages(queue, staged, self._chunk_size)

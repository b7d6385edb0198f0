"""What the sweep's statements share: ending jobs that nobody holds, and telling their readers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sluicegate.shared.bodies import Bodies
from sluicegate.shared.celery_app import JobMessage
from sluicegate.shared.endings import terminal_payload
from sluicegate.shared.jobs import Lane
from sluicegate.shared.queues import parse_queue
from sluicegate.shared.secrets import SecretUnreadable
from sluicegate.shared.statements import Database
from sluicegate.workers.replies import Replies

log = logging.getLogger(__name__)


async def tell(replies: Replies, rows: Sequence[Any]) -> None:
    """Append the terminal events of rows with id, fence, body, created_at and finished_at."""
    await asyncio.gather(
        *(
            replies.end(
                replies.channel(row.id, row.fence),
                terminal_payload(row.body, row.created_at, row.finished_at),
            )
            for row in rows
        )
    )


_ENDED = """
SELECT r.job_id AS id, r.fence, r.body, j.created_at, j.finished_at
FROM results r JOIN jobs j ON j.id = r.job_id
WHERE r.job_id = ANY(%(ids)s::uuid[])
"""


async def tell_settled(
    db: Database, replies: Replies, job_ids: Sequence[UUID], bodies: Bodies
) -> None:
    """Append the terminal events of those of these jobs that have ended."""
    if not job_ids:
        return
    ended = []
    for row in await db.execute(_ENDED, ids=list(job_ids)):
        try:
            ended.append(row._replace(body=bodies.open_result(row.body)))
        except SecretUnreadable as error:
            log.warning("the end of job %s is not announced, it is in Postgres: %s", row.id, error)
    await tell(replies, ended)


def to_messages(queue: str, rows: Sequence[Any], chunk_size: int) -> list[JobMessage]:
    """Make the messages of a queue's rows (id, run_at, fence, published_at), oldest first.

    The rows are of one statement, so they were published at the same moment. A single job's
    message carries its fence, so that a revoked earlier one does not silence it.
    """
    ordered = sorted(rows, key=lambda row: (row.run_at, row.id))
    size = 1 if parse_queue(queue).lane is Lane.INTERACTIVE else chunk_size
    return [
        JobMessage(
            queue=queue,
            job_ids=tuple(row.id for row in ordered[start : start + size]),
            published_at=ordered[start].published_at,
            fence=ordered[start].fence,
        )
        for start in range(0, len(ordered), size)
    ]


def single_messages(rows: Sequence[Any]) -> list[JobMessage]:
    """Make one message for each row with id, queue, fence and published_at."""
    return [
        JobMessage(
            queue=row.queue, job_ids=(row.id,), published_at=row.published_at, fence=row.fence
        )
        for row in rows
    ]

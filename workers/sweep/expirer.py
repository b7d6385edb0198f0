"""The expirer: ends jobs whose deadline passed while they waited, and says what they waited for."""

from __future__ import annotations

from sluicegate.shared.endings import ENDED_BODY
from sluicegate.shared.statements import Database
from sluicegate.workers.replies import Replies
from sluicegate.workers.sweep.endings import tell

_BATCH = 500

_EXPIRE = f"""
WITH due AS (
    SELECT id, CASE state WHEN 'parked' THEN held_back END AS held_back FROM jobs
    WHERE state IN ('queued', 'parked') AND deadline_at <= now()
    ORDER BY deadline_at LIMIT {_BATCH}
    FOR NO KEY UPDATE SKIP LOCKED
), ended AS (
    UPDATE jobs j
    SET state = 'expired', fence = j.fence + 1, finished_at = now(), held_back = NULL
    FROM due WHERE j.id = due.id
    RETURNING j.*, concat_ws(
        '; ', 'its deadline passed before it was answered', due.held_back) AS why
)
INSERT INTO results (job_id, fence, body)
SELECT j.id, j.fence, {
    ENDED_BODY.format(
        state="'expired'",
        error_class="'timeout'",
        message="j.why",
    )
} FROM ended j
RETURNING job_id AS id, fence, body,
    (SELECT created_at FROM ended e WHERE e.id = job_id) AS created_at,
    (SELECT finished_at FROM ended e WHERE e.id = job_id) AS finished_at
"""


class Expirer:
    """One round ends all that are due; safe to run twice at once."""

    def __init__(self, *, db: Database, replies: Replies) -> None:
        self._db = db
        self._replies = replies

    async def round(self) -> None:
        """End the jobs whose deadline has passed, and tell their readers."""
        while True:
            rows = await self._db.execute(_EXPIRE)
            await tell(self._replies, rows)
            if len(rows) < _BATCH:
                return

"""Batches: what the command that cancels one and the sweep share."""

from __future__ import annotations

from typing import Final

from sluicegate.shared.endings import CANCELLED_BODY

#: Lines that one statement cancels.
CANCEL_SLICE: Final = 1000

#: The last line of batch `%(batch_id)s`, null for none. Whoever goes through a batch does it by
#: ranges of lines: a limit instead would let a planner that does not know yet how large the batch
#: is sort all the rest of it each time.
LAST_LINE: Final = "SELECT max(batch_line) AS last FROM jobs WHERE batch_id = %(batch_id)s"

#: Cancels the jobs of batch `%(batch_id)s` that wait, of the slice behind line `%(after)s`; returns
#: how many. Those that run go on; those that are staged at this moment are waited for, not passed
#: over. No terminal event is written: a reader who waits finds the row at its next look.
CANCEL_WAITING: Final = f"""
WITH waiting AS (
    SELECT id FROM jobs
    WHERE batch_id = %(batch_id)s AND state IN ('queued', 'parked')
      AND batch_line > %(after)s AND batch_line <= %(after)s + {CANCEL_SLICE}
    ORDER BY id
    FOR NO KEY UPDATE
), ended AS (
    UPDATE jobs j SET state = 'cancelled', fence = j.fence + 1, finished_at = now()
    FROM waiting WHERE j.id = waiting.id
    RETURNING j.*
), kept AS (
    INSERT INTO results (job_id, fence, body)
    SELECT j.id, j.fence, {CANCELLED_BODY} FROM ended j
)
SELECT count(*) AS jobs FROM ended
"""

"""The canceller: ends what comes back, to wait, in a batch that is cancelled.

`bulk cancel` ends the jobs that wait and lets the running ones finish. One of those may be tried
again instead, or may have been staged while its turn came: nothing of the batch is started any
more.
"""

from __future__ import annotations

from sluicegate.shared.batches import CANCEL_SLICE, CANCEL_WAITING
from sluicegate.shared.statements import Database

# All that is left of most of them runs. The jobs of a batch are read, however many, only if some
# do not: one look sees both numbers at the same moment.
_WAITED_FOR = """
SELECT b.id, (
    SELECT coalesce(max(batch_line), 0) FROM jobs j WHERE j.batch_id = b.id) AS last
FROM batches b
WHERE b.cancelled_at IS NOT NULL AND b.finished_at IS NULL
  AND b.total - b.succeeded - b.failed - b.cancelled - b.expired
      > (SELECT count(*) FROM jobs j WHERE j.state = 'running' AND j.batch_id = b.id)
ORDER BY b.id
"""


class Canceller:
    """One round ends all that wait in cancelled batches; safe to run twice at once."""

    def __init__(self, *, db: Database) -> None:
        self._db = db

    async def round(self) -> None:
        """Cancel the waiting jobs of cancelled batches; raises if Postgres is away."""
        for batch in await self._db.execute(_WAITED_FOR):
            for after in range(0, batch.last, CANCEL_SLICE):
                await self._db.execute(CANCEL_WAITING, batch_id=batch.id, after=after)

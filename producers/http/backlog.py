"""How long work waits for workers: more of it is refused while that is too long."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine

from sluicegate.producers.http.problems import Problem
from sluicegate.shared.database import DATABASE_ERRORS
from sluicegate.shared.queues import POOLS
from sluicegate.shared.settings import Settings

log = logging.getLogger(__name__)

#: How old what is known may be; then it is looked up in the background.
_FRESH_S: Final = 1.0
#: What is not known for so long is no reason to refuse anything.
_KNOWN_S: Final = 15.0
_RETRY_AFTER_S: Final = 5

#: The lookup is given up after so long: it must not burden a database that is slow already. And it
#: takes rows in the order of an index whatever statistics say: after a quiet night they say that
#: nothing is queued, and the planner would read all that waits, and sort it, for each queue.
SETTINGS: Final = "SET LOCAL statement_timeout = '500ms'; SET LOCAL enable_sort = off"

#: Per queue of the interactive lane one row of an index, however long the queue is.
QUERY: Final = """
SELECT u.name AS use_case, extract(epoch FROM now() - min(oldest.waits_since))::float8 AS age_s
FROM use_cases u CROSS JOIN unnest(%(pools)s::text[]) AS pool
CROSS JOIN LATERAL (
    SELECT greatest(j.published_at, j.run_at) AS waits_since FROM jobs j
    WHERE j.state = 'queued' AND j.queue = u.name || '.' || pool
    ORDER BY greatest(j.published_at, j.run_at) LIMIT 1
) AS oldest
GROUP BY u.name
"""


class Backlog:
    """Knows for how long the oldest interactive job of each use case has waited."""

    def __init__(self, engine: AsyncEngine, settings: Settings) -> None:
        self._engine = engine
        self._limit_s = settings.http_queue_age_s
        self._ages_s: Mapping[str, float] = {}
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    def is_late(self) -> bool:
        """Whether a job of any use case has waited for too long."""
        now = time.monotonic()
        if now - self._read_at > _FRESH_S and self._reading is None:
            self._reading = asyncio.create_task(self._read())
        if now - self._read_at > _KNOWN_S:
            return False
        return any(age_s > self._limit_s for age_s in self._ages_s.values())

    def check(self, use_case: str) -> None:
        """Raise `Problem` (429) while a job of this use case has waited for too long."""
        age_s = self._ages_s.get(use_case, 0.0)
        if self.is_late() and age_s > self._limit_s:
            raise Problem(
                429,
                "queue_too_old",
                f"jobs for {use_case} wait for {age_s:.0f} s already, so no more are taken; "
                "try again later",
                retry_after_s=_RETRY_AFTER_S,
            )

    async def close(self) -> None:
        """End the look that is under way."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        try:
            async with self._engine.connect() as connection:
                await connection.execution_options(isolation_level="READ COMMITTED")
                async with connection.begin():
                    await connection.exec_driver_sql(SETTINGS)
                    found = await connection.exec_driver_sql(QUERY, {"pools": list(POOLS)})
                    rows = found.all()
        except DATABASE_ERRORS as error:
            log.info("the age of queues cannot be read just now: %s", error)
        else:
            self._ages_s = {row.use_case: row.age_s for row in rows}
            self._read_at = time.monotonic()
        finally:
            self._reading = None

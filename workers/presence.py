"""Which queues have a live worker: a job is handed off only to where somebody takes it."""

from __future__ import annotations

import asyncio
import logging
import time

from sluicegate.shared.statements import DATABASE_ERRORS, Database

log = logging.getLogger(__name__)

_READ = """
SELECT DISTINCT unnest(queues) AS queue FROM workers
WHERE NOT draining AND seen_at > now() - %(dead_after_s)s * interval '1 second'
"""
_FRESH_S = 1.0


class Presence:
    """Asks Postgres at most once a second, and only if somebody wants to know."""

    def __init__(self, *, db: Database, dead_after_s: float) -> None:
        self._db = db
        self._dead_after_s = dead_after_s
        self._queues: frozenset[str] = frozenset()
        self._read_at = -_FRESH_S
        self._reading = asyncio.Lock()

    async def serves(self, queue: str) -> bool:
        """Whether a worker that lives takes jobs of this queue; as last known without Postgres."""
        async with self._reading:
            if time.monotonic() - self._read_at >= _FRESH_S:
                await self._read()
        return queue in self._queues

    async def _read(self) -> None:
        try:
            rows = await self._db.execute(_READ, dead_after_s=self._dead_after_s)
        except DATABASE_ERRORS as error:
            log.warning("the workers were not read (%s)", type(error).__name__)
        else:
            self._queues = frozenset(row.queue for row in rows)
        self._read_at = time.monotonic()

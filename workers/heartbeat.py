"""Beats: the lease of a worker process, and the permission to let calls leave.

The lease is the worker's, not the job's: one row, one small update every two seconds. A call
leaves only while the last confirmed beat was *sent* less than `valid_s` ago on this process' own
monotonic clock, and the sweep declares a worker dead only after watching a beat stand still for
longer than that: a call of a worker that is declared dead has left before it was.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sluicegate.shared.ids import new_id
from sluicegate.shared.jobs import Lane
from sluicegate.shared.statements import DATABASE_ERRORS, Database

log = logging.getLogger(__name__)

_ENTER = """
INSERT INTO workers (id, name, pool, lane, queues, keyring)
VALUES (%(id)s, %(name)s, %(pool)s, %(lane)s, %(queues)s, %(keyring)s)
"""

_BEAT = """
UPDATE workers
SET beat = beat + 1, seen_at = now(), queues = %(queues)s, running_jobs = %(running_jobs)s,
    oldest_unclaimed_at = %(oldest_unclaimed_at)s, draining = %(draining)s
WHERE id = %(id)s
RETURNING (
    SELECT array_agg(j.id) FROM jobs j
    WHERE j.worker_id = workers.id AND j.state = 'running' AND j.cancel_requested_at IS NOT NULL
) AS unwanted
"""

_LEAVE = "DELETE FROM workers WHERE id = %(id)s"


@dataclass(frozen=True, slots=True)
class Load:
    """What a beat reports beside being alive."""

    running_jobs: int
    #: `published_at` of the oldest message that is delivered here and not yet claimed.
    oldest_unclaimed_at: datetime | None
    draining: bool


class Heartbeat:
    """The row of this worker. `db` is its own: a busy pool must not delay a beat."""

    def __init__(
        self,
        *,
        db: Database,
        name: str,
        pool: str,
        lane: Lane,
        queues: Sequence[str],
        keyring: Sequence[str],
        interval_s: float,
        valid_s: float,
        load: Callable[[], Load],
        renamed: Callable[[UUID], None],
        unwanted: Callable[[Sequence[UUID]], None],
    ) -> None:
        self._db = db
        self._name = name
        self._pool = pool
        self._lane = lane
        self._queues = list(queues)
        #: Fingerprints, so that commands can tell what this worker could not decrypt.
        self._keyring = list(keyring)
        self._interval_s = interval_s
        self._valid_s = valid_s
        self._load = load
        self._renamed = renamed
        self._unwanted = unwanted
        self._valid_until = 0.0
        self._confirmed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.worker_id = new_id()

    async def start(self) -> None:
        """Enter the row and begin to beat; raises if Postgres does not answer."""
        await self._enter()
        self._task = asyncio.get_running_loop().create_task(self._loop())

    async def stop(self) -> None:
        """Stop beating. The row stays: see `leave`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def leave(self) -> None:
        """Delete the row: whatever still bears this worker's name is then the sweep's."""
        await self._db.execute(_LEAVE, id=self.worker_id)

    def serve(self, queue: str) -> None:
        """Name one more queue in the row, from the next beat on."""
        self._queues.append(queue)

    @property
    def valid(self) -> bool:
        """Whether a call may leave now, by a clock that also ran while this process was frozen."""
        return time.monotonic() < self._valid_until

    async def wait_valid(self) -> None:
        """Wait until a call may leave."""
        while not self.valid:
            self._confirmed.clear()
            await self._confirmed.wait()

    async def _enter(self) -> None:
        sent = time.monotonic()
        await self._db.execute(
            _ENTER,
            id=self.worker_id,
            name=self._name,
            pool=self._pool,
            lane=self._lane.value,
            queues=self._queues,
            keyring=self._keyring,
        )
        self._confirm(sent)

    def _confirm(self, sent: float) -> None:
        self._valid_until = sent + self._valid_s
        self._confirmed.set()

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self._beat()
            except DATABASE_ERRORS as error:
                log.warning("a beat was not confirmed (%s)", type(error).__name__)

    async def _beat(self) -> None:
        load = self._load()
        sent = time.monotonic()
        rows = await self._db.execute(
            _BEAT,
            id=self.worker_id,
            queues=self._queues,
            running_jobs=load.running_jobs,
            oldest_unclaimed_at=load.oldest_unclaimed_at,
            draining=load.draining,
        )
        if rows:
            self._confirm(sent)
            if rows[0].unwanted:
                # The wish lives in the row: a message that was lost delays it by a beat.
                self._unwanted(rows[0].unwanted)
            return
        # Declared dead while it was away. What it holds is no longer its own: the fence turns
        # those results into corrections. It starts again under a new id.
        log.warning("this worker was declared dead while it did not answer; it starts anew")
        self._valid_until = 0.0
        self.worker_id = new_id()
        await self._enter()
        self._renamed(self.worker_id)

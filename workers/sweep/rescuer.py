"""The rescuer: finds dead workers, and resolves what bears the name of one.

A worker is dead when its beat stood still for `dead_after_s` while this process read it without a
break: no clock of another machine is trusted, and an outage of Postgres proves nothing. Its row
goes first, in a transaction of its own; every claim and dispatch locks that row, so once it is
gone nothing new can bear its name. Only then is what bears it resolved.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from uuid import UUID

from sluicegate.shared.celery_app import JobMessage
from sluicegate.shared.endings import CANCELLED_BODY, ENDED_BODY
from sluicegate.shared.statements import DATABASE_ERRORS, Database
from sluicegate.workers import ledger
from sluicegate.workers.ledger import Told
from sluicegate.workers.replies import Replies
from sluicegate.workers.sweep.endings import single_messages, tell

log = logging.getLogger(__name__)

_BATCH = 500

_READ = "SELECT id, beat, name FROM workers"

_BURY = "DELETE FROM workers WHERE id = %(id)s AND beat = %(beat)s RETURNING id"

# Locks go jobs, attempts, budgets, each by key; jobs are also those that have gone on without an
# attempt which their dead worker left. An attempt of nobody has an unknown outcome: its whole
# reservation is booked as the estimate, which a late actual corrects. Its job is tried again once,
# if the use case says so and its attempt budget allows; a job that had not been dispatched simply
# goes back. What would go back and is to be cancelled ends.
_RESOLVE = f"""
WITH lost AS (
    SELECT j.id FROM jobs j
    WHERE j.state = 'running' AND NOT EXISTS (SELECT FROM workers w WHERE w.id = j.worker_id)
    ORDER BY j.id LIMIT {_BATCH}
), stray AS (
    SELECT DISTINCT a.job_id AS id FROM attempts a
    WHERE a.state = 'dispatching' AND NOT EXISTS (SELECT FROM workers w WHERE w.id = a.worker_id)
    LIMIT {_BATCH}
), job AS (
    SELECT j.id, j.state = 'running'
           AND NOT EXISTS (SELECT FROM workers w WHERE w.id = j.worker_id) AS is_lost
    FROM jobs j
    WHERE j.id IN (SELECT id FROM lost UNION SELECT id FROM stray)
    ORDER BY j.id
    FOR NO KEY UPDATE OF j SKIP LOCKED
), attempt AS (
    SELECT a.id FROM attempts a
    WHERE a.state = 'dispatching' AND a.job_id IN (SELECT id FROM job)
      AND (SELECT count(*) FROM job) >= 0
      AND NOT EXISTS (SELECT FROM workers w WHERE w.id = a.worker_id)
    ORDER BY a.id
    FOR NO KEY UPDATE SKIP LOCKED
), unknown AS (
    UPDATE attempts a
    SET state = 'unknown', ended_at = now(), error_class = 'lost',
        error_message = 'the worker died during the call'
    FROM attempt WHERE a.id = attempt.id
    RETURNING a.*
), entry AS (
    INSERT INTO cost_entries (
        attempt_id, job_id, account_id, use_case, provider_id, provider, model, kind,
        amount_nano_usd, baseline_nano_usd, price_version, dispatched_at)
    SELECT id, job_id, account_id, use_case, provider_id, provider, model, 'estimate',
           reserved_nano_usd, baseline_reserved_nano_usd, 'reservation', dispatched_at
    FROM unknown
), booked AS (
    SELECT account_id, use_case, dispatched_at, reserved_nano_usd AS released,
           reserved_nano_usd AS spent
    FROM unknown
), {ledger.CHARGE.format(source="booked")}, cost AS (
    SELECT job_id, count(*)::int AS attempts, sum(reserved_nano_usd)::bigint AS amount
    FROM unknown GROUP BY job_id
), plan AS (
    SELECT j.id, coalesce(cost.attempts, 0) AS attempts, coalesce(cost.amount, 0) AS amount,
           CASE WHEN cost.attempts IS NOT NULL AND (
                    coalesce(u.unknown_policy, 'retry_once') = 'fail' OR j.unknown_attempts >= 1
                    OR j.attempts_used + cost.attempts >= j.max_attempts) THEN 'failed'
                WHEN j.cancel_requested_at IS NOT NULL THEN 'cancelled'
                ELSE 'queued' END AS state
    FROM job JOIN jobs j USING (id)
    LEFT JOIN cost ON cost.job_id = j.id
    LEFT JOIN use_cases u ON u.name = j.use_case
    WHERE job.is_lost
), moved AS (
    UPDATE jobs j
    SET state = plan.state, worker_id = NULL, claim_id = NULL, fence = j.fence + 1,
        attempts_used = j.attempts_used + plan.attempts,
        unknown_attempts = j.unknown_attempts + plan.attempts,
        cost_nano_usd = j.cost_nano_usd + plan.amount,
        published_at = CASE plan.state WHEN 'queued' THEN now() ELSE j.published_at END,
        finished_at = CASE WHEN plan.state <> 'queued' THEN now() END
    FROM plan WHERE j.id = plan.id
    RETURNING j.*
), kept AS (
    INSERT INTO results (job_id, fence, body)
    SELECT j.id, j.fence, CASE j.state WHEN 'cancelled' THEN {CANCELLED_BODY} ELSE {
    ENDED_BODY.format(
        state="'failed'",
        error_class="'lost'",
        message="'its worker died during a paid call whose outcome is unknown, and the job "
        "may not be tried again'",
    )
} END FROM moved j WHERE j.state <> 'queued'
    RETURNING job_id, body
), late AS (
    SELECT cost.job_id, cost.amount FROM cost JOIN job ON job.id = cost.job_id
    WHERE NOT job.is_lost
), elsewhere AS (
    UPDATE jobs j SET cost_nano_usd = j.cost_nano_usd + late.amount
    FROM late WHERE j.id = late.job_id
)
SELECT moved.id, moved.queue, moved.state, moved.fence, moved.published_at, moved.created_at,
       moved.finished_at, kept.body, NULL::json AS budget
FROM moved LEFT JOIN kept ON kept.job_id = moved.id
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, {ledger.COPY} FROM after b
"""


async def resolve_lost(db: Database, replies: Replies, told: Told) -> list[JobMessage]:
    """Resolve jobs and attempts that name a worker without a row; return what to publish.

    `told` hears of the budgets that were charged. Safe to run twice at once, by the sweep and by
    workers that stop.
    """
    messages: list[JobMessage] = []
    while True:
        found = await db.execute(_RESOLVE)
        ledger.tell(found, told)
        rows = [row for row in found if row.budget is None]
        await tell(replies, [row for row in rows if row.state != "queued"])
        messages += single_messages([row for row in rows if row.state == "queued"])
        if rows:
            log.warning("%d jobs of dead workers were resolved", len(rows))
        if not rows:
            # Two at once share a batch, so fewer than a batch does not say that there are no more.
            return messages


@dataclass(slots=True)
class _Watch:
    beat: int
    since_s: float


class Rescuer:
    """Watches the beats. One loop a sweep process; several sweeps may watch at once."""

    def __init__(self, *, db: Database, replies: Replies, dead_after_s: float, told: Told) -> None:
        self._db = db
        self._told = told
        self._replies = replies
        self._dead_after_s = dead_after_s
        self._watched: dict[UUID, _Watch] = {}

    async def round(self) -> list[JobMessage]:
        """Look once; return the messages of jobs that are queued again.

        Raises a connection error if Postgres is away, and then begins its watch anew.
        """
        try:
            await self._bury_dead()
        except DATABASE_ERRORS:
            self._watched.clear()
            raise
        # Every round, not only after a funeral: a worker may end between deleting its own row
        # and resolving what bears its name.
        return await resolve_lost(self._db, self._replies, self._told)

    async def _bury_dead(self) -> None:
        rows = await self._db.execute(_READ)
        # Taken after the answer: a beat that was read late counts as seen late.
        now_s = asyncio.get_running_loop().time()
        watched: dict[UUID, _Watch] = {}
        dead = []
        for row in rows:
            watch = self._watched.get(row.id)
            if watch is None or watch.beat != row.beat:
                watch = _Watch(row.beat, now_s)
            elif now_s - watch.since_s >= self._dead_after_s:
                dead.append(row)
            watched[row.id] = watch
        self._watched = watched
        for row in dead:
            if await self._db.execute(_BURY, id=row.id, beat=row.beat):
                log.warning("worker %s (%s) is dead: its beat stands still", row.name, row.id)

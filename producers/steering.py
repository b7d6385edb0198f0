"""Steering: ending and reopening jobs that no worker holds. No I/O here.

Row locks decide who comes first, a claim or a cancel: a job ends at once only while nobody holds
it. A running job is asked to end: its worker hears of that in a message, or finds the wish in the
row at its next beat, and a job that comes back with a wish ends instead of being tried again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row

from sluicegate.shared.bodies import Bodies
from sluicegate.shared.catalogue import Catalogue
from sluicegate.shared.celery_app import JobMessage
from sluicegate.shared.endings import CANCELLED_BODY, terminal_payload
from sluicegate.shared.errors import IllegalTransition, InvalidJob, NotFound
from sluicegate.shared.events import FIELD, event_id, reply_key, terminal_id
from sluicegate.shared.jobs import TERMINAL, JobSpec, Lane, State
from sluicegate.shared.queues import queue_name
from sluicegate.shared.routing import needs_of, route
from sluicegate.shared.settings import Settings

#: A command for Redis, with its arguments.
Command = tuple[str | int | bytes, ...]

#: The states out of which `job retry` leads.
REOPENABLE: Final = TERMINAL - {State.SUCCEEDED}

# What waited for a lock sees the row in `job` as it is now, but builds its new row from the version
# of its snapshot at first, and checks the constraints on that before it starts again with the
# newest: columns that a constraint ties together are all set.
#: Cancels the jobs `%(job_ids)s`, each as its state demands; rows for `read_cancelled`.
CANCEL: Final = f"""
WITH job AS (
    SELECT j.id, j.state, j.worker_id FROM jobs j
    WHERE j.id = ANY(%(job_ids)s::uuid[])
    ORDER BY j.id
    FOR NO KEY UPDATE
), ended AS (
    UPDATE jobs j
    SET state = 'cancelled', worker_id = NULL, claim_id = NULL, fence = j.fence + 1,
        finished_at = now()
    FROM job WHERE j.id = job.id AND job.state IN ('queued', 'parked')
    RETURNING j.*
), asked AS (
    UPDATE jobs j SET cancel_requested_at = coalesce(j.cancel_requested_at, now())
    FROM job WHERE j.id = job.id AND job.state = 'running'
), kept AS (
    INSERT INTO results (job_id, fence, body)
    SELECT j.id, j.fence, {CANCELLED_BODY} FROM ended j
    RETURNING job_id, body
)
SELECT job.id, coalesce(ended.state, job.state) AS state, w.name AS worker,
       ended.fence, ended.created_at, ended.finished_at, kept.body
FROM job
LEFT JOIN ended ON ended.id = job.id
LEFT JOIN kept ON kept.job_id = job.id
LEFT JOIN workers w ON w.id = job.worker_id
"""

#: What `reopening` has to know of a job.
FIND_ENDED: Final = """
SELECT j.id, j.state, j.fence, j.lane, j.account_id, a.is_active, j.purged_at,
       b.request::text AS request
FROM jobs j JOIN accounts a ON a.id = j.account_id LEFT JOIN job_bodies b ON b.job_id = j.id
WHERE j.id = %(job_id)s
"""

# Only as `FIND_ENDED` saw it: what ended since then may have a result that this statement, which
# began before, would not find to delete. Repeated after a commit that was not heard of, it finds
# the job as its first try left it.
RETRY: Final = """
WITH job AS (
    SELECT j.id, j.state, j.fence, j.published_at,
           j.fence = %(fence)s AND j.state IN ('failed', 'cancelled', 'expired')
               AND j.purged_at IS NULL AS opens
    FROM jobs j WHERE j.id = %(job_id)s
    FOR NO KEY UPDATE
), gone AS (
    DELETE FROM results r USING job WHERE r.job_id = job.id AND job.opens
), opened AS (
    UPDATE jobs j
    SET state = 'queued', worker_id = NULL, claim_id = NULL, queue = %(queue)s,
        fence = j.fence + 1, attempts_used = 0, unknown_attempts = 0, refused = '{}',
        ruled_out = '{}', held_back = NULL, run_at = now(), published_at = now(),
        deadline_at = now() + make_interval(secs => %(deadline_s)s), finished_at = NULL,
        cancel_requested_at = NULL
    FROM job WHERE j.id = job.id AND job.opens
    RETURNING j.id, j.published_at
)
SELECT job.state, coalesce(opened.published_at, job.published_at) AS published_at,
       job.opens OR (job.state = 'queued' AND job.fence = %(fence)s + 1) AS reopened
FROM job LEFT JOIN opened ON opened.id = job.id
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """What became of a wish to cancel, and who is to be told."""

    state: State
    #: Name of the worker that runs the job.
    worker: str | None
    #: What tells the job's readers, where it ended now.
    commands: Sequence[Command]


def read_cancelled(settings: Settings, job_id: UUID, rows: Sequence[Row[Any]]) -> Cancelled:
    """Read the row of `CANCEL`; raise `NotFound` if there is none."""
    if not rows:
        raise NotFound(f"there is no job {job_id}")
    (row,) = rows
    commands: list[Command] = []
    if row.body is not None:
        key = settings.redis_prefix + reply_key(row.id)
        payload = terminal_payload(row.body, row.created_at, row.finished_at)
        commands = [
            ("XADD", key, terminal_id(row.fence), FIELD, payload),
            ("PEXPIRE", key, _ttl_ms(settings)),
        ]
    return Cancelled(state=State(row.state), worker=row.worker, commands=commands)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reopening:
    """A job that ended and is to be tried again, routed anew."""

    job_id: UUID
    queue: str
    #: Its fence as it ended.
    fence: int
    deadline_s: float

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Parameters of `RETRY`."""
        return {
            "job_id": self.job_id,
            "queue": self.queue,
            "fence": self.fence,
            "deadline_s": self.deadline_s,
        }

    def commands(self, settings: Settings) -> Sequence[Command]:
        """Return what empties the reply channel, so that no reader takes its old end for the new.

        From then on Redis refuses what comes late from under the old fence. To be done before
        `RETRY`: until that has committed, the row still tells how the job ended.
        """
        key = settings.redis_prefix + reply_key(self.job_id)
        return [
            ("XADD", key, "MAXLEN", 0, event_id(self.fence + 1, 0), FIELD, b""),
            ("PEXPIRE", key, _ttl_ms(settings)),
        ]

    def message(self, rows: Sequence[Row[Any]]) -> JobMessage:
        """Read the row of `RETRY`; raise `IllegalTransition` if somebody else was faster."""
        if not rows:
            raise NotFound(f"there is no job {self.job_id}")
        (row,) = rows
        if not row.reopened:
            raise IllegalTransition(
                f"job {self.job_id} was steered by somebody else just now; it is {row.state}"
            )
        return JobMessage(
            queue=self.queue,
            job_ids=(self.job_id,),
            published_at=row.published_at,
            fence=self.fence + 1,
        )


def reopening(
    settings: Settings, catalogue: Catalogue, job_id: UUID, rows: Sequence[Row[Any]]
) -> Reopening:
    """Read the row of `FIND_ENDED` and route the job by today's catalogue.

    Raises `NotFound`; `IllegalTransition` if the job has not ended, or succeeded, or its request is
    not kept any more; `InvalidJob` if nothing serves it; `SecretUnreadable`.
    """
    if not rows:
        raise NotFound(f"there is no job {job_id}")
    (row,) = rows
    if row.state not in REOPENABLE:
        raise IllegalTransition(
            f"job {job_id} is {row.state}; only a failed, cancelled or expired job can be retried"
        )
    if row.purged_at is not None:
        raise IllegalTransition(
            f"job {job_id} cannot be tried again: its request was purged at "
            f"{row.purged_at:%Y-%m-%d %H:%M} UTC; submit it anew"
        )
    if not row.is_active:
        raise InvalidJob("account", f"of job {job_id} is not active any more")
    spec = JobSpec.model_validate_json(Bodies.of(settings).open_request(row.request))
    lane = Lane(row.lane)
    candidates = route(
        needs_of(spec),
        catalogue,
        account_id=row.account_id,
        mode=settings.catalogue,
        now=datetime.now(UTC),
        first_token_ms={},
    )
    bulk = lane is Lane.BULK
    return Reopening(
        job_id=job_id,
        queue=queue_name(spec.use_case, candidates[0].provider, lane),
        fence=row.fence,
        deadline_s=settings.bulk_deadline_s if bulk else settings.interactive_deadline_s,
    )


def _ttl_ms(settings: Settings) -> int:
    return round(settings.reply_ttl_s * 1000)

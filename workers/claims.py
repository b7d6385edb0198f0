"""Claims: taking queued jobs for this worker, and knowing which ones it holds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

from sluicegate.shared.bodies import IN_THE_CLEAR, Bodies
from sluicegate.shared.celery_app import JobMessage
from sluicegate.shared.coalescing import Coalescer
from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.ids import new_id
from sluicegate.shared.jobs import JobSpec, Lane, build_spec
from sluicegate.shared.messages import LARGE_BYTES
from sluicegate.shared.secrets import SecretUnreadable
from sluicegate.shared.statements import Database, through_disconnects

#: A message may arrive a little before its job's time: clocks of broker and database differ.
_EARLY_S = 2

_FAILED = """FROM attempts a
           WHERE a.job_id = held.id AND a.state = 'failed' AND a.error_class <> 'rate_limited'
           ORDER BY a.dispatched_at DESC LIMIT held.attempts_used"""

# A row tells how long its request is in compressed form, for nothing: what is short there cannot be
# large, and of the rest the length is asked.
_IS_LARGE = f"""pg_column_size(b.request) > {LARGE_BYTES // 100}
           AND octet_length(b.request::text) > {LARGE_BYTES}"""

# The worker's row is locked first: a worker that has been declared dead has none, and claims
# nothing. Rows are found by key alone and judged once they are locked. The last branch answers a
# repeat whose first try committed but was not heard of.
_CLAIM = f"""
WITH me AS (
    SELECT id FROM workers WHERE id = %(worker_id)s FOR KEY SHARE
), wanted AS (
    SELECT * FROM json_to_recordset(%(items)s::json) AS t(job_id uuid, claim_id uuid)
), locked AS (
    SELECT j.id, wanted.claim_id, j.state, j.queue, j.run_at
    FROM wanted JOIN jobs j ON j.id = wanted.job_id CROSS JOIN me
    ORDER BY j.id
    FOR NO KEY UPDATE OF j
), claimed AS (
    UPDATE jobs j
    SET state = 'running', worker_id = %(worker_id)s, claim_id = locked.claim_id,
        fence = j.fence + 1
    FROM locked
    WHERE j.id = locked.id AND locked.state = 'queued'
      AND locked.queue = ANY(%(queues)s::text[])
      AND locked.run_at <= now() + interval '{_EARLY_S} seconds'
    RETURNING j.*
), held AS (
    SELECT * FROM claimed
    UNION ALL
    SELECT j.* FROM wanted JOIN jobs j ON j.id = wanted.job_id CROSS JOIN me
    WHERE j.state = 'running' AND j.worker_id = me.id AND j.claim_id = wanted.claim_id
)
SELECT held.id, held.claim_id, held.fence, held.account_id, held.use_case, held.lane, held.queue,
       held.attempts_used, held.unknown_attempts, held.max_attempts, held.cost_nano_usd,
       held.created_at, held.cancel_requested_at IS NOT NULL AS unwanted,
       held.refused, held.ruled_out, held.run_at > held.created_at AS waited,
       CASE WHEN held.attempts_used > 0 THEN ARRAY(SELECT a.provider_id {_FAILED}) END AS tried,
       CASE WHEN held.attempts_used > 0 THEN ARRAY(SELECT a.error_class {_FAILED}) END AS failures,
       extract(epoch FROM held.deadline_at - now())::float8 AS left_s,
       CASE WHEN {_IS_LARGE} THEN octet_length(b.request::text) ELSE 0 END AS unloaded_bytes,
       CASE WHEN {_IS_LARGE} THEN NULL ELSE b.request::text END AS request
FROM held JOIN job_bodies b ON b.job_id = held.id
"""

_LOAD = "SELECT request::text AS request FROM job_bodies WHERE job_id = %(job_id)s"

# What this worker does not know that it holds it lost on the way (a claim whose answer never
# came and was not asked for again): nothing was dispatched for it, so it goes back.
_RELEASE = """
WITH lost AS (
    SELECT j.id FROM jobs j
    WHERE j.worker_id = %(worker_id)s AND j.state = 'running'
      AND NOT j.id = ANY(%(held)s::uuid[]) AND NOT j.claim_id = ANY(%(claiming)s::uuid[])
      AND NOT EXISTS (
          SELECT FROM attempts a WHERE a.job_id = j.id AND a.state = 'dispatching')
    ORDER BY j.id
    FOR NO KEY UPDATE
)
UPDATE jobs j
SET state = 'queued', worker_id = NULL, claim_id = NULL, fence = j.fence + 1, published_at = now()
FROM lost WHERE j.id = lost.id
RETURNING j.id, j.queue, j.fence, j.published_at
"""


#: Stands in for a request that this worker cannot open; nobody is called with it.
_UNOPENED = build_spec("general", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A claimed job. Whoever holds it writes with its `fence`, or not at all."""

    id: UUID
    claim_id: UUID
    worker_id: UUID
    fence: int
    account_id: UUID
    use_case: str
    lane: Lane
    queue: str
    attempts_used: int
    unknown_attempts: int
    max_attempts: int
    #: What its earlier attempts have cost.
    cost_nano_usd: int
    created_at: datetime
    #: Its deadline on the event loop's clock.
    deadline_s: float
    spec: JobSpec
    #: As long as its request, a large one, is still to be loaded: how long it is.
    unloaded_bytes: int = 0
    #: Why its request cannot be read here, so that it is not to be called for; mostly empty.
    unreadable: str = ""
    #: Somebody wants it cancelled: it is not to be called for.
    unwanted: bool = False
    #: It has stood in line already, or was put off.
    waited: bool = False
    #: Provider rows: who said no since it last parked, and who is never to get it again.
    refused: tuple[UUID, ...] = ()
    ruled_out: tuple[UUID, ...] = ()
    #: The row of each call that its provider has failed.
    tried: tuple[UUID, ...] = ()
    #: How many of those answered, and not in the shape that was asked for.
    repairs: int = 0
    #: False: Postgres has room for it although the copy of its budget says no.
    asks_budget: bool = True


class Claims:
    """Claims for one worker id; `held` are the jobs it works on."""

    def __init__(
        self,
        *,
        db: Database,
        worker_id: UUID,
        queues: Sequence[str],
        max_items: int,
        spacing_s: float,
        give_up_after_s: float,
        bodies: Bodies = IN_THE_CLEAR,
    ) -> None:
        self._db = db
        self._queues = list(queues)
        self._give_up_after_s = give_up_after_s
        self._bodies = bodies
        self._claiming: set[UUID] = set()
        self.worker_id = worker_id
        self.held: set[UUID] = set()
        self._claim = Coalescer[tuple[UUID, Sequence[UUID]], list[Job]](
            # A claim asks for all jobs of a message: bound the statement by jobs, not messages.
            statement=self._claim_many,
            max_items=max_items,
            spacing_s=spacing_s,
        )

    def serve(self, queue: str) -> None:
        """Claim jobs of one more queue from now on."""
        self._queues.append(queue)

    async def claim(self, job_ids: Sequence[UUID]) -> list[Job]:
        """Claim what can be claimed; the rest is somebody else's, or not due, or over.

        Raises a connection error if Postgres stays away; nothing is held then.
        """
        claim_id = new_id()
        self._claiming.add(claim_id)
        try:
            jobs = await self._claim((claim_id, job_ids))
            self.held.update(job.id for job in jobs)
        finally:
            self._claiming.discard(claim_id)
        return jobs

    async def load(self, job: Job) -> Job:
        """Return the job with its large request, which the claim has left where it is."""
        rows = await through_disconnects(
            lambda: self._db.execute(_LOAD, job_id=job.id), give_up_after_s=None
        )
        if not rows:
            return replace(job, unloaded_bytes=0, unreadable="its request was deleted just now")
        # Reading it takes longer than the loop may be held up.
        spec, unreadable = await asyncio.to_thread(self._read, rows[0].request)
        return replace(job, unloaded_bytes=0, spec=spec, unreadable=unreadable)

    def let_go(self, job_id: UUID) -> None:
        """Forget a job that has been settled or handed back."""
        self.held.discard(job_id)

    async def release_lost(self) -> list[JobMessage]:
        """Put back the jobs that bear this worker's name unbeknown to it; publish what returns."""
        rows = await self._db.execute(
            _RELEASE,
            worker_id=self.worker_id,
            held=list(self.held),
            claiming=list(self._claiming),
        )
        return [
            JobMessage(
                queue=row.queue, job_ids=(row.id,), published_at=row.published_at, fence=row.fence
            )
            for row in rows
        ]

    async def _claim_many(self, requests: Sequence[tuple[UUID, Sequence[UUID]]]) -> list[list[Job]]:
        worker_id = self.worker_id
        # A job named by two messages goes to the first: the other finds it claimed.
        items: dict[UUID, UUID] = {}
        for claim_id, job_ids in requests:
            for job_id in job_ids:
                items.setdefault(job_id, claim_id)
        encoded = [{"job_id": job_id, "claim_id": claim} for job_id, claim in items.items()]
        rows = await through_disconnects(
            lambda: self._db.execute(_CLAIM, encoded, worker_id=worker_id, queues=self._queues),
            give_up_after_s=self._give_up_after_s,
        )
        now = asyncio.get_running_loop().time()
        by_claim: dict[UUID, list[Job]] = {claim_id: [] for claim_id, _ in requests}
        for row in rows:
            spec, unreadable = _UNOPENED, ""
            if row.request is not None:
                spec, unreadable = self._read(row.request)
            by_claim[row.claim_id].append(
                Job(
                    id=row.id,
                    claim_id=row.claim_id,
                    worker_id=worker_id,
                    fence=row.fence,
                    account_id=row.account_id,
                    use_case=row.use_case,
                    lane=Lane(row.lane),
                    queue=row.queue,
                    attempts_used=row.attempts_used,
                    unknown_attempts=row.unknown_attempts,
                    max_attempts=row.max_attempts,
                    cost_nano_usd=row.cost_nano_usd,
                    created_at=row.created_at,
                    deadline_s=now + row.left_s,
                    spec=spec,
                    unloaded_bytes=row.unloaded_bytes,
                    unreadable=unreadable,
                    unwanted=row.unwanted,
                    waited=row.waited,
                    refused=tuple(row.refused),
                    ruled_out=tuple(row.ruled_out),
                    tried=tuple(row.tried or ()),
                    repairs=(row.failures or []).count(ErrorClass.INVALID_ANSWER),
                )
            )
        return [by_claim[claim_id] for claim_id, _ in requests]

    def _read(self, request: str) -> tuple[JobSpec, str]:
        """Return what is asked for, or why it cannot be read."""
        try:
            return JobSpec.model_validate_json(self._bodies.open_request(request)), ""
        except SecretUnreadable:
            return _UNOPENED, "a worker's SLUICE_ENCRYPTION_KEYS lacks the key of its request"

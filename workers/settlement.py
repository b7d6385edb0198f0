"""Settlement: the one statement that ends an attempt, books its cost and moves its job."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

from sluicegate.shared.bodies import IN_THE_CLEAR, Bodies
from sluicegate.shared.coalescing import Coalescer
from sluicegate.shared.endings import CANCELLED_BODY
from sluicegate.shared.statements import Database, through_disconnects
from sluicegate.workers import ledger
from sluicegate.workers.failpoints import failpoint
from sluicegate.workers.ledger import Told

log = logging.getLogger(__name__)

# Locks go jobs, attempts, budgets, each by key. An attempt leaves `dispatching` once: whatever
# comes later finds nothing to move and books nothing. One that was booked as `unknown` takes the
# actual cost as a correction, and its job is then no longer this worker's (the fence differs), so
# result and state stay what they are. A job that goes to its next candidate in the same worker
# stays `running`. One that is to be cancelled is not called for again in any way: it ends.
_SETTLE = f"""
WITH wanted AS (
    SELECT * FROM json_to_recordset(%(items)s::json) AS t(
        n int, job_id uuid, fence bigint, job_state text, after_s float8, body json,
        attempt_id uuid, attempt_state text, error_class text, error_message text,
        status smallint, request_id text, first_token_ms int, duration_ms int,
        kind text, amount_nano_usd bigint, baseline_nano_usd bigint,
        input_tokens bigint, cache_read_tokens bigint, cache_write_5m_tokens bigint,
        cache_write_1h_tokens bigint, output_tokens bigint, reasoning_tokens bigint,
        raw_usage json, price_version text,
        queue text, refused uuid[], ruled_out uuid[], held_back text)
), job AS (
    SELECT wanted.n, j.id, j.fence, j.state, j.cancel_requested_at IS NOT NULL AS unwanted,
           j.purged_at IS NOT NULL AS purged
    FROM wanted JOIN jobs j ON j.id = wanted.job_id
    ORDER BY j.id
    FOR NO KEY UPDATE OF j
), attempt AS (
    SELECT wanted.n, a.id, a.state AS was, a.reserved_nano_usd, a.baseline_reserved_nano_usd
    FROM wanted JOIN attempts a ON a.id = wanted.attempt_id
    WHERE a.state IN ('dispatching', 'unknown') AND (SELECT count(*) FROM job) >= 0
    ORDER BY a.id
    FOR NO KEY UPDATE OF a
), ended AS (
    UPDATE attempts a
    SET state = CASE attempt.was WHEN 'unknown' THEN 'corrected' ELSE wanted.attempt_state END,
        ended_at = now(), error_class = wanted.error_class,
        -- What has been purged or erased does not come back by what is heard late.
        error_message = CASE WHEN NOT job.purged THEN wanted.error_message END,
        status = wanted.status, request_id = CASE WHEN NOT job.purged THEN wanted.request_id END,
        first_token_ms = wanted.first_token_ms, duration_ms = wanted.duration_ms,
        raw_usage = wanted.raw_usage
    FROM attempt JOIN wanted USING (n) JOIN job USING (n)
    WHERE a.id = attempt.id
    RETURNING wanted.n, a.id, attempt.was, a.account_id, a.use_case, a.provider_id, a.provider,
              a.model, a.dispatched_at, a.reserved_nano_usd,
              CASE attempt.was WHEN 'unknown' THEN a.reserved_nano_usd ELSE 0 END AS booked,
              CASE attempt.was WHEN 'unknown' THEN a.baseline_reserved_nano_usd ELSE 0 END
                  AS baseline_booked
), entry AS (
    INSERT INTO cost_entries (
        attempt_id, job_id, account_id, use_case, provider_id, provider, model, kind,
        amount_nano_usd, baseline_nano_usd, input_tokens, cache_read_tokens,
        cache_write_5m_tokens, cache_write_1h_tokens, output_tokens, reasoning_tokens,
        price_version, dispatched_at, first_token_ms, duration_ms)
    SELECT ended.id, w.job_id, ended.account_id, ended.use_case, ended.provider_id,
           ended.provider, ended.model,
           CASE ended.was WHEN 'unknown' THEN 'correction' ELSE w.kind END,
           coalesce(w.amount_nano_usd, 0) - ended.booked,
           coalesce(w.baseline_nano_usd, 0) - ended.baseline_booked,
           coalesce(w.input_tokens, 0), coalesce(w.cache_read_tokens, 0),
           coalesce(w.cache_write_5m_tokens, 0), coalesce(w.cache_write_1h_tokens, 0),
           coalesce(w.output_tokens, 0), coalesce(w.reasoning_tokens, 0),
           coalesce(w.price_version, 'none'), ended.dispatched_at, w.first_token_ms, w.duration_ms
    FROM ended JOIN wanted w USING (n)
    WHERE w.kind IS NOT NULL OR ended.was = 'unknown'
    RETURNING attempt_id, amount_nano_usd
), booked AS (
    SELECT ended.account_id, ended.use_case, ended.dispatched_at,
           CASE ended.was WHEN 'dispatching' THEN ended.reserved_nano_usd ELSE 0 END AS released,
           coalesce(entry.amount_nano_usd, 0) AS spent
    FROM ended LEFT JOIN entry ON entry.attempt_id = ended.id
), {ledger.CHARGE.format(source="booked")}, plan AS (
    SELECT w.n, job.id,
           job.fence = w.fence AND job.state = 'running'
               AND (w.attempt_id IS NULL OR ended.id IS NOT NULL) AS holds,
           CASE WHEN job.unwanted AND w.job_state IN ('queued', 'parked', 'running')
                THEN 'cancelled' ELSE w.job_state END AS job_state,
           coalesce(entry.amount_nano_usd, 0) AS amount,
           ended.id IS NOT NULL AND w.attempt_state <> 'void'
               AND w.error_class IS DISTINCT FROM 'rate_limited' AS counts
    FROM wanted w JOIN job USING (n)
    LEFT JOIN ended USING (n)
    LEFT JOIN entry ON entry.attempt_id = w.attempt_id
), moved AS (
    UPDATE jobs j
    SET cost_nano_usd = j.cost_nano_usd + plan.amount,
        attempts_used = j.attempts_used + (plan.holds AND plan.counts)::int,
        state = CASE WHEN plan.holds THEN plan.job_state ELSE j.state END,
        worker_id = CASE WHEN plan.holds AND plan.job_state <> 'running'
                         THEN NULL ELSE j.worker_id END,
        claim_id = CASE WHEN plan.holds AND plan.job_state <> 'running'
                        THEN NULL ELSE j.claim_id END,
        queue = CASE WHEN plan.holds THEN coalesce(w.queue, j.queue) ELSE j.queue END,
        refused = CASE WHEN plan.holds THEN coalesce(w.refused, '{{}}') ELSE j.refused END,
        ruled_out = CASE WHEN plan.holds THEN coalesce(w.ruled_out, j.ruled_out)
                         ELSE j.ruled_out END,
        held_back = CASE WHEN plan.holds THEN w.held_back ELSE j.held_back END,
        run_at = CASE WHEN plan.holds AND w.after_s IS NOT NULL
                      THEN now() + w.after_s * interval '1 second' ELSE j.run_at END,
        published_at = CASE WHEN plan.holds AND plan.job_state = 'queued'
                            THEN now() ELSE j.published_at END,
        finished_at = CASE WHEN plan.holds
                                AND plan.job_state NOT IN ('queued', 'parked', 'running')
                           THEN now() ELSE j.finished_at END
    FROM plan JOIN wanted w USING (n)
    WHERE j.id = plan.id AND (plan.holds OR plan.amount <> 0)
    RETURNING w.n, plan.holds, j.id, j.use_case, j.state, j.cost_nano_usd, j.attempts_used,
              j.finished_at, j.published_at
), kept AS (
    INSERT INTO results (job_id, attempt_id, fence, body)
    SELECT w.job_id, w.attempt_id, w.fence, coalesce(w.body, {CANCELLED_BODY})
    FROM wanted w JOIN moved j USING (n)
    WHERE j.holds AND j.state NOT IN ('queued', 'parked', 'running')
)
SELECT w.n, coalesce(j.holds, false) AS moved, j.published_at,
       coalesce(j.finished_at, was.finished_at) AS finished_at,
       coalesce(w.queue, was.queue, '') AS queue,
       was.state AS state_before, was.fence AS fence_before,
       CASE WHEN j.holds AND j.state = 'cancelled' AND w.body IS NULL
            THEN {CANCELLED_BODY} END AS body,
       NULL::json AS budget
FROM wanted w
LEFT JOIN moved j USING (n)
LEFT JOIN jobs was ON was.id = w.job_id
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, {ledger.COPY} FROM after b
"""


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of one settlement.

    `moved` is False where the job was no longer the worker's: the attempt is booked all the same.
    """

    moved: bool
    #: Where the job is to be published if it is queued.
    queue: str = ""
    finished_at: datetime | None = None
    published_at: datetime | None = None
    #: The result that was stored in place of another try, because the job is to be cancelled.
    body: dict[str, Any] | None = None


#: One settlement: the columns of `_SETTLE`'s `wanted`, JSON-ready, absent where null.
Settlement = dict[str, Any]


async def settle_all(db: Database, settlements: Sequence[Settlement], told: Told) -> list[Settled]:
    """Settle in one statement; safe to repeat. Each job may occur once.

    `told` hears of the budgets that were charged.
    """
    items = [settlement | {"n": n} for n, settlement in enumerate(settlements)]
    rows = await db.execute(_SETTLE, items)
    failpoint("charged")
    ledger.tell(rows, told)
    by_n = {row.n: row for row in rows}
    return [_read(settlement, by_n[n]) for n, settlement in enumerate(settlements)]


def _read(settlement: Settlement, row: Any) -> Settled:
    # A repeat whose first try committed finds the job as that try left it.
    repeated = (
        row.state_before == settlement["job_state"] and row.fence_before == settlement["fence"]
    )
    return Settled(
        moved=row.moved or repeated,
        queue=row.queue,
        finished_at=row.finished_at,
        published_at=row.published_at,
        body=row.body,
    )


class Settler:
    """Settles attempts, through any outage of Postgres.

    While Postgres is away, `journal` is given what is paid for and not yet booked; `forget` is
    told once it is. Waits as long as it takes: the message is not acknowledged before.
    """

    def __init__(
        self,
        *,
        db: Database,
        max_items: int,
        spacing_s: float,
        journal: Callable[[Sequence[Settlement]], Awaitable[None]],
        forget: Callable[[Sequence[Settlement]], Awaitable[None]],
        told: Told,
        bodies: Bodies = IN_THE_CLEAR,
    ) -> None:
        self._db = db
        self._bodies = bodies
        self._told = told
        self._journal = journal
        self._forget = forget
        self._is_away = False
        #: What is handed in, not booked and not in the journal, by identity.
        self._unkept: dict[int, Settlement] = {}
        self._settle = Coalescer[Settlement, Settled](
            statement=self._settle_many, max_items=max_items, spacing_s=spacing_s, keeps=True
        )

    async def finish(self) -> None:
        """Wait until everything that was handed in is booked, also what nobody waits for now."""
        await self._settle.finish()

    async def settle(self, settlement: Settlement) -> Settled:
        """End an attempt (if it names one) and move its job (if it is still held)."""
        if "body" in settlement:
            settlement = settlement | {"body": self._bodies.seal_result(settlement["body"])}
        self._unkept[id(settlement)] = settlement
        try:
            if self._is_away:
                # The statements under way wait for Postgres, and this one for their turn.
                await self._keep()
            return await self._settle(settlement)
        finally:
            self._unkept.pop(id(settlement), None)

    async def _settle_many(self, settlements: Sequence[Settlement]) -> list[Settled]:
        outcomes: list[Settled] = []
        for batch in _one_per_job(settlements):
            outcomes += await through_disconnects(
                partial(settle_all, self._db, batch, self._told),
                give_up_after_s=None,
                on_disconnect=self._keep,
            )
        self._is_away = False
        if any(id(settlement) not in self._unkept for settlement in settlements):
            await self._forget(settlements)
        return outcomes

    async def _keep(self) -> None:
        """Have the journal keep all that is handed in and not booked."""
        self._is_away = True
        unkept, self._unkept = list(self._unkept.values()), {}
        if unkept:
            await self._journal(unkept)


def _one_per_job(settlements: Sequence[Settlement]) -> list[list[Settlement]]:
    """Split, in order, so that no statement names a job twice."""
    batches: list[list[Settlement]] = [[]]
    named: set[UUID] = set()
    for settlement in settlements:
        if settlement["job_id"] in named:
            batches.append([])
            named.clear()
        named.add(settlement["job_id"])
        batches[-1].append(settlement)
    return batches

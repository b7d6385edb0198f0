"""What a caller may know about a job."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row

from sluicegate.shared.bodies import Bodies
from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.jobs import AttemptState, Lane, Result, State, dollars
from sluicegate.shared.messages import Frozen
from sluicegate.shared.replies import load_result


class AttemptView(Frozen):
    """One paid call: where it went, how it ended, what it cost."""

    number: int
    provider: str
    model: str
    state: AttemptState
    error_class: ErrorClass | None
    error_message: str | None
    #: HTTP status, where there was one.
    status: int | None
    #: The provider's own id of the call.
    request_id: str | None
    dispatched_at: datetime
    ended_at: datetime | None
    first_token_ms: int | None
    duration_ms: int | None
    #: Booked so far; None while nothing is.
    cost_nano_usd: int | None


class JobView(Frozen):
    """A job as it stands."""

    id: UUID
    state: State
    use_case: str
    lane: Lane
    queue: str
    #: The account's name.
    account: str
    account_id: UUID
    #: Paid calls so far, and how many there may be.
    attempts: int
    max_attempts: int
    cost_nano_usd: int
    created_at: datetime
    #: Not started before; later than `created_at` where the job waits for something.
    run_at: datetime
    deadline_at: datetime
    #: While the gates keep it parked: what each of its providers said.
    held_back: str | None
    finished_at: datetime | None
    #: When its request and its answer were removed.
    purged_at: datetime | None
    idempotency_key: str | None
    request_id: str | None
    submitted_by: str | None
    submitted_from: str | None
    #: The shared channel that its result goes to.
    reply_to: str | None
    #: The batch it came with, and its line there, from 1.
    batch_id: UUID | None
    batch_line: int | None
    #: Since when a running job is to be cancelled.
    cancel_requested_at: datetime | None
    #: As it was given at the submit.
    metadata: dict[str, str]
    history: tuple[AttemptView, ...]
    #: None until the job has ended.
    result: Result | None

    @property
    def cost(self) -> Decimal:
        """What its calls have cost so far, in US dollars, exact."""
        return dollars(self.cost_nano_usd)


# An attempt has at most one entry and one correction, each under an index of its own.
JOB_QUERY: Final = """
SELECT j.id, j.id AS job_id, j.state, j.use_case, j.lane, j.queue, j.account_id,
       a.name AS account, j.attempts_used AS attempts, j.max_attempts, j.cost_nano_usd,
       j.created_at, j.run_at, j.deadline_at,
       CASE j.state WHEN 'parked' THEN j.held_back END AS held_back,
       j.finished_at, j.purged_at, j.idempotency_key, j.request_id, j.submitted_by,
       j.submitted_from, j.reply_to, j.batch_id, j.batch_line, j.cancel_requested_at, r.body,
       coalesce(b.request->'metadata', '{}'::json) AS metadata,
       (SELECT coalesce(json_agg(one), '[]'::json) FROM (
           SELECT t.number, t.provider, t.model, t.state, t.error_class, t.error_message,
                  t.status, t.request_id, t.dispatched_at, t.ended_at, t.first_token_ms,
                  t.duration_ms,
                  (SELECT c.amount_nano_usd FROM cost_entries c
                   WHERE c.attempt_id = t.id AND c.kind <> 'correction')
                  + coalesce((SELECT c.amount_nano_usd FROM cost_entries c
                              WHERE c.attempt_id = t.id AND c.kind = 'correction'), 0)
                  AS cost_nano_usd
           FROM attempts t WHERE t.job_id = j.id ORDER BY t.fence, t.number, t.id
       ) AS one) AS history
FROM jobs j JOIN accounts a ON a.id = j.account_id LEFT JOIN job_bodies b ON b.job_id = j.id
LEFT JOIN results r ON r.job_id = j.id
WHERE j.id = %(job_id)s
"""


def load_job(row: Row[Any], bodies: Bodies) -> JobView:
    """Build the view from a row of `JOB_QUERY`; raises SecretUnreadable."""
    values = {name: row._mapping[name] for name in JobView.model_fields if name != "result"}
    values["metadata"] = bodies.open_metadata(row.metadata)
    return JobView.model_validate({**values, "result": load_result(row, bodies)})

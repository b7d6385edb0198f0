"""Batches: how far they are, what came out of them, and cancelling what waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, Protocol, TypeVar
from uuid import UUID

from sqlalchemy import Connection, Row

from sluicegate.producers.outcomes import check_timeout
from sluicegate.shared.batches import CANCEL_SLICE, CANCEL_WAITING, LAST_LINE
from sluicegate.shared.bodies import IN_THE_CLEAR, Bodies
from sluicegate.shared.errors import InvalidJob, NotFound, ResultTimeout
from sluicegate.shared.ids import new_id
from sluicegate.shared.jobs import Result, State, dollars
from sluicegate.shared.messages import Frozen
from sluicegate.shared.replies import load_result

T = TypeVar("T")

#: How often `wait` looks: one row by its key.
POLL_S: Final = 1.0

_PAGE_LINES = 1000

_PROGRESS: Final = """
SELECT b.id, b.name, a.name AS account, b.use_case, b.total, b.succeeded, b.failed, b.cancelled,
       b.expired, b.rejected, b.submitted_by, b.created_at, b.cancelled_at, b.finished_at
FROM batches b JOIN accounts a ON a.id = b.account_id
"""
_ONE = _PROGRESS + "WHERE b.id = %(batch_id)s"
_NEWEST = _PROGRESS + "ORDER BY b.created_at DESC, b.id DESC LIMIT %(limit)s"

_COST: Final = """
SELECT coalesce(sum(cost_nano_usd), 0)::bigint FROM jobs WHERE batch_id = %(batch_id)s
"""

# Looked up by key for each job: a batch of any size needs neither a sort nor a transaction that
# stays open while somebody reads.
_RESULTS: Final = f"""
SELECT j.batch_line AS line, j.id AS job_id, j.state, j.cost_nano_usd, j.created_at, j.finished_at,
       (SELECT r.body FROM results r WHERE r.job_id = j.id) AS body,
       (SELECT b.request -> 'metadata' FROM job_bodies b WHERE b.job_id = j.id) AS metadata
FROM jobs j
WHERE j.batch_id = %(batch_id)s AND (%(state)s::text IS NULL OR j.state = %(state)s)
  AND j.batch_line > %(after)s AND j.batch_line <= %(after)s + {_PAGE_LINES}
ORDER BY j.batch_line
"""

_CANCEL: Final = """
UPDATE batches SET cancelled_at = coalesce(cancelled_at, now())
WHERE id = %(batch_id)s AND finished_at IS NULL
"""


class BatchProgress(Frozen):
    """How far a batch is. Its jobs have ended in four ways, or go on."""

    id: UUID
    #: What it was made from, such as the name of a file.
    name: str
    #: The account's name.
    account: str
    use_case: str
    total: int
    succeeded: int
    failed: int
    cancelled: int
    expired: int
    #: Rows that could be no job.
    rejected: int
    submitted_by: str | None
    created_at: datetime
    cancelled_at: datetime | None
    #: None until the last of its jobs has ended.
    finished_at: datetime | None

    @property
    def ended(self) -> int:
        """How many of its jobs have ended."""
        return self.succeeded + self.failed + self.cancelled + self.expired


class BatchView(BatchProgress):
    """How far a batch is, and what it has cost so far."""

    cost_nano_usd: int

    @property
    def cost(self) -> Decimal:
        """What its calls have cost so far, in US dollars, exact."""
        return dollars(self.cost_nano_usd)


class BatchResult(Frozen):
    """One job of a batch as it stands."""

    #: The line of the file it began on, or its place among the rows, from 1.
    line: int
    job_id: UUID
    state: State
    metadata: dict[str, str]
    cost_nano_usd: int
    #: None until the job has ended.
    result: Result | None


class Query(Protocol):
    """What runs work on a connection, and again where it may be repeated."""

    def __call__(self, work: Callable[[Connection], T]) -> T:
        """Return what `work` returns; raise `QueueUnavailable`."""


class Batch:
    """A batch that was accepted."""

    def __init__(
        self,
        query: Query,
        batch_id: UUID,
        *,
        bodies: Bodies = IN_THE_CLEAR,
        is_new: bool = False,
        repeated: int = 0,
    ) -> None:
        self.id = batch_id
        #: Whether it was stored by the call that returned it, and not by an earlier one.
        self.is_new = is_new
        #: Rows of that call which are no jobs of it: their idempotency keys have some already.
        self.repeated = repeated
        self._query = query
        self._bodies = bodies

    def __repr__(self) -> str:
        return f"Batch({str(self.id)!r})"

    def progress(self) -> BatchProgress:
        """Look how far it is, which costs next to nothing; raises `NotFound`."""
        return self._query(lambda connection: find_progress(connection, self.id))

    def view(self) -> BatchView:
        """Look how far it is and what it has cost; raises `NotFound`."""
        progress = self.progress()
        cost = self._query(lambda connection: find_cost(connection, self.id))
        return BatchView(**dict(progress), cost_nano_usd=cost)

    def wait(self, timeout: float | None = None) -> BatchView:
        """Wait until all its jobs have ended, at most `timeout` seconds.

        Raises `ResultTimeout`, which cancels nothing, and `NotFound`.
        """
        seconds = check_timeout(timeout)
        deadline = None if seconds is None else time.monotonic() + seconds
        while (progress := self.progress()).finished_at is None:
            left = POLL_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise ResultTimeout(
                    f"batch {self.id} did not end within {seconds:g} s; it goes on "
                    f"({progress.ended:,} of {progress.total:,} jobs have ended)"
                )
            time.sleep(min(POLL_S, left))
        return self.view()

    def results(self, state: State | str | None = None) -> Iterator[BatchResult]:
        """Iterate over its jobs by line, ended or not, or over those in one state.

        Read page by page, so that any number takes the same memory. Raises `NotFound`.
        """
        wanted = _read_state(state)
        self.progress()
        return self._results(wanted)

    def _results(self, state: str | None) -> Iterator[BatchResult]:
        for after in range(0, self._last_line(), _PAGE_LINES):
            values = {"batch_id": self.id, "after": after, "state": state}
            for row in self._rows(_RESULTS, values):
                yield _load_batch_result(row, self._bodies)

    def cancel(self) -> int:
        """Cancel all its jobs that wait; return how many. Calls that run finish.

        What comes back from a call to be tried again is cancelled by the sweep. Raises `NotFound`.
        """
        self.progress()
        self._query(lambda connection: connection.exec_driver_sql(_CANCEL, {"batch_id": self.id}))
        cancelled = 0
        for after in range(0, self._last_line(), CANCEL_SLICE):
            (ended,) = self._rows(CANCEL_WAITING, {"batch_id": self.id, "after": after})
            cancelled += int(ended.jobs)
        return cancelled

    def _last_line(self) -> int:
        (found,) = self._rows(LAST_LINE, {"batch_id": self.id})
        return int(found.last or 0)

    def _rows(self, statement: str, values: dict[str, Any]) -> Sequence[Row[Any]]:
        return self._query(lambda connection: connection.exec_driver_sql(statement, values).all())


def find_progress(connection: Connection, batch_id: UUID) -> BatchProgress:
    """Look at one batch; raise `NotFound`."""
    row = connection.exec_driver_sql(_ONE, {"batch_id": batch_id}).one_or_none()
    if row is None:
        raise NotFound(f"there is no batch {batch_id}")
    return BatchProgress.model_validate(dict(row._mapping))


def find_cost(connection: Connection, batch_id: UUID) -> int:
    """Sum what a batch has cost so far, in nano-USD: reads all its jobs."""
    return int(connection.exec_driver_sql(_COST, {"batch_id": batch_id}).scalar_one())


def list_batches(connection: Connection, limit: int) -> list[BatchProgress]:
    """Return the newest batches, the newest first."""
    rows = connection.exec_driver_sql(_NEWEST, {"limit": limit})
    return [BatchProgress.model_validate(dict(row._mapping)) for row in rows]


def parse_batch_id(batch_id: UUID | str) -> UUID:
    """Return the id; raise `InvalidJob` if it is not a UUID."""
    if isinstance(batch_id, UUID):
        return batch_id
    try:
        return UUID(batch_id)
    except (ValueError, AttributeError, TypeError):
        raise InvalidJob(
            "batch_id", f"{batch_id!r} is not a batch's id, which is a UUID such as {new_id()}"
        ) from None


def _read_state(state: State | str | None) -> str | None:
    if state is None:
        return None
    try:
        return State(state).value
    except ValueError:
        known = ", ".join(State)
        raise InvalidJob("state", f"{state!r} is not known; there are {known}") from None


def _load_batch_result(row: Row[Any], bodies: Bodies) -> BatchResult:
    return BatchResult(
        line=row.line,
        job_id=row.job_id,
        state=row.state,
        metadata=bodies.open_metadata(row.metadata),
        cost_nano_usd=row.cost_nano_usd,
        result=load_result(row, bodies),
    )

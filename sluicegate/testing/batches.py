"""Batches in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from sqlalchemy import Connection

from sluicegate.producers.batches import Batch, BatchProgress, BatchResult, BatchView
from sluicegate.producers.bulk import Form
from sluicegate.producers.bulk_rows import batch_rows, refuse
from sluicegate.producers.outcomes import check_timeout
from sluicegate.producers.submission import Desk, Draft, Request, read_request
from sluicegate.shared.errors import IdempotencyConflict, InvalidJob, ResultTimeout
from sluicegate.shared.ids import new_id
from sluicegate.shared.jobs import Lane, State
from sluicegate.testing.job import FakeJob
from sluicegate.testing.script import ScriptError

if TYPE_CHECKING:
    from sluicegate.testing.fleet import Fleet


T = TypeVar("T")


@dataclass(eq=False, kw_only=True)
class BatchRecord:
    """A batch that was accepted; its jobs know that they are its."""

    name: str
    account: str
    #: What its rows have in common.
    common: Draft
    idempotency_key: str | None
    #: Rows that have jobs already.
    repeated: int = 0
    id: UUID = field(default_factory=new_id)
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    cancelled_at: datetime | None = None


def check_common(form: Form, desk: Desk) -> Draft:
    """Check what all rows have in common; raise `InvalidJob`."""
    return desk.draft(read_request(form.use_case, "-", {**form.common, "lane": Lane.BULK}))


def check_rows(rows: Iterable[Any], form: Form, desk: Desk) -> Iterator[tuple[int, Request, Draft]]:
    """Check rows one by one; raise `InvalidJob` that names the row which is refused."""
    for row in batch_rows(rows):
        try:
            request = form.request(row.values)
            yield row.line, request, desk.draft(request)
        except (InvalidJob, IdempotencyConflict) as error:
            refuse.reject(row, error)


class FakeBatch(Batch):
    """A batch that was accepted by a fake: a `Batch` that never waits."""

    def __init__(
        self, fleet: Fleet, batch_id: UUID, *, is_new: bool = False, repeated: int = 0
    ) -> None:
        super().__init__(_no_query, batch_id, is_new=is_new, repeated=repeated)
        self._fleet = fleet

    def progress(self) -> BatchProgress:
        """Look how far it is; raise `NotFound`."""
        record = self._fleet.find_batch(self.id)
        jobs = self._jobs()
        ends = [job.result.finished_at for job in jobs if job.result and job.result.finished_at]
        counts = {
            state.value: sum(job.state is state for job in jobs)
            for state in State
            if state.terminal
        }
        return BatchProgress.model_validate(
            {
                **counts,
                "id": self.id,
                "name": record.name,
                "account": record.account,
                "use_case": record.common.use_case,
                "total": len(jobs),
                "rejected": 0,
                "submitted_by": record.common.submitted_by,
                "created_at": record.created_at,
                "cancelled_at": record.cancelled_at,
                "finished_at": max(ends) if len(ends) == len(jobs) else None,
            }
        )

    def view(self) -> BatchView:
        """Look how far it is and what it has cost; raise `NotFound`."""
        cost_nano_usd = sum(job.cost_nano_usd for job in self._jobs())
        return BatchView(**dict(self.progress()), cost_nano_usd=cost_nano_usd)

    def wait(self, timeout: float | None = None) -> BatchView:
        """Do its jobs; raise `ResultTimeout` if one of them never ends."""
        seconds = check_timeout(timeout)
        self.progress()
        self._fleet.work(self._jobs())
        view = self.view()
        if view.finished_at is None:
            if seconds is None:
                raise ScriptError(
                    f"batch {self.id} has a job that never ends, and nobody gave a timeout: the "
                    "real client would wait for ever"
                )
            raise ResultTimeout(
                f"batch {self.id} did not end within {seconds:g} s; it goes on "
                f"({view.ended:,} of {view.total:,} jobs have ended)"
            )
        return view

    def cancel(self) -> int:
        """Cancel all its jobs that wait; return how many."""
        self.progress()
        waiting = [job for job in self._jobs() if job.waits]
        if waiting:
            self._fleet.find_batch(self.id).cancelled_at = datetime.now(UTC)
        for job in waiting:
            self._fleet.cancel(job.id)
        return len(waiting)

    def _results(self, state: str | None) -> Iterator[BatchResult]:
        for job in self._jobs():
            if state in (None, job.state):
                assert job.batch_line is not None
                yield BatchResult(
                    line=job.batch_line,
                    job_id=job.id,
                    state=job.state,
                    metadata=job.metadata,
                    cost_nano_usd=job.cost_nano_usd,
                    result=job.result,
                )

    def _jobs(self) -> list[FakeJob]:
        return [job for job in self._fleet.jobs() if job.batch_id == self.id]


def _no_query(work: Callable[[Connection], T]) -> T:
    raise NotImplementedError(f"a fake has no database, and does not fake {work!r} yet")

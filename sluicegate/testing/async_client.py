"""The fake of `AsyncSluice`: as `FakeSluice`, awaited."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any, NoReturn, Unpack
from uuid import UUID

from pydantic import BaseModel

from sluicegate.producers.async_client import AsyncSluice
from sluicegate.producers.handles import AsyncJobHandle
from sluicegate.producers.listing import JobFilters, JobSummary
from sluicegate.producers.outcomes import check_timeout, expecting, not_committed
from sluicegate.producers.reply_channels import BATCH, Channel
from sluicegate.producers.submission import (
    JobOptions,
    Prompt,
    Request,
    parse_job_id,
    read_request,
    read_requests,
)
from sluicegate.producers.views import JobView
from sluicegate.shared.errors import NotFound
from sluicegate.shared.events import Event, id_key
from sluicegate.shared.jobs import State
from sluicegate.shared.replies import parse_event_id
from sluicegate.testing.client import Stage
from sluicegate.testing.replies import AsyncFakeReplies
from sluicegate.testing.transactions import Transaction, watch_async


class AsyncFakeJobHandle(AsyncJobHandle):
    """A job that was accepted by a fake: an `AsyncJobHandle` that never waits."""

    def __init__(
        self,
        client: AsyncFakeSluice,
        job_id: UUID,
        *,
        answer_type: type[BaseModel] | None = None,
        joined: bool = False,
    ) -> None:
        super().__init__(client, job_id, answer_type=answer_type, joined=joined)
        self._fake = client

    async def _events(
        self,
        last_id: str,
        timeout: float | None,  # noqa: ASYNC109 - the interface of the real handle
        *,
        terminal_only: bool,
    ) -> AsyncGenerator[Event, None]:
        self._fake.check_open()
        last = parse_event_id(last_id)
        try:
            while (event := self._fake.fleet.next_event(self.id, last, timeout)) is not None:
                last = id_key(event.id)
                if event.terminal or not terminal_only:
                    yield expecting(event, self._answer_type)
        except NotFound:
            if self._joined:
                raise not_committed(self.id) from None
            raise


class AsyncFakeSluice(Stage, AsyncSluice):
    """An `AsyncSluice` that needs no servers; see `Stage` for what it takes and adds."""

    async def submit(
        self,
        use_case: str | None,
        prompt: Prompt,
        *,
        connection: object = None,
        **options: Unpack[JobOptions],
    ) -> AsyncFakeJobHandle:
        """Keep one job; raise as `AsyncSluice.submit`."""
        self.check_open()
        transaction = None if connection is None else await watch_async(connection)
        request = read_request(use_case, prompt, options)
        (job_id,) = self.fleet.submit([request], transaction, listed=False)
        return self._handle(request, job_id, transaction)

    async def submit_many(
        self,
        use_case: str | None,
        jobs: Iterable[Prompt | Mapping[str, Any]],
        *,
        connection: object = None,
        **common: Unpack[JobOptions],
    ) -> list[AsyncJobHandle]:
        """Keep many jobs, all or none; raise as `AsyncSluice.submit_many`."""
        self.check_open()
        transaction = None if connection is None else await watch_async(connection)
        requests = read_requests(use_case, jobs, common)
        ids = self.fleet.submit(requests, transaction)
        return [
            self._handle(request, job_id, transaction)
            for request, job_id in zip(requests, ids, strict=True)
        ]

    def _handle(
        self, request: Request, job_id: UUID, transaction: Transaction | None
    ) -> AsyncFakeJobHandle:
        return AsyncFakeJobHandle(
            self, job_id, answer_type=request.answer_type, joined=transaction is not None
        )

    async def get(self, job_id: UUID | str) -> JobView:
        """Look at a job; raise `NotFound`."""
        self.check_open()
        return self.fleet.find(parse_job_id(job_id)).view()

    def handle(
        self, job_id: UUID | str, response_format: type[BaseModel] | None = None
    ) -> AsyncFakeJobHandle:
        """Return a handle of a job that was accepted before."""
        return AsyncFakeJobHandle(self, parse_job_id(job_id), answer_type=response_format)

    async def cancel(self, job_id: UUID | str) -> State:
        """Cancel a job; return what `AsyncSluice.cancel` would."""
        self.check_open()
        return self.fleet.cancel(parse_job_id(job_id))

    async def retry(self, job_id: UUID | str) -> AsyncFakeJobHandle:
        """Queue a job again; raise as `AsyncSluice.retry`."""
        self.check_open()
        wanted = parse_job_id(job_id)
        self.fleet.retry(wanted)
        return AsyncFakeJobHandle(self, wanted)

    async def list_jobs(self, **filters: Unpack[JobFilters]) -> list[JobSummary]:
        """List jobs, newest first; raise as `AsyncSluice.list_jobs`."""
        self.check_open()
        return self.fleet.list_jobs(filters)

    def replies(
        self,
        channel: str,
        group: str,
        *,
        consumer: str | None = None,
        timeout: float | None = None,
        redeliver_after_s: float = 60.0,
        batch: int = BATCH,
    ) -> AsyncFakeReplies:
        """Read a shared reply channel as one of a group.

        The iteration ends when there are no more replies, whatever the timeout. What a consumer did
        not acknowledge comes again to the next one, as soon as the first is closed.
        """
        self.check_open()
        check_timeout(timeout)
        view = Channel(
            settings=self.settings,
            channel=channel,
            group=group,
            consumer=consumer,
            redeliver_after_s=redeliver_after_s,
            batch=batch,
        )
        return AsyncFakeReplies(view, self.fleet.channels, self.fleet.next_reply)

    async def close(self) -> None:
        """Close it; what was submitted can still be looked at."""
        self._closed = True

    def _open(self) -> NoReturn:
        raise NotImplementedError("the fake has no connections; this method is not faked yet")

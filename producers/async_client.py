"""The client for an event loop: as `Sluice`, awaited.

async with AsyncSluice() as sluice:
    job = await sluice.submit("draft", "Write a follow-up about the meeting.")
    print((await job.result(timeout=60)).text)
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection
from tenacity import AsyncRetrying

from sluicegate.producers.client import resolve_settings
from sluicegate.producers.outcomes import (
    REPEAT,
    check_timeout,
    result_of,
    timed_out,
)
from sluicegate.producers.publishing import publish_accepted
from sluicegate.producers.storing import (
    FIND,
    INSERT,
    Accepted,
    accept,
    batches,
    missing,
    parameters,
)
from sluicegate.producers.submission import (
    FIND_ACCOUNTS,
    AccountBook,
    Desk,
    Draft,
    JobOptions,
    Prompt,
    Request,
    account_parameters,
    parse_job_id,
    read_request,
    read_requests,
)
from sluicegate.producers.views import JOB_QUERY, JobView, load_job
from sluicegate.shared.catalogue import AsyncCatalogueCache
from sluicegate.shared.celery_app import JobMessage, make_celery
from sluicegate.shared.database import DATABASE_ERRORS, explain, make_async_engine
from sluicegate.shared.errors import NotFound, SluiceError
from sluicegate.shared.events import Event
from sluicegate.shared.jobs import Result
from sluicegate.shared.redis_client import make_async_redis
from sluicegate.shared.replies import parse_event_id
from sluicegate.shared.reply_reader import AsyncReplyReader
from sluicegate.shared.settings import Settings

T = TypeVar("T")


class AsyncJobHandle:
    """A job that was accepted."""

    def __init__(self, client: AsyncSluice, job_id: UUID, *, fresh_until: float = 0.0) -> None:
        self.id = job_id
        self._client = client
        # A job that was submitted just now has not ended yet: its row need not be looked at.
        self._fresh_until = fresh_until

    def __repr__(self) -> str:
        return f"AsyncJobHandle({str(self.id)!r})"

    async def result(self, timeout: float | None = None) -> Result:  # noqa: ASYNC109 - the error is ours and tells that nothing was cancelled
        """Wait for the answer, at most `timeout` seconds.

        Raises `JobFailed`, `JobExpired`, `JobCancelled`; `ResultTimeout`, which cancels nothing;
        `NotFound` if there is no such job.
        """
        seconds = check_timeout(timeout)
        (event,) = [one async for one in self._events("0", seconds, terminal_only=True)]
        return result_of(event)

    def events(
        self, last_id: str = "0", timeout: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """Iterate over the job's events after `last_id`, until the terminal one.

        Raises `ResultTimeout` when `timeout` seconds have passed; `NotFound`. Leave it early by
        way of `contextlib.aclosing`.
        """
        parse_event_id(last_id)
        return self._events(last_id, check_timeout(timeout), terminal_only=False)

    async def _events(
        self,
        last_id: str,
        timeout: float | None,  # noqa: ASYNC109 - as above
        *,
        terminal_only: bool,
    ) -> AsyncGenerator[Event, None]:
        now = time.monotonic()
        deadline = None if timeout is None else now + timeout
        reader = self._client.reader
        subscription = await reader.subscribe(
            self.id,
            last_id,
            terminal_only=terminal_only,
            check_after_s=max(0.0, self._fresh_until - now),
        )
        try:
            while (event := await reader.next(subscription, deadline)) is not None:
                yield event
        except TimeoutError:
            raise timed_out(self.id, timeout) from None
        finally:
            reader.unsubscribe(subscription)


class _Lines:
    """The connections of one process, for one event loop. Each opens at first use."""

    def __init__(self, settings: Settings) -> None:
        self.pid = os.getpid()
        self.engine = make_async_engine(settings, application_name="sluice producer")
        self.redis = make_async_redis(settings)
        self.app = make_celery(settings)
        self.reader = AsyncReplyReader(settings=settings, engine=self.engine, client=self.redis)
        self.catalogue = AsyncCatalogueCache(
            prefix=settings.redis_prefix, ttl_s=settings.catalogue_ttl_s
        )
        # Celery publishes synchronously; one thread does it for all who submit.
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="sluice-publisher")
        self._unpublished: list[JobMessage] = []
        self._publishing: asyncio.Task[None] | None = None

    async def publish(self, messages: Sequence[JobMessage]) -> None:
        """Publish, together with what others have to publish meanwhile."""
        self._unpublished += messages
        if self._publishing is None:
            self._publishing = asyncio.create_task(self._publish())
        await asyncio.shield(self._publishing)

    async def _publish(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._unpublished:
                messages, self._unpublished = self._unpublished, []
                await loop.run_in_executor(self._publisher, publish_accepted, self.app, messages)
        finally:
            self._publishing = None

    async def close(self) -> None:
        await self.reader.close()
        if self._publishing is not None:
            await self._publishing
        await asyncio.to_thread(self._publisher.shutdown)
        self.app.close()
        await self.redis.aclose()
        await self.engine.dispose()


class AsyncSluice:
    """Submits jobs and reads their results, on one event loop; it connects at first use.

    settings: those of the environment if not given. Keywords replace single settings, as in
    `AsyncSluice(redis_prefix="crm:")`.
    """

    def __init__(self, settings: Settings | None = None, **overrides: Any) -> None:
        self.settings = resolve_settings(settings, overrides)
        self._lines: _Lines | None = None
        self._closed = False
        self._accounts = AccountBook()

    async def submit(
        self, use_case: str, prompt: Prompt, **options: Unpack[JobOptions]
    ) -> AsyncJobHandle:
        """Accept one job; it is stored when this returns.

        Raises `InvalidJob` that names the field which is refused, `IdempotencyConflict`, and
        `QueueUnavailable` if Postgres does not answer.
        """
        request = read_request(use_case, prompt, options)
        desk = await self._desk([request])
        return (await self._submit([desk.draft(request)]))[0]

    async def submit_many(
        self,
        use_case: str | None,
        jobs: Iterable[Prompt | Mapping[str, Any]],
        **common: Unpack[JobOptions],
    ) -> list[AsyncJobHandle]:
        """Accept many jobs, all or none; raises as `submit`.

        Each is a prompt, or a mapping with `prompt` and what it has other than the rest: any
        option of `submit`, `use_case` too.
        """
        # Checking thousands of jobs takes seconds, which belong to the loop's other tasks.
        requests = await asyncio.to_thread(read_requests, use_case, jobs, common)
        desk = await self._desk(requests)
        return await self._submit(await asyncio.to_thread(desk.draft_all, requests))

    async def get(self, job_id: UUID | str) -> JobView:
        """Look at a job; raises `NotFound`."""
        wanted = parse_job_id(job_id)

        async def look(connection: AsyncConnection) -> JobView:
            row = (await connection.exec_driver_sql(JOB_QUERY, {"job_id": wanted})).one_or_none()
            if row is None:
                raise NotFound(f"there is no job {wanted}")
            return load_job(row)

        return await self._query(look)

    def handle(self, job_id: UUID | str) -> AsyncJobHandle:
        """Return a handle of a job that was accepted before, here or elsewhere."""
        return AsyncJobHandle(self, parse_job_id(job_id))

    async def close(self) -> None:
        """Close all connections; whoever still waits for a result gets a `SluiceError`."""
        lines, self._lines = self._lines, None
        self._closed = True
        if lines is not None:
            await lines.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def reader(self) -> AsyncReplyReader:
        """What reads the reply channels, for handles."""
        return self._open().reader

    def _open(self) -> _Lines:
        if self._closed:
            raise SluiceError("this client is closed; make a new one")
        # After a fork the sockets belong to the parent: leave them alone, open others.
        if self._lines is None or self._lines.pid != os.getpid():
            self._lines = _Lines(self.settings)
        return self._lines

    async def _desk(self, requests: Sequence[Request]) -> Desk:
        ids, unknown = self._accounts.known(requests)
        if unknown:

            async def find(connection: AsyncConnection) -> dict[str, UUID]:
                named = account_parameters(unknown)
                return self._accounts.learn(await connection.exec_driver_sql(FIND_ACCOUNTS, named))

            ids |= await self._query(find)
        lines = self._open()
        try:
            catalogue = await lines.catalogue.get(lines.engine, lines.redis)
        except DATABASE_ERRORS as error:
            raise explain(error) from error
        return Desk(settings=self.settings, catalogue=catalogue, accounts=ids)

    async def _submit(self, drafts: Sequence[Draft]) -> list[AsyncJobHandle]:
        # One statement is all or nothing by itself.
        jobs = await self._query(
            lambda connection: _store(connection, drafts), atomic=len(drafts) > 1
        )
        messages = [job.message for job in jobs if job.message is not None]
        if messages:
            await self._open().publish(messages)
        fresh_until = time.monotonic() + self.settings.reply_recheck_s
        return [
            AsyncJobHandle(self, job.id, fresh_until=fresh_until if job.is_new else 0.0)
            for job in jobs
        ]

    async def _query(
        self, work: Callable[[AsyncConnection], Awaitable[T]], *, atomic: bool = False
    ) -> T:
        """Do work that may be repeated, through a restart of Postgres that is soon over."""
        engine = self._open().engine

        async def once() -> T:
            async with engine.connect() as connection:
                if not atomic:
                    return await work(connection)
                await connection.execution_options(isolation_level="READ COMMITTED")
                async with connection.begin():
                    return await work(connection)

        try:
            return await AsyncRetrying(**REPEAT)(once)
        except DATABASE_ERRORS as error:
            raise explain(error) from error


async def _store(connection: AsyncConnection, drafts: Sequence[Draft]) -> list[Accepted]:
    jobs: list[Accepted] = []
    for batch in batches(drafts):
        stored = (await connection.exec_driver_sql(INSERT, parameters(batch))).all()
        left = missing(batch, stored)
        found = (await connection.exec_driver_sql(FIND, parameters(left))).all() if left else ()
        jobs += accept(batch, stored, found)
    return jobs

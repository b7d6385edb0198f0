"""The client for an event loop: as `Sluice`, awaited.

async with AsyncSluice() as sluice:
    job = await sluice.submit("draft", "Write a follow-up about the meeting.")
    print((await job.result(timeout=60)).text)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack, cast
from uuid import UUID
from weakref import WeakSet

from pydantic import BaseModel
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection
from tenacity import AsyncRetrying

from sluicegate.producers.budgeting import AsyncBudgeting
from sluicegate.producers.client import resolve_settings
from sluicegate.producers.early_refusal import EarlyRefusal
from sluicegate.producers.forking import opening, register
from sluicegate.producers.handles import AsyncJobHandle
from sluicegate.producers.joining import AsyncCaller, async_caller_of, join_async
from sluicegate.producers.listing import (
    ACCOUNT_QUERY,
    JobFilters,
    JobList,
    JobSummary,
    load_summary,
)
from sluicegate.producers.outcomes import (
    REPEAT,
    check_timeout,
    is_passing,
)
from sluicegate.producers.publishing import publish_accepted
from sluicegate.producers.reply_channels import BATCH, Channel
from sluicegate.producers.reply_readers import AsyncReplies
from sluicegate.producers.steering import (
    CANCEL,
    FIND_ENDED,
    RETRY,
    read_cancelled,
    reopening,
)
from sluicegate.producers.storing import (
    FIND,
    Accepted,
    accept,
    batches,
    insertion,
    missing,
    outcomes,
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
from sluicegate.producers.telling import note_untold, tell_channel_async, tell_worker
from sluicegate.producers.views import JOB_QUERY, JobView, load_job
from sluicegate.shared import statements
from sluicegate.shared.bodies import Bodies
from sluicegate.shared.catalogue import AsyncCatalogueCache, Catalogue
from sluicegate.shared.celery_app import JobMessage, make_celery
from sluicegate.shared.coalescing import Coalescer
from sluicegate.shared.database import BY_KEY, DATABASE_ERRORS, explain, make_async_engine
from sluicegate.shared.errors import IdempotencyConflict, NotFound, QueueUnavailable, SluiceError
from sluicegate.shared.jobs import State
from sluicegate.shared.redis_client import make_async_redis
from sluicegate.shared.reply_reader import AsyncReplyReader
from sluicegate.shared.settings import Settings

T = TypeVar("T")

#: Runs a statement with its parameters and returns the rows.
Run = Callable[[str, dict[str, Any]], Awaitable[Sequence[Any]]]

#: Connections for storing jobs one by one, of those that a client may have.
_STORING: Final = 2

log = logging.getLogger(__name__)


class _Lines:
    """The connections of one process, for one event loop. Each opens at first use."""

    def __init__(self, settings: Settings) -> None:
        self._loop = asyncio.get_running_loop()
        # Together no more than the settings allow, where those allow two.
        storing = min(_STORING, settings.database_pool_size - 1) or 1
        self.engine = make_async_engine(
            settings,
            application_name="sluice producer",
            pool_size=max(1, settings.database_pool_size - storing),
        )
        self._db = statements.Database(
            settings, application_name="sluice producer", size=storing, planner=BY_KEY
        )
        self.redis = make_async_redis(settings)
        self.app = make_celery(settings)
        self.reader = AsyncReplyReader(settings=settings, engine=self.engine, client=self.redis)
        self.catalogue = AsyncCatalogueCache(
            prefix=settings.redis_prefix, ttl_s=settings.catalogue_ttl_s
        )
        #: Readers of shared channels, which end with the client.
        self.replies: WeakSet[AsyncReplies] = WeakSet()
        #: Jobs that are submitted one by one, at the same moment, are stored in one statement.
        self.storing: Coalescer[Draft, Accepted] = Coalescer(
            statement=self._store, max_items=settings.coalesce_max, spacing_s=2 * settings.spacing_s
        )
        # Celery publishes synchronously; one thread does it for all who submit.
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="sluice-publisher")
        self._unpublished: list[JobMessage] = []
        self._publishing: asyncio.Task[None] | None = None
        self._closed = False

    async def publish(self, messages: Sequence[JobMessage]) -> None:
        """Publish, together with what others have to publish meanwhile."""
        self._begin(messages)
        if self._publishing is not None:
            await asyncio.shield(self._publishing)

    def publish_soon(self, messages: Sequence[JobMessage]) -> None:
        """Publish without waiting for it; called by any thread."""
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            self._begin(messages)
        else:
            self._loop.call_soon_threadsafe(self._begin, messages)

    def _begin(self, messages: Sequence[JobMessage]) -> None:
        if self._closed:
            log.warning("this client is closed; the sweep will publish (jobs: %d)", len(messages))
            return
        self._unpublished += messages
        if self._publishing is None:
            self._publishing = self._loop.create_task(self._publish())

    async def tell_worker(self, worker: str, job_ids: Sequence[UUID]) -> None:
        """Have a worker look for jobs to be cancelled."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._publisher, tell_worker, self.app, worker, job_ids)

    async def _store(self, drafts: Sequence[Draft]) -> Sequence[Accepted]:
        """Store jobs that happen to come at the same moment: none is the others' concern."""
        found: list[Accepted | IdempotencyConflict] = []
        for part in batches(drafts):
            found += outcomes(part, *await _repeated(partial(_insert, self._run, part)))
        # What is an error is raised where its own draft is waited for.
        return cast("Sequence[Accepted]", found)

    async def _run(self, statement: str, values: dict[str, Any]) -> Sequence[Any]:
        return await self._db.execute(statement, **values)

    async def _publish(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._unpublished:
                messages, self._unpublished = self._unpublished, []
                await loop.run_in_executor(self._publisher, publish_accepted, self.app, messages)
        finally:
            self._publishing = None

    async def close(self) -> None:
        self._closed = True
        await asyncio.gather(*(one.close() for one in list(self.replies)))
        await self.reader.close()
        await self.storing.finish()
        if self._publishing is not None:
            await self._publishing
        await asyncio.to_thread(self._publisher.shutdown)
        self.app.close()
        await self.redis.aclose()
        await self._db.close()
        await self.engine.dispose()


class AsyncSluice(AsyncBudgeting):
    """Submits jobs and reads their results, on one event loop; it connects at first use.

    A process that is forked may use it on a loop of its own.

    settings: those of the environment if not given. Keywords replace single settings, as in
    `AsyncSluice(redis_prefix="crm:")`. The address of a server instead has it talk to that over
    HTTP, as in `AsyncSluice("https://llm.example.com", api_key="sk-sluice-…")`; `HttpSluice`
    explains that.
    """

    def __new__(cls, settings: Settings | str | None = None, **_overrides: Any) -> Self:
        """Make the client for HTTP if an address is given."""
        if cls is AsyncSluice and isinstance(settings, str):
            from sluicegate.producers.http_async_client import AsyncHttpSluice  # noqa: PLC0415 - its own base

            return cast("Self", super().__new__(AsyncHttpSluice))
        return super().__new__(cls)

    def __init__(self, settings: Settings | str | None = None, **overrides: Any) -> None:
        assert not isinstance(settings, str)  # `__new__` has made another kind
        self.settings = resolve_settings(settings, overrides)
        self._lines: _Lines | None = None
        self._closed = False
        self._accounts = AccountBook()
        self._early = EarlyRefusal(self.settings.redis_prefix)
        register(self)

    async def submit(
        self,
        use_case: str | None,
        prompt: Prompt,
        *,
        connection: object = None,
        **options: Unpack[JobOptions],
    ) -> AsyncJobHandle:
        """Accept one job; it is stored when this returns.

        use_case: None has it chosen by what the job asks for; `result.warnings` says so.

        connection: stores it in this transaction of the caller's instead, and publishes it after
        the commit. A SQLAlchemy `AsyncSession` or `AsyncConnection`, or a psycopg
        `AsyncConnection`, to the same database; its own errors are raised as they come.

        Raises `InvalidJob` that names the field which is refused, `IdempotencyConflict`,
        `BudgetExceeded` for an interactive job without `connection` whose account has spent its
        budget, and `QueueUnavailable` if Postgres does not answer.
        """
        caller = None if connection is None else async_caller_of(connection)
        request = read_request(use_case, prompt, options)
        desk = await self._desk([request])
        is_large = request.is_large
        draft = await asyncio.to_thread(desk.draft, request) if is_large else desk.draft(request)
        if caller is None:
            redis = self._open().redis
            await self._early.check_async(draft, redis, self._catalogue, self._execute)
        return (await self._submit([request], [draft], caller))[0]

    async def submit_many(
        self,
        use_case: str | None,
        jobs: Iterable[Prompt | Mapping[str, Any]],
        *,
        connection: object = None,
        **common: Unpack[JobOptions],
    ) -> list[AsyncJobHandle]:
        """Accept many jobs, all or none; `connection` and errors as in `submit`.

        Each is a prompt, or a mapping with `prompt` and what it has other than the rest: any
        option of `submit`, `use_case` too.
        """
        caller = None if connection is None else async_caller_of(connection)
        # Checking thousands of jobs takes seconds, which belong to the loop's other tasks.
        requests = await asyncio.to_thread(read_requests, use_case, jobs, common)
        desk = await self._desk(requests)
        drafts = await asyncio.to_thread(desk.draft_all, requests)
        return await self._submit(requests, drafts, caller)

    async def get(self, job_id: UUID | str) -> JobView:
        """Look at a job; raises `NotFound`."""
        wanted = parse_job_id(job_id)

        async def look(connection: AsyncConnection) -> JobView:
            row = (await connection.exec_driver_sql(JOB_QUERY, {"job_id": wanted})).one_or_none()
            if row is None:
                raise NotFound(f"there is no job {wanted}")
            return load_job(row, Bodies.of(self.settings))

        return await self._query(look)

    def handle(
        self, job_id: UUID | str, response_format: type[BaseModel] | None = None
    ) -> AsyncJobHandle:
        """Return a handle of a job that was accepted before, here or elsewhere.

        response_format: the pydantic model that `result.parsed` is to be an instance of.
        """
        return AsyncJobHandle(self, parse_job_id(job_id), answer_type=response_format)

    async def cancel(self, job_id: UUID | str) -> State:
        """Cancel a job; return its state.

        `cancelled`: it will not run, or was cancelled before. `running`: its worker has been asked
        to cut its call off, what that cost is estimated, and `result` tells how it ended. Any other
        state: it is over. Raises `NotFound`.
        """
        wanted = parse_job_id(job_id)
        rows = await self._execute(CANCEL, job_ids=[wanted])
        cancelled = read_cancelled(self.settings, wanted, rows)
        lines = self._open()
        try:
            await tell_channel_async(lines.redis, cancelled.commands)
        except QueueUnavailable as error:
            note_untold(error)
        if cancelled.worker is not None:
            await lines.tell_worker(cancelled.worker, [wanted])
        return cancelled.state

    async def retry(self, job_id: UUID | str) -> AsyncJobHandle:
        """Try a failed, cancelled or expired job once more, with fresh attempts and deadline.

        Raises `NotFound`, `IllegalTransition` for a job in another state, `InvalidJob` if nothing
        serves it any more.
        """
        wanted = parse_job_id(job_id)
        rows = await self._execute(FIND_ENDED, job_id=wanted)
        again = reopening(self.settings, await self._catalogue(), wanted, rows)
        lines = self._open()
        await tell_channel_async(lines.redis, again.commands(self.settings))
        message = again.message(await self._execute(RETRY, **again.parameters))
        await lines.publish([message])
        return AsyncJobHandle(self, wanted)

    async def list_jobs(self, **filters: Unpack[JobFilters]) -> list[JobSummary]:
        """List jobs, newest first; raises `InvalidJob` for an account that is not there."""
        jobs = JobList(filters)
        accounts: Sequence[Row[Any]] = ()
        if jobs.account is not None:
            accounts = await self._execute(ACCOUNT_QUERY, account=jobs.account)
        statement, values = jobs.statement(accounts)
        bodies = Bodies.of(self.settings)
        return [load_summary(row, bodies) for row in await self._execute(statement, **values)]

    def replies(
        self,
        channel: str,
        group: str,
        *,
        consumer: str | None = None,
        timeout: float | None = None,
        redeliver_after_s: float = 60.0,
        batch: int = BATCH,
    ) -> AsyncReplies:
        """Read a shared reply channel as one of a group; see `Sluice.replies`."""
        replies = AsyncReplies(
            Channel(
                settings=self.settings,
                channel=channel,
                group=group,
                consumer=consumer,
                redeliver_after_s=redeliver_after_s,
                batch=batch,
            ),
            settings=self.settings,
            client=lambda: self._open().redis,
            timeout=check_timeout(timeout),
        )
        self._open().replies.add(replies)
        return replies

    async def close(self) -> None:
        """Close all connections; whoever still waits for a result gets a `SluiceError`."""
        lines = self.forget_lines()
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

    def forget_lines(self) -> _Lines | None:
        """Let go of what is open, as a forked process does; see `forking`."""
        lines, self._lines = self._lines, None
        return lines

    def _open(self) -> _Lines:
        if self._closed:
            raise SluiceError("this client is closed; make a new one")
        if self._lines is None:
            with opening:
                self._lines = _Lines(self.settings)
        return self._lines

    async def _desk(self, requests: Sequence[Request]) -> Desk:
        ids, unknown = self._accounts.known(requests)
        if unknown:

            async def find(connection: AsyncConnection) -> dict[str, UUID]:
                named = account_parameters(unknown)
                return self._accounts.learn(await connection.exec_driver_sql(FIND_ACCOUNTS, named))

            ids |= await self._query(find)
        return Desk(settings=self.settings, catalogue=await self._catalogue(), accounts=ids)

    async def _catalogue(self) -> Catalogue:
        lines = self._open()
        try:
            return await lines.catalogue.get(lines.engine, lines.redis)
        except DATABASE_ERRORS as error:
            raise explain(error) from error

    async def _submit(
        self, requests: Sequence[Request], drafts: Sequence[Draft], caller: AsyncCaller | None
    ) -> list[AsyncJobHandle]:
        if caller is not None:
            jobs = await join_async(caller, drafts, self.settings, self._open().publish_soon)
            fresh_until = 0.0
        else:
            jobs = await self._store(drafts)
            messages = [job.message for job in jobs if job.message is not None]
            if messages:
                await self._open().publish(messages)
            fresh_until = time.monotonic() + self.settings.reply_recheck_s
        return [
            AsyncJobHandle(
                self,
                job.id,
                fresh_until=fresh_until if job.is_new else 0.0,
                answer_type=request.answer_type,
                joined=caller is not None,
            )
            for request, job in zip(requests, jobs, strict=True)
        ]

    async def _store(self, drafts: Sequence[Draft]) -> list[Accepted]:
        if len(drafts) != 1:
            return await self._query(lambda connection: _store_all(connection, drafts), atomic=True)
        try:
            return [await self._open().storing(drafts[0])]
        except statements.DATABASE_ERRORS as error:
            raise explain(error) from error

    async def _execute(self, statement: str, **values: Any) -> Sequence[Row[Any]]:
        async def run(connection: AsyncConnection) -> Sequence[Row[Any]]:
            return (await connection.exec_driver_sql(statement, values)).all()

        return await self._query(run)

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
            return await _repeated(once)
        except DATABASE_ERRORS as error:
            raise explain(error) from error


async def _repeated(once: Callable[[], Awaitable[T]]) -> T:
    """Do what may be done again, as often as `REPEAT` says."""
    # Nearly always once, which needs no machinery.
    try:
        return await once()
    except Exception as error:
        if not is_passing(error):
            raise
    return await AsyncRetrying(**REPEAT)(once)


async def _store_all(connection: AsyncConnection, drafts: Sequence[Draft]) -> list[Accepted]:
    """Store a list of jobs, all or none, within a transaction."""

    async def run(statement: str, values: dict[str, Any]) -> Sequence[Any]:
        return (await connection.exec_driver_sql(statement, values)).all()

    jobs: list[Accepted] = []
    for part in batches(drafts):
        jobs += accept(part, *await _insert(run, part))
    return jobs


async def _insert(run: Run, drafts: Sequence[Draft]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the rows of what was stored, and those of `FIND` for what was not."""
    stored = await run(*insertion(drafts))
    left = missing(drafts, stored)
    return stored, await run(FIND, parameters(left)) if left else ()

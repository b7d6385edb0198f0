"""The client for threads: submit jobs, and wait for what becomes of them.

with Sluice() as sluice:
    job = sluice.submit("draft", "Write a follow-up about the meeting.")
    print(job.result(timeout=60).text)
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack
from uuid import UUID

from sqlalchemy import Connection
from tenacity import Retrying

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
from sluicegate.shared.catalogue import Catalogue, CatalogueCache, read
from sluicegate.shared.celery_app import make_celery
from sluicegate.shared.database import DATABASE_ERRORS, explain, make_engine
from sluicegate.shared.errors import NotFound, SluiceError
from sluicegate.shared.events import Event
from sluicegate.shared.jobs import Result
from sluicegate.shared.redis_client import make_redis
from sluicegate.shared.replies import parse_event_id
from sluicegate.shared.reply_reader import ReplyReader
from sluicegate.shared.settings import Settings, get_settings, load_settings

T = TypeVar("T")


def resolve_settings(settings: Settings | None, overrides: Mapping[str, object]) -> Settings:
    """Return the process' settings, or those given, with some replaced; raise `SettingsError`."""
    if not overrides:
        return settings or get_settings()
    return load_settings(**{**(dict(settings) if settings else {}), **overrides})


class JobHandle:
    """A job that was accepted."""

    def __init__(self, client: Sluice, job_id: UUID, *, fresh_until: float = 0.0) -> None:
        self.id = job_id
        self._client = client
        # A job that was submitted just now has not ended yet: its row need not be looked at.
        self._fresh_until = fresh_until

    def __repr__(self) -> str:
        return f"JobHandle({str(self.id)!r})"

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the answer, at most `timeout` seconds.

        Raises `JobFailed`, `JobExpired`, `JobCancelled`; `ResultTimeout`, which cancels nothing;
        `NotFound` if there is no such job.
        """
        (event,) = self._events("0", check_timeout(timeout), terminal_only=True)
        return result_of(event)

    def events(self, last_id: str = "0", timeout: float | None = None) -> Iterator[Event]:
        """Iterate over the job's events after `last_id`, until the terminal one.

        Raises `ResultTimeout` when `timeout` seconds have passed; `NotFound`.
        """
        parse_event_id(last_id)
        return self._events(last_id, check_timeout(timeout), terminal_only=False)

    def _events(
        self, last_id: str, timeout: float | None, *, terminal_only: bool
    ) -> Iterator[Event]:
        now = time.monotonic()
        deadline = None if timeout is None else now + timeout
        reader = self._client.reader
        subscription = reader.subscribe(
            self.id,
            last_id,
            terminal_only=terminal_only,
            check_after_s=max(0.0, self._fresh_until - now),
        )
        try:
            while (event := reader.next(subscription, deadline)) is not None:
                yield event
        except TimeoutError:
            raise timed_out(self.id, timeout) from None
        finally:
            reader.unsubscribe(subscription)


class _Lines:
    """The connections of one process. Each opens at first use."""

    def __init__(self, settings: Settings) -> None:
        self.pid = os.getpid()
        self.engine = make_engine(settings, application_name="sluice producer")
        self.redis = make_redis(settings)
        self.app = make_celery(settings)
        self.reader = ReplyReader(settings=settings, engine=self.engine, client=self.redis)
        self.catalogue = CatalogueCache(
            prefix=settings.redis_prefix, ttl_s=settings.catalogue_ttl_s
        )

    def close(self) -> None:
        self.reader.close()
        self.app.close()
        self.redis.close()
        self.engine.dispose()


class Sluice:
    """Submits jobs and reads their results. Threads may share one; it connects at first use.

    settings: those of the environment if not given. Keywords replace single settings, as in
    `Sluice(redis_prefix="crm:")`.
    """

    def __init__(self, settings: Settings | None = None, **overrides: Any) -> None:
        self.settings = resolve_settings(settings, overrides)
        self._lock = threading.Lock()
        self._lines: _Lines | None = None
        self._closed = False
        self._accounts = AccountBook()

    def submit(self, use_case: str, prompt: Prompt, **options: Unpack[JobOptions]) -> JobHandle:
        """Accept one job; it is stored when this returns.

        Raises `InvalidJob` that names the field which is refused, `IdempotencyConflict`, and
        `QueueUnavailable` if Postgres does not answer.
        """
        request = read_request(use_case, prompt, options)
        return self._submit([self._desk([request]).draft(request)])[0]

    def submit_many(
        self,
        use_case: str | None,
        jobs: Iterable[Prompt | Mapping[str, Any]],
        **common: Unpack[JobOptions],
    ) -> list[JobHandle]:
        """Accept many jobs, all or none; raises as `submit`.

        Each is a prompt, or a mapping with `prompt` and what it has other than the rest: any
        option of `submit`, `use_case` too.
        """
        requests = read_requests(use_case, jobs, common)
        return self._submit(self._desk(requests).draft_all(requests))

    def get(self, job_id: UUID | str) -> JobView:
        """Look at a job; raises `NotFound`."""
        wanted = parse_job_id(job_id)
        rows = self._query(
            lambda connection: connection.exec_driver_sql(JOB_QUERY, {"job_id": wanted}).all()
        )
        if not rows:
            raise NotFound(f"there is no job {wanted}")
        return load_job(rows[0])

    def handle(self, job_id: UUID | str) -> JobHandle:
        """Return a handle of a job that was accepted before, here or elsewhere."""
        return JobHandle(self, parse_job_id(job_id))

    def close(self) -> None:
        """Close all connections; whoever still waits for a result gets a `SluiceError`."""
        with self._lock:
            lines, self._lines = self._lines, None
            self._closed = True
        if lines is not None:
            lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def reader(self) -> ReplyReader:
        """What reads the reply channels, for handles."""
        return self._open().reader

    def _open(self) -> _Lines:
        with self._lock:
            if self._closed:
                raise SluiceError("this client is closed; make a new one")
            # After a fork the sockets belong to the parent: leave them alone, open others.
            if self._lines is None or self._lines.pid != os.getpid():
                self._lines = _Lines(self.settings)
            return self._lines

    def _desk(self, requests: Sequence[Request]) -> Desk:
        ids, unknown = self._accounts.known(requests)
        if unknown:
            ids |= self._accounts.learn(
                self._query(
                    lambda connection: connection.exec_driver_sql(
                        FIND_ACCOUNTS, account_parameters(unknown)
                    ).all()
                )
            )
        return Desk(settings=self.settings, catalogue=self._catalogue(), accounts=ids)

    def _catalogue(self) -> Catalogue:
        lines = self._open()
        return lines.catalogue.get(lambda: self._query(read), lines.redis)

    def _submit(self, drafts: Sequence[Draft]) -> list[JobHandle]:
        # One statement is all or nothing by itself.
        jobs = self._query(lambda connection: _store(connection, drafts), atomic=len(drafts) > 1)
        messages = [job.message for job in jobs if job.message is not None]
        if messages:
            publish_accepted(self._open().app, messages)
        fresh_until = time.monotonic() + self.settings.reply_recheck_s
        return [
            JobHandle(self, job.id, fresh_until=fresh_until if job.is_new else 0.0) for job in jobs
        ]

    def _query(self, work: Callable[[Connection], T], *, atomic: bool = False) -> T:
        """Do work that may be repeated, through a restart of Postgres that is soon over."""
        engine = self._open().engine

        def once() -> T:
            with engine.connect() as connection:
                if not atomic:
                    return work(connection)
                connection.execution_options(isolation_level="READ COMMITTED")
                with connection.begin():
                    return work(connection)

        try:
            return Retrying(**REPEAT)(once)
        except DATABASE_ERRORS as error:
            raise explain(error) from error


def _store(connection: Connection, drafts: Sequence[Draft]) -> list[Accepted]:
    jobs: list[Accepted] = []
    for batch in batches(drafts):
        stored = connection.exec_driver_sql(INSERT, parameters(batch)).all()
        left = missing(batch, stored)
        found = connection.exec_driver_sql(FIND, parameters(left)).all() if left else ()
        jobs += accept(batch, stored, found)
    return jobs

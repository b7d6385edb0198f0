"""The client for threads: submit jobs, and wait for what becomes of them.

with Sluice() as sluice:
    job = sluice.submit("draft", "Write a follow-up about the meeting.")
    print(job.result(timeout=60).text)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast
from uuid import UUID
from weakref import WeakSet

from pydantic import BaseModel
from sqlalchemy import Connection, Row
from tenacity import Retrying

from sluicegate.producers.batches import Batch, parse_batch_id
from sluicegate.producers.budgeting import Budgeting
from sluicegate.producers.bulk_rows import batch_form, batch_key, batch_rows, refuse
from sluicegate.producers.bulk_storing import store_batch
from sluicegate.producers.early_refusal import EarlyRefusal
from sluicegate.producers.forking import opening, register
from sluicegate.producers.handles import JobHandle
from sluicegate.producers.joining import Caller, caller_of, join
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
)
from sluicegate.producers.publishing import publish_accepted
from sluicegate.producers.reply_channels import BATCH, Channel
from sluicegate.producers.reply_readers import Replies
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
from sluicegate.producers.telling import note_untold, tell_channel, tell_worker
from sluicegate.producers.views import JOB_QUERY, JobView, load_job
from sluicegate.shared.bodies import Bodies
from sluicegate.shared.catalogue import Catalogue, CatalogueCache, read
from sluicegate.shared.celery_app import JobMessage, make_celery
from sluicegate.shared.database import DATABASE_ERRORS, explain, make_engine
from sluicegate.shared.errors import NotFound, QueueUnavailable, SluiceError
from sluicegate.shared.jobs import State
from sluicegate.shared.redis_client import make_redis
from sluicegate.shared.reply_reader import ReplyReader
from sluicegate.shared.settings import Settings, get_settings, load_settings

T = TypeVar("T")


def resolve_settings(settings: Settings | None, overrides: Mapping[str, object]) -> Settings:
    """Return the process' settings, or those given, with some replaced; raise `SettingsError`."""
    if not overrides:
        return settings or get_settings()
    return load_settings(**{**(dict(settings) if settings else {}), **overrides})


class _Lines:
    """The connections of one process. Each opens at first use."""

    def __init__(self, settings: Settings) -> None:
        self.engine = make_engine(settings, application_name="sluice producer")
        self.redis = make_redis(settings)
        self.app = make_celery(settings)
        self.app.producer_pool  # noqa: B018 - made while no other thread can make another
        self.reader = ReplyReader(settings=settings, engine=self.engine, client=self.redis)
        self.catalogue = CatalogueCache(
            prefix=settings.redis_prefix, ttl_s=settings.catalogue_ttl_s
        )
        #: Readers of shared channels, which end with the client.
        self.replies: WeakSet[Replies] = WeakSet()

    def close(self) -> None:
        with opening:
            replies = list(self.replies)
        for one in replies:
            one.close()
        self.reader.close()
        self.app.close()
        self.redis.close()
        self.engine.dispose()


class Sluice(Budgeting):
    """Submits jobs and reads their results. Threads may share one; it connects at first use.

    A process that is forked may go on with it: the child opens connections of its own.

    settings: those of the environment if not given. Keywords replace single settings, as in
    `Sluice(redis_prefix="crm:")`. The address of a server instead has it talk to that over HTTP, as
    in `Sluice("https://llm.example.com", api_key="sk-sluice-…")`; `HttpSluice` explains
    that.
    """

    def __new__(cls, settings: Settings | str | None = None, **_overrides: Any) -> Self:
        """Make the client for HTTP if an address is given."""
        if cls is Sluice and isinstance(settings, str):
            from sluicegate.producers.http_client import HttpSluice  # noqa: PLC0415 - its own base

            return cast("Self", super().__new__(HttpSluice))
        return super().__new__(cls)

    def __init__(self, settings: Settings | str | None = None, **overrides: Any) -> None:
        assert not isinstance(settings, str)  # `__new__` has made another kind
        self.settings = resolve_settings(settings, overrides)
        self._lines: _Lines | None = None
        self._closed = False
        self._accounts = AccountBook()
        self._early = EarlyRefusal(self.settings.redis_prefix)
        register(self)

    def submit(
        self,
        use_case: str | None,
        prompt: Prompt,
        *,
        connection: object = None,
        **options: Unpack[JobOptions],
    ) -> JobHandle:
        """Accept one job; it is stored when this returns.

        use_case: None has it chosen by what the job asks for; `result.warnings` says so.

        connection: stores it in this transaction of the caller's instead, and publishes it after
        the commit. A SQLAlchemy `Session` or `Connection`, a psycopg `Connection` or Django's
        `connection`, to the same database; its own errors are raised as they come.

        Raises `InvalidJob` that names the field which is refused, `IdempotencyConflict`,
        `BudgetExceeded` for an interactive job without `connection` whose account has spent its
        budget, and `QueueUnavailable` if Postgres does not answer.
        """
        caller = None if connection is None else caller_of(connection)
        request = read_request(use_case, prompt, options)
        draft = self._desk([request]).draft(request)
        if caller is None:
            self._early.check(draft, self._open().redis, self._catalogue, self._execute)
        return self._submit([request], [draft], caller)[0]

    def submit_many(
        self,
        use_case: str | None,
        jobs: Iterable[Prompt | Mapping[str, Any]],
        *,
        connection: object = None,
        **common: Unpack[JobOptions],
    ) -> list[JobHandle]:
        """Accept many jobs, all or none; `connection` and errors as in `submit`.

        Each is a prompt, or a mapping with `prompt` and what it has other than the rest: any
        option of `submit`, `use_case` too.
        """
        caller = None if connection is None else caller_of(connection)
        requests = read_requests(use_case, jobs, common)
        return self._submit(requests, self._desk(requests).draft_all(requests), caller)

    def submit_batch(
        self,
        use_case: str,
        rows: Iterable[Prompt | Mapping[str, Any]],
        *,
        name: str = "rows",
        template: str | None = None,
        **options: Unpack[JobOptions],
    ) -> Batch:
        """Accept any number of bulk jobs as one batch, all or none; raises as `submit`.

        Each row is a prompt, or a mapping with `prompt` and options of its own; with a template, as
        in "Summarise: {note}", a mapping of what fills it, the rest of which becomes metadata. They
        are read once, as they are stored. `name` is shown in lists.

        `idempotency_key` is the batch's here: where it has one already that is returned, and
        nothing is stored. Rows with keys that have jobs already are left out, and counted.
        """
        form = batch_form(use_case, template, options)
        key = batch_key(options)
        stored = store_batch(
            batch_rows(rows),
            settings=self.settings,
            catalogue=self._catalogue(),
            form=form,
            name=name,
            rejects=refuse,
            key=lambda: key,
        )
        return Batch(
            self._query,
            stored.batch_id,
            bodies=Bodies.of(self.settings),
            is_new=stored.is_new,
            repeated=stored.repeated,
        )

    def batch(self, batch_id: UUID | str) -> Batch:
        """Return a batch that was accepted before, here or elsewhere."""
        return Batch(self._query, parse_batch_id(batch_id), bodies=Bodies.of(self.settings))

    def get(self, job_id: UUID | str) -> JobView:
        """Look at a job; raises `NotFound`."""
        wanted = parse_job_id(job_id)
        rows = self._query(
            lambda connection: connection.exec_driver_sql(JOB_QUERY, {"job_id": wanted}).all()
        )
        if not rows:
            raise NotFound(f"there is no job {wanted}")
        return load_job(rows[0], Bodies.of(self.settings))

    def handle(
        self, job_id: UUID | str, response_format: type[BaseModel] | None = None
    ) -> JobHandle:
        """Return a handle of a job that was accepted before, here or elsewhere.

        response_format: the pydantic model that `result.parsed` is to be an instance of.
        """
        return JobHandle(self, parse_job_id(job_id), answer_type=response_format)

    def cancel(self, job_id: UUID | str) -> State:
        """Cancel a job; return its state.

        `cancelled`: it will not run, or was cancelled before. `running`: its worker has been asked
        to cut its call off, what that cost is estimated, and `result` tells how it ended. Any other
        state: it is over. Raises `NotFound`.
        """
        wanted = parse_job_id(job_id)
        rows = self._execute(CANCEL, job_ids=[wanted])
        cancelled = read_cancelled(self.settings, wanted, rows)
        lines = self._open()
        try:
            tell_channel(lines.redis, cancelled.commands)
        except QueueUnavailable as error:
            note_untold(error)
        if cancelled.worker is not None:
            tell_worker(lines.app, cancelled.worker, [wanted])
        return cancelled.state

    def retry(self, job_id: UUID | str) -> JobHandle:
        """Try a failed, cancelled or expired job once more, with fresh attempts and deadline.

        Raises `NotFound`, `IllegalTransition` for a job in another state, `InvalidJob` if nothing
        serves it any more.
        """
        wanted = parse_job_id(job_id)
        rows = self._execute(FIND_ENDED, job_id=wanted)
        again = reopening(self.settings, self._catalogue(), wanted, rows)
        lines = self._open()
        tell_channel(lines.redis, again.commands(self.settings))
        message = again.message(self._execute(RETRY, **again.parameters))
        publish_accepted(lines.app, [message])
        return JobHandle(self, wanted)

    def list_jobs(self, **filters: Unpack[JobFilters]) -> list[JobSummary]:
        """List jobs, newest first; raises `InvalidJob` for an account that is not there."""
        jobs = JobList(filters)
        accounts: Sequence[Row[Any]] = ()
        if jobs.account is not None:
            accounts = self._execute(ACCOUNT_QUERY, account=jobs.account)
        statement, values = jobs.statement(accounts)
        bodies = Bodies.of(self.settings)
        return [load_summary(row, bodies) for row in self._execute(statement, **values)]

    def replies(
        self,
        channel: str,
        group: str,
        *,
        consumer: str | None = None,
        timeout: float | None = None,
        redeliver_after_s: float = 60.0,
        batch: int = BATCH,
    ) -> Replies:
        """Read a shared reply channel, that of jobs with this `reply_to`, as one of a group.

        Each group gets every result, and shares them among its consumers; one that was not
        acknowledged comes again. The group begins with the oldest result that is kept.

        consumer: its name in the group; who comes back under the same name first gets again what
        it had not acknowledged. None: a new name. timeout: end after so many seconds without a
        reply; None: never. redeliver_after_s: who holds a reply for longer without an ack may lose
        it to another consumer. batch: replies that are fetched at once. Raises `InvalidJob`.
        """
        replies = Replies(
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
        lines = self._open()
        with opening:
            lines.replies.add(replies)
        return replies

    def close(self) -> None:
        """Close all connections; whoever still waits for a result gets a `SluiceError`."""
        with opening:
            lines = self.forget_lines()
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

    def forget_lines(self) -> _Lines | None:
        """Let go of what is open, as a forked process does; see `forking`."""
        lines, self._lines = self._lines, None
        return lines

    def _open(self) -> _Lines:
        lines = self._lines
        if lines is not None:
            return lines
        with opening:
            if self._closed:
                raise SluiceError("this client is closed; make a new one")
            if self._lines is None:
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

    def _submit(
        self, requests: Sequence[Request], drafts: Sequence[Draft], caller: Caller | None
    ) -> list[JobHandle]:
        if caller is not None:
            jobs = join(caller, drafts, self.settings, self._publish)
            fresh_until = 0.0
        else:
            # One statement is all or nothing by itself.
            atomic = len(drafts) > 1
            jobs = self._query(lambda connection: _store(connection, drafts), atomic=atomic)
            messages = [job.message for job in jobs if job.message is not None]
            if messages:
                self._publish(messages)
            fresh_until = time.monotonic() + self.settings.reply_recheck_s
        return [
            JobHandle(
                self,
                job.id,
                fresh_until=fresh_until if job.is_new else 0.0,
                answer_type=request.answer_type,
                joined=caller is not None,
            )
            for request, job in zip(requests, jobs, strict=True)
        ]

    def _publish(self, messages: Sequence[JobMessage]) -> None:
        publish_accepted(self._open().app, messages)

    def _execute(self, statement: str, **values: Any) -> Sequence[Row[Any]]:
        return self._query(lambda connection: connection.exec_driver_sql(statement, values).all())

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
        stored = connection.exec_driver_sql(*insertion(batch)).all()
        left = missing(batch, stored)
        found = connection.exec_driver_sql(FIND, parameters(left)).all() if left else ()
        jobs += accept(batch, stored, found)
    return jobs

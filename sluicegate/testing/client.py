"""The fake of `Sluice`: the same interface, jobs in memory, answers from the test.

fake = FakeSluice()
fake.on("draft").answers("Dear Ada, ...")
assert write_follow_up(fake, "Ada") == "Dear Ada, ..."
assert fake.jobs[0].prompt == "Write a follow-up for Ada."
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn, Unpack
from uuid import UUID

from pydantic import BaseModel

from sluicegate.producers.batches import parse_batch_id
from sluicegate.producers.bulk_rows import batch_form, batch_key
from sluicegate.producers.client import Sluice
from sluicegate.producers.handles import JobHandle
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
from sluicegate.shared.errors import NotFound, SluiceError
from sluicegate.shared.events import Event, id_key
from sluicegate.shared.jobs import State
from sluicegate.shared.replies import parse_event_id
from sluicegate.shared.settings import Settings, load_settings
from sluicegate.testing.batches import FakeBatch
from sluicegate.testing.catalogue import fresh_catalogue
from sluicegate.testing.fleet import Fleet
from sluicegate.testing.job import FakeJob
from sluicegate.testing.replies import FakeReplies
from sluicegate.testing.script import Rule, Script
from sluicegate.testing.transactions import Transaction, watch


class Stage:
    """What a test does with a fake: say what becomes of jobs, and look at them.

    settings, and keywords that replace single ones: as `Sluice`; the defaults if not given, never
    those of the environment. accounts: the names of those there are beside `default`; if not given,
    every name is one. strict: a job that no `on` fits is a `ScriptError`, not an echo of its
    prompt. eager: jobs are done when `submit` returns; otherwise they wait until somebody asks for
    the result or the events, or the test calls `work`. beside: another fake, of either kind, whose
    jobs and rules this one shares.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        accounts: Collection[str] | None = None,
        strict: bool = False,
        eager: bool = False,
        beside: Stage | None = None,
        **overrides: Any,
    ) -> None:
        self.fleet: Fleet
        if beside is not None:
            self.fleet = beside.fleet
        else:
            given = settings or Settings.model_construct()
            catalogue, default_account = fresh_catalogue()
            self.fleet = Fleet(
                settings=load_settings(**{**dict(given), **overrides}),
                catalogue=catalogue,
                default_account=default_account,
                accounts=accounts,
                script=Script(strict=strict),
                eager=eager,
            )
        self.settings: Settings = self.fleet.settings
        self._closed: bool = False

    def on(
        self,
        use_case: str | None = None,
        *,
        prompt: str | re.Pattern[str] | None = None,
        when: Callable[[FakeJob], bool] | None = None,
    ) -> Rule:
        """Begin a rule for the jobs that meet all that is given; the newest rule that fits decides.

        prompt: text that the prompt contains, or a pattern found in it. when: a function of the
        job. Go on with `.answers(...)`, `.streams(...)`, `.calls_tool(...)`, `.fails(...)`,
        `.expires()` or `.never_ends()`.
        """
        return self.fleet.script.add(Rule(use_case, prompt, when))

    @property
    def jobs(self) -> list[FakeJob]:
        """All jobs so far, in the order in which they were submitted; not those rolled back."""
        return self.fleet.jobs()

    def work(self) -> None:
        """Do all jobs that wait, as a fleet would meanwhile."""
        self.fleet.work()

    def add_use_case(self, name: str, *, like: str = "general") -> None:
        """Add a use case of your own, routed and limited as another one is."""
        catalogue = self.fleet.catalogue
        new = replace(catalogue.use_cases[like], name=name, description="")
        providers = [
            replace(
                row,
                use_case=row.use_case | ({name} if like in row.use_case else set()),
                failover=row.failover | ({name} if like in row.failover else set()),
            )
            for row in catalogue.providers
        ]
        self.fleet.catalogue = replace(
            catalogue, providers=tuple(providers), use_cases={**catalogue.use_cases, name: new}
        )

    def check_open(self) -> None:
        """Raise `SluiceError` after `close`."""
        if self._closed:
            raise SluiceError("this client is closed; make a new one")


class FakeJobHandle(JobHandle):
    """A job that was accepted by a fake: a `JobHandle` that never waits."""

    def __init__(
        self,
        client: FakeSluice,
        job_id: UUID,
        *,
        answer_type: type[BaseModel] | None = None,
        joined: bool = False,
    ) -> None:
        super().__init__(client, job_id, answer_type=answer_type, joined=joined)
        self._fake = client

    def _events(
        self, last_id: str, timeout: float | None, *, terminal_only: bool
    ) -> Iterator[Event]:
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


class FakeSluice(Stage, Sluice):
    """A `Sluice` that needs no servers; see `Stage` for what it takes and adds."""

    def submit(
        self,
        use_case: str | None,
        prompt: Prompt,
        *,
        connection: object = None,
        **options: Unpack[JobOptions],
    ) -> FakeJobHandle:
        """Keep one job; raise as `Sluice.submit`."""
        self.check_open()
        transaction = None if connection is None else watch(connection)
        request = read_request(use_case, prompt, options)
        (job_id,) = self.fleet.submit([request], transaction, listed=False)
        return self._handle(request, job_id, transaction)

    def submit_many(
        self,
        use_case: str | None,
        jobs: Iterable[Prompt | Mapping[str, Any]],
        *,
        connection: object = None,
        **common: Unpack[JobOptions],
    ) -> list[JobHandle]:
        """Keep many jobs, all or none; raise as `Sluice.submit_many`."""
        self.check_open()
        transaction = None if connection is None else watch(connection)
        requests = read_requests(use_case, jobs, common)
        ids = self.fleet.submit(requests, transaction)
        return [
            self._handle(request, job_id, transaction)
            for request, job_id in zip(requests, ids, strict=True)
        ]

    def _handle(
        self, request: Request, job_id: UUID, transaction: Transaction | None
    ) -> FakeJobHandle:
        return FakeJobHandle(
            self, job_id, answer_type=request.answer_type, joined=transaction is not None
        )

    def submit_batch(
        self,
        use_case: str,
        rows: Iterable[Prompt | Mapping[str, Any]],
        *,
        name: str = "rows",
        template: str | None = None,
        **options: Unpack[JobOptions],
    ) -> FakeBatch:
        """Keep bulk jobs as one batch, all or none; raise as `Sluice.submit_batch`."""
        self.check_open()
        form = batch_form(use_case, template, options)
        record, is_new = self.fleet.submit_batch(form, rows, name=name, key=batch_key(options))
        repeated = record.repeated if is_new else 0
        return FakeBatch(self.fleet, record.id, is_new=is_new, repeated=repeated)

    def batch(self, batch_id: UUID | str) -> FakeBatch:
        """Return a batch that was accepted before."""
        return FakeBatch(self.fleet, parse_batch_id(batch_id))

    def get(self, job_id: UUID | str) -> JobView:
        """Look at a job; raise `NotFound`."""
        self.check_open()
        return self.fleet.find(parse_job_id(job_id)).view()

    def handle(
        self, job_id: UUID | str, response_format: type[BaseModel] | None = None
    ) -> FakeJobHandle:
        """Return a handle of a job that was accepted before."""
        return FakeJobHandle(self, parse_job_id(job_id), answer_type=response_format)

    def cancel(self, job_id: UUID | str) -> State:
        """Cancel a job; return what `Sluice.cancel` would."""
        self.check_open()
        return self.fleet.cancel(parse_job_id(job_id))

    def retry(self, job_id: UUID | str) -> FakeJobHandle:
        """Queue a job again; raise as `Sluice.retry`."""
        self.check_open()
        wanted = parse_job_id(job_id)
        self.fleet.retry(wanted)
        return FakeJobHandle(self, wanted)

    def list_jobs(self, **filters: Unpack[JobFilters]) -> list[JobSummary]:
        """List jobs, newest first; raise as `Sluice.list_jobs`."""
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
    ) -> FakeReplies:
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
        return FakeReplies(view, self.fleet.channels, self.fleet.next_reply)

    def close(self) -> None:
        """Close it; what was submitted can still be looked at."""
        self._closed = True

    def _open(self) -> NoReturn:
        raise NotImplementedError("the fake has no connections; this method is not faked yet")

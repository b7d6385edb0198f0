"""A fleet in memory: it keeps jobs, and works on one when somebody asks how it ended.

Requests are checked, stored, steered and listed by the rules of the real client; only Postgres,
Redis and the workers are missing. There is no thread and no clock in it: what a test asks for
happens in the order in which it is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

import orjson

from sluicegate.producers.bulk import Form
from sluicegate.producers.listing import JobList, JobSummary
from sluicegate.producers.outcomes import timed_out
from sluicegate.producers.reply_channels import Channel, Delivery
from sluicegate.producers.steering import reopening
from sluicegate.producers.storing import Stored
from sluicegate.producers.submission import Desk, Draft, Request
from sluicegate.shared.bodies import Bodies
from sluicegate.shared.catalogue import Catalogue, Provider
from sluicegate.shared.endings import CANCELLED
from sluicegate.shared.errors import ErrorClass, NotFound, SluiceError
from sluicegate.shared.events import Delta, Event, ToolCallDelta, id_key
from sluicegate.shared.fitting import left_out
from sluicegate.shared.jobs import AttemptState, JobError, JobSpec, Lane, State
from sluicegate.shared.pricing import baseline_nano_usd
from sluicegate.shared.routing import answer_tokens, detection_said, needs_of, route
from sluicegate.shared.settings import Settings
from sluicegate.testing.batches import BatchRecord, check_common, check_rows
from sluicegate.testing.job import FakeJob, plausible_usage
from sluicegate.testing.replies import FakeChannels
from sluicegate.testing.script import (
    Answer,
    Expiry,
    Failure,
    Script,
    ScriptError,
    Silence,
    words,
)
from sluicegate.testing.shelf import Accounts, Shelf
from sluicegate.testing.transactions import Transaction


class _Ended(NamedTuple):
    """A job as `retry` finds it."""

    id: UUID
    state: State
    fence: int
    lane: Lane
    account_id: UUID
    is_active: bool
    request: str
    purged_at: None = None


def _ended(job: FakeJob) -> _Ended:
    return _Ended(
        id=job.id,
        state=job.state,
        fence=job.fence,
        lane=job.lane,
        account_id=job.draft.account_id,
        is_active=True,
        request=job.draft.request.decode(),
    )


def _meets(job: FakeJob, wanted: Mapping[str, Any]) -> bool:
    """Whether a job is one of those that `list_jobs` was asked for."""
    has = {
        "use_case": job.use_case,
        "account_id": job.draft.account_id,
        "lane": job.lane,
        "queue": job.draft.queue,
        "batch": job.batch_id,
    }
    return (
        all(wanted.get(name, value) == value for name, value in has.items())
        and job.state in wanted.get("state", State)
        and job.created_at >= wanted.get("since", job.created_at)
    )


class Fleet:
    """Keeps jobs and works on them.

    accounts: the active ones; None: any. eager: jobs are worked on when they are submitted.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        catalogue: Catalogue,
        default_account: UUID,
        accounts: Collection[str] | None,
        script: Script,
        eager: bool,
    ) -> None:
        self.settings = settings
        self.catalogue = catalogue
        self.script = script
        self.channels = FakeChannels()
        self._accounts = Accounts(accounts, default_account)
        self._eager = eager
        self._jobs: dict[UUID, FakeJob] = {}
        #: Transactions that jobs were submitted in and whose end is not known yet.
        self._open: list[tuple[Transaction, list[FakeJob]]] = []
        self._batches: dict[UUID, BatchRecord] = {}
        # Tests may submit from threads; every public method holds it.
        self._lock = threading.RLock()

    # Submission

    def submit(
        self,
        requests: Sequence[Request],
        transaction: Transaction | None = None,
        *,
        listed: bool = True,
    ) -> list[UUID]:
        """Check and keep jobs, all or none; raise as the real client does.

        listed: whether errors tell the place of a job in the list.
        """
        with self._lock:
            shelf = Shelf(self._settled())
            desk = self._desk()
            drafts = desk.draft_all(requests) if listed else [desk.draft(one) for one in requests]
            for request, draft in zip(requests, drafts, strict=True):
                if shelf.standing(draft) is None:
                    shelf.add(self._job(request, draft, committed=transaction is None))
            ids = [shelf.accepted(draft) for draft in drafts]
            self._keep(shelf.new, transaction)
            return ids

    def submit_batch(
        self, form: Form, rows: Iterable[Any], *, name: str, key: str | None
    ) -> tuple[BatchRecord, bool]:
        """Check and keep a batch, all or none; return whether it is new, too."""
        with self._lock:
            shelf = Shelf(self._settled())
            desk = self._desk()
            common = check_common(form, desk)
            for known in self._batches.values():
                same_account = known.common.account_id == common.account_id
                if key is not None and known.idempotency_key == key and same_account:
                    return known, False
            record = BatchRecord(
                name=name,
                account=self._accounts.name(common.account_id),
                common=common,
                idempotency_key=key,
            )
            for line, request, draft in check_rows(rows, form, desk):
                if shelf.standing(draft) is not None:
                    shelf.accepted(draft)
                    record.repeated += 1
                    continue
                job = self._job(request, draft)
                job.batch_id, job.batch_line = record.id, line
                shelf.add(job)
            if not shelf.new:
                raise SluiceError(
                    f"no row can be a new job (0 are rejected, {record.repeated} were submitted "
                    "before); nothing is stored"
                )
            self._batches[record.id] = record
            self._keep(shelf.new)
            return record, True

    def _desk(self) -> Desk:
        return Desk(settings=self.settings, catalogue=self.catalogue, accounts=self._accounts)

    def _job(self, request: Request, draft: Draft, *, committed: bool = True) -> FakeJob:
        options = request.terms.model_dump(exclude_unset=True) | request.fields
        if request.answer_type is not None:
            options["response_format"] = request.answer_type
        return FakeJob(
            options=options,
            account=self._accounts.name(draft.account_id),
            draft=draft,
            spec=JobSpec.model_validate_json(Bodies.of(self.settings).open_request(draft.request)),
            state=draft.state,
            committed=committed,
        )

    def _keep(self, jobs: Mapping[UUID, FakeJob], transaction: Transaction | None = None) -> None:
        for job in jobs.values():
            self.script.check(job)
        self._jobs |= jobs
        if transaction is not None:
            self._open.append((transaction, list(jobs.values())))
        if self._eager:
            self.work()

    def _settled(self) -> dict[UUID, FakeJob]:
        """Return the jobs after what became of the transactions that they were submitted in."""
        for watched in list(self._open):
            transaction, jobs = watched
            committed = transaction.committed
            if committed is None:
                continue
            self._open.remove(watched)
            for job in jobs:
                job.committed = committed
                if not committed:
                    del self._jobs[job.id]
                elif self._eager:
                    self._work(job)
        return self._jobs

    # Looking

    def jobs(self) -> list[FakeJob]:
        """Return all jobs, in the order in which they were submitted."""
        with self._lock:
            return [job for job in self._settled().values() if job.committed]

    def find(self, job_id: UUID) -> FakeJob:
        """Return a job; raise `NotFound`."""
        with self._lock:
            job = self._settled().get(job_id)
            if job is None or not job.committed:
                raise NotFound(f"there is no job {job_id}")
            return job

    def find_batch(self, batch_id: UUID) -> BatchRecord:
        """Return a batch; raise `NotFound`."""
        with self._lock:
            if batch_id not in self._batches:
                raise NotFound(f"there is no batch {batch_id}")
            return self._batches[batch_id]

    def list_jobs(self, filters: Mapping[str, Any]) -> list[JobSummary]:
        """List jobs, newest first."""
        listed = JobList(filters)
        accounts: list[Any] = []
        if listed.account is not None and listed.account in self._accounts:
            accounts = [Stored(id=self._accounts[listed.account], published_at=None)]
        _, wanted = listed.statement(accounts)
        found = [job for job in reversed(self.jobs()) if _meets(job, wanted)]
        return [job.summary() for job in found[: wanted["limit"]]]

    # Steering

    def cancel(self, job_id: UUID) -> State:
        """Cancel a job that has not ended; return what the real client would."""
        with self._lock:
            job = self.find(job_id)
            if job.waits:
                job.end_waiting(State.CANCELLED, ErrorClass.CANCELLED, CANCELLED)
                self.channels.add(job)
            elif job.state is State.RUNNING:
                # Its worker is asked, and cuts the call off; what that cost is estimated.
                row = self._provider(job)
                needs = needs_of(job.spec)
                tokens = answer_tokens(needs, self.catalogue.use_cases[job.use_case], row)
                error = JobError(
                    error_class=ErrorClass.CANCELLED, message=CANCELLED, provider=row.name
                )
                job.cancel_requested_at = datetime.now(UTC)
                reserved = row.card.reserve_nano_usd(needs.prompt_tokens, tokens)
                job.book(AttemptState.CANCELLED, reserved, error)
                job.end(State.CANCELLED, error=error)
                self.channels.add(job)
                return State.RUNNING
            return job.state

    def retry(self, job_id: UUID) -> None:
        """Queue a failed, cancelled or expired job again; raise as the real client does."""
        with self._lock:
            job = self.find(job_id)
            rows: Any = [_ended(job)]
            again = reopening(self.settings, self.catalogue, job_id, rows)
            job.reopen(again.deadline_s)
            if self._eager:
                self.work()

    # Work

    def work(self, jobs: Iterable[FakeJob] | None = None) -> None:
        """Work on those of the jobs that wait, in order; None: all there are."""
        with self._lock:
            for job in self.jobs() if jobs is None else jobs:
                self._work(job)

    def next_event(
        self, job_id: UUID, last: tuple[int, int], timeout: float | None
    ) -> Event | None:
        """Return the event after `last`, None after the terminal one.

        Raises `NotFound`; `ResultTimeout` where the real client would wait until then.
        """
        with self._lock:
            job = self.find(job_id)
            self._work(job)
            for event in job.events:
                if id_key(event.id) > last:
                    return event
            if job.state.terminal:
                return None
            if timeout is None:
                raise ScriptError(
                    f"job {job_id} never ends, and nobody gave a timeout: the real client would "
                    "wait for ever"
                )
            raise timed_out(job_id, timeout)

    def next_reply(self, channel: Channel, holder: object) -> Delivery | None:
        """Return the next reply of a shared channel, after the jobs that wait for it are done."""
        with self._lock:
            self.work(job for job in self.jobs() if job.reply_to == channel.name)
            return self.channels.take(channel, holder)

    def _work(self, job: FakeJob) -> None:
        if not job.waits:
            return
        late = job.deadline_at <= datetime.now(UTC)
        match Expiry() if late else self.script.take(job):
            case Answer() as answer:
                # Before anything happens: a function of the test's may raise.
                text = answer.text(job)
                self._succeed(job, answer, text)
            case Failure(error_class=error_class, message=message, status=status):
                row = self._provider(job)
                error = JobError(
                    error_class=error_class, message=message, provider=row.name, status=status
                )
                job.begin(row)
                job.book(AttemptState.FAILED, None, error)
                job.end(State.FAILED, error=error)
            case Expiry():
                self._expire(job)
            case Silence(deltas=deltas):
                job.begin(self._provider(job))
                self._stream(job, deltas)
                return
        self.channels.add(job)

    @staticmethod
    def _expire(job: FakeJob) -> None:
        job.end_waiting(
            State.EXPIRED, ErrorClass.TIMEOUT, "its deadline passed before it was answered"
        )

    def _succeed(self, job: FakeJob, answer: Answer, text: str) -> None:
        row = self._provider(job)
        written = text + "".join(call.model_dump_json() for call in answer.tool_calls)
        usage = plausible_usage(needs_of(job.spec).prompt_tokens, written)
        cost_nano_usd = row.card.cost_nano_usd(usage)
        job.begin(row)
        self._stream(job, words(text) if answer.deltas is None else answer.deltas)
        if job.spec.stream and answer.tool_calls:
            job.say(
                Delta(
                    tool_calls=tuple(
                        ToolCallDelta(
                            index=n,
                            id=call.id,
                            name=call.name,
                            arguments=orjson.dumps(call.arguments).decode(),
                        )
                        for n, call in enumerate(answer.tool_calls)
                    )
                )
            )
        job.book(AttemptState.SUCCEEDED, cost_nano_usd)
        job.end(
            State.SUCCEEDED,
            warnings=(*detection_said(job.spec), *left_out(job.spec, row)),
            text=text,
            tool_calls=answer.tool_calls,
            finish_reason=answer.finish_reason,
            provider=row.name,
            model=row.model,
            usage=usage,
            baseline_nano_usd=baseline_nano_usd(usage, self.settings.baseline_model),
        )

    @staticmethod
    def _stream(job: FakeJob, deltas: Iterable[str]) -> None:
        if job.spec.stream:
            for text in deltas:
                job.say(Delta(text=text))

    def _provider(self, job: FakeJob) -> Provider:
        return route(
            needs_of(job.spec),
            self.catalogue,
            account_id=job.draft.account_id,
            mode=self.settings.catalogue,
            now=datetime.now(UTC),
            first_token_ms={},
        )[0]

"""The path of a job through a worker: claim, route, dispatch, call, settle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

import psycopg
import redis.asyncio
from sqlalchemy.ext.asyncio import AsyncEngine

from sluicegate.shared.catalogue import AsyncCatalogueCache, Catalogue, Provider
from sluicegate.shared.celery_app import JobMessage
from sluicegate.shared.database import CONNECTION_ERRORS, is_bad_data
from sluicegate.shared.endings import CANCELLED
from sluicegate.shared.errors import ErrorClass, InvalidJob, UnknownPrice
from sluicegate.shared.ids import new_id
from sluicegate.shared.jobs import Lane, State
from sluicegate.shared.pricing import baseline_provider, price_card
from sluicegate.shared.queues import parse_queue
from sluicegate.shared.routing import answer_tokens, needs_of, route
from sluicegate.shared.secrets import Keyring
from sluicegate.shared.settings import Settings
from sluicegate.workers import outcomes
from sluicegate.workers.calls import Calls, CutOffError
from sluicegate.workers.claims import Claims, Job
from sluicegate.workers.dispatch import Attempt, Dispatcher
from sluicegate.workers.failpoints import failpoint
from sluicegate.workers.heartbeat import Heartbeat
from sluicegate.workers.providers.access import adapter_for
from sluicegate.workers.providers.base import (
    Adapter,
    Adapters,
    Answer,
    Call,
    Deadlines,
    ProviderError,
)
from sluicegate.workers.replies import Channel, Replies
from sluicegate.workers.retry import Expire, GiveUp, Park, Retry, RetryPolicy
from sluicegate.workers.settlement import Settlement, Settler
from sluicegate.workers.slots import Slots
from sluicegate.workers.statements import through_disconnects

log = logging.getLogger(__name__)

_LATENCY_WEIGHT = 0.2

_DEFECT = outcomes.refusal("a defect of ours ended it; it is logged", ErrorClass.INTERNAL)
_CANCELLED = outcomes.refusal(CANCELLED, ErrorClass.CANCELLED)


@dataclass(frozen=True, slots=True)
class Again:
    """The job is queued again: `message` is to be published after `after_s`."""

    message: JobMessage
    after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where a job's next call goes, and what it may cost at most."""

    provider: Provider
    #: The reading that the provider is from.
    catalogue: Catalogue = field(repr=False)
    max_tokens: int
    reserved_nano_usd: int
    baseline_reserved_nano_usd: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the path is made of; built once a process, on its loop."""

    settings: Settings
    engine: AsyncEngine
    redis: redis.asyncio.Redis
    catalogue: AsyncCatalogueCache
    adapters: Adapters
    keyring: Keyring
    heartbeat: Heartbeat
    claims: Claims
    dispatcher: Dispatcher
    settler: Settler
    replies: Replies
    slots: Slots
    retry: RetryPolicy


class Execution:
    """Runs the jobs of one message at a time; thousands of messages run side by side."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._first_token_ms: dict[UUID, float] = {}
        self._calls = Calls()
        #: Jobs in hand that are to be cancelled and have no call under way.
        self._unwanted: set[UUID] = set()
        #: Set when the worker stops: a cancellation then means that the time is up.
        self.stopping = False

    async def run(
        self,
        job_ids: Sequence[UUID],
        *,
        begun: Callable[[], None],
        claimed: Callable[[], None],
    ) -> list[Again]:
        """Run what can be claimed of these jobs to an outcome that Postgres has.

        `begun` is called once there is room for them, so that the next message may be fetched and
        its claim travel with this one's; `claimed` once they are this worker's. Returns the jobs
        that are queued again. Raises `Draining`, or a connection error if Postgres stays away
        before a claim: the message is then to be delivered again.
        """
        again: list[Again] = []
        size = self._parts.slots.limit
        for start in range(0, len(job_ids), size):
            again += await self._run_slice(job_ids[start : start + size], begun, claimed)
        return again

    def cancel(self, job_ids: Sequence[UUID]) -> None:
        """End these jobs, whose rows say that they are to be cancelled, as far as they are in hand.

        A call under way is cut off; a job before its call is not called for; one that is being
        settled ends as it does. Repeating it does nothing.
        """
        for job_id in job_ids:
            if not self._calls.cut_off(job_id) and job_id in self._parts.claims.held:
                self._unwanted.add(job_id)

    async def _run_slice(
        self, job_ids: Sequence[UUID], begun: Callable[[], None], claimed: Callable[[], None]
    ) -> list[Again]:
        slots = self._parts.slots
        await slots.acquire(len(job_ids))
        free = len(job_ids)
        try:
            begun()
            jobs = await self._parts.claims.claim(job_ids)
            free -= len(jobs)
        finally:
            slots.release(free)
        claimed()
        if not jobs:
            return []
        failpoint("claimed")
        if len(jobs) == 1:
            ended = [await self._run_job(jobs[0])]
        else:
            ended = await asyncio.gather(*map(self._run_job, jobs))
        return [again for again in ended if again is not None]

    async def _run_job(self, job: Job) -> Again | None:
        """Take one job to its end: what goes wrong in us ends that job and no other."""
        try:
            if job.unwanted:
                return await self._end(job, outcomes.released(job))
            return await self._attempt(job)
        except Exception:
            # The log says where; the caller is told that it was us.
            log.exception("job %s met a defect", job.id)
            return await self._end(job, outcomes.failed(job, State.FAILED, _DEFECT))
        finally:
            self._parts.claims.let_go(job.id)
            self._unwanted.discard(job.id)
            self._parts.slots.release(1)

    async def _attempt(self, job: Job) -> Again | None:
        parts = self._parts
        await parts.heartbeat.wait_valid()
        if job.deadline_s <= asyncio.get_running_loop().time():
            return await self._expire(job)

        # Route. The catalogue may have changed since the job was submitted.
        try:
            plan = self._plan(job, await self._catalogue())
        except (InvalidJob, UnknownPrice) as problem:
            error = outcomes.refusal(str(problem))
            return await self._end(job, outcomes.failed(job, State.FAILED, error))

        # Admit: breaker, limits and the budget's copy in Redis have their place here.

        # Dispatch: from here on the call may cost money, whatever becomes of this process.
        attempt = Attempt(
            attempt_id=new_id(),
            job_id=job.id,
            worker_id=job.worker_id,
            fence=job.fence,
            number=job.attempts_used + 1,
            provider_id=plan.provider.id,
            provider=plan.provider.name,
            model=plan.provider.model,
            reserved_nano_usd=plan.reserved_nano_usd,
            baseline_reserved_nano_usd=plan.baseline_reserved_nano_usd,
        )
        if not await parts.dispatcher.open(attempt):
            return None  # another's by now
        failpoint("dispatched")
        if not parts.heartbeat.valid:
            # The statement took so long that this worker may have been declared dead meanwhile.
            return await self._end(job, outcomes.released(job, attempt))
        try:
            return await self._call(job, plan, attempt)
        except asyncio.CancelledError:
            if self.stopping:
                raise  # out of time: whoever resolves this worker's attempts books it as unknown
            await self._end_cut_off(job, State.CANCELLED, attempt, _CANCELLED)
            raise
        except Exception:
            log.exception("job %s met a defect during its call", job.id)
            await self._end_cut_off(job, State.FAILED, attempt, _DEFECT)
            return None

    async def _end_cut_off(
        self, job: Job, state: State, attempt: Attempt, error: ProviderError
    ) -> None:
        """End a job in the middle of its call: what that cost only the provider knows."""
        ended = outcomes.cut_off_attempt(attempt, state)
        await self._end(job, outcomes.failed(job, state, error, attempt=attempt, ended=ended))

    async def _catalogue(self) -> Catalogue:
        parts = self._parts
        try:
            return await parts.catalogue.get(parts.engine, parts.redis)
        except CONNECTION_ERRORS:
            return await through_disconnects(
                lambda: parts.catalogue.get(parts.engine, parts.redis), give_up_after_s=None
            )

    def _plan(self, job: Job, catalogue: Catalogue) -> Plan:
        settings = self._parts.settings
        needs = needs_of(job.spec)
        candidates = route(
            needs,
            catalogue,
            account_id=job.account_id,
            mode=settings.catalogue,
            now=datetime.now(UTC),
            first_token_ms=self._first_token_ms,
        )
        # A worker calls the providers of its own pool; another pool's have a queue of their own.
        pool = parse_queue(job.queue).pool
        provider = next((row for row in candidates if row.provider == pool), None)
        if provider is None:
            raise InvalidJob("use_case", f"no active {pool} provider serves {job.use_case!r}")
        max_tokens = answer_tokens(needs, catalogue.use_cases[job.use_case], provider)
        baseline = price_card(baseline_provider(settings.baseline_model), settings.baseline_model)
        return Plan(
            provider=provider,
            catalogue=catalogue,
            max_tokens=max_tokens,
            reserved_nano_usd=provider.card.reserve_nano_usd(needs.prompt_tokens, max_tokens),
            baseline_reserved_nano_usd=baseline.reserve_nano_usd(needs.prompt_tokens, max_tokens),
        )

    async def _call(self, job: Job, plan: Plan, attempt: Attempt) -> Again | None:
        parts = self._parts
        channel = parts.replies.channel(job.id, job.fence)
        if job.lane is Lane.INTERACTIVE:
            await parts.replies.begin(channel, model=attempt.model, attempt=attempt.number)
        if job.id in self._unwanted:
            return await self._end(job, outcomes.released(job, attempt))
        sink = channel.delta if job.spec.stream else None
        try:
            adapter = self.adapter(plan.provider, job.account_id, plan.catalogue)
            call = adapter.call(self._request(job, plan), sink)
            answer = await self._calls.make(job.id, call)
        except CutOffError:
            channel.discard()
            await self._end_cut_off(job, State.CANCELLED, attempt, _CANCELLED)
            return None
        except ProviderError as error:
            channel.discard()
            return await self._failed(job, plan, attempt, error)
        failpoint("answered")
        self._note_latency(plan.provider.id, answer)
        settlement = outcomes.succeeded(
            job, attempt, plan.provider, answer, parts.settings.baseline_model
        )
        return await self._end(job, settlement, channel)

    def _request(self, job: Job, plan: Plan) -> Call:
        settings = self._parts.settings
        left_s = job.deadline_s - asyncio.get_running_loop().time()
        total_s = max(0.001, min(settings.total_deadline_s, left_s))
        return Call(
            spec=job.spec,
            model=plan.provider.model,
            max_tokens=plan.max_tokens,
            stream=job.spec.stream,
            deadlines=Deadlines(
                connect_s=min(settings.connect_deadline_s, total_s),
                first_token_s=min(settings.first_token_deadline_s, total_s),
                idle_s=min(settings.idle_deadline_s, total_s),
                total_s=total_s,
            ),
        )

    def adapter(self, provider: Provider, account_id: UUID | None, catalogue: Catalogue) -> Adapter:
        """Do as `adapter_for`, with what this process has."""
        parts = self._parts
        return adapter_for(
            provider,
            account_id,
            adapters=parts.adapters,
            settings=parts.settings,
            keyring=parts.keyring,
            catalogue=catalogue,
        )

    async def _failed(
        self, job: Job, plan: Plan, attempt: Attempt, error: ProviderError
    ) -> Again | None:
        ended = outcomes.ended_attempt(
            attempt, plan.provider, error, self._parts.settings.baseline_model
        )
        decision = self._parts.retry.decide(
            error.error_class,
            attempts_used=attempt.number,
            max_attempts=job.max_attempts,
            retry_after_s=error.retry_after_s,
            left_s=job.deadline_s - asyncio.get_running_loop().time(),
        )
        match decision:
            case Retry(after_s):
                settlement = outcomes.again(job, State.QUEUED, after_s, ended)
            case Park(after_s):
                settlement = outcomes.again(job, State.PARKED, after_s, ended)
            case GiveUp(why):
                settlement = outcomes.failed(
                    job, State.FAILED, error, attempt=attempt, ended=ended, why=why
                )
            case Expire(why):
                settlement = outcomes.failed(
                    job, State.EXPIRED, error, attempt=attempt, ended=ended, why=why
                )
        return await self._end(job, settlement)

    async def _expire(self, job: Job) -> Again | None:
        error = outcomes.refusal("its deadline passed before it was answered", ErrorClass.TIMEOUT)
        return await self._end(job, outcomes.failed(job, State.EXPIRED, error))

    async def _end(
        self, job: Job, settlement: Settlement, channel: Channel | None = None
    ) -> Again | None:
        """Settle, then tell whoever waits. Postgres has it before anybody is told."""
        parts = self._parts
        try:
            settled = await parts.settler.settle(settlement)
        except psycopg.Error as refused:
            if not is_bad_data(refused):
                raise
            # Something in the answer is not storable: the money is booked, the answer is not.
            log.error("Postgres refuses the result of job %s: %s", job.id, type(refused))
            error = outcomes.refusal("its answer could not be stored", ErrorClass.INTERNAL)
            unstorable = {"raw_usage": None, "error_message": None, "request_id": None}
            settlement = (
                settlement
                | unstorable
                | {
                    name: outcomes.failed(job, State.FAILED, error)[name]
                    for name in ("body", "job_state")
                }
            )
            settled = await parts.settler.settle(settlement)
        failpoint("settled")
        if not settled.moved:
            return None
        body = settled.body or settlement.get("body")
        if body is not None:
            channel = channel or parts.replies.channel(job.id, job.fence)
            await parts.replies.end(channel, outcomes.terminal_payload(job, body, settled))
            return None
        if settlement["job_state"] != State.QUEUED or settled.published_at is None:
            return None
        message = JobMessage(
            queue=job.queue,
            job_ids=(job.id,),
            published_at=settled.published_at,
            fence=job.fence,
        )
        return Again(message, settlement["after_s"])

    def _note_latency(self, provider_id: UUID, answer: Answer) -> None:
        if answer.first_token_ms is None:
            return
        known = self._first_token_ms.get(provider_id, answer.first_token_ms)
        self._first_token_ms[provider_id] = known + _LATENCY_WEIGHT * (
            answer.first_token_ms - known
        )

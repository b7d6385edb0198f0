"""The path of a job through a worker: claim, route, dispatch, call, settle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from uuid import UUID

import psycopg
import redis.asyncio
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy.ext.asyncio import AsyncEngine

from sluicegate.shared.catalogue import AsyncCatalogueCache, Catalogue
from sluicegate.shared.celery_app import JobMessage
from sluicegate.shared.database import CONNECTION_ERRORS, is_bad_data
from sluicegate.shared.endings import CANCELLED
from sluicegate.shared.errors import ErrorClass, InvalidJob, UnknownPrice
from sluicegate.shared.jobs import Lane, State
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import through_disconnects
from sluicegate.workers import affording, outcomes, repair, reports
from sluicegate.workers.calling import Caller
from sluicegate.workers.calls import CutOffError
from sluicegate.workers.claims import Claims, Job
from sluicegate.workers.dispatch import Attempt, Dispatcher
from sluicegate.workers.failpoints import failpoint
from sluicegate.workers.gates import UNASKED, Gates
from sluicegate.workers.heartbeat import Heartbeat
from sluicegate.workers.ledger import Full
from sluicegate.workers.placement import (
    HandOff,
    Held,
    OverBudget,
    Placement,
    Plan,
    after_failure,
)
from sluicegate.workers.providers.base import Answer, ProviderError
from sluicegate.workers.replies import Channel, Replies
from sluicegate.workers.retry import Expire, GiveUp, Next, Retry, RetryPolicy
from sluicegate.workers.settlement import Settled, Settlement, Settler
from sluicegate.workers.slots import Slots

log = logging.getLogger(__name__)

_DEFECT = outcomes.refusal("a defect of ours ended it; it is logged", ErrorClass.INTERNAL)
_TOO_LATE = outcomes.refusal("its deadline passed before it was answered", ErrorClass.TIMEOUT)
_CANCELLED = outcomes.refusal(CANCELLED, ErrorClass.CANCELLED)

#: A request that is encrypted with a key which is not here: until somebody has given it to us.
_UNREADABLE_PARK_S = 30.0


#: Of all large requests in memory together, as they are stored; each is there about three times.
_LARGE_BYTES_MAX = 128_000_000


@dataclass(frozen=True, slots=True)
class Again:
    """The job is queued again: `message` is to be published after `after_s`."""

    message: JobMessage
    after_s: float
    #: Whether it is another pool's from now on.
    handed_off: bool


@dataclass(slots=True)
class Holding:
    """What belongs to one holding of a job, from its claim until it is let go."""

    channel: Channel
    #: What those who said no have said, by row: why the job waited or failed.
    said: dict[UUID, str] = field(default_factory=dict)
    #: Of the last call that failed.
    error_class: ErrorClass | None = None
    #: Until when it waits here for calls under way to free its budget; None: it did not have to.
    patient_until_s: float | None = None
    #: It is one of the few that do.
    is_patient: bool = False
    #: Before it is placed again.
    rest_s: float = 0.0

    @property
    def reasons(self) -> str:
        """All that was said, for one sentence."""
        return "; ".join(self.said.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the path is made of; built once a process, on its loop."""

    settings: Settings
    engine: AsyncEngine
    redis: redis.asyncio.Redis
    catalogue: AsyncCatalogueCache
    heartbeat: Heartbeat
    claims: Claims
    placement: Placement
    dispatcher: Dispatcher
    caller: Caller
    gates: Gates
    settler: Settler
    replies: Replies
    slots: Slots
    retry: RetryPolicy


class Execution:
    """Runs the jobs of one message at a time; thousands of messages run side by side."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        #: Jobs in hand that are to be cancelled and have no call under way.
        self._unwanted: set[UUID] = set()
        #: Jobs in hand that have waited here for room in a budget.
        self._patient = 0
        #: Bytes of large requests that may be in memory.
        self._room = Slots(_LARGE_BYTES_MAX)
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
            if not self._parts.caller.cut_off(job_id) and job_id in self._parts.claims.held:
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
            if job.unloaded_bytes:
                return await self._run_large(job)
            return await self._run_loaded(job)
        except Exception:
            # The log says where; the caller is told that it was us.
            log.exception("job %s met a defect", job.id)
            return await self._end(job, outcomes.failed(job, State.FAILED, _DEFECT))
        finally:
            self._parts.claims.let_go(job.id)
            self._unwanted.discard(job.id)
            self._parts.slots.release(1)

    async def _run_large(self, job: Job) -> Again | None:
        """Load the request of a job, when there is room for it, and run the job."""
        weight = min(job.unloaded_bytes, self._room.limit)
        await self._room.acquire(weight)
        try:
            return await self._run_loaded(await self._parts.claims.load(job))
        finally:
            self._room.release(weight)

    async def _run_loaded(self, job: Job) -> Again | None:
        if job.unreadable:
            return await self._end(job, outcomes.parked(job, _UNREADABLE_PARK_S, job.unreadable))
        return await self._carry(job)

    async def _carry(self, job: Job) -> Again | None:
        """Take the job from candidate to candidate until one answers, or it has to wait."""
        holding = Holding(self._parts.replies.channel(job.id, job.fence))
        try:
            return await self._carry_on(job, holding)
        finally:
            self._patient -= holding.is_patient

    async def _carry_on(self, job: Job, holding: Holding) -> Again | None:
        while True:
            try:
                place = await self._place(job, holding)
            except asyncio.CancelledError:
                if not self.stopping:
                    await self._end(job, outcomes.failed(job, State.CANCELLED, _CANCELLED))
                raise
            step = await self._attempt(job, place, holding) if isinstance(place, Plan) else place
            match step:
                case Job():
                    job = step
                case None | Again():
                    return step
                case settlement:
                    return await self._end(job, settlement)

    async def _place(  # noqa: PLR0911 - each way in which it does not come to a call
        self, job: Job, holding: Holding
    ) -> Plan | Job | Settlement:
        """Find who takes the job now; or what ends this holding of it; or a reason to look anew."""
        parts = self._parts
        if holding.rest_s:
            await asyncio.sleep(holding.rest_s)
            holding.rest_s = 0.0
        await parts.heartbeat.wait_valid()
        if job.deadline_s <= asyncio.get_running_loop().time():
            return outcomes.failed(job, State.EXPIRED, _TOO_LATE, why=holding.reasons)
        if job.id in self._unwanted:
            return outcomes.released(job)
        try:
            place = await parts.placement.find(
                job,
                self._catalogue,
                said=holding.said,
                first_token_ms=parts.caller.first_token_ms,
            )
        except (InvalidJob, UnknownPrice) as problem:
            # The catalogue has changed since the job was submitted.
            return outcomes.failed(job, State.FAILED, outcomes.refusal(str(problem)))
        match place:
            case HandOff(queue, refused):
                return outcomes.handed_off(replace(job, refused=refused), queue)
            case OverBudget(plan):
                reserve = plan.reserved_nano_usd
                full = await parts.dispatcher.look(job.account_id, job.use_case, reserve)
                if full is None:
                    return replace(job, asks_budget=False)  # the copy is old
                return self._over_budget(job, full, holding)
            case Held(None, why, error_class):
                known = holding.error_class or error_class
                error = outcomes.refusal(f"nobody can take it: {why}", known)
                return outcomes.failed(job, State.FAILED, error)
            case Held(after_s, why):
                return outcomes.parked(job, after_s or 0.0, why)
            case plan:
                return plan

    def _over_budget(self, job: Job, full: Full, holding: Holding) -> Job | Settlement:
        """Wait for room in a budget, here or in Postgres, or end the job if there will be none."""
        now_s = asyncio.get_running_loop().time()
        if holding.patient_until_s is None:
            holding.patient_until_s = now_s
            most = affording.patient_max(self._parts.slots.limit)
            if job.lane is Lane.INTERACTIVE and self._patient < most:
                self._patient += 1
                holding.is_patient = True
                holding.patient_until_s += affording.PATIENCE_S
        match affording.afford(full, job.lane, patience_s=holding.patient_until_s - now_s):
            case affording.Refuse():
                refusal = outcomes.refusal(str(full), ErrorClass.BUDGET)
                return outcomes.failed(job, State.FAILED, refusal)
            case affording.Park(after_s):
                return outcomes.parked(job, after_s, str(full))
            case affording.Rest(rest_s):
                holding.rest_s = rest_s
                return replace(job, asks_budget=True)

    async def _attempt(
        self, job: Job, plan: Plan, holding: Holding
    ) -> Job | Settlement | Again | None:
        """Make one call; return the job if it is to be placed anew, or what ends it uncalled."""
        parts = self._parts
        # Dispatch: from here on the call may cost money, whatever becomes of this process.
        attempt = Attempt(
            attempt_id=plan.attempt_id,
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
        returned = partial(reports.returned, job, plan)
        with parts.gates.giving_back(returned):
            opened = await self._open(job, attempt)
        if opened is not True:
            parts.gates.report(returned())
            # Without an attempt it is another's by now.
            return self._over_budget(job, opened, holding) if opened else None
        failpoint("dispatched")
        if not parts.heartbeat.valid:
            # The statement took so long that this worker may have been declared dead meanwhile.
            parts.gates.report(returned())
            return await self._end(job, outcomes.released(job, attempt))
        try:
            return await self._call(job, plan, attempt, holding)
        except asyncio.CancelledError:
            if self.stopping:
                raise  # out of time: whoever resolves this worker's attempts books it as unknown
            await self._end_cut_off(job, State.CANCELLED, attempt, _CANCELLED)
            raise
        except Exception:
            log.exception("job %s met a defect during its call", job.id)
            await self._end_cut_off(job, State.FAILED, attempt, _DEFECT)
            return None

    async def _open(self, job: Job, attempt: Attempt) -> Full | bool:
        """Dispatch. Who is to stop meanwhile waits to hear whether there is an attempt now.

        Nobody else would end it, and free what it holds, as long as this worker lives.
        """
        opening = asyncio.ensure_future(self._parts.dispatcher.open(attempt))
        try:
            return await asyncio.shield(opening)
        except (asyncio.CancelledError, SoftTimeLimitExceeded):
            if self.stopping:
                opening.cancel()
            else:
                ended = outcomes.void_attempt(attempt) if await opening is True else None
                await self._end(job, outcomes.failed(job, State.CANCELLED, _CANCELLED, ended=ended))
            raise

    async def _call(
        self, job: Job, plan: Plan, attempt: Attempt, holding: Holding
    ) -> Job | Again | None:
        parts, channel = self._parts, holding.channel
        if job.lane is Lane.INTERACTIVE:
            parts.replies.begin(channel, model=attempt.model, attempt=attempt.number)
        if job.id in self._unwanted:
            parts.gates.report(reports.returned(job, plan))
            return await self._end(job, outcomes.released(job, attempt))
        try:
            answer = await parts.caller.call(job, plan, channel)
        except CutOffError:
            channel.discard()
            await self._end_cut_off(job, State.CANCELLED, attempt, _CANCELLED)
            return None
        except ProviderError as error:
            channel.discard()
            return await self._failed(job, plan, attempt, error, holding)
        failpoint("answered")
        problem = repair.misfit_of(job.spec, answer)
        if problem is not None:
            channel.discard()
            return await self._misfit(job, plan, attempt, answer, problem)
        settlement = outcomes.succeeded(
            job, attempt, plan.provider, answer, parts.settings.baseline_model
        )
        return await self._end(job, settlement, channel)

    async def _misfit(
        self, job: Job, plan: Plan, attempt: Attempt, answer: Answer, problem: str
    ) -> Job | Again | None:
        """Book an answer that does not fit its schema, and have it asked for once more."""
        error = repair.error_of(answer, problem)
        baseline = self._parts.settings.baseline_model
        ended = outcomes.ended_attempt(attempt, plan.provider, error, baseline)
        ended |= outcomes.took(answer)
        if not repair.is_worth_it(job):
            why = "it was asked for twice" if job.repairs else "no attempt is left to repair it"
            settlement = outcomes.failed(
                job, State.FAILED, error, attempt=attempt, ended=ended, why=why
            )
            return await self._end(job, settlement)
        repairing = repair.repairing(job, plan, answer, problem, ended.get("amount_nano_usd", 0))
        settlement = outcomes.kept(repairing, ended)
        return repairing if await self._goes_on(repairing, settlement) else None

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

    async def _failed(
        self, job: Job, plan: Plan, attempt: Attempt, error: ProviderError, holding: Holding
    ) -> Job | Again | None:
        settings = self._parts.settings
        ended = outcomes.ended_attempt(attempt, plan.provider, error, settings.baseline_model)
        holding.said[plan.provider.id] = str(error).rstrip(".")
        holding.error_class = error.error_class
        taught = after_failure(job, plan, error.error_class, ended.get("amount_nano_usd", 0))
        # What this one never takes, those may that rest or have failed just now.
        asked = plan.left if error.error_class.transient else (*plan.left, *plan.later)
        others = any(row.id not in taught.ruled_out for row in asked)
        decision = self._parts.retry.decide(
            error.error_class,
            tries_here=taught.tried.count(plan.provider.id),
            others=others,
            attempts_used=taught.attempts_used,
            max_attempts=job.max_attempts,
            retry_after_s=error.retry_after_s,
            left_s=job.deadline_s - asyncio.get_running_loop().time(),
            gated=plan.verdict is not UNASKED,
            # A key that we do not have is ours to repair, and is not suspended anywhere.
            patient=job.lane is Lane.BULK and error.sent,
        )
        match decision:
            case Next():
                settlement = outcomes.kept(taught, ended)
                return taught if await self._goes_on(taught, settlement) else None
            case Retry(after_s):
                parks = after_s > settings.retry_park_above_s
                # With nobody else to ask a new round begins.
                round_ = replace(job, refused=job.refused if others else ())
                settlement = outcomes.again(round_, after_s, ended, str(error) if parks else None)
            case GiveUp(why):
                settlement = outcomes.failed(
                    job, State.FAILED, error, attempt=attempt, ended=ended, why=why
                )
            case Expire(why):
                settlement = outcomes.failed(
                    job, State.EXPIRED, error, attempt=attempt, ended=ended, why=why
                )
        return await self._end(job, settlement)

    async def _goes_on(self, job: Job, settlement: Settlement) -> bool:
        """Book an attempt of a job that stays here; False if it is no longer this worker's."""
        settled = await self._parts.settler.settle(settlement)
        if settled.moved and settled.body is not None:
            await self._tell(job, settled.body, settled)
        return settled.moved and settled.body is None

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
            await self._tell(job, body, settled, channel)
            return None
        if settlement["job_state"] != State.QUEUED or settled.published_at is None:
            return None
        message = JobMessage(
            queue=settled.queue,
            job_ids=(job.id,),
            published_at=settled.published_at,
            fence=job.fence,
        )
        return Again(message, settlement.get("after_s", 0.0), settled.queue != job.queue)

    async def _tell(
        self, job: Job, body: dict[str, Any], settled: Settled, channel: Channel | None = None
    ) -> None:
        replies = self._parts.replies
        channel = channel or replies.channel(job.id, job.fence)
        await replies.end(channel, outcomes.terminal_payload(job, body, settled))

"""Placement: which candidate takes a job now; or where else it goes, or how long it waits."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from uuid import UUID

from sluicegate.shared.admission.gate import Ask, Reason, Verdict
from sluicegate.shared.catalogue import Catalogue, Provider
from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.ids import new_id
from sluicegate.shared.jobs import Lane
from sluicegate.shared.pricing import baseline_provider, price_card
from sluicegate.shared.queues import parse_queue, queue_name
from sluicegate.shared.routing import Needs, answer_tokens, needs_of, route
from sluicegate.shared.settings import Settings
from sluicegate.workers.claims import Job
from sluicegate.workers.estimates import TokenEstimates
from sluicegate.workers.gates import UNASKED, Gates
from sluicegate.workers.held_back import FOR_GOOD, FORCED_OPEN, PAUSED, SAID_NO, WORDS, by
from sluicegate.workers.presence import Presence

#: What is paused waits until somebody resumes it, which wakes it; this is for a wake-up lost.
_PAUSED_S = 900.0
#: How soon it is worth looking again whether a pool has workers.
_UNSERVED_S = {Lane.INTERACTIVE: 15.0, Lane.BULK: 60.0}
#: Bulk work rather waits for its own candidate than pays another, up to this long a rest of it.
_BULK_REST_S = 60.0
#: Bulk jobs stand longer at the gate: nobody waits for them, and it keeps the limit in use.
_BULK_PATIENCE = 5

#: How long a job waits beyond the row's own word when others took the place that was its turn.
_SOON_S = {Lane.INTERACTIVE: (0.5, 3.0), Lane.BULK: (2.0, 20.0)}

_AT_LIMIT = frozenset({Reason.REQUESTS, Reason.TOKENS, Reason.CONCURRENCY})
_OVER_BUDGET = frozenset({Reason.BUDGET_SPENT, Reason.BUDGET_HELD})

#: How many jobs stand at one row's gate in one process; more would ask it all the time.
_STANDING_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where a job's next call goes, what it may cost at most, and under which permit."""

    provider: Provider
    #: The reading that the provider is from.
    catalogue: Catalogue = field(repr=False)
    #: The attempt that the gates have admitted.
    attempt_id: UUID
    verdict: Verdict
    #: Of the answer: at most, and as the gates were asked for.
    max_tokens: int
    output_tokens: int
    #: Of the prompt, as estimated without and with what was learned of the model.
    prompt_tokens: int
    input_tokens: int
    reserved_nano_usd: int
    baseline_reserved_nano_usd: int
    #: The candidates that are left to go to if this one fails.
    left: tuple[Provider, ...]
    #: Those that have said no for now: they may take the job later.
    later: tuple[Provider, ...]


@dataclass(frozen=True, slots=True)
class HandOff:
    """The next candidate is another pool's: `queue` is where it takes jobs.

    `refused` are the rows that have said no by now.
    """

    queue: str
    refused: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class OverBudget:
    """The copy of the account's budget has no room for `plan`; Postgres is to be asked."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Held:
    """Nobody takes it now. `after_s` None: waiting will not change that.

    `why` lists what each candidate said.
    """

    after_s: float | None
    why: str
    #: Of the result, if waiting does not help.
    error_class: ErrorClass = ErrorClass.AUTH


@dataclass(frozen=True, slots=True)
class _Refusal:
    provider: Provider
    why: str
    #: None: for good.
    wait_s: float | None
    #: What the gates said, and to what; None: they were not asked.
    verdict: Verdict | None = None
    ask: Ask | None = None
    #: What would have been done; None: it is another pool's, or was not asked.
    plan: Plan | None = None
    is_served: bool = True


class _CatalogueChanged(Exception):
    """Ends a wait at the gate."""


class Placement:
    """Asks the candidates of a job in their order."""

    def __init__(
        self, *, settings: Settings, gates: Gates, presence: Presence, estimates: TokenEstimates
    ) -> None:
        self._settings = settings
        self._gates = gates
        self._presence = presence
        self._estimates = estimates
        #: Jobs that stand at a row's gate, by row and lane.
        self._standing: Counter[tuple[UUID, Lane]] = Counter()

    async def find(
        self,
        job: Job,
        read: Callable[[], Awaitable[Catalogue]],
        *,
        said: Mapping[UUID, str],
        first_token_ms: Mapping[UUID, float],
    ) -> Plan | HandOff | OverBudget | Held:
        """Place the job. What is found to take it is admitted, and is to be reported.

        `read` gives the catalogue of the moment. `said` are the reasons of `job.refused`, as far as
        they are known. Raises `InvalidJob` or `UnknownPrice` when no row of the catalogue can serve
        the job at all.
        """
        while True:
            catalogue = await read()
            try:
                return await self._find(job, catalogue, read, said, first_token_ms)
            except _CatalogueChanged:
                # A pause, a lever or a limit: whoever stands at the gate goes by it, too.
                continue

    async def _find(
        self,
        job: Job,
        catalogue: Catalogue,
        read: Callable[[], Awaitable[Catalogue]],
        said: Mapping[UUID, str],
        first_token_ms: Mapping[UUID, float],
    ) -> Plan | HandOff | OverBudget | Held:
        if paused := _pause_of(job, catalogue):
            return Held(_PAUSED_S, paused)
        needs = needs_of(job.spec)
        pool = parse_queue(job.queue).pool
        # Of other pools' rows nothing is known here. Were they taken for fast, and we there for
        # fast as well, the job would go to and fro.
        latencies = dict.fromkeys(
            (row.id for row in catalogue.providers if row.provider != pool), math.inf
        ) | dict(first_token_ms)
        candidates = route(
            needs,
            catalogue,
            account_id=job.account_id,
            mode=self._settings.catalogue,
            now=datetime.now(UTC),
            first_token_ms=latencies,
        )
        refusals: list[_Refusal] = []
        for at, provider in enumerate(candidates):
            refusal = self._known_refusal(job, catalogue, provider, said)
            if refusal is not None:
                refusals.append(refusal)
                continue
            if provider.provider != pool:
                refusal = await self._look(job, needs, catalogue, provider)
                if refusal is None:
                    refused = (*job.refused, *(one.provider.id for one in refusals))
                    return HandOff(_queue_of(job, provider), refused)
                refusals.append(refusal)
                continue
            left = [
                other
                for other in candidates[at + 1 :]
                if self._known_refusal(job, catalogue, other, said) is None
                and (other.provider == pool or await self._serves(job, other))
            ]
            # Whatever can fail or wait comes before the gates are asked: what they admit is used.
            max_tokens = _max_tokens(job, needs, catalogue, provider)
            reserve = provider.card.reserve_nano_usd(needs.prompt_tokens, max_tokens)
            cost = reserve if job.asks_budget else None
            ask = self._ask(job, needs, provider, max_tokens, cost_nano_usd=cost)
            plan = self._plan(
                needs, catalogue, ask, max_tokens, reserve, left=left, refusals=refusals
            )
            verdict = await self._patiently(job, ask, catalogue, read)
            if verdict.reason is None:
                return replace(plan, verdict=verdict)
            if verdict.reason in _OVER_BUDGET:
                return OverBudget(plan)
            refusals.append(self._refusal(job, ask, verdict, plan))
            if job.lane is Lane.BULK and _worth_waiting(verdict):
                break
        return await self._stand_in_line(job, needs, catalogue, refusals)

    def _known_refusal(
        self, job: Job, catalogue: Catalogue, provider: Provider, said: Mapping[UUID, str]
    ) -> _Refusal | None:
        if provider.id in job.ruled_out:
            return _Refusal(provider, said.get(provider.id, FOR_GOOD), None)
        if provider.id in catalogue.pauses.providers:
            return _Refusal(provider, PAUSED, _PAUSED_S)
        if provider.breaker == "forced_open":
            # Also while Redis, which would say so, is away.
            return _Refusal(provider, FORCED_OPEN, _PAUSED_S)
        if provider.id in job.refused:
            why = said.get(provider.id, SAID_NO)
            return _Refusal(provider, why, self._rest_s(job))
        return None

    def _rest_s(self, job: Job) -> float:
        settings = self._settings
        rest_s = settings.retry_base_s * 2.0 ** min(len(job.tried), 10)
        return min(rest_s, settings.retry_max_s)

    async def _serves(self, job: Job, provider: Provider) -> bool:
        return await self._presence.serves(_queue_of(job, provider))

    async def _look(
        self, job: Job, needs: Needs, catalogue: Catalogue, provider: Provider
    ) -> _Refusal | None:
        """Ask for another pool's candidate: it admits for itself, once the job is there."""
        if not await self._serves(job, provider):
            why = f"no worker serves {_queue_of(job, provider)}"
            return _Refusal(provider, why, _UNSERVED_S[job.lane], is_served=False)
        max_tokens = _max_tokens(job, needs, catalogue, provider)
        ask = self._ask(job, needs, provider, max_tokens, take=False)
        verdict = await self._gates.admit(ask)
        return None if verdict.reason is None else self._refusal(job, ask, verdict)

    async def _patiently(
        self,
        job: Job,
        ask: Ask,
        catalogue: Catalogue,
        read: Callable[[], Awaitable[Catalogue]],
    ) -> Verdict:
        """Ask, and again if the wait is short; raises if the catalogue changes meanwhile."""
        loop = asyncio.get_running_loop()
        patience_s = self._settings.gate_patience_s
        if job.lane is Lane.BULK:
            patience_s *= _BULK_PATIENCE
        until = min(loop.time() + patience_s, job.deadline_s)
        gate = (ask.provider.id, job.lane)
        while True:
            verdict = await self._gates.admit(ask)
            if verdict.reason not in _AT_LIMIT and verdict.reason is not Reason.COOLDOWN:
                return verdict
            # Not all at the same moment: one would get in, and all would have asked.
            wait_s = verdict.wait_s * random.uniform(1.0, 1.5)  # noqa: S311 - no secret
            if loop.time() + wait_s > until or self._standing[gate] >= _STANDING_MAX:
                return verdict
            self._standing[gate] += 1
            try:
                await asyncio.sleep(wait_s)
            finally:
                self._standing[gate] -= 1
            if await read() is not catalogue:
                raise _CatalogueChanged

    async def _stand_in_line(
        self, job: Job, needs: Needs, catalogue: Catalogue, refusals: list[_Refusal]
    ) -> Plan | OverBudget | Held:
        """Have the job wait for the candidate that may take it first, in its turn there."""
        temporary = [one for one in refusals if one.wait_s is not None]
        served = [one for one in temporary if one.is_served]
        if served or (job.lane is Lane.INTERACTIVE and len(temporary) < len(refusals)):
            # A pool without workers is no reason to come back soon where another says when, nor
            # to keep bad news from whoever waits.
            temporary = served
        if not temporary:
            locked_out = any(one.verdict is not None for one in refusals)
            why = ErrorClass.AUTH if locked_out else ErrorClass.CONTEXT_TOO_LONG
            return Held(None, _listed(refusals), why)
        first = min(temporary, key=lambda one: one.wait_s or 0.0)
        wait_s = first.wait_s or 0.0
        if first.plan is not None and first.ask is not None and first.verdict is not None:
            if job.waited and first.verdict.reason in _AT_LIMIT:
                # Its turn had come, and others were quicker: it comes back soon, with a few others.
                wait_s += random.uniform(*_SOON_S[job.lane])  # noqa: S311 - no secret
            else:
                verdict = await self._gates.admit(replace(first.ask, line_up=True))
                if verdict.reason is None:
                    return replace(first.plan, verdict=verdict)
                if verdict.reason in _OVER_BUDGET:
                    return OverBudget(first.plan)
                wait_s = verdict.wait_s
        return Held(wait_s, _listed([await self._asked_why(job, one) for one in refusals]))

    async def _asked_why(self, job: Job, refusal: _Refusal) -> _Refusal:
        """Find out what holds back a row that said no in another worker, or before a park."""
        if refusal.why is not SAID_NO:
            return refusal
        ask = Ask(
            attempt_id=new_id(),
            provider=refusal.provider,
            account_id=job.account_id,
            lane=job.lane,
            input_tokens=0,
            output_tokens=0,
            take=False,
        )
        verdict = await self._gates.admit(ask)
        return refusal if verdict.reason is None else self._refusal(job, ask, verdict)

    def _ask(
        self,
        job: Job,
        needs: Needs,
        provider: Provider,
        max_tokens: int,
        *,
        cost_nano_usd: int | None = None,
        take: bool = True,
    ) -> Ask:
        return Ask(
            attempt_id=new_id(),
            provider=provider,
            account_id=job.account_id,
            lane=job.lane,
            input_tokens=self._estimates.input_tokens(
                provider.model,
                needs.prompt_tokens,
                has_attachments="vision" in needs.capabilities,
            ),
            output_tokens=self._estimates.output_tokens(provider.model, job.use_case, max_tokens),
            cost_nano_usd=cost_nano_usd,
            use_case=job.use_case,
            is_retry=provider.id in job.tried,
            take=take,
        )

    def _plan(
        self,
        needs: Needs,
        catalogue: Catalogue,
        ask: Ask,
        max_tokens: int,
        reserved_nano_usd: int,
        *,
        left: Sequence[Provider],
        refusals: Sequence[_Refusal],
    ) -> Plan:
        model = self._settings.baseline_model
        baseline = price_card(baseline_provider(model), model)
        return Plan(
            provider=ask.provider,
            catalogue=catalogue,
            attempt_id=ask.attempt_id,
            verdict=UNASKED,
            max_tokens=max_tokens,
            output_tokens=ask.output_tokens,
            prompt_tokens=needs.prompt_tokens,
            input_tokens=ask.input_tokens,
            reserved_nano_usd=reserved_nano_usd,
            baseline_reserved_nano_usd=baseline.reserve_nano_usd(needs.prompt_tokens, max_tokens),
            left=tuple(left),
            later=tuple(
                one.provider for one in refusals if one.wait_s is not None and one.is_served
            ),
        )

    def _refusal(self, job: Job, ask: Ask, verdict: Verdict, plan: Plan | None = None) -> _Refusal:
        reason = verdict.reason
        assert reason is not None
        # Somebody waits for an interactive job: a refused key is worth telling at once.
        for_good = reason is Reason.SUSPENDED and job.lane is Lane.INTERACTIVE
        wait_s = None if for_good else verdict.wait_s
        return _Refusal(ask.provider, WORDS[reason], wait_s, verdict, ask, plan)


def after_failure(job: Job, plan: Plan, error_class: ErrorClass, cost_nano_usd: int) -> Job:
    """Return the job as its next placement has to see it."""
    row = plan.provider
    if error_class is ErrorClass.RATE_LIMITED:
        # Nothing was paid, and the gates know, if there were any.
        return replace(job, refused=(*job.refused, row.id)) if plan.verdict is UNASKED else job
    return replace(
        job,
        attempts_used=job.attempts_used + 1,
        cost_nano_usd=job.cost_nano_usd + cost_nano_usd,
        tried=(*job.tried, row.id),
        refused=(*job.refused, row.id),
        ruled_out=(*job.ruled_out, *_ruled_out(job, plan, error_class)),
    )


def _ruled_out(job: Job, plan: Plan, error_class: ErrorClass) -> tuple[UUID, ...]:
    """Return the rows that are never to get this job again."""
    row = plan.provider
    match error_class:
        case ErrorClass.CONTEXT_TOO_LONG:
            return tuple(
                other.id
                for other in plan.catalogue.providers
                if other.model == row.model or other.context_tokens <= row.context_tokens
            )
        case ErrorClass.NOT_FOUND:
            return (row.id,)
        case ErrorClass.AUTH | ErrorClass.QUOTA if job.lane is Lane.INTERACTIVE:
            return (row.id,)  # bulk work waits until somebody has seen to it
        case _:
            return ()


def _max_tokens(job: Job, needs: Needs, catalogue: Catalogue, provider: Provider) -> int:
    return answer_tokens(needs, catalogue.use_cases[job.use_case], provider)


def _queue_of(job: Job, provider: Provider) -> str:
    return queue_name(job.use_case, provider.provider, job.lane)


def _worth_waiting(verdict: Verdict) -> bool:
    return verdict.reason in _AT_LIMIT or (
        verdict.reason is Reason.COOLDOWN and verdict.wait_s <= _BULK_REST_S
    )


def _pause_of(job: Job, catalogue: Catalogue) -> str:
    if job.use_case in catalogue.pauses.use_cases:
        return f"the use case {job.use_case} is paused"
    return "the account is paused" if job.account_id in catalogue.pauses.accounts else ""


def _listed(refusals: list[_Refusal]) -> str:
    return "; ".join(by(one.provider.name, one.why) for one in refusals)

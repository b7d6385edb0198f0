"""Calling: one admitted, dispatched call from its request to its answer, and what it teaches."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from uuid import UUID

from sluicegate.shared.admission.gate import Probe
from sluicegate.shared.catalogue import Catalogue, Provider
from sluicegate.shared.fitting import fit
from sluicegate.shared.secrets import Keyring
from sluicegate.shared.settings import Settings
from sluicegate.workers import reports
from sluicegate.workers.calls import Calls
from sluicegate.workers.claims import Job
from sluicegate.workers.estimates import TokenEstimates
from sluicegate.workers.gates import Gates
from sluicegate.workers.placement import Plan
from sluicegate.workers.providers.access import adapter_for
from sluicegate.workers.providers.base import (
    Adapter,
    Adapters,
    Answer,
    Call,
    Deadlines,
    DeltaSink,
    ProviderError,
    ToolCallFragment,
)
from sluicegate.workers.replies import Channel

_LATENCY_WEIGHT = 0.2
#: A provider that has had this long and said nothing is slow, whatever the job's own deadline was.
_FAIR_S = 5.0


class Caller:
    """Makes the calls of a worker process, and tells the gates how each ended."""

    def __init__(
        self,
        *,
        settings: Settings,
        adapters: Adapters,
        keyring: Keyring,
        gates: Gates,
        estimates: TokenEstimates,
    ) -> None:
        self._settings = settings
        self._adapters = adapters
        self._keyring = keyring
        self._gates = gates
        self._estimates = estimates
        self._calls = Calls()
        self._first_token_ms: dict[UUID, float] = {}

    @property
    def first_token_ms(self) -> Mapping[UUID, float]:
        """What is known here of each row's time to the first token."""
        return self._first_token_ms

    def adapter(self, provider: Provider, account_id: UUID | None, catalogue: Catalogue) -> Adapter:
        """Do as `adapter_for`, with what this process has."""
        return adapter_for(
            provider,
            account_id,
            adapters=self._adapters,
            settings=self._settings,
            keyring=self._keyring,
            catalogue=catalogue,
        )

    def cut_off(self, job_id: UUID) -> bool:
        """Cut off the job's call; False if none is under way."""
        return self._calls.cut_off(job_id)

    async def call(self, job: Job, plan: Plan, channel: Channel) -> Answer:
        """Make the call; raises `ProviderError`, or `CutOffError` after `cut_off`."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            adapter = self.adapter(plan.provider, job.account_id, plan.catalogue)
            call = adapter.call(self._request(job, plan), self._sink(job, plan, channel))
            answer = await self._calls.make(job.id, call)
        except ProviderError as error:
            took_s = loop.time() - began_s
            fair = self._is_fair(job, error, took_s, at_s=loop.time())
            await self._gates.report_now(reports.failed(job, plan, error, fair=fair))
            raise
        except BaseException:
            self._gates.report(reports.cut_off(job, plan))
            raise
        self._gates.report(reports.answered(job, plan, answer))
        self._learn(job, plan, answer)
        return answer

    def _request(self, job: Job, plan: Plan) -> Call:
        settings = self._settings
        left_s = max(0.001, job.deadline_s - asyncio.get_running_loop().time())
        total_s = min(settings.total_deadline_s, left_s)
        # Whoever is asked next needs time, too, before the caller gives up.
        silent_s = left_s / 2 if plan.left else left_s
        return Call(
            spec=fit(job.spec, plan.provider),
            model=plan.provider.model,
            max_tokens=plan.max_tokens,
            stream=job.spec.stream,
            deadlines=Deadlines(
                connect_s=min(settings.connect_deadline_s, silent_s),
                first_token_s=min(settings.first_token_deadline_s, silent_s),
                response_s=min(settings.response_deadline_s, silent_s),
                idle_s=min(settings.idle_deadline_s, total_s),
                total_s=total_s,
            ),
        )

    def _sink(self, job: Job, plan: Plan, channel: Channel) -> DeltaSink | None:
        if not job.spec.stream:
            return None
        if not plan.verdict.is_probe:
            return channel.delta
        probe = Probe(
            attempt_id=plan.attempt_id,
            provider=plan.provider,
            generation=plan.verdict.generation,
        )

        first = True

        def first_then_all(text: str, tool_calls: Sequence[ToolCallFragment] = ()) -> None:
            nonlocal first
            if first:
                first = False
                self._gates.probed(probe)
            channel.delta(text, tool_calls)

        return first_then_all

    def _is_fair(self, job: Job, error: ProviderError, took_s: float, *, at_s: float) -> bool:
        """Whether a call that ended then had the time that a call is meant to have."""
        settings = self._settings
        meant_s = (
            settings.first_token_deadline_s if job.spec.stream else settings.response_deadline_s
        )
        ended_by_job = at_s >= job.deadline_s - 0.1
        return took_s >= min(meant_s, _FAIR_S) and not (ended_by_job and error.partial.text)

    def _learn(self, job: Job, plan: Plan, answer: Answer) -> None:
        if answer.first_token_ms is not None:
            row = plan.provider.id
            known = self._first_token_ms.get(row, answer.first_token_ms)
            self._first_token_ms[row] = known + _LATENCY_WEIGHT * (answer.first_token_ms - known)
        if answer.usage is not None:
            self._estimates.learn(
                plan.provider.model,
                plan.prompt_tokens,
                reports.input_tokens(answer.usage),
                has_attachments=job.spec.needs_vision,
            )
            self._estimates.learn_output(plan.provider.model, job.use_case, answer.usage.output)

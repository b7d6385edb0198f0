"""The gates as a worker sees them: many asks in one pipeline, leases renewed, and life without.

Redis is expendable. While it cannot be asked every call is let through: what it may cost at most
is decided by Postgres, and what is in flight is bounded by the worker's slots.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from uuid import UUID

import redis.asyncio
from redis.exceptions import RedisError

from sluicegate.shared.admission.gate import Ask, Gate, Probe, Reason, Report, Verdict
from sluicegate.shared.coalescing import Coalescer
from sluicegate.shared.settings import Settings

log = logging.getLogger(__name__)

#: Of a verdict that nobody gave; no breaker ever has it, so its report changes none.
UNASKED = Verdict(reason=None, generation=-1)
_COMPLAIN_EVERY_S = 10.0
_FORCED_S = 60.0


class Gates:
    """Admits and reports for one worker process; everything on its loop."""

    def __init__(self, *, client: redis.asyncio.Redis, settings: Settings) -> None:
        self._gate = Gate(client, settings)
        self._renew_every_s = settings.beat_interval_s
        self._in_flight: defaultdict[UUID, set[UUID]] = defaultdict(set)
        self._complained_at = -_COMPLAIN_EVERY_S
        self._renewing: asyncio.Task[None] | None = None
        self._admit = Coalescer[Ask, Verdict](
            statement=self._admit_many,
            max_items=settings.coalesce_max,
            spacing_s=settings.spacing_s,
        )
        self._report = Coalescer[Report | Probe, None](
            statement=self._report_many,
            max_items=settings.coalesce_max,
            spacing_s=settings.spacing_s,
        )

    def start(self) -> None:
        """Begin to renew the leases of what is in flight."""
        self._renewing = asyncio.get_running_loop().create_task(self._renew())

    async def stop(self) -> None:
        """Stop renewing, and wait for the reports that are under way."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        await self._report.finish()

    async def admit(self, ask: Ask) -> Verdict:
        """Ask for one call. What is admitted must be reported; whatever is not is free again."""
        verdict = await self._admit(ask)
        if ask.take and verdict.reason is None:
            self._in_flight[ask.provider.id].add(ask.attempt_id)
        return verdict

    @contextmanager
    def giving_back(self, returned: Callable[[], Report]) -> Iterator[None]:
        """Give an admission back if its call does not come to leave; `returned` says so."""
        try:
            yield
        except BaseException:
            self.report(returned())
            raise

    async def report_now(self, report: Report) -> None:
        """Say how an admitted call ended, and wait until the next ask will find it."""
        self._in_flight[report.provider.id].discard(report.attempt_id)
        await self._report(report)

    def report(self, report: Report) -> None:
        """Say how an admitted call ended, soon: nobody waits for it."""
        self._in_flight[report.provider.id].discard(report.attempt_id)
        # At most one for each call in flight, so their number is bounded by the slots.
        self._report.post(report)

    def probed(self, probe: Probe) -> None:
        """Say that a probe has been answered its first token."""
        self._report.post(probe)

    async def _admit_many(self, asks: Sequence[Ask]) -> list[Verdict]:
        try:
            return await self._gate.admit(asks)
        except (RedisError, OSError) as error:
            self._complain(error)
            return [_without_gates(ask) for ask in asks]

    async def _report_many(self, items: Sequence[Report | Probe]) -> list[None]:
        try:
            if probes := [item for item in items if isinstance(item, Probe)]:
                await self._gate.probed(probes)
            if reports := [item for item in items if isinstance(item, Report)]:
                await self._gate.report(reports)
        except (RedisError, OSError) as error:
            # Its leases give back what these calls held.
            self._complain(error)
        return [None] * len(items)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._renew_every_s)
            leases = {row: list(ids) for row, ids in self._in_flight.items() if ids}
            if not leases:
                continue
            try:
                await self._gate.renew(leases)
            except (RedisError, OSError) as error:
                self._complain(error)

    def _complain(self, error: Exception) -> None:
        now_s = time.monotonic()
        if now_s - self._complained_at >= _COMPLAIN_EVERY_S:
            self._complained_at = now_s
            log.warning("Redis does not answer (%s): calls leave without gates", error)


def _without_gates(ask: Ask) -> Verdict:
    # What an operator has forced is in the catalogue, and holds.
    if ask.provider.breaker == "forced_open":
        return Verdict(reason=Reason.BREAKER, wait_s=_FORCED_S)
    return UNASKED

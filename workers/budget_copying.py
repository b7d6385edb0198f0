"""Copying budgets to Redis as they change, for the gates to see: many in a pipeline, soon."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import redis.asyncio
from redis.exceptions import RedisError

from sluicegate.shared.admission.budget_copies import BudgetCopies
from sluicegate.shared.settings import Settings
from sluicegate.workers.ledger import Copy

log = logging.getLogger(__name__)


class BudgetCopying:
    """Keeps the copies of one process; on its loop. What Redis misses is repaired by the sweep.

    However long Redis takes, no more waits than the newest copy of each budget.
    """

    def __init__(self, *, client: redis.asyncio.Redis, settings: Settings) -> None:
        self._copies = BudgetCopies(client, settings.redis_prefix)
        self._spacing_s = settings.spacing_s
        self._waiting: dict[str, Copy] = {}
        self._sending: asyncio.Task[None] | None = None

    def told(self, copies: Sequence[Copy]) -> None:
        """Hear of budgets that have changed; nobody waits for it."""
        for copy in copies:
            known = self._waiting.get(copy["id"])
            if known is None or known["version"] < copy["version"]:
                self._waiting[copy["id"]] = copy
        if self._waiting and self._sending is None:
            self._sending = asyncio.get_running_loop().create_task(self._send())

    async def finish(self, timeout_s: float) -> None:
        """Wait until all that was told is there, or Redis has not taken it; then stop."""
        if self._sending is not None:
            _, late = await asyncio.wait((self._sending,), timeout=timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _send(self) -> None:
        try:
            while self._waiting:
                copies, self._waiting = list(self._waiting.values()), {}
                try:
                    await self._copies.put(copies)
                except (RedisError, OSError) as error:
                    log.info("budgets were not copied (%s); the sweep will", type(error).__name__)
                await asyncio.sleep(self._spacing_s)
        finally:
            self._sending = None

"""Copying budgets to Redis as they change, for the gates to see: many in a pipeline, soon."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import redis.asyncio
from redis.exceptions import RedisError

from sluicegate.shared.admission.budget_copies import BudgetCopies
from sluicegate.shared.settings import Settings
from sluicegate.workers.coalescing import Coalescer
from sluicegate.workers.ledger import Copy

log = logging.getLogger(__name__)


class BudgetCopying:
    """Keeps the copies of one process; on its loop. What Redis misses is repaired by the sweep."""

    def __init__(self, *, client: redis.asyncio.Redis, settings: Settings) -> None:
        self._copies = BudgetCopies(client, settings.redis_prefix)
        self._put = Coalescer[Copy, None](
            statement=self._put_many,
            max_items=settings.coalesce_max,
            spacing_s=settings.spacing_s,
        )

    def told(self, copies: Sequence[Copy]) -> None:
        """Hear of budgets that have changed; nobody waits for it."""
        for copy in copies:
            self._put.post(copy)

    async def finish(self) -> None:
        """Wait until all that was told is there."""
        await self._put.finish()

    async def _put_many(self, copies: Sequence[Copy]) -> list[None]:
        newest: dict[str, Copy] = {}
        for copy in copies:
            known = newest.get(copy["id"])
            if known is None or known["version"] < copy["version"]:
                newest[copy["id"]] = copy
        try:
            await self._copies.put(list(newest.values()))
        except (RedisError, OSError) as error:
            log.info("budgets were not copied (%s); the sweep will", type(error).__name__)
        return [None] * len(copies)

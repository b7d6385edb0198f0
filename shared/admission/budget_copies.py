"""Copies of budgets in Redis, so that a full budget refuses a call before Postgres is asked.

One hash an account, one field a budget. A copy is replaced by a later version alone, in whatever
order writers come; it decides nothing that Postgres has not said, so a copy that is old, or gone,
costs a question. What Postgres has and a copy has not is the reconciler's to repair, and what is of
no budget is his to remove: nothing here expires, as a budget that nobody uses stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import orjson
import redis.asyncio
from redis.exceptions import NoScriptError

from sluicegate.shared.admission.keys import COPY, budgets_key


def drift_key(prefix: str) -> str:
    """Return where the reconciler leaves what it found last."""
    return f"{prefix}budget:1-drift"


class BudgetCopies:
    """All copies, for asyncio; methods raise `RedisError` or `OSError`."""

    def __init__(self, client: redis.asyncio.Redis, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    async def put(self, copies: Sequence[Mapping[str, Any]]) -> int:
        """Keep those that are later than what is there; return how many were."""
        try:
            return await self._put(copies)
        except NoScriptError:
            await self._client.script_load(COPY.source)
            return await self._put(copies)

    async def remove(self, account_id: UUID | str, budget_ids: Sequence[str]) -> None:
        """Forget copies."""
        await self._client.hdel(budgets_key(self._prefix, account_id), *budget_ids)

    async def read(self, account_ids: Sequence[UUID | str]) -> dict[str, dict[str, Any]]:
        """Return the copies of these accounts by the budget's id."""
        pipeline = self._client.pipeline(transaction=False)
        for account_id in account_ids:
            pipeline.hgetall(budgets_key(self._prefix, account_id))
        found: dict[str, dict[str, Any]] = {}
        for fields in await pipeline.execute():
            for budget_id, packed in fields.items():
                found[budget_id.decode()] = orjson.loads(packed)
        return found

    async def account_ids(self) -> list[str]:
        """Return the accounts that there are copies of."""
        start = budgets_key(self._prefix, "")
        return [
            key.decode().removeprefix(start)
            async for key in self._client.scan_iter(match=start + "*", count=1000)
        ]

    async def _put(self, copies: Sequence[Mapping[str, Any]]) -> int:
        pipeline = self._client.pipeline(transaction=False)
        for copy in copies:
            pipeline.evalsha(
                COPY.sha,
                1,
                budgets_key(self._prefix, copy["account_id"]),
                copy["id"],
                copy["version"],
                orjson.dumps(copy),
            )
        return sum(await pipeline.execute())

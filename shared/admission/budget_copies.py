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


def copied_key(prefix: str) -> str:
    """Return the set of accounts that there are copies of."""
    return f"{prefix}budget:1-copied"


def drift_key(prefix: str) -> str:
    """Return the hash in which the reconciler counts what it has found."""
    return f"{prefix}budget:1-drift"


class BudgetCopies:
    """All copies, for asyncio; methods raise `RedisError` or `OSError`."""

    def __init__(self, client: redis.asyncio.Redis, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    async def put(self, copies: Sequence[Mapping[str, Any]]) -> None:
        """Keep those that are later than what is there."""
        try:
            await self._put(copies)
        except NoScriptError:
            await self._client.script_load(COPY.source)
            await self._put(copies)

    async def remove(self, copies: Sequence[Mapping[str, Any]]) -> None:
        """Forget copies."""
        pipeline = self._client.pipeline(transaction=False)
        for copy in copies:
            pipeline.hdel(budgets_key(self._prefix, copy["account_id"]), copy["id"])
        await pipeline.execute()

    async def read(self, account_ids: Sequence[UUID | str]) -> dict[str, dict[str, Any]]:
        """Return the copies of these accounts by the budget's id.

        One that cannot be read has no version.
        """
        pipeline = self._client.pipeline(transaction=False)
        for account_id in account_ids:
            pipeline.hgetall(budgets_key(self._prefix, account_id))
        found: dict[str, dict[str, Any]] = {}
        for account_id, fields in zip(account_ids, await pipeline.execute(), strict=True):
            for budget_id, packed in fields.items():
                copy = _read(packed) | {"id": budget_id.decode(), "account_id": str(account_id)}
                found[copy["id"]] = copy
        return found

    async def account_ids(self) -> list[str]:
        """Return the accounts that there are copies of."""
        members: Any = await self._client.smembers(copied_key(self._prefix))
        return sorted(member.decode() for member in members)

    async def forget_accounts(self, account_ids: Sequence[str]) -> None:
        """Look for no copies of these accounts any more, until there is one again."""
        await self._client.srem(copied_key(self._prefix), *account_ids)

    async def _put(self, copies: Sequence[Mapping[str, Any]]) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for copy in copies:
            pipeline.evalsha(
                COPY.sha,
                2,
                budgets_key(self._prefix, copy["account_id"]),
                copied_key(self._prefix),
                copy["account_id"],
                copy["id"],
                copy["version"],
                orjson.dumps(copy),
            )
        await pipeline.execute()


def _read(packed: bytes) -> dict[str, Any]:
    try:
        copy = orjson.loads(packed)
    except orjson.JSONDecodeError:
        return {}
    return copy if isinstance(copy, dict) else {}

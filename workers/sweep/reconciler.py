"""The reconciler: makes the copies of budgets in Redis equal to what Postgres has.

Workers copy a budget whenever it changes. A copy is missing after a flush, old where a worker died
between its commit and the copy, or where Redis came back from an older file; and it is of nothing
where the budget was cleared. None of that can let an account overspend, it only delays; here it is
found, repaired by setting, and counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import redis.asyncio

from sluicegate.shared.admission.budget_copies import BudgetCopies, drift_key
from sluicegate.shared.statements import Database
from sluicegate.workers.ledger import COPY

log = logging.getLogger(__name__)

_BATCH: Final = 500
_FIRST: Final = "00000000-0000-0000-0000-000000000000"
#: How long a copy may be on its way.
_GRACE_S: Final = 0.5
_AMOUNTS: Final = ("day_spent", "day_held", "month_spent", "month_held")

_READ = f"""
SELECT {COPY} AS copy FROM budgets b WHERE b.id > %(after)s::uuid ORDER BY b.id LIMIT {_BATCH}
"""
_READ_AGAIN = f"SELECT {COPY} AS copy FROM budgets b WHERE b.id = ANY(%(ids)s::uuid[])"


@dataclass(slots=True)
class Drift:
    """What a round has found."""

    #: Budgets that there are.
    budgets: int = 0
    #: Copies that were not there, that stayed behind, or that nobody could have written.
    missing: int = 0
    behind: int = 0
    wrong: int = 0
    #: Copies of budgets that are no more.
    orphaned: int = 0
    #: The largest difference of one amount.
    largest_nano_usd: int = 0

    @property
    def repaired(self) -> int:
        """How many copies were set or removed."""
        return self.missing + self.behind + self.wrong + self.orphaned


class Reconciler:
    """One round looks at every budget; safe to run twice at once."""

    def __init__(self, *, db: Database, client: redis.asyncio.Redis, prefix: str) -> None:
        self._db = db
        self._client = client
        self._copies = BudgetCopies(client, prefix)
        self._drift_key = drift_key(prefix)

    async def round(self) -> Drift:
        """Compare and repair. What was found is also counted in Redis, for whoever watches.

        Raises if a server is away.
        """
        drift = Drift()
        # Redis first: whatever it has, Postgres had before, so what is read there is not older.
        account_ids = await self._copies.account_ids()
        copies = await self._copies.read(account_ids)
        found = await self._differences(copies, drift)
        if found:
            # Most of them are copies on their way.
            await asyncio.sleep(_GRACE_S)
            await self._repair({row["id"]: row for row in found}, drift)
        if copies:
            await self._copies.remove(list(copies.values()))
            drift.orphaned = len(copies)
        await self._forget_empty(account_ids)
        if drift.repaired:
            log.info("copies of budgets were repaired: %s", drift)
        await self._count(drift)
        return drift

    async def _differences(
        self, copies: dict[str, dict[str, Any]], drift: Drift
    ) -> list[dict[str, Any]]:
        """Return the budgets whose copies differ; what is left of `copies` is of none."""
        found: list[dict[str, Any]] = []
        after = _FIRST
        while True:
            rows = [row.copy for row in await self._db.execute(_READ, after=after)]
            drift.budgets += len(rows)
            found += [row for row in rows if copies.pop(row["id"], None) != row]
            if len(rows) < _BATCH:
                return found
            after = rows[-1]["id"]

    async def _repair(self, before: dict[str, dict[str, Any]], drift: Drift) -> None:
        """Set the copies that are not even what these budgets were before."""
        copies = await self._copies.read(sorted({row["account_id"] for row in before.values()}))
        repairs = []
        for row in await self._db.execute(_READ_AGAIN, ids=list(before)):
            budget = row.copy
            copy = copies.get(budget["id"], {})
            version = copy.get("version", -1)
            if copy == budget or before[budget["id"]]["version"] <= version < budget["version"]:
                continue
            if not copy:
                drift.missing += 1
            elif 0 <= version < budget["version"]:
                drift.behind += 1
            else:
                # A version that Postgres never gave, or does not have any more.
                drift.wrong += 1
                await self._copies.remove([copy])
            drift.largest_nano_usd = max(drift.largest_nano_usd, _difference(budget, copy))
            repairs.append(budget)
        if repairs:
            await self._copies.put(repairs)

    async def _forget_empty(self, account_ids: list[str]) -> None:
        kept = {copy["account_id"] for copy in (await self._copies.read(account_ids)).values()}
        if empty := [account_id for account_id in account_ids if account_id not in kept]:
            await self._copies.forget_accounts(empty)

    async def _count(self, drift: Drift) -> None:
        found = asdict(drift)
        last = {name: found.pop(name) for name in ("budgets", "largest_nano_usd")}
        pipeline = self._client.pipeline(transaction=False)
        for name, count in found.items():
            pipeline.hincrby(self._drift_key, name, count)
        pipeline.hincrby(self._drift_key, "rounds", 1)
        for name, value in (*last.items(), ("at_s", time.time())):
            pipeline.hset(self._drift_key, name, value)
        await pipeline.execute()


def _difference(budget: Mapping[str, Any], copy: Mapping[str, Any]) -> int:
    return max(abs(int(budget[name]) - int(copy.get(name, 0))) for name in _AMOUNTS)

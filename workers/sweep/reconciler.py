"""The reconciler: makes the copies of budgets in Redis equal to what Postgres has.

Workers copy a budget whenever it changes. A copy is missing after a flush, old where a worker died
between its commit and the copy, or where Redis came back from an older file; and it is of nothing
where the budget was cleared. None of that can let an account overspend, it only delays; here it is
found, repaired by setting, and counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import orjson
import redis.asyncio

from sluicegate.shared.admission.budget_copies import BudgetCopies, drift_key
from sluicegate.workers.ledger import COPY
from sluicegate.workers.statements import Database

log = logging.getLogger(__name__)

_BATCH: Final = 500
_FIRST: Final = "00000000-0000-0000-0000-000000000000"
_AMOUNTS: Final = ("day_spent", "day_held", "month_spent", "month_held")

_READ = f"""
SELECT {COPY} AS copy FROM budgets b WHERE b.id > %(after)s::uuid ORDER BY b.id LIMIT {_BATCH}
"""


@dataclass(slots=True)
class Drift:
    """What a round has found."""

    #: Budgets that there are.
    budgets: int = 0
    #: Copies that were not there, that were behind, or that nobody could have written.
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
        """Compare and repair; what was found is also left in Redis, for whoever watches.

        Raises if a server is away.
        """
        drift = Drift()
        # Redis first: whatever it has, Postgres had before, so what is read there is not older.
        copies = await self._copies.read(await self._copies.account_ids())
        after = _FIRST
        while True:
            rows = [row.copy for row in await self._db.execute(_READ, after=after)]
            await self._compare(rows, copies, drift)
            if len(rows) < _BATCH:
                break
            after = rows[-1]["id"]
        for copy in copies.values():
            await self._copies.remove(copy["account_id"], [copy["id"]])
            drift.orphaned += 1
        await self._client.set(self._drift_key, orjson.dumps(asdict(drift) | {"at_s": time.time()}))
        if drift.repaired:
            log.warning("copies of budgets were repaired: %s", drift)
        return drift

    async def _compare(
        self, rows: list[dict[str, Any]], copies: dict[str, dict[str, Any]], drift: Drift
    ) -> None:
        """Repair the copies of these budgets, and take them from `copies`."""
        repairs = []
        for row in rows:
            drift.budgets += 1
            copy = copies.pop(row["id"], None)
            if copy == row:
                continue
            repairs.append(row)
            drift.largest_nano_usd = max(drift.largest_nano_usd, _difference(row, copy or {}))
            if copy is None:
                drift.missing += 1
            elif copy["version"] < row["version"]:
                drift.behind += 1
            else:
                # A version that Postgres never gave, or does not have any more.
                drift.wrong += 1
                await self._copies.remove(row["account_id"], [row["id"]])
        if repairs:
            await self._copies.put(repairs)


def _difference(row: Mapping[str, Any], copy: Mapping[str, Any]) -> int:
    return max(abs(int(row[name]) - int(copy.get(name, 0))) for name in _AMOUNTS)

"""The alerter: tells each alert once on the account's alert channel, a Redis Stream.

Alerts commit in any order, so one gets its number only when it is to be told, from the row of its
channel, which is locked meanwhile: who sees a number sees all below it. The number is the id of the
entry, and Redis refuses an id that is not above its last one. So a second sweep, a round that slept
or died before it could note what it had done, and a Redis that came back, add nothing twice.

After a flush the numbers go on. What was told stays told: every alert is in Postgres.
"""

from __future__ import annotations

import logging
from typing import Any, Final
from uuid import UUID

import redis.asyncio
from redis.exceptions import ResponseError

from sluicegate.shared.alerts import ALERT_FIELD, ALERTS_KEPT, FACTS, NAMES, alert_key, payload
from sluicegate.shared.reply_channels import entry_number
from sluicegate.shared.statements import Database
from sluicegate.workers.failpoints import failpoint

log = logging.getLogger(__name__)

#: Channels that a round tells on, alerts of each that a statement reads, and statements for each.
_CHANNELS: Final = 200
_BATCH: Final = 200
_BATCHES: Final = 50

_UNTOLD = f"""
SELECT account_id, bool_or(number IS NULL) AS unnumbered
FROM alerts WHERE told_at IS NULL
GROUP BY account_id ORDER BY min(id) LIMIT {_CHANNELS}
"""

# No reply channel can have such a name. Rows that somebody holds are left to the next round, here
# and below: nobody waits for us while we wait for him.
_NUMBER = f"""
WITH due AS (
    SELECT id, row_number() OVER (ORDER BY id) AS n FROM (
        SELECT id FROM alerts
        WHERE told_at IS NULL AND number IS NULL
          AND account_id IS NOT DISTINCT FROM %(account_id)s::uuid
        ORDER BY id LIMIT {_BATCH * _BATCHES}
        FOR NO KEY UPDATE SKIP LOCKED
    ) free
), reserved AS (
    INSERT INTO reply_channels AS c (name, last_number)
    SELECT '@alerts:' || coalesce(%(account_id)s::text, ''), %(last)s::bigint + count(*) FROM due
    ON CONFLICT (name) DO UPDATE
    SET last_number = greatest(c.last_number, %(last)s::bigint) + (SELECT count(*) FROM due)
    RETURNING last_number
)
UPDATE alerts a SET number = reserved.last_number - (SELECT count(*) FROM due) + due.n
FROM reserved, due WHERE a.id = due.id
"""

_READ = f"""
SELECT a.number, {FACTS} FROM alerts a {NAMES}
WHERE a.told_at IS NULL AND a.number IS NOT NULL
  AND a.account_id IS NOT DISTINCT FROM %(account_id)s::uuid
ORDER BY a.number LIMIT {_BATCH}
"""

_TOLD = """
WITH free AS (
    SELECT id FROM alerts WHERE id = ANY(%(ids)s::bigint[]) AND told_at IS NULL
    ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE alerts a SET told_at = now() FROM free WHERE a.id = free.id
RETURNING a.id
"""

_LAST = """
if redis.call('EXISTS', KEYS[1]) == 0 then return '0-0' end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then return info[i + 1] end
end
"""

# In one step, in order, and up to the first that finds no room: never one without those before it.
_ADD = f"""
local function last_number()
{_LAST}end
local last = tonumber(string.match(last_number(), '^%d+'))
for i = 3, #ARGV, 2 do
  if tonumber(ARGV[i]) > last then
    redis.call(
      'XADD', KEYS[1], 'MAXLEN', '=', ARGV[1], ARGV[i] .. '-0', ARGV[2], ARGV[i + 1])
  end
end
"""


class Alerter:
    """One round tells what is untold; safe to run twice at once."""

    def __init__(self, *, db: Database, client: redis.asyncio.Redis, prefix: str) -> None:
        self._db = db
        self._client = client
        self._prefix = prefix

    async def round(self) -> bool:
        """Tell; return whether there was anything. Raises if a server is away."""
        channels = await self._db.execute(_UNTOLD)
        for channel in channels:
            key = self._prefix + alert_key(channel.account_id)
            try:
                await self._tell(key, channel.account_id, unnumbered=channel.unnumbered)
            except ResponseError as error:
                # No room, or something else lies under its key. The other channels go on.
                log.error("alert channel %s takes nothing: %s", key, error)
        return bool(channels)

    async def _tell(self, key: str, account_id: UUID | None, *, unnumbered: bool) -> None:
        if unnumbered:
            # A database that was made anew begins above what the stream has had.
            last = await self._run(_LAST, key)
            await self._db.execute(_NUMBER, account_id=account_id, last=entry_number(last))
        for _ in range(_BATCHES):
            rows = await self._db.execute(_READ, account_id=account_id)
            if not rows:
                return
            entries = [part for row in rows for part in (row.number, payload(row))]
            await self._run(_ADD, key, ALERTS_KEPT, ALERT_FIELD, *entries)
            failpoint("told")
            noted = await self._db.execute(_TOLD, ids=[row.id for row in rows])
            if len(noted) < len(rows):
                return

    async def _run(self, script: str, key: str, *arguments: int | bytes) -> Any:
        running: Any = self._client.eval(script, 1, key, *arguments)
        return await running

"""The deliverer: takes terminal results from the outbox to shared reply channels.

A channel in Postgres is a list of outbox rows with growing numbers, a row for every result that
some consumer group has yet to acknowledge. Its Redis Stream is a copy: what has a number above the
stream's last id is appended, in order. So nothing is to be remembered about a delivery. A crash, a
second sweep, a Redis that lost a second or everything: the next round reads the last id and goes on
from there. A row is deleted once every group has acknowledged it, and the stream trimmed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import redis.asyncio
from redis.exceptions import ResponseError

from sluicegate.shared.reply_channels import (
    JOB_FIELD,
    REPLY_FIELD,
    channel_key,
    entry_id,
    entry_number,
)
from sluicegate.shared.statements import Database

log = logging.getLogger(__name__)

#: Channels that one statement and one pipeline look at, entries that one script adds, and the bytes
#: of requests and results, as Postgres keeps them, that a statement reads unless one alone is more.
_CHANNELS: Final = 100
_BATCH: Final = 500
_BATCH_BYTES: Final = 8_000_000

#: A group with more consumers than this has its idle ones cleared away: a consumer that was
#: restarted comes back under a new name.
_CONSUMERS: Final = 100
_CONSUMER_IDLE_MS: Final = 3_600_000

# Channels with rows, found by their index alone: there may be millions of rows.
_ACTIVE = f"""
WITH RECURSIVE active AS (
    (SELECT channel, 1 AS n FROM outbox WHERE channel > %(after)s ORDER BY channel LIMIT 1)
    UNION ALL
    SELECT (SELECT o.channel FROM outbox o WHERE o.channel > a.channel
            ORDER BY o.channel LIMIT 1), a.n + 1
    FROM active a WHERE a.channel IS NOT NULL AND a.n < {_CHANNELS}
)
SELECT a.channel,
       (SELECT min(o.number) FROM outbox o WHERE o.channel = a.channel) AS first_number,
       (SELECT max(o.number) FROM outbox o WHERE o.channel = a.channel) AS last_number,
       EXISTS (SELECT FROM outbox o WHERE o.channel = a.channel AND o.number IS NULL) AS waiting,
       (SELECT coalesce(json_object_agg(g.name, g.place), '{{}}'::json)
        FROM reply_groups g WHERE g.channel = a.channel) AS places
FROM active a WHERE a.channel IS NOT NULL
"""

# Whoever gives out numbers holds the channel's row until they are committed: a reader that sees
# a number sees all below it. A row that another sweep has numbered meanwhile is left alone.
_NUMBER = """
WITH reserved AS (
    INSERT INTO reply_channels AS c (name, last_number)
    VALUES (%(channel)s, %(last)s::bigint + %(limit)s)
    ON CONFLICT (name) DO UPDATE
    SET last_number = greatest(c.last_number, %(last)s::bigint) + %(limit)s
    RETURNING last_number
), due AS (
    SELECT id, row_number() OVER (ORDER BY id) AS n FROM (
        SELECT id FROM outbox WHERE channel = %(channel)s AND number IS NULL
        ORDER BY id LIMIT %(limit)s
    ) first
)
UPDATE outbox o SET number = reserved.last_number - %(limit)s + due.n
FROM reserved, due
WHERE o.id = due.id AND o.number IS NULL
"""

# `request` may hold images: it is opened only for the rows that are sent.
_READ = f"""
SELECT o.id, o.number, o.job_id, CASE WHEN o.body IS NOT NULL THEN json_build_object(
           'result', o.body, 'state', o.state, 'created_at', o.created_at,
           'finished_at', o.finished_at, 'idempotency_key', o.idempotency_key,
           'request_id', o.request_id,
           'metadata', (SELECT b.request->'metadata' FROM job_bodies b WHERE b.job_id = o.job_id)
       )::text END AS entry
FROM (
    SELECT o.id, o.number, o.job_id, r.body, j.state, j.created_at, j.finished_at,
           j.idempotency_key, j.request_id,
           sum(coalesce(pg_column_size(r.body), 0) + coalesce(pg_column_size(b.request), 0))
               OVER (ORDER BY o.number) AS bytes,
           row_number() OVER (ORDER BY o.number) AS n
    FROM (SELECT id, number, job_id, fence FROM outbox
          WHERE channel = %(channel)s AND number > %(after)s ORDER BY number LIMIT %(limit)s) o
    LEFT JOIN jobs j ON j.id = o.job_id
    LEFT JOIN results r ON r.job_id = o.job_id AND r.fence = o.fence
    LEFT JOIN job_bodies b ON b.job_id = o.job_id
) o
WHERE o.n = 1 OR o.bytes <= {_BATCH_BYTES}
ORDER BY o.number
"""

_FORGET = """
DELETE FROM reply_groups g
USING json_to_recordset(%(items)s::json) AS i(channel text, name text)
WHERE g.channel = i.channel AND g.name = i.name
"""

_DROP = "DELETE FROM outbox WHERE id = ANY(%(ids)s::bigint[])"

# A group's place never goes back: what it has acknowledged once it has acknowledged.
_ACKNOWLEDGED = """
WITH places AS (
    INSERT INTO reply_groups AS g (channel, name, place)
    SELECT channel, name, place
    FROM json_to_recordset(%(items)s::json) AS i(channel text, name text, place bigint)
    WHERE name IS NOT NULL ORDER BY channel, name
    ON CONFLICT (channel, name) DO UPDATE SET place = greatest(g.place, excluded.place)
)
DELETE FROM outbox o USING (
    SELECT channel, min(place) AS place
    FROM json_to_recordset(%(items)s::json) AS i(channel text, place bigint) GROUP BY channel
) done
WHERE o.channel = done.channel AND o.number < done.place
"""

# The stream's length and last id, and each group's name, consumers, first pending entry and last
# delivered one.
_LOOK = """
if redis.call('EXISTS', KEYS[1]) == 0 then return {0, '0-0', {}} end
local last = '0-0'
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then last = info[i + 1] end
end
local groups = {}
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local found = {}
  for i = 1, #group, 2 do found[group[i]] = group[i + 1] end
  local first = false
  if found['pending'] > 0 then first = redis.call('XPENDING', KEYS[1], found['name'])[2] end
  groups[#groups + 1] = {found['name'], found['consumers'], first, found['last-delivered-id']}
end
return {redis.call('XLEN', KEYS[1]), last, groups}
"""

# Appends in one step what follows on the last id that was seen. If that is gone, so is what lay
# before it, and appending would leave a hole; what another sweep has appended is left out.
_ADD = """
local last = 0
if redis.call('EXISTS', KEYS[1]) == 1 then
  local info = redis.call('XINFO', 'STREAM', KEYS[1])
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then
      last = tonumber(string.match(info[i + 1], '^%d+'))
    end
  end
end
if last < tonumber(ARGV[1]) then return -1 end
local added = 0
for i = 4, #ARGV, 3 do
  if tonumber(ARGV[i]) > last then
    redis.call('XADD', KEYS[1], ARGV[i] .. '-0', ARGV[2], ARGV[i + 1], ARGV[3], ARGV[i + 2])
    added = added + 1
  end
end
return added
"""

# A consumer with pending entries stays: they would be lost with it.
_CLEAR_CONSUMERS = """
local consumers = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if consumers['err'] then return end
for _, consumer in ipairs(consumers) do
  local found = {}
  for i = 1, #consumer, 2 do found[consumer[i]] = consumer[i + 1] end
  if found['pending'] == 0 and found['idle'] > tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], found['name'])
  end
end
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What Redis holds of a channel."""

    entries: int
    #: Number of the last entry there was; 0 for a stream that is new.
    last_number: int
    #: By group: the first number that it has not acknowledged.
    places: dict[str, int]
    #: Groups with so many consumers that the idle ones are to go.
    crowded: tuple[str, ...]

    @classmethod
    def read(cls, found: Any) -> Self:
        """Read what the script returned."""
        entries, last, groups = found
        places, crowded = {}, []
        for name, consumers, first, delivered in groups:
            group = name.decode(errors="replace")
            places[group] = entry_number(first) if first else entry_number(delivered) + 1
            if consumers > _CONSUMERS:
                crowded.append(group)
        return cls(
            entries=entries,
            last_number=entry_number(last),
            places=places,
            crowded=tuple(crowded),
        )


class Deliverer:
    """One round takes a batch of every channel's results further; safe to run twice at once.

    channel_max: entries that a channel holds; further results wait in Postgres.
    """

    def __init__(
        self, *, db: Database, client: redis.asyncio.Redis, prefix: str, channel_max: int
    ) -> None:
        self._db = db
        self._client = client
        self._prefix = prefix
        self._channel_max = channel_max
        self._full: set[str] = set()

    async def round(self) -> bool:
        """Go once over all channels; return whether there is more to do at once.

        Raises if a server is away.
        """
        more = False
        after = ""
        while rows := await self._db.execute(_ACTIVE, after=after):
            after = rows[-1].channel
            looks = await self._look([row.channel for row in rows])
            seen = [(row, look) for row, look in zip(rows, looks, strict=True) if look is not None]
            lost = await self._restore(seen)
            # While a group was lost nobody knows what it still needs.
            cleared = await self._clear([one for one in seen if one[0].channel not in lost])
            await self._clear_consumers(seen)
            for row, look in seen:
                room = self._room(row, look.entries - cleared.get(row.channel, 0))
                if room > 0 and (row.waiting or (row.last_number or 0) > look.last_number):
                    more |= await self._deliver(row, look.last_number, min(room, _BATCH))
        return more

    def _key(self, channel: str) -> str:
        return self._prefix + channel_key(channel)

    async def _look(self, channels: Sequence[str]) -> list[Look | None]:
        pipeline = self._client.pipeline(transaction=False)
        for channel in channels:
            pipeline.execute_command("EVAL", _LOOK, 1, self._key(channel))
        looks: list[Look | None] = []
        for channel, found in zip(
            channels, await pipeline.execute(raise_on_error=False), strict=True
        ):
            if isinstance(found, ResponseError):
                # Something else lies under its key. The other channels go on.
                log.error("reply channel %s cannot be looked at: %s", channel, found)
                looks.append(None)
                continue
            if isinstance(found, Exception):
                raise found
            looks.append(Look.read(found))
        return looks

    async def _restore(self, seen: Sequence[tuple[Any, Look]]) -> set[str]:
        """Make the groups again that Redis has lost, forget those that somebody has destroyed.

        Returns the channels that were lost.
        """
        lost: set[str] = set()
        forgotten: list[dict[str, str]] = []
        pipeline = self._client.pipeline(transaction=False)
        for row, look in seen:
            missing = row.places.keys() - look.places.keys()
            if missing and _is_lost(row, look):
                log.warning("Redis has lost reply channel %s; it is filled again", row.channel)
                lost.add(row.channel)
                for group in missing:
                    start = entry_id(row.places[group] - 1)
                    pipeline.execute_command(
                        "XGROUP", "CREATE", self._key(row.channel), group, start, "MKSTREAM"
                    )
            else:
                forgotten += [{"channel": row.channel, "name": group} for group in missing]
        for outcome in await pipeline.execute(raise_on_error=False):
            # Its consumers may have been quicker.
            if isinstance(outcome, Exception) and "BUSYGROUP" not in str(outcome):
                raise outcome
        if forgotten:
            await self._db.execute(_FORGET, items=forgotten)
        return lost

    async def _clear(self, seen: Sequence[tuple[Any, Look]]) -> dict[str, int]:
        """Clear away what all groups have acknowledged; return how many entries, by channel."""
        items: list[dict[str, Any]] = []
        places: dict[str, int] = {}
        pipeline = self._client.pipeline(transaction=False)
        for row, look in seen:
            if not look.places:
                continue
            place = places[row.channel] = min(look.places.values())
            pipeline.execute_command("XTRIM", self._key(row.channel), "MINID", entry_id(place))
            moved = any(at > row.places.get(name, 0) for name, at in look.places.items())
            if moved or (row.first_number or place) < place:
                items += [
                    {"channel": row.channel, "name": name, "place": at}
                    for name, at in look.places.items()
                ]
        if items:
            # Before the stream: an entry without a row is harmless, a row without its entry not.
            await self._db.execute(_ACKNOWLEDGED, items=items)
        return dict(zip(places, await pipeline.execute(), strict=True))

    async def _clear_consumers(self, seen: Sequence[tuple[Any, Look]]) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for row, look in seen:
            for group in look.crowded:
                pipeline.execute_command(
                    "EVAL", _CLEAR_CONSUMERS, 1, self._key(row.channel), group, _CONSUMER_IDLE_MS
                )
        await pipeline.execute()

    def _room(self, row: Any, entries: int) -> int:
        room = self._channel_max - entries
        if room <= 0 and row.waiting:
            if row.channel not in self._full:
                self._full.add(row.channel)
                log.warning(
                    "reply channel %s is full (%d entries): further results wait until all its "
                    "groups have acknowledged; see `sluice reply list`",
                    row.channel,
                    entries,
                )
        else:
            self._full.discard(row.channel)
        return room

    async def _deliver(self, row: Any, after: int, limit: int) -> bool:
        """Append a batch; return whether there may be more."""
        channel = row.channel
        if row.waiting:
            await self._db.execute(_NUMBER, channel=channel, last=after, limit=limit)
        found = await self._db.execute(_READ, channel=channel, after=after, limit=limit)
        # A job that is tried again has no result any more; its next end has a row of its own.
        gone = [one.id for one in found if one.entry is None]
        if gone:
            await self._db.execute(_DROP, ids=gone)
        ready = [one for one in found if one.entry is not None]
        if ready:
            values = [value for one in ready for value in (one.number, str(one.job_id), one.entry)]
            pipeline = self._client.pipeline(transaction=False)
            pipeline.execute_command(
                "EVAL", _ADD, 1, self._key(channel), after, JOB_FIELD, REPLY_FIELD, *values
            )
            (added,) = await pipeline.execute()
            if added < 0:
                log.warning("Redis lost reply channel %s this moment; trying again", channel)
        return bool(found)


def _is_lost(row: Any, look: Look) -> bool:
    """Whether the stream ends before what it once had; if not, a group was destroyed on purpose."""
    places: list[int] = list(row.places.values())
    ended = max([row.first_number or 0, *(place - 1 for place in places)])
    return look.last_number < ended

"""Writing reply channels: deltas of many streams, and terminal events, in shared pipelines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import orjson
import redis.asyncio
from redis.exceptions import RedisError, ResponseError

from sluicegate.shared.coalescing import Coalescer
from sluicegate.shared.events import FIELD, event_id, reply_key, terminal_id
from sluicegate.shared.settings import Settings
from sluicegate.workers.providers.base import ToolCallFragment

log = logging.getLogger(__name__)

_BEGIN_TIMEOUT_S = 1.0

# One command and one answer for the deltas of many streams: a command for each of them takes
# longer here than all else that is done for a delta. NOMKSTREAM: after a flush the beginning is
# gone, so the rest is not sent either.
_APPEND = """
local taken = {}
for n, key in ipairs(KEYS) do
    local id = redis.pcall(
        'XADD', key, 'NOMKSTREAM', ARGV[2 * n], ARGV[1], ARGV[2 * n + 1])
    taken[n] = type(id) == 'string' and 1 or 0
end
return taken
"""
#: Streams that one call of the script appends to: Redis serves nobody else meanwhile.
_APPEND_MAX = 200


class Channel:
    """One job's reply channel under one fence; made by `Replies`.

    Redis refuses an event whose id is not the greatest so far, which is how the deltas of a
    worker that lost the job are kept out. The channel then falls silent: `lost`.
    """

    __slots__ = ("_replies", "_text", "_tools", "begun", "fence", "key", "lost", "n", "streamed")

    def __init__(self, replies: Replies, key: str, fence: int) -> None:
        self._replies = replies
        self._text: list[str] = []
        self._tools: list[ToolCallFragment] = []
        self.key = key
        self.fence = fence
        self.n = 0
        self.lost = False
        self.streamed = False
        #: Ends when the beginning of the attempt is there, which deltas must not overtake.
        self.begun: asyncio.Task[None] | None = None

    def delta(self, text: str, tool_calls: Sequence[ToolCallFragment] = ()) -> None:
        """Add to the answer; it is sent within the delta interval, the first of it at once."""
        is_first, self.streamed = not self.streamed, True
        if not self.lost:
            if text:
                self._text.append(text)
            self._tools.extend(tool_calls)
            self._replies.note_dirty(self, at_once=is_first)

    def take(self) -> bytes | None:
        """Return what has come together as one event, or None."""
        if not self._text and not self._tools:
            return None
        payload: dict[str, Any] = {"type": "delta", "text": "".join(self._text)}
        if self._tools:
            payload["tool_calls"] = self._tools
        self._text = []
        self._tools = []
        return orjson.dumps(payload)

    def discard(self) -> None:
        """Forget deltas that were not sent: another attempt follows, or nobody can read them."""
        self._text = []
        self._tools = []


class Replies:
    """All reply channels of a worker process."""

    def __init__(self, settings: Settings, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._prefix = settings.redis_prefix
        self._ttl_ms = round(settings.reply_ttl_s * 1000)
        self._interval_s = settings.delta_interval_s
        self._dirty: dict[str, Channel] = {}
        self._sender: asyncio.Task[None] | None = None
        self._sending = asyncio.Lock()
        self._flush = Coalescer[Channel, None](
            statement=self._flush_many,
            max_items=_APPEND_MAX,
            spacing_s=settings.spacing_s,
            parallel=1,  # each waits for the one before it in any case
            keeps=True,
        )
        self._append = Coalescer[tuple[str, str, bytes], None](
            statement=self._append_many,
            max_items=settings.coalesce_max,
            spacing_s=settings.spacing_s,
            keeps=True,  # what was said late is said all the same, and in its order
        )

    def channel(self, job_id: UUID, fence: int) -> Channel:
        """Open the job's channel for this holder."""
        return Channel(self, self._prefix + reply_key(job_id), fence)

    def begin(self, channel: Channel, *, model: str, attempt: int) -> None:
        """Say that an attempt has begun; from the second on, that what came before is void.

        Its call need not wait for that, nor for a Redis that does not answer.
        """
        channel.lost = False  # it may have been Redis that was away for a moment
        kind = "started" if attempt == 1 else "reset"
        payload = orjson.dumps({"type": kind, "model": model, "attempt": attempt})
        channel.begun = asyncio.create_task(self._begin(channel, payload, after=channel.begun))

    async def end(self, channel: Channel, payload: bytes) -> None:
        """Append what is left of the answer, then the terminal event: nothing can follow that."""
        if channel.begun is not None:
            await channel.begun
        if channel.streamed:
            await self._flush(channel)
        await self._send(channel.key, terminal_id(channel.fence), payload)

    def note_dirty(self, channel: Channel, *, at_once: bool) -> None:
        """Have the channel's deltas sent at once, or at the end of the interval."""
        if at_once:
            self._flush.post(channel)
            return
        self._dirty[channel.key] = channel
        if self._sender is None:
            self._sender = asyncio.get_running_loop().create_task(self._send_deltas())

    async def close(self) -> None:
        """Stop sending deltas; what is left is in the terminal events, or is void."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)

    async def _begin(
        self, channel: Channel, payload: bytes, *, after: asyncio.Task[None] | None
    ) -> None:
        try:
            # Not `wait_for`: before Python 3.12 it may swallow a cancellation.
            async with asyncio.timeout(_BEGIN_TIMEOUT_S):
                if after is not None:
                    await asyncio.shield(after)
                if channel.streamed:
                    # Deltas of the attempt before may be under way; this must not overtake them.
                    async with self._sending:
                        pass
                channel.n += 1
                await self._send(channel.key, event_id(channel.fence, channel.n), payload)
        except TimeoutError:
            # Deltas could overtake the beginning: none are sent.
            channel.lost = True
            channel.discard()

    async def _send(self, key: str, id_: str, payload: bytes) -> None:
        try:
            await self._append((key, id_, payload))
        except (RedisError, OSError) as error:
            # Readers look at the row itself every few seconds: a lost event cannot hang them.
            log.warning(
                "Redis did not take an event (%s); readers find the result in Postgres",
                type(error).__name__,
            )

    async def _append_many(self, items: Sequence[tuple[str, str, bytes]]) -> list[None]:
        pipeline = self._client.pipeline(transaction=False)
        for key, id_, payload in items:
            pipeline.execute_command("XADD", key, id_, FIELD, payload)
            pipeline.execute_command("PEXPIRE", key, self._ttl_ms)
        for outcome in await pipeline.execute(raise_on_error=False):
            # An id that is not the greatest: a repeat, or the job has a new holder.
            if isinstance(outcome, Exception) and not _is_stale(outcome):
                raise outcome
        return [None] * len(items)

    async def _send_deltas(self) -> None:
        """Send until there is nothing more to send: one pipeline an interval for all streams."""
        try:
            while True:
                await asyncio.sleep(self._interval_s)
                channels = list(self._dirty.values())
                self._dirty.clear()
                if not channels:
                    return
                async with self._sending:
                    for start in range(0, len(channels), _APPEND_MAX):
                        await self._send_once(channels[start : start + _APPEND_MAX])
        finally:
            self._sender = None

    async def _flush_many(self, channels: Sequence[Channel]) -> list[None]:
        """Send the deltas that have come together, after those that are under way."""
        async with self._sending:
            await self._send_once(channels)
        return [None] * len(channels)

    async def _send_once(self, channels: Sequence[Channel]) -> None:
        sent = []
        events: list[str | bytes] = []
        for channel in channels:
            if channel.begun is not None and not channel.begun.done():
                self.note_dirty(channel, at_once=False)
                continue
            payload = channel.take()
            if payload is not None:
                channel.n += 1
                events += (event_id(channel.fence, channel.n), payload)
                sent.append(channel)
        if not sent:
            return
        keys = [channel.key for channel in sent]
        try:
            taken = await self._client.eval(_APPEND, len(keys), *keys, FIELD, *events)
        except (RedisError, OSError) as error:
            log.warning("Redis did not take deltas (%s)", type(error).__name__)
            taken = [0] * len(sent)
        for channel, is_taken in zip(sent, taken, strict=True):
            if not is_taken:
                channel.lost = True
                channel.discard()


def _is_stale(error: Exception) -> bool:
    return isinstance(error, ResponseError) and "equal or smaller" in str(error)

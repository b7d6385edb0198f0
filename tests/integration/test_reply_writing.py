"""What a worker writes into reply channels: the deltas of many streams, each kept or refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis.asyncio

from sluicegate.shared.events import FIELD, Delta, Event, decode, reply_key, terminal_id
from sluicegate.shared.settings import Settings
from sluicegate.workers import replies as writing
from sluicegate.workers.replies import Channel, Replies
from tests.polling import eventually_async

_END = b'{"type":"completed"}'


@pytest.fixture
async def replies(settings: Settings, async_redis: redis.asyncio.Redis) -> AsyncIterator[Replies]:
    opened = Replies(settings, async_redis)
    yield opened
    await opened.close()


class Written:
    """What Redis holds of a channel."""

    def __init__(self, settings: Settings, client: redis.asyncio.Redis) -> None:
        self._prefix = settings.redis_prefix
        self._client = client

    async def ids(self, job_id: UUID) -> list[str]:
        return [id_.decode() for id_, _ in await self._entries(job_id)]

    async def text(self, job_id: UUID) -> str:
        events: list[Event] = [
            decode(id_.decode(), fields[FIELD])
            for id_, fields in await self._entries(job_id)
            if fields[FIELD] != _END
        ]
        return "".join(one.payload.text for one in events if isinstance(one.payload, Delta))

    async def kinds(self, job_id: UUID) -> list[str]:
        return [
            decode(id_.decode(), fields[FIELD]).payload.type
            for id_, fields in await self._entries(job_id)
            if fields[FIELD] != _END
        ]

    async def ends(self, job_id: UUID, piece: str) -> bool:
        return (await self.text(job_id)).endswith(piece)

    async def forget(self, job_id: UUID) -> None:
        await self._client.delete(self._prefix + reply_key(job_id))

    async def _entries(self, job_id: UUID) -> list[tuple[bytes, dict[bytes, bytes]]]:
        entries: Any = await self._client.xrange(self._prefix + reply_key(job_id))
        return list(entries)


@pytest.fixture
def written(settings: Settings, async_redis: redis.asyncio.Redis) -> Written:
    return Written(settings, async_redis)


async def _begun(replies: Replies, job_id: UUID, *, fence: int = 1) -> Channel:
    channel = replies.channel(job_id, fence)
    replies.begin(channel, model="m", attempt=1)
    assert channel.begun is not None
    await channel.begun
    return channel


async def _all_answered(channels: list[Channel]) -> bool:
    return all(channel.lost for channel in channels)


async def test_the_first_piece_is_sent_at_once_and_the_others_with_those_of_the_interval(
    settings: Settings, async_redis: redis.asyncio.Redis, written: Written
) -> None:
    replies = Replies(settings.model_copy(update={"delta_interval_s": 3600.0}), async_redis)
    job_id = uuid4()
    channel = await _begun(replies, job_id)
    channel.delta("one ")
    await eventually_async(partial(written.ends, job_id, "one "))
    channel.delta("two ")
    channel.delta("three")
    assert await written.ids(job_id) == ["1-1", "1-2"]
    await replies.end(channel, _END)
    assert await written.text(job_id) == "one two three"
    assert await written.ids(job_id) == ["1-1", "1-2", "1-3", terminal_id(1)]
    await replies.close()


async def test_no_piece_overtakes_the_beginning_that_is_under_way(
    replies: Replies, written: Written
) -> None:
    job_id = uuid4()
    channel = replies.channel(job_id, 1)
    for attempt in (1, 2):
        replies.begin(channel, model="m", attempt=attempt)
        for piece in ("one ", "two "):
            channel.delta(f"{attempt}:{piece}")
            await asyncio.sleep(0)  # a turn, in which it would be sent
    await replies.end(channel, _END)
    # The attempts' pieces are told apart by those who call, which discard what was not sent.
    assert (await written.text(job_id)).endswith("2:one 2:two ")
    kinds = await written.kinds(job_id)
    assert kinds[0] == "started"
    assert kinds.index("reset") < kinds.index("delta")
    assert not channel.lost


async def test_who_does_not_hear_of_a_beginning_sends_nothing_that_would_belong_to_it(
    settings: Settings,
    async_redis: redis.asyncio.Redis,
    written: Written,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writing, "_BEGIN_TIMEOUT_S", 0.05)
    replies, job_id = Replies(settings, async_redis), uuid4()
    channel = replies.channel(job_id, 1)
    await async_redis.client_pause(300, all=True)  # nobody is answered
    replies.begin(channel, model="m", attempt=1)
    channel.delta("kept")
    assert channel.begun is not None
    await channel.begun
    assert channel.lost
    channel.delta("silent")
    assert channel.take() is None
    await replies.end(channel, _END)
    assert (await written.ids(job_id))[-1] == terminal_id(1)
    assert await written.text(job_id) == ""
    await replies.close()


async def test_more_streams_than_one_command_takes_get_all_of_their_own(
    replies: Replies, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_APPEND_MAX", 3)
    jobs = [uuid4() for _ in range(8)]
    channels = [await _begun(replies, job_id) for job_id in jobs]
    for piece in ("one ", "two ", "three"):
        for n, channel in enumerate(channels):
            channel.delta(f"{n}:{piece}")
        if piece != "three":  # what is left the end sends
            for n, job_id in enumerate(jobs):
                await eventually_async(partial(written.ends, job_id, f"{n}:{piece}"))
    for channel in channels:
        await replies.end(channel, _END)
    for n, job_id in enumerate(jobs):
        assert await written.text(job_id) == f"{n}:one {n}:two {n}:three"
        assert (await written.ids(job_id)) == ["1-1", "1-2", "1-3", "1-4", terminal_id(1)]
    assert not any(channel.lost for channel in channels)


async def test_who_has_lost_the_job_or_its_channel_falls_silent_alone(
    replies: Replies, written: Written
) -> None:
    kept, lost, forgotten = (uuid4() for _ in range(3))
    channels = [await _begun(replies, job_id) for job_id in (lost, forgotten, kept)]
    await _begun(replies, lost, fence=2)  # another worker's
    await written.forget(forgotten)
    for channel in channels:  # in one turn of the loop, so in one command
        channel.delta("late")
    await eventually_async(partial(written.ends, kept, "late"))
    await eventually_async(lambda: _all_answered(channels[:2]))
    assert [channel.lost for channel in channels] == [True, True, False]
    assert await written.ids(lost) == ["1-1", "2-1"]
    assert await written.ids(forgotten) == []
    assert await written.text(kept) == "late"
    channels[0].delta("later")
    assert channels[0].take() is None

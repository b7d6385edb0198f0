"""Shared reply channels in memory: each group gets what ended until it has acknowledged it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

from sluicegate.producers.reply_channels import AsyncReply, Channel, Delivery, Reply
from sluicegate.producers.reply_readers import AsyncReplies, Replies
from sluicegate.shared.jobs import Result
from sluicegate.shared.reply_channels import entry_id
from sluicegate.testing.job import FakeJob


@dataclass(eq=False)
class _Entry:
    id: str
    job: FakeJob
    result: Result
    #: How often each group was given it; a group that has acknowledged it is gone from here.
    deliveries: dict[str, int] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    #: Who has it in hand, by group.
    holders: dict[str, ReferenceType[Any]] = field(default_factory=dict)


class FakeChannels:
    """All shared reply channels of a fake."""

    def __init__(self) -> None:
        self._entries: dict[str, list[_Entry]] = {}
        self._number = 0

    def add(self, job: FakeJob) -> None:
        """Send a job's result to the channel it asked for, if it did."""
        if job.reply_to is not None and job.result is not None:
            self._number += 1
            entry = _Entry(entry_id(self._number), job, job.result)
            self._entries.setdefault(job.reply_to, []).append(entry)

    def take(self, channel: Channel, holder: object) -> Delivery | None:
        """Give out the next entry that the group has not acknowledged and nobody has in hand."""
        group = channel.group
        for entry in self._entries.get(channel.name, ()):
            held = entry.holders.get(group)
            if group in entry.acknowledged or (held is not None and held() is not None):
                continue
            entry.holders[group] = ref(holder)
            entry.deliveries[group] = entry.deliveries.get(group, 0) + 1
            return Delivery(
                id=entry.id,
                result=entry.result,
                metadata=entry.job.metadata,
                idempotency_key=entry.job.idempotency_key,
                request_id=entry.job.draft.request_id,
                deliveries=entry.deliveries[group],
            )
        return None

    def acknowledge(self, channel: Channel, entry: str) -> None:
        """Do not give this entry to the group again."""
        for one in self._entries.get(channel.name, ()):
            if one.id == entry:
                one.acknowledged.add(channel.group)

    def let_go(self, channel: Channel, holder: object) -> None:
        """Give what this consumer has in hand to whoever comes next."""
        for entry in self._entries.get(channel.name, ()):
            held = entry.holders.get(channel.group)
            if held is not None and held() is holder:
                del entry.holders[channel.group]


#: Returns the next delivery to a consumer; None if there is none.
Take = Callable[[Channel, object], Delivery | None]


class FakeReplies(Replies):
    """The replies of a channel; the iteration ends when there are no more, whatever the timeout."""

    def __init__(self, channel: Channel, channels: FakeChannels, take: Take) -> None:
        self._channel = channel
        self._channels = channels
        self._take = take
        self._closed = False

    def __next__(self) -> Reply:
        """Return the next reply, after doing the jobs that wait for this channel."""
        delivery = None if self._closed else self._take(self._channel, self)
        if delivery is None:
            raise StopIteration
        return Reply(**_values(delivery), _ack=self._acknowledge)

    def close(self) -> None:
        """End the iteration. What was not acknowledged comes again, to this group."""
        self._closed = True
        self._channels.let_go(self._channel, self)

    def _acknowledge(self, entry: str) -> None:
        self._channels.acknowledge(self._channel, entry)


class AsyncFakeReplies(AsyncReplies):
    """As `FakeReplies`, for an event loop."""

    def __init__(self, channel: Channel, channels: FakeChannels, take: Take) -> None:
        self._channel = channel
        self._channels = channels
        self._take = take
        self._closed = False

    async def __anext__(self) -> AsyncReply:
        """Return the next reply, after doing the jobs that wait for this channel."""
        delivery = None if self._closed else self._take(self._channel, self)
        if delivery is None:
            raise StopAsyncIteration
        return AsyncReply(**_values(delivery), _ack=self._acknowledge)

    async def close(self) -> None:
        """End the iteration. What was not acknowledged comes again, to this group."""
        self._closed = True
        self._channels.let_go(self._channel, self)

    async def _acknowledge(self, entry: str) -> None:
        self._channels.acknowledge(self._channel, entry)


def _values(delivery: Delivery) -> dict[str, Any]:
    return {
        name: getattr(delivery, name)
        for name in ("id", "result", "metadata", "idempotency_key", "request_id", "deliveries")
    }

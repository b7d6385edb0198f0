"""Readers of shared reply channels: `Replies` for threads, `AsyncReplies` for an event loop.

Each does what its `Channel` plans, on a connection of its own that is blocked most of the time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from types import TracebackType
from typing import Any, Final, Self

import redis
import redis.asyncio
from tenacity import (
    AsyncRetrying,
    Retrying,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from sluicegate.producers.reply_channels import AsyncReply, Channel, Delivery, Reply
from sluicegate.shared.errors import QueueUnavailable
from sluicegate.shared.redis_client import make_async_redis, make_redis
from sluicegate.shared.settings import Settings

_AWAY: Final = (redis.RedisError, OSError)
_ACK: Final[dict[str, Any]] = {
    "retry": retry_if_exception_type(_AWAY),
    "stop": stop_after_delay(15),
    "wait": wait_random_exponential(multiplier=0.05, max=1),
    "reraise": True,
}


def _values(delivery: Delivery) -> dict[str, Any]:
    return {one.name: getattr(delivery, one.name) for one in fields(Delivery)}


def _not_taken(error: BaseException) -> QueueUnavailable:
    return QueueUnavailable(f"Redis did not take the ack, so the reply will come again: {error}")


class Replies(Iterator[Reply]):
    """The replies of a channel for one consumer, as they come; made by `Sluice.replies`.

    Threads may share one. It holds a connection to Redis of its own while it is read, beside those
    of the client. `close` may be called from any thread, and from a signal handler: iterating ends
    within two seconds, and what was given out can still be acknowledged.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        settings: Settings,
        client: Callable[[], redis.Redis],
        timeout: float | None,
    ) -> None:
        self._channel = channel
        self._timeout = timeout
        #: Acks go through the client's own connections: this one may be blocked.
        self._acks = client
        # A command that is repeated in secret would hide that an answer was lost.
        self._client = make_redis(settings, pool_size=1, repeats=0)
        self._reading = threading.Lock()
        self._over = threading.Event()

    @property
    def consumer(self) -> str:
        """The name under which the group knows this consumer."""
        return self._channel.consumer

    @property
    def problem(self) -> str:
        """Why Redis did not answer the last time it was asked; empty if it did."""
        return self._channel.problem

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Reply:
        """Wait for the next reply; the iteration ends with `timeout` or `close`."""
        with self._reading:
            delivery = self._next()
        if self._over.is_set():
            self._disconnect()
        if delivery is None:
            raise StopIteration
        return Reply(**_values(delivery), _ack=self._acknowledge)

    def close(self) -> None:
        """End the iteration. What was not acknowledged comes again, to this group."""
        self._over.set()
        self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _next(self) -> Delivery | None:
        channel = self._channel
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        while not self._over.is_set():
            now = time.monotonic()
            if delivery := channel.take(now):
                return delivery
            left_s = None if deadline is None else max(0.0, deadline - now)
            call = channel.plan(now, left_s)
            try:
                answer = getattr(self._client, call.method)(*call.args, **call.options)
                dry = channel.accept(answer, time.monotonic())
            except _AWAY as error:
                pause_s = channel.failed(error, time.monotonic())
                dry = pause_s > 0
                self._over.wait(pause_s if left_s is None else min(pause_s, left_s))
            except BaseException as error:
                channel.failed(error, time.monotonic())
                raise
            if dry and left_s == 0:
                return None
        return None

    def _acknowledge(self, entry: str) -> None:
        channel = self._channel
        try:
            Retrying(**_ACK)(lambda: self._acks().xack(channel.key, channel.group, entry))
        except _AWAY as error:
            raise _not_taken(error) from error
        channel.acknowledged(entry)

    def _disconnect(self) -> None:
        # Whoever reads does it when it ends.
        if self._reading.acquire(blocking=False):
            try:
                self._client.connection_pool.disconnect()
            finally:
                self._reading.release()


class AsyncReplies(AsyncIterator[AsyncReply]):
    """As `Replies`, for an event loop; made by `AsyncSluice.replies`."""

    def __init__(
        self,
        channel: Channel,
        *,
        settings: Settings,
        client: Callable[[], redis.asyncio.Redis],
        timeout: float | None,
    ) -> None:
        self._channel = channel
        self._timeout = timeout
        #: Acks go through the client's own connections: this one may be blocked.
        self._acks = client
        # A command that is repeated in secret would hide that an answer was lost.
        self._client = make_async_redis(settings, pool_size=1, repeats=0)
        self._reading = asyncio.Lock()
        self._over = asyncio.Event()

    @property
    def consumer(self) -> str:
        """The name under which the group knows this consumer."""
        return self._channel.consumer

    @property
    def problem(self) -> str:
        """Why Redis did not answer the last time it was asked; empty if it did."""
        return self._channel.problem

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AsyncReply:
        """Wait for the next reply; the iteration ends with `timeout` or `close`."""
        async with self._reading:
            delivery = await self._next()
        if delivery is None:
            raise StopAsyncIteration
        return AsyncReply(**_values(delivery), _ack=self._acknowledge)

    async def close(self) -> None:
        """End the iteration. What was not acknowledged comes again, to this group."""
        self._over.set()
        async with self._reading:
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _next(self) -> Delivery | None:
        channel = self._channel
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        while not self._over.is_set():
            now = time.monotonic()
            if delivery := channel.take(now):
                return delivery
            left_s = None if deadline is None else max(0.0, deadline - now)
            call = channel.plan(now, left_s)
            try:
                answer = await getattr(self._client, call.method)(*call.args, **call.options)
                dry = channel.accept(answer, time.monotonic())
            except _AWAY as error:
                pause_s = channel.failed(error, time.monotonic())
                dry = pause_s > 0
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_s if left_s is None else min(pause_s, left_s)):
                        await self._over.wait()
            except BaseException as error:
                channel.failed(error, time.monotonic())
                raise
            if dry and left_s == 0:
                return None
        return None

    async def _acknowledge(self, entry: str) -> None:
        channel = self._channel

        async def ack() -> None:
            await self._acks().xack(channel.key, channel.group, entry)

        try:
            await AsyncRetrying(**_ACK)(ack)
        except _AWAY as error:
            raise _not_taken(error) from error
        channel.acknowledged(entry)

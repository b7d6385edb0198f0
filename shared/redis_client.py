"""Connections to Redis or Valkey."""

from __future__ import annotations

import asyncio
from typing import Any

import hiredis
import redis
import redis.asyncio
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.connection import BlockingConnectionPool as AsyncBlockingPool
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import BlockingConnectionPool
from redis.retry import Retry

from sluicegate.shared.settings import Settings


class _Connection(AbstractConnection):
    """A connection that packs commands in C, and on which tasks can be cancelled at any moment.

    redis-py packs in Python here, which takes a millisecond for an XREAD of 250 streams. It sends
    through `asyncio.wait_for`, which before Python 3.12 swallows a cancellation that arrives
    together with what it waits for (https://github.com/python/cpython/issues/86296): a loop that
    was told to end went on for ever.
    """

    def pack_command(self, *args: Any) -> list[bytes]:
        """Pack a command; its name may be of several words, which are sent one by one."""
        name, *rest = args
        try:
            return [hiredis.pack_command((*name.split(), *rest))]
        except TypeError:  # a memoryview, or what redis-py has a better word for
            return super().pack_command(*args)

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send; raises `CancelledError` also where redis-py has swallowed it."""
        task = asyncio.current_task()
        assert task is not None
        cancelled = task.cancelling()
        await super().send_packed_command(command, check_health)
        if task.cancelling() > cancelled:
            # Nobody reads the answer any more: the next user must not get it.
            await self.disconnect(nowait=True)
            raise asyncio.CancelledError


def make_redis(
    settings: Settings, *, pool_size: int | None = None, repeats: int = 1
) -> redis.Redis:
    """Build the synchronous client; a full pool makes callers wait instead of raising.

    repeats: how often a command is sent again, on a new connection, when its answer is lost.
    """
    pool = BlockingConnectionPool.from_url(
        settings.redis_dsn,
        max_connections=pool_size or settings.redis_pool_size,
        timeout=settings.command_timeout_s,
        socket_timeout=settings.command_timeout_s,
        socket_connect_timeout=settings.connect_timeout_s,
        socket_keepalive=True,
        health_check_interval=25,
        # One more try is for a connection that was closed while it lay idle. What to do about a
        # server that is away is decided by whoever asked, not by minutes of hidden retries.
        retry=Retry(NoBackoff(), repeats),
    )
    return redis.Redis.from_pool(pool)


def make_async_redis(
    settings: Settings, *, pool_size: int | None = None, repeats: int = 1
) -> redis.asyncio.Redis:
    """Build the asyncio client; see `make_redis`."""
    pool = AsyncBlockingPool.from_url(
        settings.redis_dsn,
        max_connections=pool_size or settings.redis_pool_size,
        timeout=settings.command_timeout_s,
        socket_timeout=settings.command_timeout_s,
        socket_connect_timeout=settings.connect_timeout_s,
        socket_keepalive=True,
        health_check_interval=25,
        # One more try is for a connection that was closed while it lay idle. What to do about a
        # server that is away is decided by whoever asked, not by minutes of hidden retries.
        retry=AsyncRetry(NoBackoff(), repeats),
    )
    # The URL decides which class it is: TCP, TLS or a Unix socket.
    pool.connection_class = type("Connection", (_Connection, pool.connection_class), {})
    return redis.asyncio.Redis.from_pool(pool)

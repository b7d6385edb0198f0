"""Connections to Redis or Valkey."""

from __future__ import annotations

import redis
import redis.asyncio
from redis.asyncio.connection import BlockingConnectionPool as AsyncBlockingPool
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import BlockingConnectionPool
from redis.retry import Retry

from sluicegate.shared.settings import Settings


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
    return redis.asyncio.Redis.from_pool(pool)

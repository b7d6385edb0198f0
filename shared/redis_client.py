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


def make_redis(settings: Settings) -> redis.Redis:
    """Build the synchronous client; a full pool makes callers wait instead of raising."""
    pool = BlockingConnectionPool.from_url(
        settings.redis_dsn,
        max_connections=settings.redis_pool_size,
        timeout=settings.command_timeout_s,
        socket_timeout=settings.command_timeout_s,
        socket_connect_timeout=settings.connect_timeout_s,
        socket_keepalive=True,
        health_check_interval=25,
        # One more try, for a connection that was closed while it lay idle. What to do about a
        # server that is away is decided by whoever asked, not by minutes of hidden retries.
        retry=Retry(NoBackoff(), 1),
    )
    return redis.Redis(connection_pool=pool)


def make_async_redis(settings: Settings) -> redis.asyncio.Redis:
    """Build the asyncio client; a full pool makes callers wait instead of raising."""
    pool = AsyncBlockingPool.from_url(
        settings.redis_dsn,
        max_connections=settings.redis_pool_size,
        timeout=settings.command_timeout_s,
        socket_timeout=settings.command_timeout_s,
        socket_connect_timeout=settings.connect_timeout_s,
        socket_keepalive=True,
        health_check_interval=25,
        # One more try, for a connection that was closed while it lay idle. What to do about a
        # server that is away is decided by whoever asked, not by minutes of hidden retries.
        retry=AsyncRetry(NoBackoff(), 1),
    )
    return redis.asyncio.Redis.from_pool(pool)

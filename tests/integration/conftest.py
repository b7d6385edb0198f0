"""What integration tests share: a gate on the real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
import redis.asyncio

from sluicegate.shared.settings import Settings
from tests.gate_row import Server


@pytest.fixture
def gate_server(redis_client: redis.Redis, settings: Settings) -> Iterator[Server]:
    """Return the test's Redis, for gates."""
    server = Server(redis_client, redis.asyncio.Redis.from_url(settings.redis_dsn))
    yield server
    server.close()

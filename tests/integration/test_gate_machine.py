"""The gate against its model, on the real server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis
import redis.asyncio

from sluicegate.shared.settings import Settings
from tests.gate_machine import BREAKER, LIMITS, TINY, Server, run_machine


@pytest.fixture
def server(redis_client: redis.Redis, settings: Settings) -> Iterator[Server]:
    server = Server(redis_client, redis.asyncio.Redis.from_url(settings.redis_dsn))
    yield server
    server.close()


@pytest.mark.parametrize("limits", [BREAKER, LIMITS, TINY], ids=["breaker", "limits", "tiny"])
def test_gate_does_as_its_model(server: Server, settings: Settings, limits: dict[str, Any]) -> None:
    run_machine(server, settings, limits, examples=25, steps=40)

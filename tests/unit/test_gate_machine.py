"""The gate against its model, on fakeredis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
from fakeredis import aioredis

from sluicegate.shared.settings import Settings
from tests.gate_machine import BREAKER, LIMITS, TINY, Server, run_machine


@pytest.fixture
def server() -> Iterator[Server]:
    fake = fakeredis.FakeServer()
    server = Server(fakeredis.FakeRedis(server=fake), aioredis.FakeRedis(server=fake))
    yield server
    server.close()


@pytest.mark.parametrize("limits", [BREAKER, LIMITS, TINY], ids=["breaker", "limits", "tiny"])
def test_gate_does_as_its_model(server: Server, limits: dict[str, Any]) -> None:
    settings = Settings(_env_file=None, redis_prefix="test:")
    run_machine(server, settings, limits, examples=25, steps=40)

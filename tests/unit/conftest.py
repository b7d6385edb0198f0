"""What unit tests share: a gate on fakeredis."""

from __future__ import annotations

from collections.abc import Iterator

import fakeredis
import pytest
from fakeredis import aioredis

from sluicegate.shared.settings import Settings
from tests.gate_row import Server


@pytest.fixture
def gate_server() -> Iterator[Server]:
    """Return a fake Redis that knows Lua."""
    fake = fakeredis.FakeServer()
    server = Server(fakeredis.FakeRedis(server=fake), aioredis.FakeRedis(server=fake))
    yield server
    server.close()


@pytest.fixture
def gate_settings() -> Settings:
    """Return the settings as they ship."""
    return Settings(_env_file=None)

"""What integration tests share: a gate on the real server, and a receiver of posts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
import redis.asyncio

from sluicegate.shared.settings import Settings
from tests.gate_row import Server
from tests.https_server import Certificate, Receiver, receiving


@pytest.fixture
def gate_server(redis_client: redis.Redis, settings: Settings) -> Iterator[Server]:
    """Return the test's Redis, for gates."""
    server = Server(redis_client, redis.asyncio.Redis.from_url(settings.redis_dsn))
    yield server
    server.close()


@pytest.fixture
def receiver(certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """Return a receiver whose authority is trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.authority))
    with receiving(certificate) as running:
        yield running

"""The catalogue as a worker reads it: a burst after a pause in the work sees what has changed."""

from __future__ import annotations

import asyncio

from sqlalchemy import text

from sluicegate.shared.catalogue import AsyncCatalogueCache, invalidate
from sluicegate.shared.database import make_async_engine, make_engine
from sluicegate.shared.redis_client import make_async_redis, make_redis
from sluicegate.shared.settings import Settings


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _pause(settings: Settings, use_case: str) -> None:
    engine, client = make_engine(settings, application_name="test"), make_redis(settings)
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO pauses (kind, subject) VALUES ('use_case', :name)"),
            {"name": use_case},
        )
    invalidate(client, settings.redis_prefix)
    client.close()
    engine.dispose()


def test_a_burst_after_a_pause_in_the_work_sees_what_has_changed(settings: Settings) -> None:
    clock = Clock()

    async def burst() -> None:
        engine, client = make_async_engine(settings), make_async_redis(settings)
        cache = AsyncCatalogueCache(prefix=settings.redis_prefix, ttl_s=3600, clock=clock)
        try:
            before = await cache.get(engine, client)
            await asyncio.to_thread(_pause, settings, "draft")
            clock.now = 30.0
            seen = await asyncio.gather(*(cache.get(engine, client) for _ in range(25)))
            assert before.pauses.use_cases == frozenset()
            assert {one.pauses.use_cases for one in seen} == {frozenset({"draft"})}
            # In the middle of the work one asks, and the others go on with what was right just now.
            await asyncio.to_thread(_pause, settings, "voice")
            clock.now = 30.6
            seen = await asyncio.gather(*(cache.get(engine, client) for _ in range(25)))
            assert {"draft", "voice"} in {one.pauses.use_cases for one in seen}
            assert frozenset({"draft"}) in {one.pauses.use_cases for one in seen}
        finally:
            await client.aclose()
            await engine.dispose()

    asyncio.run(burst())

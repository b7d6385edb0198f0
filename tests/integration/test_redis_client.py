"""What our Redis client adds to redis-py, on a real server."""

from __future__ import annotations

import asyncio

import pytest

from sluicegate.shared.redis_client import make_async_redis
from sluicegate.shared.settings import Settings


async def _cancelled_after(settings: Settings, turns: int) -> bool:
    """Cancel a command after so many turns of the loop; return whether it was still running."""
    client = make_async_redis(settings)
    try:
        await client.set("answer", "42")
        command = asyncio.ensure_future(client.get("answer"))
        for _ in range(turns):
            await asyncio.sleep(0)
        was_running = command.cancel()
        if was_running:
            with pytest.raises(asyncio.CancelledError):
                await command
        # Nobody gets the answer to the question of somebody who has gone.
        assert await client.echo("next") == b"next"
    finally:
        await client.aclose()
    return was_running


def test_a_cancellation_is_never_swallowed(settings: Settings) -> None:
    async def at_every_moment() -> None:
        turns = 0
        while await _cancelled_after(settings, turns):
            turns += 1
            assert turns < 10_000
        assert turns > 3

    asyncio.run(at_every_moment())

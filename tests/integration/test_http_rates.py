"""The bucket that all HTTP processes share, on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import redis.asyncio
from pydantic import SecretStr

from sluicegate.producers.http.problems import Problem
from sluicegate.producers.http.rates import Rates
from sluicegate.shared.redis_client import make_async_redis
from sluicegate.shared.settings import Settings
from tests.polling import eventually_async


def rates_of(
    settings: Settings, client: redis.asyncio.Redis, rate: float, burst: int
) -> Callable[[], Rates]:
    wanted = settings.model_copy(update={"http_rate_per_s": rate, "http_rate_burst": burst})
    return lambda: Rates(client, wanted)


async def taken(rates: Rates, subject: str, times: int) -> int:
    """How many of so many requests are let through."""
    refused: list[Problem] = []
    for _ in range(times):
        try:
            await rates.take(subject)
        except Problem as problem:
            refused.append(problem)
    assert all(problem.status == 429 for problem in refused)
    assert all(int(problem.headers["Retry-After"]) >= 1 for problem in refused)
    return times - len(refused)


async def test_a_burst_and_no_more(settings: Settings, async_redis: redis.asyncio.Redis) -> None:
    make = rates_of(settings, async_redis, 0.001, 100)
    processes = [make() for _ in range(4)]
    found = await asyncio.gather(*(taken(one, "key:1", 60) for one in processes))
    # What a process has taken in advance, and then had no use for, is lost to the others.
    assert 80 <= sum(found) <= 100
    assert await taken(processes[0], "key:2", 5) == 5


async def test_it_fills_again(settings: Settings, async_redis: redis.asyncio.Redis) -> None:
    rates = rates_of(settings, async_redis, 20.0, 5)()
    assert await taken(rates, "key:1", 10) >= 5
    await eventually_async(lambda: taken(rates, "key:1", 1), 10)


async def test_most_requests_of_a_busy_caller_cost_redis_nothing(
    settings: Settings, async_redis: redis.asyncio.Redis
) -> None:
    rates = rates_of(settings, async_redis, 1000.0, 1000)()
    await async_redis.config_resetstat()
    assert await taken(rates, "key:1", 500) == 500
    stats = await async_redis.info("commandstats")
    calls = sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "eval"))
    assert 0 < calls < 100


async def test_subjects_do_not_show_in_redis(
    settings: Settings, async_redis: redis.asyncio.Redis
) -> None:
    rates = rates_of(settings, async_redis, 1.0, 5)()
    await taken(rates, "jwt:ann@example.com", 1)
    keys = [key async for key in async_redis.scan_iter(match=f"{settings.redis_prefix}*")]
    assert keys
    assert not any(b"ann" in key for key in keys)


async def test_without_redis_nobody_is_held_up(settings: Settings) -> None:
    away = settings.model_copy(
        update={"redis_url": SecretStr("redis://127.0.0.1:1/0"), "http_rate_burst": 1}
    )
    client = make_async_redis(away)
    assert await taken(Rates(client, away), "key:1", 10) == 10
    await client.aclose()


@pytest.mark.parametrize("rate", [0.05, 0.5, 2.0])
async def test_the_wait_that_is_told_is_enough(
    settings: Settings, async_redis: redis.asyncio.Redis, rate: float
) -> None:
    now = 0.0
    wanted = settings.model_copy(update={"http_rate_per_s": rate, "http_rate_burst": 1})
    rates = Rates(async_redis, wanted, clock=lambda: now)
    assert await taken(rates, "key:1", 1) == 1
    with pytest.raises(Problem) as caught:
        await rates.take("key:1")
    # Nobody is let through before that, whatever the bucket says meanwhile.
    assert await taken(rates, "key:1", 3) == 0
    assert int(caught.value.headers["Retry-After"]) >= 1 / rate


async def test_many_at_once_lose_nothing(
    settings: Settings, async_redis: redis.asyncio.Redis
) -> None:
    wanted = settings.model_copy(update={"http_rate_per_s": 0.001, "http_rate_burst": 200})
    rates = Rates(async_redis, wanted, clock=lambda: 0.0)
    await async_redis.config_resetstat()
    found = await asyncio.gather(*(taken(rates, "key:1", 10) for _ in range(20)))
    assert sum(found) == 200
    stats = await async_redis.info("commandstats")
    calls = sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "eval"))
    # One ask at a time, and each for more than the one before.
    assert calls < 40
    assert await taken(rates, "key:1", 1) == 0


async def test_callers_are_forgotten(settings: Settings, async_redis: redis.asyncio.Redis) -> None:
    rates = Rates(async_redis, settings.model_copy(update={"redis_url": SecretStr("")}))
    rates._away_until = float("inf")
    for n in range(10_050):
        await rates.take(f"key:{n}")
        await rates.take("key:busy")
    assert len(rates._leases) == 10_000
    assert "key:busy" in rates._leases
    assert "key:1" not in rates._leases

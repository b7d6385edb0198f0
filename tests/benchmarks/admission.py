"""What admission costs a worker: 25 jobs at a time ask and report, over and over.

Prints a JSON line: jobs, and the CPU of this process for them and for as many that ask nobody.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from uuid import UUID

import uvloop

from sluicegate.shared.admission.gate import Ask, Outcome, Report
from sluicegate.shared.catalogue import AsyncCatalogueCache, Provider
from sluicegate.shared.database import make_async_engine
from sluicegate.shared.ids import new_id
from sluicegate.shared.jobs import Lane
from sluicegate.shared.redis_client import make_async_redis
from sluicegate.shared.settings import Settings, get_settings
from sluicegate.workers.gates import Gates

#: Jobs of one message.
CHUNK = 25
#: With and without take turns, so that a slow moment hits both.
_TURN = timedelta(seconds=0.25)

Job = Callable[[], Awaitable[None]]


def gated(gates: Gates, provider: Provider) -> Job:
    """Return what a job does: ask, and report what its call has used."""
    account_id = UUID(int=1)

    async def job() -> None:
        ask = Ask(
            attempt_id=new_id(),
            provider=provider,
            account_id=account_id,
            lane=Lane.BULK,
            input_tokens=260,
            output_tokens=1024,
        )
        verdict = await gates.admit(ask)
        assert verdict.reason is None, verdict
        await asyncio.sleep(0)
        await gates.report_now(
            Report(
                attempt_id=ask.attempt_id,
                provider=provider,
                account_id=account_id,
                lane=ask.lane,
                generation=verdict.generation,
                is_probe=verdict.is_probe,
                outcome=Outcome.SUCCEEDED,
                reserved_input_tokens=ask.input_tokens,
                reserved_output_tokens=ask.output_tokens,
                used_input_tokens=250,
                used_output_tokens=100,
            )
        )

    return job


async def ungated() -> None:
    """Do as little in its place."""
    await asyncio.sleep(0)


async def measure(seconds: float) -> dict[str, float]:
    """Return the CPU of both, in seconds, and how many jobs there were of each."""
    settings: Settings = get_settings()
    engine = make_async_engine(settings, application_name="bench", pool_size=1)
    redis = make_async_redis(settings)
    cache = AsyncCatalogueCache(prefix=settings.redis_prefix, ttl_s=settings.catalogue_ttl_s)
    catalogue = await cache.get(engine, redis)
    provider = next(row for row in catalogue.providers if row.requests_per_minute is not None)
    gates = Gates(client=redis, settings=settings)
    gates.start()
    job = gated(gates, provider)
    await _spend(job, 4)  # connections, and the scripts
    chunks = 0
    with_s = without_s = 0.0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        spent_s, n = await _for_a_turn(job)
        with_s += spent_s
        without_s += await _spend(ungated, n)
        chunks += n
    await gates.stop()
    await redis.aclose()
    await engine.dispose()
    return {"jobs": chunks * CHUNK, "with_s": with_s, "without_s": without_s}


async def _for_a_turn(job: Job) -> tuple[float, int]:
    until = time.monotonic() + _TURN.total_seconds()
    spent_s, chunks = 0.0, 0
    while time.monotonic() < until:
        spent_s += await _spend(job, 1)
        chunks += 1
    return spent_s, chunks


async def _spend(job: Job, chunks: int) -> float:
    before = time.process_time()
    for _ in range(chunks):
        await asyncio.gather(*(job() for _ in range(CHUNK)))
    return time.process_time() - before


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, required=True)
    print(json.dumps(uvloop.run(measure(parser.parse_args().seconds))))


if __name__ == "__main__":
    main()

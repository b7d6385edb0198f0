"""Two sweeps at once do what one does, once."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis

from sluicegate.shared.settings import Settings
from sluicegate.workers.sweep.loops import Sweep
from tests.databases import Rows

JOBS = 700

_ADD = """
INSERT INTO jobs (id, account_id, use_case, lane, queue, state, fence, worker_id, max_attempts,
                  run_at, published_at, deadline_at, request_hash)
SELECT gen_random_uuid(), a.id, 'summary', 'bulk', 'summary.anthropic.bulk', %(state)s, 1,
       CASE WHEN %(state)s = 'running' THEN gen_random_uuid() END, 4,
       now() - interval '1 hour', now() - interval '1 hour', now() + %(left)s::interval, ''
FROM generate_series(1, %(jobs)s), accounts a WHERE a.name = 'default'
"""

_DISPATCH = """
INSERT INTO attempts (id, job_id, fence, number, worker_id, account_id, use_case, provider_id,
                      provider, model, state, reserved_nano_usd, baseline_reserved_nano_usd)
SELECT gen_random_uuid(), id, fence, 1, worker_id, account_id, use_case, gen_random_uuid(), 'p',
       'm', 'dispatching', 7, 9
FROM jobs
"""


@pytest.fixture
async def sweeps(settings: Settings) -> AsyncIterator[tuple[Sweep, Sweep]]:
    both = Sweep(settings), Sweep(settings)
    yield both
    for sweep in both:
        await sweep.close()


def _published(settings: Settings, client: redis.Redis) -> list[str]:
    """Ids in the messages that wait, one for each time a job is named."""
    found: Any = client.lrange(f"{settings.redis_prefix}summary.anthropic.bulk", 0, -1)
    return [job_id for one in found for job_id in _job_ids(json.loads(one))]


def _job_ids(message: dict[str, Any]) -> list[str]:
    (job_ids,), _, _ = json.loads(base64.b64decode(message["body"]))
    return list(job_ids)


async def test_jobs_are_staged_once(
    settings: Settings, redis_client: redis.Redis, sweeps: tuple[Sweep, Sweep], rows: Rows
) -> None:
    rows(_ADD, state="parked", left="1 day", jobs=JOBS)
    await asyncio.gather(*(sweep.stage() for sweep in sweeps for _ in range(3)))
    published = _published(settings, redis_client)
    assert sorted(published) == sorted(str(row.id) for row in rows("SELECT id FROM jobs"))
    assert rows("SELECT DISTINCT state, fence FROM jobs") == [("queued", 2)]


async def test_lost_messages_are_published_once(
    settings: Settings, redis_client: redis.Redis, sweeps: tuple[Sweep, Sweep], rows: Rows
) -> None:
    rows(_ADD, state="queued", left="1 day", jobs=JOBS)
    await asyncio.gather(*(sweep.republish() for sweep in sweeps for _ in range(3)))
    published = _published(settings, redis_client)
    assert sorted(published) == sorted(str(row.id) for row in rows("SELECT id FROM jobs"))


async def test_dead_workers_calls_are_booked_once(
    settings: Settings, redis_client: redis.Redis, sweeps: tuple[Sweep, Sweep], rows: Rows
) -> None:
    rows(_ADD, state="running", left="1 day", jobs=JOBS)
    rows(_DISPATCH)
    await asyncio.gather(*(sweep.rescue() for sweep in sweeps for _ in range(3)))
    assert rows("SELECT state, count(*) FROM attempts GROUP BY 1") == [("unknown", JOBS)]
    assert rows("SELECT kind, count(*), sum(amount_nano_usd) FROM cost_entries GROUP BY 1") == [
        ("estimate", JOBS, 7 * JOBS)
    ]
    assert rows(
        "SELECT DISTINCT state, fence, attempts_used, unknown_attempts, cost_nano_usd FROM jobs"
    ) == [("queued", 2, 1, 1, 7)]
    assert len(_published(settings, redis_client)) == JOBS


async def test_a_policy_may_forbid_another_try(
    redis_client: redis.Redis, settings: Settings, sweeps: tuple[Sweep, Sweep], rows: Rows
) -> None:
    rows("UPDATE use_cases SET unknown_policy = 'fail' WHERE name = 'summary'")
    rows(_ADD, state="running", left="1 day", jobs=20)
    rows(_DISPATCH)
    await asyncio.gather(*(sweep.rescue() for sweep in sweeps))
    assert rows("SELECT DISTINCT state, fence FROM jobs") == [("failed", 2)]
    (body,) = {
        json.dumps(row.error) for row in rows("SELECT body -> 'error' AS error FROM results")
    }
    assert json.loads(body)["error_class"] == "lost"
    assert _published(settings, redis_client) == []


async def test_deadlines_end_jobs_once(sweeps: tuple[Sweep, Sweep], rows: Rows) -> None:
    rows(_ADD, state="parked", left="-1 second", jobs=JOBS)
    rows(_ADD, state="queued", left="-1 second", jobs=JOBS)
    await asyncio.gather(*(sweep.expire() for sweep in sweeps for _ in range(3)))
    assert rows("SELECT state, count(*) FROM jobs GROUP BY 1") == [("expired", 2 * JOBS)]
    assert rows("SELECT DISTINCT fence FROM results") == [(2,)]
    assert rows("SELECT count(*) FROM results") == [(2 * JOBS,)]

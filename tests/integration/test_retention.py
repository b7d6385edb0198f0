"""Retention: what the purger removes, when, how much at a time, and what is left to be read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import redis
from sqlalchemy import Engine

from sluicegate import AsyncSluice, JobFailed, Purged, Sluice, State
from sluicegate.producers.steering import FIND_ENDED, RETRY, reopening
from sluicegate.shared.catalogue import read
from sluicegate.shared.database import BY_SIZE
from sluicegate.shared.errors import IllegalTransition
from sluicegate.shared.ids import new_id
from sluicegate.shared.purging import PURGE_BATCH, PURGE_DUE
from sluicegate.shared.redis_client import make_async_redis
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import Database
from sluicegate.workers.local.sandbox_control import SandboxControl
from sluicegate.workers.sweep.deliverer import Deliverer
from sluicegate.workers.sweep.purger import Purger
from tests.command_line import Command
from tests.databases import Rows
from tests.dumping import dump
from tests.harness import Rig, with_sandbox
from tests.polling import eventually
from tests.stand_in import StandIn

RETENTION_S = 3600.0
LONG_AGO_S = RETENTION_S + 60

Work = Callable[[UUID], StandIn]


@pytest.fixture
def client(settings: Settings) -> Iterator[Sluice]:
    with Sluice(settings, reply_recheck_s=0.2) as sluice:
        yield sluice


@pytest.fixture
def sluice(settings: Settings, command_line: Callable[[Settings], Command]) -> Command:
    return command_line(settings)


@pytest.fixture
def work(engine: Engine, redis_client: redis.Redis, settings: Settings) -> Work:
    return lambda job_id: StandIn(
        engine=engine, client=redis_client, settings=settings, job_id=job_id
    )


@asynccontextmanager
async def purgers(settings: Settings, count: int = 1) -> AsyncIterator[list[Purger]]:
    db = Database(settings, application_name="test", size=count, planner=BY_SIZE)
    client = make_async_redis(settings)
    yield [
        Purger(db=db, client=client, prefix=settings.redis_prefix, retention_s=RETENTION_S)
        for _ in range(count)
    ]
    await client.aclose()
    await db.close()


async def purge(settings: Settings) -> int:
    async with purgers(settings) as (purger,):
        return await purger.round()


def ended_jobs(rows: Rows, count: int, *, ago_s: float = LONG_AGO_S) -> list[UUID]:
    """Insert jobs that have ended, with request and result."""
    ids = [new_id() for _ in range(count)]
    rows(
        """
        WITH job AS (
            INSERT INTO jobs (id, account_id, use_case, lane, queue, state, max_attempts,
                              deadline_at, request_hash, finished_at)
            SELECT one, (SELECT id FROM accounts WHERE name = 'default'), 'draft', 'bulk',
                   'draft.anthropic.bulk', 'succeeded', 5, now(), 'h',
                   now() - make_interval(secs => %(ago)s)
            FROM unnest(%(ids)s::uuid[]) one RETURNING id
        ), body AS (
            INSERT INTO job_bodies SELECT id, '{"messages": "asked"}' FROM job
        )
        INSERT INTO results (job_id, fence, body)
        SELECT id, 1, json_build_object(
            'version', 1, 'state', 'succeeded', 'use_case', 'draft', 'text', 'said')
        FROM job
        """,
        ids=ids,
        ago=ago_s,
    )
    return ids


async def test_what_is_left_of_an_answer(
    client: Sluice, settings: Settings, sluice: Command, work: Work, redis_client: redis.Redis
) -> None:
    asked = {"metadata": {"lead": "CANARY"}, "idempotency_key": "k-1"}
    handle = client.submit("draft", "CANARY", **asked)  # type: ignore[arg-type]
    young = client.submit("draft", "young")
    stand_in = work(handle.id)
    stand_in.say("delta", text="CANARY")
    usage = {"input": 3, "output": 4}
    stand_in.end(
        stand_in.settle(
            ago_s=LONG_AGO_S, text="CANARY", cost_nano_usd=17, usage=usage, model="m-1", attempts=1
        )
    )
    work(young.id).settle(text="kept", ago_s=RETENTION_S - 60)
    assert handle.result(timeout=10).text == "CANARY"

    assert await purge(settings) == 1
    assert "CANARY" not in dump(settings.database_dsn)
    assert not redis_client.exists(stand_in.key)
    assert young.result(timeout=10).text == "kept"
    view = client.get(handle.id)
    assert (view.state, view.metadata, view.idempotency_key) == ("succeeded", {}, "k-1")
    assert view.result is not None
    assert view.result.purged_at == view.purged_at is not None
    left = view.result
    assert (left.text, left.tool_calls, left.model, left.attempts) == ("", (), "m-1", 1)
    assert (left.usage.input, left.usage.output) == (3, 4)
    said = r"^the answer of job .*, which succeeded, was purged at 20\S+ \S+ UTC; its state"
    with pytest.raises(Purged, match=said):
        handle.result(timeout=10)
    with pytest.raises(Purged):
        _ = view.result.parsed
    assert client.submit("draft", "CANARY", **asked).id == handle.id  # type: ignore[arg-type]
    async with AsyncSluice(settings) as loop:
        with pytest.raises(Purged):
            await loop.handle(handle.id).result(timeout=10)

    shown = sluice("job", "show", handle.id)
    assert shown.code == 0
    assert "request and answer are gone" in shown.out
    assert json.loads(sluice("job", "show", handle.id, "--json").out)["purged_at"]
    retried = sluice("job", "retry", handle.id)
    assert retried.code == 1


async def test_a_failed_job_says_that_its_reason_is_gone_and_is_not_tried_again(
    client: Sluice, settings: Settings, sluice: Command, work: Work, rows: Rows
) -> None:
    handle = client.submit("draft", "hi")
    error = {"error_class": "server", "message": "CANARY broke it", "status": 500}
    work(handle.id).settle("failed", ago_s=LONG_AGO_S, error=error)
    rows(
        "INSERT INTO attempts (id, job_id, fence, number, worker_id, account_id, use_case,"
        " provider_id, provider, model, state, reserved_nano_usd, baseline_reserved_nano_usd,"
        " error_message) SELECT gen_random_uuid(), id, 1, 1, id, account_id, 'draft', id, 'p',"
        " 'm', 'failed', 0, 0, 'CANARY' FROM jobs WHERE id = %(id)s",
        id=handle.id,
    )
    assert await purge(settings) == 1
    assert "CANARY" not in dump(settings.database_dsn)
    with pytest.raises(JobFailed, match="what went wrong was purged"):
        handle.result(timeout=10)
    (listed,) = client.list_jobs(state="failed")
    assert (listed.error_class, listed.error) == ("server", "what went wrong was purged")
    outcome = sluice("job", "retry", handle.id)
    assert outcome.code == 1
    assert outcome.err.startswith(
        f"sluice: job {handle.id} cannot be tried again: its request was purged at "
    )
    assert outcome.err.count("\n") == 1
    assert client.get(handle.id).state is State.FAILED


async def test_a_retry_that_is_decided_before_the_purge_does_not_reopen(
    client: Sluice, settings: Settings, work: Work, rows: Rows, engine: Engine
) -> None:
    handle = client.submit("draft", "hi")
    error = {"error_class": "server", "message": "broke"}
    work(handle.id).settle("failed", ago_s=LONG_AGO_S, error=error)
    with engine.connect() as connection:
        catalogue = read(connection)
    again = reopening(settings, catalogue, handle.id, rows(FIND_ENDED, job_id=handle.id))
    assert await purge(settings) == 1
    with pytest.raises(IllegalTransition):
        again.message(rows(RETRY, **again.parameters))
    assert client.get(handle.id).state is State.FAILED


async def test_jobs_of_a_batch_are_listed_without_their_answers(
    client: Sluice, settings: Settings, sluice: Command, work: Work
) -> None:
    batch = client.submit_batch("draft", ["CANARY one", "two"])
    first, second = (result.job_id for result in batch.results())
    work(first).settle(text="CANARY", ago_s=LONG_AGO_S)
    work(second).settle(text="kept")
    assert await purge(settings) == 1
    one, other = (json.loads(line) for line in sluice("bulk", "results", batch.id).out.splitlines())
    assert (one["state"], one["text"], one["metadata"]) == ("succeeded", "", {})
    assert one["purged_at"]
    assert other["text"] == "kept"
    assert "purged_at" not in other
    assert "CANARY" not in dump(settings.database_dsn)


async def test_a_result_that_is_not_acknowledged_is_kept(
    client: Sluice, settings: Settings, work: Work, rows: Rows
) -> None:
    handle = client.submit("draft", "hi", reply_to="crm")
    work(handle.id).settle(text="the answer", ago_s=LONG_AGO_S)
    db = Database(settings, application_name="test", size=1, planner=BY_SIZE)
    async_redis = make_async_redis(settings)
    deliverer = Deliverer(db=db, client=async_redis, prefix=settings.redis_prefix, channel_max=10)
    assert await purge(settings) == 0
    with client.replies("crm", "group", timeout=5) as replies:
        await deliverer.round()
        reply = next(replies)
        assert reply.result.text == "the answer"
        await deliverer.round()
        assert await purge(settings) == 0
        reply.ack()
    await deliverer.round()
    assert await purge(settings) == 1
    assert rows("SELECT 1 FROM job_bodies") == []
    await async_redis.aclose()
    await db.close()


async def test_any_number_goes_in_batches_and_two_purgers_share(
    settings: Settings, rows: Rows
) -> None:
    held = ended_jobs(rows, PURGE_BATCH + 20, ago_s=2 * LONG_AGO_S)
    rows(
        "INSERT INTO outbox (channel, job_id, fence) SELECT 'c', unnest(%(ids)s::uuid[]), 1",
        ids=held,
    )
    due = ended_jobs(rows, 2 * PURGE_BATCH + 20)
    young = ended_jobs(rows, 30, ago_s=10)
    async with purgers(settings, 2) as pair:
        counts = await asyncio.gather(*(purger.round() for purger in pair))
        # What one had locked while the other passed by is the next round's; it comes at once here.
        left = await purge(settings)
    assert sum(counts) + left == len(due)
    kept = {row.job_id for row in rows("SELECT job_id FROM job_bodies")}
    assert kept == {*held, *young}
    purged = {row.id for row in rows("SELECT id FROM jobs WHERE purged_at IS NOT NULL")}
    assert purged == set(due)


async def test_between_two_rounds_it_looks_at_nothing(settings: Settings, rows: Rows) -> None:
    async with purgers(settings) as (purger,):
        assert await purger.round() == 0
        ended_jobs(rows, 3)
        assert await purger.round() == 0
    assert await purge(settings) == 3


def test_the_sweep_purges(
    settings: Settings, sandbox: SandboxControl, rows: Rows, tmp_path: Path
) -> None:
    (due,) = ended_jobs(rows, 1)
    with Rig(
        settings=with_sandbox(settings, sandbox, body_retention_s=RETENTION_S),
        sandbox=sandbox,
        folder=tmp_path,
    ) as rig:
        rig.start_sweep()
        eventually(lambda: rig.client.get(due).purged_at, 60)
    assert rows("SELECT 1 FROM job_bodies") == []


def test_what_is_due_is_found_by_its_index(rows: Rows) -> None:
    ended_jobs(rows, 3000, ago_s=10)
    ended_jobs(rows, 5)
    rows("ANALYZE jobs")
    values = {"retention_s": RETENTION_S, "after": "1970-01-01 00:00Z", "after_id": UUID(int=0)}
    plan = rows("EXPLAIN (ANALYZE, FORMAT JSON, TIMING OFF) " + PURGE_DUE, **values)[0][0]
    of_jobs = [node for node in _nodes(plan[0]["Plan"]) if node.get("Relation Name") == "jobs"]
    scans = [node for node in of_jobs if node["Node Type"] != "ModifyTable"]
    assert {node.get("Index Name") for node in scans} <= {"jobs_unpurged_idx", "jobs_pkey"}
    # However many there are, only the five are read.
    read_rows = [node["Actual Rows"] * node["Actual Loops"] for node in scans]
    assert max(read_rows) == 5
    assert not any(node.get("Rows Removed by Filter") for node in scans)


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)

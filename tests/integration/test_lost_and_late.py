"""What two do at once, and what comes late: wishes of dead workers' jobs, plans, pools, retries."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from uuid import UUID

import psycopg
import pytest
import redis
from celery import Celery
from sqlalchemy import Engine

from sluicegate import Sluice, State
from sluicegate.producers import bulk_storing
from sluicegate.shared.celery_app import make_celery
from sluicegate.shared.database import BY_SIZE, connect_options
from sluicegate.shared.errors import IdempotencyConflict
from sluicegate.shared.events import reply_key, terminal_id
from sluicegate.shared.redis_client import make_async_redis
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import Database
from sluicegate.workers.journal import Journal
from sluicegate.workers.replies import Replies
from sluicegate.workers.sweep.canceller import Canceller
from sluicegate.workers.sweep.loops import Sweep
from sluicegate.workers.sweep.rescuer import resolve_lost
from tests.books import untold
from tests.databases import Rows
from tests.polling import eventually_async
from tests.stand_in import StandIn


@pytest.fixture
def client(settings: Settings) -> Iterator[Sluice]:
    with Sluice(settings) as sluice:
        yield sluice


async def test_a_dead_workers_job_with_a_wish_ends(
    client: Sluice, settings: Settings, engine: Engine, redis_client: redis.Redis
) -> None:
    wished, other = client.submit_many("draft", ["a", "b"])
    for handle in (wished, other):
        # Its worker has no row: it is dead.
        StandIn(engine=engine, client=redis_client, settings=settings, job_id=handle.id)
    assert wished.cancel() is State.RUNNING
    db = Database(settings, application_name="test", size=1, planner=BY_SIZE)
    async_redis = make_async_redis(settings)
    replies = Replies(settings, async_redis)
    (message,) = await resolve_lost(db, replies, untold)
    await replies.close()
    await async_redis.aclose()
    await db.close()
    assert message.job_ids == (other.id,)
    assert client.get(other.id).state is State.QUEUED
    ended = client.get(wished.id)
    assert ended.state is State.CANCELLED
    assert ended.result is not None
    assert ended.result.error is not None
    assert ended.result.error.error_class == "cancelled"
    assert ended.finished_at is not None
    told: Any = redis_client.xrange(settings.redis_prefix + reply_key(wished.id))
    assert [entry_id.decode() for entry_id, _ in told] == [terminal_id(2)]


async def test_a_journaled_retry_of_a_job_with_a_wish_is_not_published(
    client: Sluice, settings: Settings, engine: Engine, redis_client: redis.Redis
) -> None:
    handle = client.submit("draft", "a")
    worker = StandIn(engine=engine, client=redis_client, settings=settings, job_id=handle.id)
    handle.cancel()
    queue = settings.redis_prefix + "draft.anthropic"
    before = redis_client.llen(queue)
    async_redis = make_async_redis(settings)
    journal = Journal(client=async_redis, prefix=settings.redis_prefix)
    await journal.append(
        [{"job_id": handle.id, "fence": worker.fence, "job_state": "queued", "after_s": 0.0}]
    )
    await async_redis.aclose()
    sweep = Sweep(settings)
    await sweep.rescue()
    await sweep.close()
    assert client.get(handle.id).state is State.CANCELLED
    assert redis_client.llen(queue) == before


async def test_a_cancelled_batch_without_its_jobs_holds_up_nobody(
    client: Sluice, settings: Settings, rows: Rows
) -> None:
    gone, batch = (client.submit_batch("summary", ["a", "b"]) for _ in range(2))
    rows("UPDATE batches SET cancelled_at = now()")
    rows("DELETE FROM jobs WHERE batch_id = %(id)s", id=gone.id)
    db = Database(settings, application_name="test", size=1, planner=BY_SIZE)
    await Canceller(db=db).round()
    await db.close()
    assert batch.progress().cancelled == 2


def test_what_follows_from_an_end_is_found_by_key_whatever_was_planned_before(
    client: Sluice, settings: Settings, rows: Rows
) -> None:
    batch = client.submit_batch("summary", ["a"] * 1000)
    ids = [row.id for row in rows("SELECT id FROM jobs")]
    rows("UPDATE jobs SET state = 'cancelled'")
    dsn, options = connect_options(settings, "test", BY_SIZE)
    with psycopg.connect(dsn, **options) as connection:
        connection.execute(
            "INSERT INTO results (job_id, fence, body)"
            " SELECT unnest(%s::uuid[]), 1, json_build_object('state', 'cancelled')",
            [ids],
        )
        connection.execute("DELETE FROM results")
        scanned = connection.execute(
            "SELECT seq_scan FROM pg_stat_xact_user_tables WHERE relname = 'jobs'"
        ).fetchone()
        assert scanned == (0,)
    assert batch.progress().ended == 0


def test_two_batches_with_the_same_keys_in_another_order(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_storing, "_BLOCK_ROWS", 1)
    both_have_one = threading.Barrier(2)
    outcomes: list[object] = []

    def rows_of(*keys: str) -> Iterator[dict[str, str]]:
        yield {"prompt": "a", "idempotency_key": keys[0]}
        both_have_one.wait(30)
        yield {"prompt": "a", "idempotency_key": keys[1]}

    def submit(*keys: str) -> None:
        with Sluice(settings) as sluice:
            try:
                outcomes.append(sluice.submit_batch("summary", rows_of(*keys)).id)
            except IdempotencyConflict as conflict:
                outcomes.append(conflict)

    threads = [threading.Thread(target=submit, args=keys) for keys in (("x", "y"), ("y", "x"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {type(outcome) for outcome in outcomes} == {UUID, IdempotencyConflict}
    (conflict,) = (one for one in outcomes if isinstance(one, IdempotencyConflict))
    assert "nothing is stored, submit again" in str(conflict)


def test_threads_that_publish_first_share_one_pool(settings: Settings) -> None:
    for _ in range(20):
        app = make_celery(settings)
        with ThreadPoolExecutor(16) as threads:
            pools = list(threads.map(partial(_pool_of, app, threading.Barrier(16)), range(16)))
        assert len({id(pool) for pool in pools}) == 1
        app.close()


def _pool_of(app: Celery, at_once: threading.Barrier, _: int) -> Any:
    at_once.wait(30)
    return app.pool


async def test_a_burst_of_wishes_is_one_round_of_a_loop(settings: Settings) -> None:
    sweep = Sweep(settings.model_copy(update={"sweep_interval_s": 600.0}))
    wake = asyncio.Event()
    rounds = 0

    async def round_() -> None:
        nonlocal rounds
        rounds += 1

    loop = asyncio.create_task(sweep._loop("test", round_, wake))
    for _ in range(100):
        wake.set()
        for _ in range(10):
            await asyncio.sleep(0)
    assert rounds < 50
    seen = rounds
    wake.set()

    async def went_round() -> bool:
        return rounds > seen

    await eventually_async(went_round)
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    await sweep.close()

"""A long honest backlog: the sweep leaves it alone, and no statement reads it from end to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from uuid import UUID

import pytest
import redis
import redis.asyncio
from sqlalchemy import Connection, Engine

from sluicegate.shared.accounts import DEFAULT_ACCOUNT, find_account
from sluicegate.shared.budgets import set_budget
from sluicegate.shared.celery_app import JobMessage, make_celery, publish
from sluicegate.shared.database import BY_KEY, BY_SIZE
from sluicegate.shared.ids import new_id
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import Database
from sluicegate.workers.claims import Claims
from sluicegate.workers.dispatch import Attempt, Dispatcher
from sluicegate.workers.settlement import settle_all
from sluicegate.workers.sweep.loops import Sweep
from sluicegate.workers.sweep.republisher import Republisher
from tests.books import untold
from tests.harness import FULL
from tests.polling import eventually

JOBS = 1_000_000 if FULL else 20_000
CHUNK = 25
QUEUE = "summary.anthropic.bulk"

pytestmark = pytest.mark.timeout(900 if FULL else 120)

# A millisecond lies between two jobs; the chunk's message carries the time of its first.
_FILL = """
WITH spec AS (
    SELECT n, ('01900000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid AS id,
           now() - interval '1 hour' + n / 25 * 25 * interval '1 millisecond' AS at,
           accounts.id AS account_id
    FROM generate_series(0, %(jobs)s - 1) AS n, accounts WHERE accounts.name = 'default'
), made AS (
    INSERT INTO jobs (id, account_id, use_case, lane, queue, state, max_attempts, run_at,
                      published_at, created_at, deadline_at, request_hash)
    SELECT id, account_id, 'summary', 'bulk', 'summary.anthropic.bulk', 'queued', 4, at, at, at,
           at + interval '1 day', ''
    FROM spec
    RETURNING id, published_at
), bodies AS (
    INSERT INTO job_bodies (job_id, request)
    SELECT id, '{"version": 1, "use_case": "summary", "messages":
                 [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}' FROM spec
)
SELECT published_at, array_agg(id ORDER BY id) AS ids FROM made GROUP BY 1 ORDER BY 1
"""


def _fill(engine: Engine, settings: Settings) -> list[list[UUID]]:
    """Queue the jobs, and publish a message for each chunk of them; return the chunks."""
    with engine.connect() as connection:
        connection.exec_driver_sql("SET statement_timeout = 0")
        chunks = connection.exec_driver_sql(_FILL, {"jobs": JOBS}).all()
        connection.exec_driver_sql("ANALYZE")
    app = make_celery(settings)
    messages = [
        JobMessage(queue=QUEUE, job_ids=tuple(row.ids), published_at=row.published_at)
        for row in chunks
    ]
    for start in range(0, len(messages), 1000):
        publish(app, messages[start : start + 1000])
    app.close()
    return [list(row.ids) for row in chunks]


async def test_a_backlog_is_left_alone_and_what_was_lost_is_published(
    *,
    settings: Settings,
    engine: Engine,
    redis_client: redis.Redis,
    async_redis: redis.asyncio.Redis,
    record_property: Callable[[str, object], None],
) -> None:
    db = Database(settings, application_name="test", size=2, planner=BY_SIZE)
    republisher = Republisher(
        db=db,
        client=async_redis,
        prefix=settings.redis_prefix,
        lost_after_s=settings.lost_after_s,
        chunk_size=CHUNK,
    )
    queues = [QUEUE, "general.openai"]
    chunks = _fill(engine, settings)
    for _ in range(3):
        started = time.monotonic()
        assert await republisher.round(queues) == []
        record_property("round_ms", round((time.monotonic() - started) * 1000, 1))
    # The broker loses the oldest message. The next oldest is 25 ms younger: this could still be
    # a worker that was given the message a moment ago, so nothing happens.
    redis_client.rpop(settings.redis_prefix + QUEUE)
    assert await republisher.round(queues) == []
    # The fleet works off more of the backlog than `lost_after_s` is worth.
    taken = round(settings.lost_after_s * 1000 / CHUNK) + 40
    redis_client.rpop(settings.redis_prefix + QUEUE, taken)
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "UPDATE jobs SET state = 'cancelled' WHERE id = ANY(%(ids)s)",
            {"ids": [job_id for chunk in chunks[1 : taken + 1] for job_id in chunk]},
        )
    (message,) = await republisher.round(queues)
    assert sorted(message.job_ids) == sorted(chunks[0])
    assert await republisher.round(queues) == []
    # Then it loses everything: published again in bounded portions, oldest first.
    redis_client.delete(settings.redis_prefix + QUEUE)
    portion = await republisher.round(queues)
    assert [list(message.job_ids) for message in portion] == chunks[taken + 1 : taken + 41]
    await db.close()


def _rows_read_by_scans(engine: Engine) -> dict[str, int]:
    with engine.connect() as connection:
        rows = connection.exec_driver_sql(
            "SELECT relname, seq_tup_read FROM pg_stat_user_tables WHERE relname ="
            " ANY('{jobs,job_bodies,attempts,results,cost_entries}')"
        ).all()
    return {row.relname: row.seq_tup_read for row in rows}


def _enter_worker(engine: Engine) -> UUID:
    worker_id = new_id()
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "INSERT INTO workers (id, name, pool, lane, queues)"
            " VALUES (%(id)s, 'w', 'anthropic', 'bulk', %(queues)s)",
            {"id": worker_id, "queues": [QUEUE]},
        )
    return worker_id


async def test_no_statement_reads_the_backlog_from_end_to_end(
    settings: Settings, engine: Engine
) -> None:
    """The server counts the rows that it reads by scanning a table: see how many there are."""
    chunks = _fill(engine, settings)
    with engine.connect() as connection:
        _fill_history(connection)
    with engine.connect() as connection:
        connection.execution_options(isolation_level="READ COMMITTED")
        with connection.begin():
            set_budget(
                connection, find_account(connection, DEFAULT_ACCOUNT), limits={"month": 10**12}
            )
    worker_id = _enter_worker(engine)
    # Counting what is spent already reads history: that is over.
    engine.dispose()
    eventually(lambda: _backends(engine) == 1)
    before = _rows_read_by_scans(engine)
    # As a worker has it.
    db = Database(settings, application_name="test", size=2, planner=BY_KEY)
    sweep = Sweep(settings)
    try:
        await _work(chunks[:8], worker_id, db, sweep)
        # A worker dies with a chunk in hand.
        assert len(await _claims(db, worker_id).claim(chunks[9])) == CHUNK
        with engine.connect() as connection:
            connection.exec_driver_sql("DELETE FROM workers")
        await sweep.rescue()
    finally:
        await sweep.close()
        await db.close()
    engine.dispose()
    # The counts arrive when connections end; this reading's own is the last.
    eventually(lambda: _backends(engine) == 1)
    grown = {name: rows - before[name] for name, rows in _rows_read_by_scans(engine).items()}
    assert {name: rows for name, rows in grown.items() if rows >= JOBS // 2} == {}


def _claims(db: Database, worker_id: UUID) -> Claims:
    return Claims(
        db=db,
        worker_id=worker_id,
        queues=[QUEUE],
        max_items=200,
        spacing_s=0,
        give_up_after_s=5,
    )


async def _work(chunks: list[list[UUID]], worker_id: UUID, db: Database, sweep: Sweep) -> None:
    """Do what worker and sweep do, often enough that statements are prepared."""
    claims = _claims(db, worker_id)
    dispatcher = Dispatcher(db=db, max_items=200, spacing_s=0, told=untold)
    for chunk in chunks:
        jobs = await claims.claim(chunk)
        assert len(jobs) == len(chunk)
        settlements = []
        for job in jobs:
            attempt = Attempt(
                attempt_id=new_id(), job_id=job.id, worker_id=worker_id, fence=job.fence, number=1,
                provider_id=new_id(), provider="p", model="m", reserved_nano_usd=9,
                baseline_reserved_nano_usd=9,
            )  # fmt: skip
            assert await dispatcher.open(attempt)
            settlements.append(
                {
                    "job_id": job.id, "fence": job.fence, "job_state": "succeeded",
                    "attempt_id": attempt.attempt_id, "attempt_state": "succeeded",
                    "kind": "actual", "amount_nano_usd": 5, "baseline_nano_usd": 5,
                    "body": {"state": "succeeded"},
                }
            )  # fmt: skip
        settled = await settle_all(db, settlements, untold)
        assert all(one.moved for one in settled)
        await claims.release_lost()
        await sweep.rescue()
        await sweep.stage()
        await sweep.republish()
        await sweep.expire()


def _backends(engine: Engine) -> int:
    with engine.connect() as connection:
        found = connection.exec_driver_sql(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        ).scalar_one()
    return int(found)


def _fill_history(connection: Connection) -> None:
    """Fill the other tables with what jobs of earlier days have left."""
    connection.exec_driver_sql("SET statement_timeout = 0")
    connection.exec_driver_sql(
        """
        WITH old AS (
            INSERT INTO jobs (id, account_id, use_case, lane, queue, state, max_attempts,
                              deadline_at, finished_at, request_hash)
            SELECT gen_random_uuid(), a.id, 'summary', 'bulk', 'summary.anthropic.bulk',
                   'succeeded', 4, now(), now(), ''
            FROM generate_series(1, %(jobs)s), accounts a WHERE a.name = 'default'
            RETURNING id, account_id
        ), paid AS (
            INSERT INTO attempts (id, job_id, fence, number, worker_id, account_id, use_case,
                provider_id, provider, model, state, reserved_nano_usd,
                baseline_reserved_nano_usd)
            SELECT gen_random_uuid(), id, 1, 1, gen_random_uuid(), account_id, 'summary',
                   gen_random_uuid(), 'p', 'm', 'succeeded', 1, 1
            FROM old RETURNING id, job_id, account_id
        ), kept AS (
            INSERT INTO results (job_id, fence, body)
            SELECT id, 1, '{"state": "succeeded"}' FROM old
        )
        INSERT INTO cost_entries (attempt_id, job_id, account_id, use_case, provider_id, provider,
            model, kind, amount_nano_usd, baseline_nano_usd, price_version, dispatched_at)
        SELECT id, job_id, account_id, 'summary', gen_random_uuid(), 'p', 'm', 'actual', 1, 1, 'x',
               now()
        FROM paid
        """,
        {"jobs": JOBS},
    )
    connection.exec_driver_sql("ANALYZE")

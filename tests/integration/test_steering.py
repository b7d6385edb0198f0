"""Cancelling, retrying and listing jobs, through both clients, against real claims."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis
from sqlalchemy import Engine

from sluicegate import AsyncSluice, Sluice, State
from sluicegate.producers.listing import JobList, read_since
from sluicegate.producers.queue_listing import QUEUES_QUERY
from sluicegate.producers.steering import CANCEL
from sluicegate.shared import accounts
from sluicegate.shared.database import BY_KEY
from sluicegate.shared.errors import (
    IllegalTransition,
    InvalidJob,
    JobCancelled,
    NotFound,
    QueueUnavailable,
)
from sluicegate.shared.events import event_id, reply_key, terminal_id
from sluicegate.shared.ids import new_id
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import Database
from sluicegate.workers.claims import Claims, Job
from sluicegate.workers.dispatch import Attempt, Dispatcher
from sluicegate.workers.settlement import Settlement, settle_all
from tests.books import untold
from tests.databases import Rows
from tests.polling import eventually
from tests.stand_in import StandIn

QUEUES = ["draft.anthropic", "draft.anthropic.bulk"]
RESERVED, COST = 100, 30

Steer = Callable[..., Any]


@pytest.fixture(params=["threads", "loop"])
def steer(request: pytest.FixtureRequest, settings: Settings) -> Steer:
    """Call a method of either client, so that each test holds for both."""

    def call(method: str, *args: Any, settings: Settings = settings, **options: Any) -> Any:
        if request.param == "threads":
            with Sluice(settings) as sluice:
                return getattr(sluice, method)(*args, **options)

        async def awaited() -> Any:
            async with AsyncSluice(settings) as sluice:
                return await getattr(sluice, method)(*args, **options)

        return asyncio.run(awaited())

    return call


@pytest.fixture
def sluice(settings: Settings) -> Any:
    with Sluice(settings.model_copy(update={"reply_recheck_s": 0.3})) as sluice:
        yield sluice


@pytest.fixture
def stand_in(engine: Engine, redis_client: redis.Redis, settings: Settings) -> Any:
    return lambda job_id: StandIn(
        engine=engine, client=redis_client, settings=settings, job_id=job_id
    )


@pytest.fixture
def without_redis(settings: Settings) -> Settings:
    return Settings(
        _env_file=None,
        **{**dict(settings), "redis_url": "redis://127.0.0.1:1/0"},
    )


class Fleet:
    """Workers' own statements, without workers."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.db = Database(settings, application_name="test", size=4, planner=BY_KEY)
        self._dispatcher = Dispatcher(db=self.db, max_items=100, spacing_s=0, told=untold)

    async def enter(self, name: str = "w@test") -> Claims:
        worker_id = new_id()
        await self.db.execute(
            "INSERT INTO workers (id, name, pool, lane, queues)"
            " VALUES (%(id)s, %(name)s, 'anthropic', 'interactive', %(queues)s)",
            id=worker_id,
            name=name,
            queues=QUEUES,
        )
        return Claims(
            db=self.db,
            worker_id=worker_id,
            queues=QUEUES,
            max_items=1,
            spacing_s=0,
            give_up_after_s=5,
        )

    async def dispatch(self, job: Job) -> Attempt:
        attempt = Attempt(
            attempt_id=new_id(),
            job_id=job.id,
            worker_id=job.worker_id,
            fence=job.fence,
            number=job.attempts_used + 1,
            provider_id=new_id(),
            provider="p",
            model="m",
            reserved_nano_usd=RESERVED,
            baseline_reserved_nano_usd=RESERVED,
        )
        assert await self._dispatcher.open(attempt)
        return attempt

    async def settle(
        self, job: Job, attempt: Attempt, *, job_state: str, attempt_state: str
    ) -> Any:
        settlement: Settlement = {
            "job_id": job.id,
            "fence": job.fence,
            "job_state": job_state,
            "attempt_id": attempt.attempt_id,
            "attempt_state": attempt_state,
        }
        if job_state in ("queued", "parked"):
            settlement["after_s"] = 60.0
        else:
            settlement["body"] = {"state": job_state}
        if attempt_state != "void":
            settlement |= {"kind": "actual", "amount_nano_usd": COST, "baseline_nano_usd": COST}
        (settled,) = await settle_all(self.db, [settlement], untold)
        return settled


@pytest.fixture
async def fleet(settings: Settings) -> AsyncIterator[Fleet]:
    fleet = Fleet(settings)
    yield fleet
    await fleet.db.close()


def submit(settings: Settings, jobs: int = 1, **options: Any) -> list[UUID]:
    with Sluice(settings) as sluice:
        prompts = [f"note {n}" for n in range(jobs)]
        return [handle.id for handle in sluice.submit_many("draft", prompts, **options)]


def channel(client: redis.Redis, settings: Settings, job_id: UUID) -> list[Any]:
    found: Any = client.xrange(settings.redis_prefix + reply_key(job_id))
    return [(entry_id.decode(), fields) for entry_id, fields in found]


# Cancelling


@pytest.mark.parametrize("lane", ["interactive", "bulk"])
def test_a_waiting_job_is_cancelled_at_once(
    steer: Steer,
    rows: Rows,
    sluice: Sluice,
    redis_client: redis.Redis,
    lane: str,
) -> None:
    settings = sluice.settings
    (job_id,) = submit(settings, lane=lane)
    assert steer("cancel", str(job_id)) is State.CANCELLED
    (row,) = rows("SELECT * FROM jobs LEFT JOIN results ON job_id = id")
    assert (row.state, row.fence, row.worker_id) == ("cancelled", 1, None)
    assert row.finished_at is not None
    assert row.body["error"] == {"error_class": "cancelled", "message": "the job was cancelled"}
    ((entry_id, _),) = channel(redis_client, settings, job_id)
    assert entry_id == terminal_id(1)
    assert 0 < int(redis_client.pttl(settings.redis_prefix + reply_key(job_id))) <= 3_600_000
    with pytest.raises(JobCancelled, match="the job was cancelled"):
        sluice.handle(job_id).result(timeout=10)
    # Once more changes nothing.
    assert steer("cancel", job_id) is State.CANCELLED
    assert rows("SELECT fence FROM jobs") == [(1,)]


def test_what_reads_already_is_told(sluice: Sluice, settings: Settings) -> None:
    handle = sluice.submit("draft", "hello")
    events = handle.events(timeout=20)
    assert handle.cancel() is State.CANCELLED
    (event,) = events
    assert event.payload.type == "failed"
    assert event.payload.result.state is State.CANCELLED


async def test_a_cancelled_job_is_claimed_by_nobody(settings: Settings, fleet: Fleet) -> None:
    claims = await fleet.enter()
    ids = await asyncio.to_thread(submit, settings, 2)
    async with AsyncSluice(settings) as sluice:
        await sluice.cancel(ids[0])
    assert [job.id for job in await claims.claim(ids)] == ids[1:]


def test_a_running_job_is_asked_to_end(
    steer: Steer, rows: Rows, settings: Settings, stand_in: Callable[[UUID], StandIn]
) -> None:
    (job_id,) = submit(settings)
    worker = stand_in(job_id)
    assert steer("cancel", job_id) is State.RUNNING
    (first,) = rows("SELECT state, fence, cancel_requested_at FROM jobs")
    assert (first.state, first.fence) == ("running", worker.fence)
    assert first.cancel_requested_at is not None
    assert steer("cancel", job_id) is State.RUNNING
    assert rows("SELECT state, fence, cancel_requested_at FROM jobs") == [first]


def test_a_job_that_comes_back_while_its_cancel_waits_for_it_is_cancelled(
    sluice: Sluice, engine: Engine, rows: Rows, settings: Settings, stand_in: Callable[[UUID], Any]
) -> None:
    (job_id,) = submit(settings)
    stand_in(job_id)
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %(text)s"
    comes_back = "UPDATE jobs SET state = 'queued', worker_id = NULL, claim_id = NULL"
    with ThreadPoolExecutor(1) as threads, engine.connect() as holder:
        holder.execution_options(isolation_level="READ COMMITTED")
        with holder.begin():
            holder.exec_driver_sql(comes_back)
            cancelling = threads.submit(sluice.cancel, job_id)
            eventually(lambda: rows(waits, text="%cancel_requested_at%"))
        assert cancelling.result(30) is State.CANCELLED
    (row,) = rows("SELECT state, worker_id, claim_id FROM jobs")
    assert tuple(row) == ("cancelled", None, None)


@pytest.mark.parametrize("end", ["succeeded", "failed", "expired"])
def test_what_is_over_stays_as_it_is(
    steer: Steer,
    rows: Rows,
    settings: Settings,
    stand_in: Callable[[UUID], StandIn],
    end: str,
) -> None:
    (job_id,) = submit(settings)
    stand_in(job_id).settle(end)
    before = rows("SELECT * FROM jobs JOIN results ON job_id = id")
    assert steer("cancel", job_id) == end
    assert rows("SELECT * FROM jobs JOIN results ON job_id = id") == before


@pytest.mark.parametrize("method", ["cancel", "retry"])
def test_a_job_that_is_not_there_is_not_found(steer: Steer, method: str) -> None:
    with pytest.raises(NotFound, match="there is no job"):
        steer(method, uuid4())
    with pytest.raises(InvalidJob, match="job_id"):
        steer(method, "seven")


def test_without_redis_a_job_is_cancelled_all_the_same(
    steer: Steer,
    rows: Rows,
    settings: Settings,
    without_redis: Settings,
    stand_in: Callable[[UUID], StandIn],
) -> None:
    waiting, running = submit(settings, 2)
    stand_in(running)
    # Of a worker that has a row, so that there is somebody to be told.
    rows(
        "INSERT INTO workers (id, name, pool, lane, queues)"
        " SELECT worker_id, 'w@test', 'anthropic', 'interactive', '{}' FROM jobs"
        " WHERE state = 'running'"
    )
    assert steer("cancel", waiting, settings=without_redis) is State.CANCELLED
    assert steer("cancel", running, settings=without_redis) is State.RUNNING
    assert rows("SELECT count(*) FROM jobs WHERE cancel_requested_at IS NOT NULL") == [(1,)]


async def test_a_claim_and_a_cancel_at_the_same_moment_have_one_outcome(
    settings: Settings, fleet: Fleet, rows: Rows
) -> None:
    claims = [await fleet.enter(f"w{n}@test") for n in range(2)]
    ids = await asyncio.to_thread(submit, settings, 300)
    dice = random.Random(7)
    chunks = [ids[start : start + 2] for start in range(0, len(ids), 2)]
    async with AsyncSluice(settings, database_pool_size=8) as sluice:
        moves: list[Any] = [claims[n % 2].claim(chunk) for n, chunk in enumerate(chunks)]
        moves += [claims[n % 2].claim(chunk) for n, chunk in enumerate(reversed(chunks))]
        moves += [sluice.cancel(job_id) for job_id in ids]
        dice.shuffle(moves)
        outcomes = await asyncio.gather(*moves)
    claimed = [job.id for one in outcomes if isinstance(one, list) for job in one]
    assert len(claimed) == len(set(claimed))
    found = {
        row.id: row
        for row in rows(
            "SELECT id, state, jobs.fence, cancel_requested_at, body FROM jobs"
            " LEFT JOIN results ON job_id = id"
        )
    }
    running = {job_id for job_id, row in found.items() if row.state == "running"}
    cancelled = {job_id for job_id, row in found.items() if row.state == "cancelled"}
    assert running == set(claimed)
    assert running | cancelled == set(ids)
    assert running
    assert cancelled
    for row in found.values():
        assert row.fence == 1
        assert (row.body is None) == (row.cancel_requested_at is not None)
    said = [one for one in outcomes if isinstance(one, State)]
    assert said.count(State.RUNNING) == len(running)
    assert said.count(State.CANCELLED) == len(cancelled)


@pytest.mark.parametrize(
    ("job_state", "attempt_state", "cost"),
    [("queued", "failed", COST), ("parked", "failed", COST), ("queued", "void", 0)],
)
async def test_a_job_with_a_wish_ends_where_it_would_wait_again(
    fleet: Fleet, rows: Rows, job_state: str, attempt_state: str, cost: int
) -> None:
    settings = fleet.settings
    claims = await fleet.enter()
    ids = await asyncio.to_thread(submit, settings, 2)
    wished, other = await claims.claim(ids)
    attempts = [await fleet.dispatch(job) for job in (wished, other)]
    async with AsyncSluice(settings) as sluice:
        assert await sluice.cancel(wished.id) is State.RUNNING
    settled = await fleet.settle(
        wished, attempts[0], job_state=job_state, attempt_state=attempt_state
    )
    assert settled.moved
    assert settled.body["error"]["error_class"] == "cancelled"
    assert settled.finished_at is not None
    await fleet.settle(other, attempts[1], job_state=job_state, attempt_state=attempt_state)
    (ended,) = rows(
        "SELECT j.*, r.body, r.fence AS result_fence FROM jobs j JOIN results r ON r.job_id = j.id"
    )
    assert (ended.id, ended.state, ended.fence) == (wished.id, "cancelled", wished.fence)
    assert ended.result_fence == ended.fence
    assert ended.body == settled.body
    assert ended.body["cost_nano_usd"] == ended.cost_nano_usd == cost
    assert ended.body["attempts"] == ended.attempts_used == (cost > 0)
    assert rows("SELECT state FROM jobs WHERE id = %(id)s", id=other.id) == [(job_state,)]


@pytest.mark.parametrize("end", ["succeeded", "failed", "expired"])
async def test_a_wish_that_comes_too_late_changes_no_result(
    settings: Settings, fleet: Fleet, rows: Rows, end: str
) -> None:
    claims = await fleet.enter()
    (job,) = await claims.claim(await asyncio.to_thread(submit, settings))
    attempt = await fleet.dispatch(job)
    async with AsyncSluice(settings) as sluice:
        await sluice.cancel(job.id)
        settled = await fleet.settle(job, attempt, job_state=end, attempt_state="succeeded")
        assert (settled.moved, settled.body) == (True, None)
        assert await sluice.cancel(job.id) == end
    assert rows("SELECT state FROM jobs") == [(end,)]


async def test_a_job_that_comes_back_with_a_wish_says_so_to_who_claims_it(
    settings: Settings, fleet: Fleet, rows: Rows
) -> None:
    lost, claims = await fleet.enter(), await fleet.enter()
    ids = await asyncio.to_thread(submit, settings, 2)
    await lost.claim(ids)
    async with AsyncSluice(settings) as sluice:
        await sluice.cancel(ids[0])
    for job_id in ids:
        lost.let_go(job_id)
    assert len(await lost.release_lost()) == 2
    assert {job.id: job.unwanted for job in await claims.claim(ids)} == {
        ids[0]: True,
        ids[1]: False,
    }


# Retrying


@pytest.mark.parametrize("end", ["failed", "cancelled", "expired"])
def test_a_job_that_went_wrong_is_tried_again_from_the_beginning(
    steer: Steer,
    rows: Rows,
    redis_client: redis.Redis,
    stand_in: Callable[[UUID], StandIn],
    end: str,
) -> None:
    job_id = steer("submit", "draft", "hi").id
    worker = stand_in(job_id)
    queue = worker.key.removesuffix(reply_key(job_id)) + "draft.anthropic"
    worker.say("delta", text="half an")
    worker.end(worker.settle(end, error={"error_class": "server", "message": "no"}))
    rows(
        "UPDATE jobs SET attempts_used = 5, unknown_attempts = 1, refused = ARRAY[id],"
        " cancel_requested_at = now(), deadline_at = now() - interval '1 h',"
        " run_at = now() + interval '1 h', cost_nano_usd = 7, queue = 'draft.openai'"
    )
    redis_client.delete(queue)
    assert steer("retry", job_id).id == job_id
    (row,) = rows("SELECT *, extract(epoch FROM deadline_at - now()) AS left_s FROM jobs")
    assert (row.state, row.queue, row.fence) == ("queued", "draft.anthropic", 2)
    assert (row.attempts_used, row.unknown_attempts, row.refused) == (0, 0, [])
    assert row.cancel_requested_at is None
    assert row.finished_at is None
    assert 290 < row.left_s <= 300
    assert row.run_at == row.published_at
    # What was paid stays paid.
    assert row.cost_nano_usd == 7
    assert rows("SELECT * FROM results") == []
    assert redis_client.llen(queue) == 1
    # The channel is empty, and takes nothing of before: neither that attempt's, nor its end.
    assert redis_client.xrange(worker.key) == []
    for late in (event_id(1, 99), terminal_id(1)):
        with pytest.raises(redis.ResponseError, match="equal or smaller"):
            worker.append(late, {"type": "delta", "text": "late"})
    stand_in(job_id).answer("a whole answer")
    assert steer("get", job_id).result.text == "a whole answer"
    entries: Any = redis_client.xrange(worker.key)
    assert [entry_id for entry_id, _ in entries] == [
        *(b"3-1", b"3-2", terminal_id(3).encode()),
    ]


def test_a_bulk_job_is_retried_with_its_own_deadline(
    rows: Rows, sluice: Sluice, settings: Settings, redis_client: redis.Redis
) -> None:
    (job_id,) = submit(settings, lane="bulk")
    sluice.cancel(job_id)
    sluice.retry(job_id)
    (row,) = rows("SELECT state, extract(epoch FROM deadline_at - now()) AS left_s FROM jobs")
    assert row.state == "queued"
    assert 86_000 < row.left_s <= 86_400
    assert redis_client.llen(settings.redis_prefix + "draft.anthropic.bulk") == 1


def test_only_what_went_wrong_is_retried(
    steer: Steer, rows: Rows, settings: Settings, stand_in: Callable[[UUID], StandIn]
) -> None:
    queued, running, done = submit(settings, 3)
    (parked,) = submit(settings, lane="bulk")
    stand_in(running)
    stand_in(done).settle()
    before = rows("SELECT * FROM jobs ORDER BY id")
    for job_id, state in (
        (queued, "queued"),
        (running, "running"),
        (done, "succeeded"),
        (parked, "parked"),
    ):
        with pytest.raises(IllegalTransition, match=f"is {state}"):
            steer("retry", job_id)
    assert rows("SELECT * FROM jobs ORDER BY id") == before


def test_a_job_that_nothing_serves_any_more_is_refused(
    steer: Steer, rows: Rows, settings: Settings, sluice: Sluice
) -> None:
    (job_id,) = submit(settings)
    sluice.cancel(job_id)
    rows("UPDATE accounts SET is_active = false")
    with pytest.raises(InvalidJob, match="account"):
        steer("retry", job_id)
    rows("UPDATE accounts SET is_active = true")
    rows("UPDATE llm_providers SET is_active = false")
    with pytest.raises(InvalidJob, match="use_case"):
        steer("retry", job_id)
    assert rows("SELECT state FROM jobs") == [("cancelled",)]


def test_without_redis_a_retry_is_refused_and_nothing_changed(
    steer: Steer, rows: Rows, settings: Settings, without_redis: Settings, sluice: Sluice
) -> None:
    (job_id,) = submit(settings)
    sluice.cancel(job_id)
    with pytest.raises(QueueUnavailable, match="Redis"):
        steer("retry", job_id, settings=without_redis)
    assert rows("SELECT state, fence FROM jobs") == [("cancelled", 1)]
    assert steer("retry", job_id).id == job_id


async def test_many_retries_and_cancels_at_once_leave_a_job_in_one_state(
    settings: Settings, rows: Rows
) -> None:
    ids = await asyncio.to_thread(submit, settings, 20)
    async with AsyncSluice(settings) as sluice:
        for job_id in ids:
            await sluice.cancel(job_id)
        moves = [sluice.retry(job_id) for job_id in ids for _ in range(4)]
        outcomes = await asyncio.gather(*moves, return_exceptions=True)
        for one in outcomes:
            assert not isinstance(one, BaseException) or isinstance(one, IllegalTransition), one
        assert rows("SELECT DISTINCT state, fence FROM jobs") == [("queued", 2)]
        mixed: list[Any] = [sluice.cancel(job_id) for job_id in ids for _ in range(3)]
        mixed += [sluice.retry(job_id) for job_id in ids for _ in range(3)]
        random.Random(7).shuffle(mixed)
        for one in await asyncio.gather(*mixed, return_exceptions=True):
            assert not isinstance(one, BaseException) or isinstance(one, IllegalTransition), one
    for row in rows("SELECT state, body FROM jobs LEFT JOIN results ON job_id = id"):
        assert (row.state, row.body is None) in [("queued", True), ("cancelled", False)]


def test_the_counts_of_a_batch_follow(
    rows: Rows, settings: Settings, sluice: Sluice, stand_in: Callable[[UUID], StandIn]
) -> None:
    ids = submit(settings, 3, lane="bulk")
    batch_id = new_id()
    rows(
        "INSERT INTO batches (id, account_id, name, use_case, total)"
        " SELECT %(id)s, id, 'b', 'draft', 3 FROM accounts LIMIT 1",
        id=batch_id,
    )
    rows("UPDATE jobs SET batch_id = %(id)s", id=batch_id)

    def counts() -> Any:
        (row,) = rows(
            "SELECT succeeded, failed, cancelled, finished_at IS NOT NULL AS over FROM batches"
        )
        return tuple(row)

    sluice.cancel(ids[0])
    stand_in(ids[1]).settle("failed")
    assert counts() == (0, 1, 1, False)
    stand_in(ids[2]).settle()
    assert counts() == (1, 1, 1, True)
    sluice.retry(ids[0])
    assert counts() == (1, 1, 0, False)
    sluice.retry(ids[1])
    assert counts() == (1, 0, 0, False)
    for job_id in ids[:2]:
        stand_in(job_id).settle()
    assert counts() == (3, 0, 0, True)


# Listing


@pytest.fixture
def listed(
    settings: Settings,
    engine: Engine,
    rows: Rows,
    sluice: Sluice,
    stand_in: Callable[[UUID], StandIn],
) -> dict[str, UUID]:
    """Jobs of all kinds, oldest first."""
    with engine.connect() as connection:
        accounts.add_account(connection, "acme")
    ids = {
        "done": sluice.submit("draft", "hi").id,
        "failed": sluice.submit("summary", "hi", account="acme").id,
        "parked": sluice.submit("draft", "hi", lane="bulk").id,
        "cancelled": sluice.submit("draft", "hi", account="acme").id,
        "queued": sluice.submit("general", "hi").id,
    }
    stand_in(ids["done"]).settle(text="hello")
    reason = {"error_class": "auth", "message": "no key"}
    stand_in(ids["failed"]).settle("failed", error=reason)
    sluice.cancel(ids["cancelled"])
    return ids


_LISTS: list[tuple[dict[str, Any], list[str]]] = [
    ({}, ["queued", "cancelled", "parked", "failed", "done"]),
    ({"limit": 2}, ["queued", "cancelled"]),
    ({"state": "failed"}, ["failed"]),
    ({"state": State.PARKED}, ["parked"]),
    ({"state": ["failed", State.CANCELLED]}, ["cancelled", "failed"]),
    ({"state": []}, []),
    ({"use_case": "draft"}, ["cancelled", "parked", "done"]),
    ({"account": "acme"}, ["cancelled", "failed"]),
    ({"account": "acme", "state": {"cancelled"}}, ["cancelled"]),
    ({"lane": "bulk"}, ["parked"]),
    ({"queue": "general.openai"}, ["queued"]),
    ({"since": timedelta(hours=1)}, ["queued", "cancelled", "parked", "failed", "done"]),
    ({"since": datetime(2020, 1, 1, tzinfo=UTC), "limit": 1}, ["queued"]),
    ({"since": datetime(2090, 1, 1, tzinfo=UTC)}, []),
    ({"since": datetime.min.replace(tzinfo=UTC), "lane": "bulk"}, ["parked"]),
    ({"batch": UUID(int=7)}, []),
]


def test_jobs_are_listed_newest_first_by_what_is_known_of_them(
    steer: Steer, listed: dict[str, UUID]
) -> None:
    for filters, expected in _LISTS:
        found = [one.id for one in steer("list_jobs", **filters)]
        assert found == [listed[name] for name in expected], filters


def test_a_summary_says_what_went_wrong(
    steer: Steer, listed: dict[str, UUID], engine: Engine
) -> None:
    failed, done = steer("list_jobs", state=["failed", "succeeded"])
    assert (failed.account, failed.error_class, failed.error) == ("acme", "auth", "no key")
    assert (done.state, done.error) == (State.SUCCEEDED, None)
    with engine.connect() as connection:
        (acme,) = (one for one in accounts.list_accounts(connection) if one.name == "acme")
    assert len(steer("list_jobs", account=acme.id)) == 2


def test_an_older_job_is_left_out_by_postgres_own_clock(
    steer: Steer, listed: dict[str, UUID], rows: Rows
) -> None:
    rows("UPDATE jobs SET created_at = now() - interval '2 h' WHERE state = 'parked'")
    found = steer("list_jobs", since=timedelta(hours=1), use_case="draft")
    assert [one.state for one in found] == ["cancelled", "succeeded"]


_REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"state": "broken"}, InvalidJob, "state"),
    ({"limit": 0}, InvalidJob, "limit"),
    ({"limit": 10_001}, InvalidJob, "limit"),
    ({"lane": "fast"}, InvalidJob, "lane"),
    ({"batch": "seven"}, InvalidJob, "batch"),
    ({"since": datetime(2026, 1, 1)}, InvalidJob, "since"),  # noqa: DTZ001 - that is the point
    ({"since": timedelta.max}, InvalidJob, "since"),
    ({"colour": "red"}, InvalidJob, "colour"),
    ({"account": "nobody"}, InvalidJob, "nobody"),
    ({"queue": "a\x00b"}, InvalidJob, "queue"),
]


def test_a_filter_that_is_none_is_refused(steer: Steer) -> None:
    for filters, error, said in _REFUSED:
        with pytest.raises(error, match=said):
            steer("list_jobs", **filters)


def test_ages_and_times_are_read() -> None:
    assert read_since("30s") == timedelta(seconds=30)
    assert read_since("2d") == timedelta(days=2)
    assert read_since("2026-11-22T10:00Z") == datetime(2026, 11, 22, 10, tzinfo=UTC)
    for text in ("", "1w", "yesterday", "2026-11-22", "-1h"):
        with pytest.raises(InvalidJob, match="since"):
            read_since(text)


_FILL = """
INSERT INTO jobs (id, account_id, use_case, lane, queue, state, max_attempts, deadline_at,
                  request_hash, created_at)
SELECT ('01900000-' || lpad(to_hex(n / 65536), 4, '0') || '-7' || lpad(to_hex(n %% 4096), 3, '0')
        || '-8000-' || lpad(to_hex(n), 12, '0'))::uuid,
       a.id, 'draft', 'interactive', 'draft.anthropic',
       CASE WHEN n %% 1000 = 0 THEN 'failed' WHEN n %% 1001 = 0 THEN 'queued' ELSE 'succeeded' END,
       5, now(), '', now()
FROM generate_series(1, 30000) n, accounts a
"""


_FILTERS: list[dict[str, Any]] = [
    {},
    {"state": "failed"},
    {"state": ["failed", "expired"]},
    {"state": ["succeeded"]},
    {"account": "default"},
    {"batch": UUID(int=7)},
    {"since": timedelta(hours=1)},
    {"since": timedelta(hours=1), "state": ["succeeded"], "use_case": "general"},
]


def test_statements_read_by_indexes_and_only_as_far_as_they_must(rows: Rows) -> None:
    rows(_FILL)
    rows("ANALYZE jobs")
    for filters in _FILTERS:
        statement, values = JobList(filters).statement(rows("SELECT id FROM accounts"))
        ((plan,),) = rows(f"EXPLAIN (FORMAT JSON) {statement}", **values)
        assert "Index" in str(plan), filters
        # Reading the table from end to end costs more than 800.
        assert plan[0]["Plan"]["Total Cost"] < 400, (filters, plan)
    told = "\n".join(line for (line,) in rows(f"EXPLAIN {CANCEL}", job_ids=[new_id()]))
    assert "Seq Scan on jobs" not in told
    assert "jobs_pkey" in told
    told = "\n".join(line for (line,) in rows(f"EXPLAIN {QUEUES_QUERY}", dead_after_s=15))
    assert "Seq Scan on jobs" not in told

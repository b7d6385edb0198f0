"""Shared reply channels: results go from the outbox to consumer groups, at least once."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
import redis
import redis.asyncio
from pydantic import SecretStr
from sqlalchemy import Engine

from sluicegate import AsyncSluice, InvalidJob, Sluice, SluiceError, State
from sluicegate.producers.reply_channels import Delivery
from sluicegate.shared.database import BY_SIZE
from sluicegate.shared.redis_client import make_async_redis
from sluicegate.shared.reply_channels import JOB_FIELD, REPLY_FIELD
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import Database
from sluicegate.workers.sweep.deliverer import _ADD, Deliverer
from sluicegate.workers.sweep.loops import Sweep
from tests.command_line import Command
from tests.databases import Rows
from tests.polling import eventually, eventually_async
from tests.stand_in import StandIn

CHANNEL = "crm-eu"
SOON_S = 30.0
#: So short that everything unacknowledged is offered again at once, where a test wants that.
AT_ONCE_S = 0.05

Finish = Callable[..., list[UUID]]


class Consumer:
    """Reads channels with either client; each call is a process that starts anew."""

    def __init__(self, settings: Settings, *, threads: bool) -> None:
        self._settings = settings
        self._threads = threads

    def read(
        self,
        group: str = "crm",
        *,
        channel: str = CHANNEL,
        count: int = -1,
        ack: bool = True,
        **options: Any,
    ) -> list[Delivery]:
        """Read what is there, or wait for `count` replies."""
        options.setdefault("timeout", 0 if count < 0 else SOON_S)
        found: list[Delivery] = []
        if self._threads:
            with (
                Sluice(self._settings) as sluice,
                sluice.replies(channel, group, **options) as replies,
            ):
                for reply in replies:
                    found.append(reply)
                    if ack:
                        reply.ack()
                    if len(found) == count:
                        break
            return found

        async def read() -> None:
            async with (
                AsyncSluice(self._settings) as sluice,
                sluice.replies(channel, group, **options) as replies,
            ):
                async for reply in replies:
                    found.append(reply)
                    if ack:
                        await reply.ack()
                    if len(found) == count:
                        break

        asyncio.run(read())
        return found


def jobs_of(replies: Iterable[Delivery]) -> list[UUID]:
    return [reply.job_id for reply in replies]


@pytest.fixture(params=["threads", "loop"])
def consumer(request: pytest.FixtureRequest, settings: Settings) -> Consumer:
    return Consumer(settings, threads=request.param == "threads")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"sweep_interval_s": 600.0})


@pytest.fixture
def sluice(settings: Settings) -> Iterator[Sluice]:
    with Sluice(settings) as client:
        yield client


@pytest.fixture
def finish(sluice: Sluice, engine: Engine, redis_client: redis.Redis, settings: Settings) -> Finish:
    """Submit jobs and end them well; nothing is delivered yet."""

    def run(count: int, channel: str = CHANNEL, **result: Any) -> list[UUID]:
        handles = sluice.submit_many("draft", ["hello"] * count, reply_to=channel)
        for handle in handles:
            StandIn(engine=engine, client=redis_client, settings=settings, job_id=handle.id).settle(
                **result
            )
        return [handle.id for handle in handles]

    return run


async def _deliverer_rounds(settings: Settings) -> None:
    db = Database(settings, application_name="test", size=1, planner=BY_SIZE)
    client = make_async_redis(settings)
    deliverer = Deliverer(
        db=db,
        client=client,
        prefix=settings.redis_prefix,
        channel_max=settings.reply_channel_max,
    )
    try:
        while await deliverer.round():
            pass
    finally:
        await db.close()
        await client.aclose()


@pytest.fixture
def deliver(settings: Settings) -> Callable[[], None]:
    """Run a deliverer that has just started, until it has nothing more to do."""
    return lambda: asyncio.run(_deliverer_rounds(settings))


@pytest.fixture
def key(settings: Settings) -> str:
    return f"{settings.redis_prefix}channel:{CHANNEL}"


@pytest.fixture
def entries(redis_client: redis.Redis, settings: Settings) -> Callable[..., list[UUID]]:
    """Jobs of the entries that a channel holds, in order."""

    def read(channel: str = CHANNEL) -> list[UUID]:
        found: Any = redis_client.xrange(f"{settings.redis_prefix}channel:{channel}")
        return [UUID(values[JOB_FIELD].decode()) for _, values in found]

    return read


def blocked(client: redis.Redis) -> list[int]:
    """Ids of the connections that wait for replies."""
    found: Any = client.client_list()
    return [int(one["id"]) for one in found if one["cmd"] == "xreadgroup" and "b" in one["flags"]]


# What arrives


async def test_every_end_of_a_job_arrives_with_what_the_submitter_gave(
    settings: Settings, engine: Engine, redis_client: redis.Redis
) -> None:
    sweep = Sweep(settings)
    async with AsyncSluice(settings) as sluice:
        common: Any = {"reply_to": CHANNEL}
        good = await sluice.submit(
            "draft", "a", metadata={"lead": "7"}, idempotency_key="k-1", request_id="r-1", **common
        )
        bad = await sluice.submit("draft", "b", **common)
        late = await sluice.submit("draft", "c", **common)
        unwanted = await sluice.submit("draft", "d", **common)
        other = await sluice.submit("draft", "e")

        def work(job_id: UUID) -> StandIn:
            return StandIn(engine=engine, client=redis_client, settings=settings, job_id=job_id)

        work(good.id).settle(text="yes", cost_nano_usd=1_500)
        work(other.id).settle()
        error = {"error_class": "bad_request", "message": "refused"}
        work(bad.id).settle("failed", error=error)
        with engine.connect() as connection:
            connection.exec_driver_sql(
                "UPDATE jobs SET deadline_at = now() WHERE id = %(id)s", {"id": late.id}
            )
        await sweep.expire()
        assert await unwanted.cancel() is State.CANCELLED
        await sweep.deliver()

        found = [reply async for reply in sluice.replies(CHANNEL, "crm", timeout=0)]
    await sweep.close()
    assert [(reply.job_id, reply.result.state) for reply in found] == [
        (good.id, State.SUCCEEDED),
        (bad.id, State.FAILED),
        (late.id, State.EXPIRED),
        (unwanted.id, State.CANCELLED),
    ]
    first = found[0]
    assert (first.metadata, first.idempotency_key, first.request_id) == (
        {"lead": "7"},
        "k-1",
        "r-1",
    )
    assert (first.result.text, first.result.cost) == ("yes", Decimal("0.0000015"))
    assert first.result.latency_s is not None
    assert (found[1].metadata, found[1].idempotency_key, found[1].deliveries) == ({}, None, 1)
    assert found[1].result.error is not None
    assert found[1].result.error.message == "refused"


async def test_an_end_wakes_the_sweep(
    settings: Settings, engine: Engine, redis_client: redis.Redis, rows: Rows
) -> None:
    sweep = asyncio.create_task(Sweep(settings).run())
    listens = "SELECT FROM pg_stat_activity WHERE query LIKE 'LISTEN%%' AND datname = %(name)s"
    name = settings.database_dsn.rpartition("/")[2].partition("?")[0]

    async def listening() -> bool:
        return bool(await asyncio.to_thread(rows, listens, name=name))

    await eventually_async(listening)
    async with AsyncSluice(settings) as sluice:
        job = await sluice.submit("draft", "hello", reply_to=CHANNEL)
        StandIn(engine=engine, client=redis_client, settings=settings, job_id=job.id).settle()
        async for reply in sluice.replies(CHANNEL, "crm", timeout=SOON_S):
            assert reply.job_id == job.id
            break
        else:
            pytest.fail("nothing came")
    sweep.cancel()
    await asyncio.gather(sweep, return_exceptions=True)


# Groups and consumers


def test_each_group_gets_all_and_its_consumers_share(
    consumer: Consumer, finish: Finish, deliver: Callable[[], None]
) -> None:
    jobs = finish(6)
    deliver()
    first = consumer.read("crm", count=2, batch=1, consumer="a")
    second = consumer.read("crm", consumer="b")
    assert jobs_of(first) + jobs_of(second) == jobs
    assert jobs_of(consumer.read("audit")) == jobs


def test_a_consumer_that_comes_back_gets_again_what_it_had_not_acknowledged(
    consumer: Consumer, finish: Finish, deliver: Callable[[], None]
) -> None:
    jobs = finish(3)
    deliver()
    assert jobs_of(consumer.read(consumer="a", ack=False)) == jobs
    # Fetched pages are smaller than what there is, and what is new comes last.
    jobs += finish(1)
    deliver()
    again = consumer.read(consumer="a", batch=2)
    assert jobs_of(again) == jobs
    assert [reply.deliveries for reply in again] == [2, 2, 2, 1]
    assert consumer.read(consumer="a", redeliver_after_s=AT_ONCE_S, timeout=0.3) == []


def test_what_a_consumer_left_goes_to_another_one(
    consumer: Consumer, finish: Finish, deliver: Callable[[], None]
) -> None:
    jobs = finish(3)
    deliver()
    assert jobs_of(consumer.read(consumer="a", count=1, batch=3, ack=False)) == jobs[:1]
    assert consumer.read(consumer="b") == []
    found = consumer.read(consumer="b", count=3, redeliver_after_s=AT_ONCE_S)
    assert jobs_of(found) == jobs
    assert {reply.deliveries for reply in found} == {2}
    # Acknowledged by another one: not its own any more.
    assert consumer.read(consumer="a") == []


def test_what_a_consumer_that_died_never_saw_was_not_delivered(
    consumer: Consumer, finish: Finish, deliver: Callable[[], None]
) -> None:
    finish(3)
    deliver()
    consumer.read(consumer="a", count=1, ack=False)
    found = consumer.read(consumer="b", count=3, redeliver_after_s=AT_ONCE_S)
    assert sorted(reply.deliveries for reply in found) == [1, 1, 2]


def test_a_reply_that_is_not_acknowledged_comes_again_to_the_same_reader(
    consumer: Consumer, finish: Finish, deliver: Callable[[], None]
) -> None:
    jobs = finish(1)
    deliver()
    found = consumer.read(count=3, ack=False, redeliver_after_s=AT_ONCE_S)
    assert jobs_of(found) == jobs * 3
    assert [reply.deliveries for reply in found] == [1, 2, 3]
    assert {reply.id for reply in found} == {found[0].id}


def test_replies_that_waited_too_long_in_a_reader_are_fetched_again(
    sluice: Sluice, finish: Finish, deliver: Callable[[], None]
) -> None:
    finish(2)
    deliver()
    with sluice.replies(CHANNEL, "crm", redeliver_after_s=0.2, timeout=SOON_S, batch=2) as replies:
        first = next(replies)
        with sluice.replies(CHANNEL, "crm", redeliver_after_s=0.2, timeout=SOON_S) as others:
            taken = [next(others), next(others)]  # both are taken over
            for reply in taken:
                reply.ack()
        assert first.job_id in jobs_of(taken)
        finish(1)
        deliver()
        assert next(replies).job_id not in jobs_of(taken)


def test_results_that_come_while_a_reader_waits(
    consumer: Consumer,
    finish: Finish,
    deliver: Callable[[], None],
    redis_client: redis.Redis,
) -> None:
    with ThreadPoolExecutor(1) as executor:
        reading = executor.submit(consumer.read, count=2)
        eventually(lambda: blocked(redis_client))
        jobs = finish(2)
        deliver()
        assert jobs_of(reading.result(SOON_S)) == jobs


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("channel", {"channel": "a b"}),
        ("group", {"group": ""}),
        ("consumer", {"consumer": "-x"}),
        ("timeout", {"timeout": -1}),
        ("redeliver_after_s", {"redeliver_after_s": 0}),
        ("batch", {"batch": 0}),
    ],
)
def test_what_cannot_be_read(sluice: Sluice, field: str, options: dict[str, Any]) -> None:
    given: dict[str, Any] = {"channel": CHANNEL, "group": "crm", **options}
    with pytest.raises(InvalidJob) as caught:
        sluice.replies(**given)
    assert caught.value.field == field


def test_an_entry_that_cannot_be_read_is_left_to_others_and_then_left_out(
    sluice: Sluice,
    finish: Finish,
    deliver: Callable[[], None],
    redis_client: redis.Redis,
    key: str,
) -> None:
    redis_client.xadd(key, {REPLY_FIELD: b"{}"}, id="7-0")
    with sluice.replies(CHANNEL, "crm", timeout=0) as replies:
        assert list(replies) == []
    pending: Any = redis_client.xpending(key, "crm")
    assert pending["pending"] == 1
    jobs = finish(1)
    deliver()
    with sluice.replies(CHANNEL, "crm", timeout=0) as replies:
        for reply in replies:
            assert reply.job_id == jobs.pop()
            reply.ack()
    assert jobs == []

    with sluice.replies(CHANNEL, "crm", timeout=0.1, redeliver_after_s=AT_ONCE_S) as replies:

        def given_up() -> bool:
            assert list(replies) == []
            left: Any = redis_client.xpending(key, "crm")
            return bool(left["pending"] == 0)

        eventually(given_up)


# Ending, and servers that come and go


def test_close_ends_a_wait_and_what_was_given_can_be_acknowledged(
    sluice: Sluice,
    finish: Finish,
    deliver: Callable[[], None],
    redis_client: redis.Redis,
    key: str,
) -> None:
    finish(1)
    deliver()
    replies = sluice.replies(CHANNEL, "crm")
    reply = next(replies)
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(list, replies)
        eventually(lambda: blocked(redis_client))
        replies.close()
        assert waiting.result(SOON_S) == []
    assert list(replies) == []
    reply.ack()
    pending: Any = redis_client.xpending(key, "crm")
    assert pending["pending"] == 0
    eventually(lambda: not blocked(redis_client))
    sluice.close()
    with pytest.raises(SluiceError, match="closed"):
        reply.ack()


async def test_closing_the_client_ends_its_readers(
    settings: Settings, async_redis: redis.asyncio.Redis
) -> None:
    sluice = AsyncSluice(settings)
    replies = sluice.replies(CHANNEL, "crm")
    waiting = asyncio.create_task(anext(replies, None))

    async def reading() -> bool:
        found = await async_redis.client_list()
        return any(one["cmd"] == "xreadgroup" for one in found)

    await eventually_async(reading)
    await sluice.close()
    assert await asyncio.wait_for(waiting, SOON_S) is None

    threads = Sluice(settings)
    with ThreadPoolExecutor(1) as executor:
        blocking = executor.submit(list, threads.replies(CHANNEL, "crm"))
        await eventually_async(reading)
        await asyncio.to_thread(threads.close)
        assert await asyncio.to_thread(blocking.result, SOON_S) == []


async def test_a_wait_that_is_cancelled_loses_nothing(
    settings: Settings, finish: Finish, async_redis: redis.asyncio.Redis
) -> None:
    async with AsyncSluice(settings) as sluice:
        replies = sluice.replies(CHANNEL, "crm", timeout=SOON_S)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await anext(replies)
        jobs = await asyncio.to_thread(finish, 2)
        await _deliverer_rounds(settings)
        assert [(await anext(replies)).job_id for _ in jobs] == jobs


def test_a_reader_survives_a_killed_connection(
    sluice: Sluice, finish: Finish, deliver: Callable[[], None], redis_client: redis.Redis
) -> None:
    first = finish(1)
    deliver()
    with sluice.replies(CHANNEL, "crm", timeout=SOON_S) as replies:
        held = next(replies)
        with ThreadPoolExecutor(1) as executor:
            waiting = executor.submit(next, replies)
            (connection,) = eventually(lambda: blocked(redis_client))
            redis_client.client_kill_filter(_id=str(connection))
            second = finish(1)
            deliver()
            # The one in hand does not come twice.
            assert waiting.result(SOON_S).job_id == second[0]
        assert held.job_id == first[0]


def test_what_was_given_in_an_answer_that_got_lost_comes_at_once(
    sluice: Sluice,
    finish: Finish,
    deliver: Callable[[], None],
    redis_client: redis.Redis,
    key: str,
) -> None:
    jobs = finish(1)
    deliver()
    with sluice.replies(CHANNEL, "crm", timeout=0) as other:
        entry = next(other).id
    with sluice.replies(CHANNEL, "crm", timeout=SOON_S) as replies, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, replies)
        (connection,) = eventually(lambda: blocked(redis_client))
        # Redis takes it for given, and this reader has not seen it.
        redis_client.xclaim(key, "crm", replies.consumer, 0, [entry])
        redis_client.client_kill_filter(_id=str(connection))
        assert waiting.result(SOON_S).job_id == jobs[0]


def test_a_reader_survives_the_loss_of_its_channel(
    consumer: Consumer,
    finish: Finish,
    deliver: Callable[[], None],
    redis_client: redis.Redis,
    key: str,
) -> None:
    with ThreadPoolExecutor(1) as executor:
        reading = executor.submit(consumer.read, count=2)
        eventually(lambda: blocked(redis_client))
        redis_client.delete(key)
        jobs = finish(2)
        deliver()
        assert jobs_of(reading.result(SOON_S)) == jobs


# The deliverer


def test_a_result_that_a_retry_took_away_is_not_delivered_in_place_of_the_next(
    sluice: Sluice,
    engine: Engine,
    redis_client: redis.Redis,
    deliver: Callable[[], None],
    entries: Callable[..., list[UUID]],
) -> None:
    job = sluice.submit("draft", "hello", reply_to=CHANNEL)
    job.cancel()
    sluice.retry(job.id)
    StandIn(engine=engine, client=redis_client, settings=sluice.settings, job_id=job.id).settle()
    deliver()
    assert entries() == [job.id]


def test_two_deliverers_add_each_result_once(
    finish: Finish, settings: Settings, entries: Callable[..., list[UUID]], rows: Rows
) -> None:
    jobs = finish(40)
    # Many results, without the work of making so many jobs.
    rows(
        "INSERT INTO outbox (channel, job_id, fence) SELECT channel, job_id, fence FROM outbox, "
        "generate_series(1, 30)"
    )

    async def both() -> None:
        await asyncio.gather(*(_deliverer_rounds(settings) for _ in range(3)))

    asyncio.run(both())
    found = entries()
    assert len(found) == len(jobs) * 31
    assert found[: len(jobs)] == jobs
    numbers = [row.number for row in rows("SELECT number FROM outbox ORDER BY id")]
    assert numbers == sorted(set(numbers))


def test_a_deliverer_goes_on_where_another_one_died(
    finish: Finish, deliver: Callable[[], None], entries: Callable[..., list[UUID]], rows: Rows
) -> None:
    jobs = finish(3)
    # Numbered, and not added.
    rows("UPDATE outbox SET number = id")
    rows("INSERT INTO reply_channels SELECT channel, max(number) FROM outbox GROUP BY channel")
    deliver()
    assert entries() == jobs
    # Added, and nothing else.
    deliver()
    assert entries() == jobs
    jobs += finish(1)
    deliver()
    assert entries() == jobs


def test_a_full_channel_waits_and_the_others_go_on(
    finish: Finish,
    settings: Settings,
    consumer: Consumer,
    entries: Callable[..., list[UUID]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    small = settings.model_copy(update={"reply_channel_max": 4})
    jobs = finish(10)
    others = finish(2, "other")
    asyncio.run(_deliverer_rounds(small))
    assert entries() == jobs[:4]
    assert entries("other") == others
    assert "reply channel crm-eu is full" in caplog.text
    found = []
    for _ in range(3):
        found += jobs_of(consumer.read())
        asyncio.run(_deliverer_rounds(small))
    assert found == jobs
    assert entries() == []


def test_entries_go_once_every_group_has_acknowledged_them(
    finish: Finish,
    deliver: Callable[[], None],
    consumer: Consumer,
    entries: Callable[..., list[UUID]],
    rows: Rows,
) -> None:
    jobs = finish(4)
    deliver()
    consumer.read("slow", count=1, batch=1)
    consumer.read("crm")
    deliver()
    assert entries() == jobs[1:]
    assert [row.job_id for row in rows("SELECT job_id FROM outbox ORDER BY id")] == jobs[1:]
    # What one group has in hand stays, whatever came after it.
    consumer.read("slow", count=1, batch=1, ack=False)
    consumer.read("slow")
    deliver()
    assert entries() == jobs[1:]
    consumer.read("slow", redeliver_after_s=AT_ONCE_S, count=1)
    deliver()
    assert entries() == []
    assert rows("SELECT FROM outbox") == []


def test_what_nobody_acknowledged_survives_the_loss_of_redis(
    finish: Finish,
    deliver: Callable[[], None],
    consumer: Consumer,
    redis_client: redis.Redis,
    key: str,
) -> None:
    jobs = finish(5)
    deliver()
    consumer.read("crm")
    assert jobs_of(consumer.read("slow", count=2, batch=2)) == jobs[:2]
    deliver()
    redis_client.delete(key)
    jobs += finish(1)
    deliver()
    # Both groups go on where they were, without having said anything.
    groups: Any = redis_client.xinfo_groups(key)
    assert {group["name"] for group in groups} == {b"crm", b"slow"}
    assert jobs_of(consumer.read("slow")) == jobs[2:]
    assert jobs_of(consumer.read("crm")) == jobs[5:]


def test_a_group_that_never_acknowledged_anything_is_restored_too(
    finish: Finish,
    deliver: Callable[[], None],
    consumer: Consumer,
    redis_client: redis.Redis,
    key: str,
) -> None:
    jobs = finish(2)
    deliver()
    consumer.read("new", ack=False, consumer="a")
    deliver()
    redis_client.delete(key)
    # Another group is there first, and done with everything.
    jobs += finish(1)
    assert consumer.read("crm") == []
    deliver()
    assert jobs_of(consumer.read("crm")) == jobs
    deliver()
    assert jobs_of(consumer.read("new")) == jobs


def test_a_group_that_was_destroyed_holds_up_nobody(
    finish: Finish,
    deliver: Callable[[], None],
    consumer: Consumer,
    redis_client: redis.Redis,
    key: str,
) -> None:
    finish(2)
    deliver()
    consumer.read("crm")
    consumer.read("gone", count=1, batch=1)
    deliver()
    assert redis_client.xlen(key) == 1
    redis_client.xgroup_destroy(key, "gone")
    deliver()
    deliver()
    assert redis_client.xlen(key) == 0
    groups: Any = redis_client.xinfo_groups(key)
    assert [group["name"] for group in groups] == [b"crm"]


def test_what_redis_lost_of_its_last_second_is_added_again(
    finish: Finish,
    deliver: Callable[[], None],
    redis_client: redis.Redis,
    entries: Callable[..., list[UUID]],
    key: str,
) -> None:
    jobs = finish(5)
    deliver()
    kept: Any = redis_client.xrange(key, count=2)
    redis_client.delete(key)
    for entry, values in kept:
        redis_client.xadd(key, values, id=entry)
    deliver()
    assert entries() == jobs


def test_a_stream_that_was_lost_while_a_batch_was_on_its_way_gets_no_hole(
    redis_client: redis.Redis, key: str
) -> None:
    fields = (JOB_FIELD, REPLY_FIELD)
    # Read as what follows on 6, which is gone.
    assert redis_client.eval(_ADD, 1, key, 6, *fields, 7, "job", "{}") == -1
    assert redis_client.exists(key) == 0
    assert redis_client.eval(_ADD, 1, key, 0, *fields, 5, "job", "{}", 6, "job", "{}") == 2
    # Another sweep was quicker with the 6.
    assert redis_client.eval(_ADD, 1, key, 5, *fields, 6, "job", "{}", 7, "job", "{}") == 1
    assert redis_client.xlen(key) == 3


def test_numbers_go_on_above_those_of_a_stream_from_another_time(
    finish: Finish, deliver: Callable[[], None], redis_client: redis.Redis, key: str
) -> None:
    redis_client.xadd(key, {"x": "y"}, id="900-3")
    finish(1)
    deliver()
    ids: Any = [entry for entry, _ in redis_client.xrange(key)]  # type: ignore[union-attr]  # sync
    assert ids[0] == b"900-3"
    assert int(ids[1].split(b"-")[0]) > 900


def test_a_result_that_was_taken_back_is_not_delivered(
    finish: Finish,
    deliver: Callable[[], None],
    entries: Callable[..., list[UUID]],
    rows: Rows,
) -> None:
    first, second = finish(2)
    rows("DELETE FROM results WHERE job_id = %(id)s", id=first)
    deliver()
    assert entries() == [second]
    assert [row.job_id for row in rows("SELECT job_id FROM outbox")] == [second]


def test_a_key_of_another_kind_holds_up_nobody_else(
    finish: Finish,
    deliver: Callable[[], None],
    redis_client: redis.Redis,
    entries: Callable[..., list[UUID]],
    key: str,
) -> None:
    redis_client.set(key, "not a stream")
    finish(1)
    others = finish(1, "other")
    deliver()
    assert entries("other") == others


@pytest.fixture
def _few_consumers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sluicegate.workers.sweep.deliverer._CONSUMERS", 2)
    monkeypatch.setattr("sluicegate.workers.sweep.deliverer._CONSUMER_IDLE_MS", -1)


@pytest.mark.usefixtures("_few_consumers")
def test_consumers_of_the_past_are_cleared_away(
    finish: Finish,
    deliver: Callable[[], None],
    consumer: Consumer,
    redis_client: redis.Redis,
    key: str,
) -> None:
    finish(2)
    deliver()
    consumer.read(consumer="holds", count=1, batch=1, ack=False)
    for name in ("a", "b", "c"):
        consumer.read(consumer=name, ack=False, count=1 if name == "a" else -1, batch=1)
    deliver()
    left: Any = redis_client.xinfo_consumers(key, "crm")
    assert {one["name"] for one in left} == {b"holds", b"a"}


# Commands


@pytest.fixture
def command(
    settings: Settings, command_line: Callable[[Settings], Command]
) -> Callable[..., tuple[int, str]]:
    """Run a command; return its exit code and what it printed on either side."""
    run = command_line(settings)

    def both(*arguments: str) -> tuple[int, str]:
        outcome = run(*arguments)
        return outcome.code, outcome.out + outcome.err

    return both


def test_an_operator_sees_and_removes_a_group_that_holds_up_a_channel(
    command: Callable[..., tuple[int, str]],
    finish: Finish,
    deliver: Callable[[], None],
    consumer: Consumer,
) -> None:
    assert command("reply", "list", "--json") == (0, '{"channels": []}\n')
    finish(3)
    finish(1, "other")
    _, before = command("reply", "list")
    assert [line.split("\t")[:3] for line in before.splitlines()[1:]] == [
        [CHANNEL, "3", "3"],
        ["other", "1", "1"],
    ]
    deliver()
    consumer.read("crm")
    consumer.read("gone", count=1, batch=1, ack=False)
    deliver()
    _, listed = command("reply", "list", "--json")
    first, other = json.loads(listed)["channels"]
    assert (first["channel"], first["kept"], first["waiting"]) == (CHANNEL, 3, 0)
    assert first["groups"] == [
        {"group": "crm", "unread": 0, "unacknowledged": 0, "consumers": 1},
        {"group": "gone", "unread": 2, "unacknowledged": 1, "consumers": 1},
    ]
    assert other["groups"] == []

    code, said = command("reply", "forget", CHANNEL, "--group", "gone")
    assert (code, "is removed" in said) == (0, True)
    deliver()
    _, listed = command("reply", "list", "--json")
    kept = {one["channel"]: one["kept"] for one in json.loads(listed)["channels"]}
    assert kept == {CHANNEL: 0, "other": 1}
    code, said = command("reply", "forget", CHANNEL, "--group", "gone")
    assert code == 1
    assert said == f"sluice: reply channel {CHANNEL} has no group gone; see `sluice reply list`\n"


def test_an_operator_reads_a_channel(
    command: Callable[..., tuple[int, str]], finish: Finish, deliver: Callable[[], None]
) -> None:
    (job,) = finish(1, text="one\ntwo", cost_nano_usd=2_000)
    (second,) = finish(1, text="three")
    deliver()
    tail = ("reply", "tail", CHANNEL, "--timeout", "0")
    code, said = command(*tail, "--group", "ops")
    assert (code, said.splitlines()[0]) == (0, f"{job}\tsucceeded\t$0.000002\tone two")
    assert command(*tail, "--group", "ops") == (0, "")
    _, said = command(*tail, "--group", "more", "--json")
    found = [json.loads(line) for line in said.splitlines()]
    assert [one["result"]["job_id"] for one in found] == [str(job), str(second)]
    code, said = command(*tail, "--group", "no good")
    assert (code, said.startswith("sluice: --group: must be")) == (2, True)


def test_a_server_that_is_away_is_told_in_one_line(
    settings: Settings, command_line: Callable[[Settings], Command]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{probe.getsockname()[1]}/0"
    sluice = command_line(settings.model_copy(update={"redis_url": SecretStr(url)}))
    group = (CHANNEL, "--group", "ops")
    for arguments in (("tail", *group, "--timeout", 1), ("forget", *group)):
        outcome = sluice("reply", *arguments)
        assert (outcome.code, outcome.out) == (1, "")
        assert re.fullmatch(
            r"sluice: Redis did not answer \(.+\); check SLUICE_REDIS_URL\n", outcome.err
        )


def test_a_server_that_goes_away_is_not_an_empty_channel(
    settings: Settings, sluice: Sluice
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{probe.getsockname()[1]}/0"
    away = settings.model_copy(update={"redis_url": SecretStr(url)})
    with Sluice(away) as other, other.replies(CHANNEL, "crm", timeout=0) as replies:
        assert list(replies) == []
        assert "refused" in replies.problem
    with sluice.replies(CHANNEL, "crm", timeout=0) as replies:
        assert list(replies) == []
        assert replies.problem == ""

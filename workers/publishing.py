"""Publishing from the event loop: one thread makes the synchronous calls of kombu and Celery.

Celery publishes synchronously, so `apply_async` on the event loop would hold up every other task
for a round trip to the broker, or for as long as the broker does not answer. The publisher's thread
makes these calls instead, as one pipeline where several wait.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from celery import Celery, Task
from celery.result import AsyncResult
from kombu import Producer
from kombu.exceptions import OperationalError
from sqlalchemy.util.concurrency import await_, in_greenlet

__all__ = ["AsyncTask", "Publisher"]

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Call:
    """A publish that somebody on the loop waits for."""

    future: asyncio.Future[Any]
    function: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    result: Any = None
    error: Exception | None = None

    def make(self, producer: Producer) -> None:
        try:
            self.result = self.function(*self.args, producer=producer, **self.options)
            self.error = None
        except Exception as error:  # noqa: BLE001 - it is raised where the future is awaited
            self.error = error


class Publisher:
    """One thread that publishes for an event loop.

    app: whose producer pool it uses.
    waiting_limit: publishes that may wait at once; more are refused with `OperationalError`.
    batch_limit: publishes that go to the broker in one pipeline at most.
    acquire_timeout_s: how long it waits for a connection of the app's pool.
    """

    _serving: ClassVar[dict[asyncio.AbstractEventLoop, Publisher]] = {}

    def __init__(
        self,
        app: Celery,
        *,
        waiting_limit: int = 10_000,
        batch_limit: int = 100,
        acquire_timeout_s: float = 30.0,
    ) -> None:
        self._app = app
        self._waiting_limit = waiting_limit
        self._batch_limit = batch_limit
        self._acquire_timeout_s = acquire_timeout_s
        # Unbounded by itself; `_waiting`, touched on the loop alone, is what bounds it.
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._waiting = 0
        self._open = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="sluice-publisher", daemon=True)

    @classmethod
    def here(cls) -> Publisher | None:
        """Return the publisher that serves the running event loop, if there is one."""
        try:
            return cls._serving.get(asyncio.get_running_loop())
        except RuntimeError:
            return None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serve this loop until `close`."""
        self._loop = loop
        self._open = True
        self._serving[loop] = self
        self._thread.start()

    def publish(
        self, function: Callable[..., Any], /, *args: Any, **options: Any
    ) -> asyncio.Future[Any]:
        """Call `function(*args, producer=..., **options)` in the thread; call this on the loop.

        `task.apply_async`, `app.send_task` and the like take such a `producer`. The future ends
        with what the function returns, once the broker has it, or with the error it raised. After
        a pipeline that failed part-way the function is called again by itself, so what it
        publishes must be harmless to repeat, as a hint about jobs is. A publish whose future is
        cancelled before its turn is not made.
        """
        if self._loop is None:
            raise RuntimeError("Start the publisher before publishing with it.")
        future: asyncio.Future[Any] = self._loop.create_future()
        if not self._open:
            future.set_exception(OperationalError("the publisher is closed: publish elsewhere"))
        elif self._waiting >= self._waiting_limit:
            future.set_exception(
                OperationalError(
                    f"{self._waiting} publishes wait for the broker already: try again later"
                )
            )
        else:
            self._waiting += 1
            self._calls.put(_Call(future, function, args, options))
        return future

    def close(self, timeout_s: float) -> None:
        """Refuse new publishes, make those that wait, and end the thread; blocks up to timeout_s.

        Call it from another thread than the loop's, while the loop still runs.
        """
        if not self._open or self._loop is None:
            return
        self._open = False
        self._serving.pop(self._loop, None)
        self._calls.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("The broker did not answer: %d publishes are given up.", self._waiting)

    def _work(self) -> None:
        going_on = True
        while going_on:
            batch: list[_Call] = []
            call = self._calls.get()
            while call is not None:
                batch.append(call)
                if len(batch) == self._batch_limit:
                    break
                try:
                    call = self._calls.get_nowait()
                except queue.Empty:
                    break
            going_on = call is not None
            self._make([call for call in batch if not call.future.cancelled()])
            self._answer(batch)

    def _make(self, calls: list[_Call]) -> None:
        try:
            with self._app.producer_pool.acquire(
                block=True, timeout=self._acquire_timeout_s
            ) as producer:
                if len(calls) > 1 and self._made_as_one(calls, producer):
                    return
                for call in calls:
                    call.make(producer)
        except Exception as error:  # noqa: BLE001 - no connection: every caller is told so
            for call in calls:
                call.error = error

    @staticmethod
    def _made_as_one(calls: list[_Call], producer: Producer) -> bool:
        # A pipeline that fails says nothing about its parts: each is then made by itself.
        try:
            with producer.batch():  # type: ignore[attr-defined]  # newer than the stubs
                for call in calls:
                    call.make(producer)
        except Exception as error:  # noqa: BLE001 - the same calls follow one by one
            logger.info("A batch of %d publishes failed (%s): one by one.", len(calls), error)
            return False
        return not any(isinstance(call.error, OperationalError) for call in calls)

    def _answer(self, batch: list[_Call]) -> None:
        if not batch or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._resolve, batch)
        except RuntimeError:
            logger.warning("The event loop ended before %d publishes did.", len(batch))

    def _resolve(self, batch: list[_Call]) -> None:
        self._waiting -= len(batch)
        for call in batch:
            if call.future.done():
                continue
            if call.error is None:
                call.future.set_result(call.result)
            else:
                call.future.set_exception(call.error)


class AsyncTask(Task[..., Any]):
    """A Celery task whose `apply_async`, and so `retry`, never blocks the pool's event loop.

    In a task body on the pool's loop the publish is made by the publisher's thread while other
    tasks run; anywhere else `apply_async` is Celery's. Coroutines await `send` instead.
    """

    abstract = True

    def apply_async(  # type: ignore[override]  # the options of Celery's, not named one by one
        self,
        args: tuple[Any, ...] | list[Any] | None = None,
        kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> AsyncResult[Any]:
        """Do as Celery's `apply_async`, and raise what it raises."""
        # A caller who brings a connection of its own wants that one used.
        if {"producer", "connection"} & options.keys() or not in_greenlet():
            return super().apply_async(args, kwargs, **options)  # type: ignore[arg-type]  # lists too
        publisher = Publisher.here()
        if publisher is None:
            return super().apply_async(args, kwargs, **options)  # type: ignore[arg-type]  # lists too
        # Celery keys the running task by greenlet, so the thread cannot know the parent.
        parent = self.app.current_worker_task
        if parent is not None:
            request = parent.request
            options["root_id"] = options.get("root_id") or request.root_id or request.id
            options["parent_id"] = options.get("parent_id") or request.id
        result: AsyncResult[Any] = await_(
            publisher.publish(super().apply_async, args, kwargs, **options)
        )
        return result

    async def send(
        self,
        args: tuple[Any, ...] | list[Any] | None = None,
        kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> AsyncResult[Any]:
        """Do as `apply_async`, awaited from a coroutine on the pool's loop."""
        publisher = Publisher.here()
        if publisher is None:
            raise RuntimeError(
                "Await `send` on the event loop of a worker; elsewhere call `apply_async`."
            )
        result: AsyncResult[Any] = await publisher.publish(
            super().apply_async, args, kwargs, **options
        )
        return result

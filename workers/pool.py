"""The asyncio worker pool: Celery's own tracer, in greenlets on one event loop.

`worker_pool = "sluicegate.workers.pool:TaskPool"` in the app's configuration selects it. A task
body is `return await_(coroutine)`; one process holds thousands of them. Two threads matter:

- the *hub thread*, Celery's main thread, owns the broker connection. Everything Celery is told
  (accepted, succeeded, failed, timed out) and all prefetch accounting happens there;
- the *loop thread* runs the tasks.

Here is what happens on the hub thread; `Runs` is what happens on the loop, which hands its calls to
the hub through a `HubInbox`.

*Prefetch.* Celery asks the broker for `worker_concurrency * worker_prefetch_multiplier` messages
(1 * 1) and counts those not acknowledged. A task calls `claimed()` when it has made its message's
work its own: one more is then asked for, and one less when the task ends. So one message waits
unclaimed, however many are claimed. After a reconnect Celery starts at 1 again, on a channel that
has no unacknowledged messages; what runs is then counted anew, claimed or not.

*A lost broker connection* leaves tasks running. Kombu 5.7 would try to put their messages back over
the connection that is gone, and end the worker with an AttributeError; and an acknowledgement on a
closed channel ends it likewise. So that is switched off while the worker runs, and the messages of
running tasks are moved to the new channel, over which they are acknowledged or put back. Messages
that wait for a countdown are forgotten: the sweep publishes their jobs again.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from celery import bootsteps
from celery.concurrency import get_implementation
from celery.concurrency.base import BasePool
from celery.exceptions import Reject
from celery.platforms import EX_FAILURE
from celery.signals import worker_shutting_down
from celery.worker import state
from kombu.asynchronous import Hub
from kombu.common import QoS
from kombu.transport import virtual
from sqlalchemy.util.concurrency import await_

from sluicegate.shared.celery_app import keep_one_client
from sluicegate.workers.hub_inbox import HubInbox
from sluicegate.workers.loop_thread import AsyncioThread
from sluicegate.workers.publishing import Publisher
from sluicegate.workers.runs import Run, Runs, claimed, told

__all__ = ["TaskPool", "await_", "claimed", "require_asyncio_pool"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Above Linux' largest process id (PID_MAX_LIMIT), so that a task's pid never names a process.
_FIRST_PID = 2**22 + 1

START_TIMEOUT_S = 60.0
STOP_HOOK_TIMEOUT_S = 5.0
#: What a loop that is still alive may lag behind while it stops.
DRAIN_SLACK_S = 3.0
PUBLISHER_CLOSE_TIMEOUT_S = 5.0
THREAD_JOIN_TIMEOUT_S = 2.0


def require_asyncio_pool(worker: Any) -> None:
    """Exit with a sentence unless this worker uses the asyncio pool as it is meant to be used.

    For a receiver of Celery's `worker_init` signal; `worker` is its sender.
    """
    pool: Any = get_implementation(worker.pool_cls)
    if not (isinstance(pool, type) and issubclass(pool, TaskPool)):
        raise SystemExit(
            f"This worker runs on the asyncio pool only, not on {pool.__module__}: "
            "start it without -P/--pool."
        )
    broker = worker.app.connection_for_read().transport.driver_type
    if broker != "redis":
        raise SystemExit(f"The asyncio pool works with Redis as the broker, not with {broker}.")
    if worker.prefetch_multiplier < 1:
        raise SystemExit(
            "Set worker_prefetch_multiplier to 1: 0 would fetch the whole queue into one worker."
        )


class _Connected(bootsteps.StartStopStep):
    """Tells the pool of each new broker connection."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        consumer.pool.use_connection(consumer.qos, consumer.task_consumer.channel)


class TaskPool(BasePool):
    """Celery's pool interface over one event loop; Celery creates it.

    Settings of the app (`app.conf`), both in seconds:
    `sluice_stop_grace_s` (30): how long running tasks may go on after SIGTERM. What is left is then
        cancelled, and its message put back on the queue unless the body catches the cancellation
        and returns. `worker_concurrency` is the number of messages that wait unclaimed.
    `sluice_cancel_grace_s` (5): how long a cancelled task may take to end.
    `SLUICE_LOOP_DEBUG=1` in the environment runs the loop in debug mode.

    A second SIGTERM changes nothing, as everywhere in Celery; SIGQUIT cancels at once.
    """

    signal_safe = False
    task_join_will_block = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        conf = self.app.conf
        self._stop_grace_s = float(conf.get("sluice_stop_grace_s", 30.0))
        self._cancel_grace_s = float(conf.get("sluice_cancel_grace_s", 5.0))
        self._inbox = HubInbox()
        self._thread = AsyncioThread(
            name="sluice-loop",
            debug=os.environ.get("SLUICE_LOOP_DEBUG") == "1",
            on_death=self._on_loop_death,
        )
        #: Publishes for the tasks without blocking their loop.
        self.publisher = Publisher(self.app)
        self._start_hooks: list[Callable[[], Awaitable[None]]] = []
        self._drain_hooks: list[Callable[[float], Awaitable[None]]] = []
        self._stop_hooks: list[Callable[[], Awaitable[None]]] = []
        self._pids = itertools.count(_FIRST_PID)
        self._runs = Runs(
            thread=self._thread,
            cancel_grace_s=self._cancel_grace_s,
            settle=partial(self._inbox.put, self._settle),
            count=partial(self._inbox.put, self._count),
            tell=self._inbox.put,
        )
        self._claimed_count = 0
        self._qos: QoS | None = None
        #: Kombu's channel that messages come over.
        self._channel: Any = None
        self._hub: Hub | None = None
        self._draining = False
        self.app.steps["consumer"].add(_Connected)

    # What the application may call.

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that tasks run on; there is none before `on_start`."""
        return self._thread.loop

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on the loop, from another thread."""
        return self._thread.submit(coroutine)

    def add_start_hook(self, hook: Callable[[], Awaitable[None]]) -> None:
        """Await this on the loop before the first message; an error ends the worker.

        Add hooks in Celery's `celeryd_after_setup`, whose `instance.pool` this pool is.
        """
        self._start_hooks.append(hook)

    def add_drain_hook(self, hook: Callable[[float], Awaitable[None]]) -> None:
        """Await this when the worker begins to stop, while its tasks still run.

        The hook is given the moment, by `time.monotonic()`, at which what still runs is cancelled.
        """
        self._drain_hooks.append(hook)

    def add_stop_hook(self, hook: Callable[[], Awaitable[None]]) -> None:
        """Await this after the last task ended, for at most `STOP_HOOK_TIMEOUT_S`; last in first.

        Publishing still works in it. Add it in a start hook, once there is something to close.
        """
        self._stop_hooks.append(hook)

    # What Celery calls, on the hub's thread.

    def on_start(self) -> None:
        """Start the loop and the publisher, and run the start hooks."""
        self._inbox.open()
        # The hub sees that it is to stop at its next turn, which may be a second away.
        worker_shutting_down.connect(self._wake)
        self._thread.start()
        self.publisher.start(self._thread.loop)
        try:
            for hook in self._start_hooks:
                self._thread.submit(_awaited(hook())).result(START_TIMEOUT_S)
        except Exception as error:
            debugging = logger.isEnabledFor(logging.DEBUG)
            reason = str(error) or f"it was not ready after {START_TIMEOUT_S:g} s"
            logger.critical("The worker cannot start: %s", reason, exc_info=debugging)
            self._shut_down(grace_s=0)
            raise SystemExit(EX_FAILURE) from error

    def did_start_ok(self) -> bool:
        """Whether the loop runs."""
        return self._thread.alive

    def register_with_event_loop(self, loop: Hub) -> None:
        """Attach the inbox; called again after each reconnect, which empties the hub."""
        self._hub = loop
        self._inbox.attach(loop)

    def use_connection(self, qos: QoS, channel: Any) -> None:
        """Count on a new connection's prefetch, and acknowledge over its channel, from now on."""
        self._qos = qos
        self._claimed_count = 0
        self._channel = channel
        channel.qos.restore_at_shutdown = False
        keep_one_client(channel)
        for request in tuple(state.active_requests):
            if not request.acknowledged:
                request.message.channel = channel
                # Not as Redis' channel does it, with a round trip each: who has it is known there.
                virtual.QoS.append(channel.qos, request.message, request.message.delivery_tag)
        for run in self._runs.unsettled():
            self._count(run)

    def on_apply(  # type: ignore[override]  # Celery keeps a weak reference to what is returned
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        callback: Callable[..., Any],
        error_callback: Callable[..., Any],
        accept_callback: Callable[..., Any] | None = None,
        timeout_callback: Callable[..., Any],
        timeout: float | None = None,
        soft_timeout: float | None = None,
        **_: Any,
    ) -> Run:
        """Start a task on the loop."""
        run = Run(
            runs=self._runs,
            pid=next(self._pids),
            target=target,
            args=tuple(args),
            callback=callback,
            error_callback=error_callback,
            timeout_callback=timeout_callback,
            timeout_s=timeout or self.options.get("timeout"),
            soft_timeout_s=soft_timeout or self.options.get("soft_timeout"),
        )
        if self._draining:
            # A countdown that ended while the worker stops: another worker's, then.
            self._settle(run, error_callback, told(Reject("the worker stops", requeue=True)))
            return run
        self._runs.add(run)
        if accept_callback is not None:
            accept_callback(run.pid, time.monotonic())
        self._runs.begin(run)
        return run

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Cancel the task that was accepted with this pid; a finished one is left alone."""
        self._runs.terminate(pid)

    def grow(self, n: int = 1) -> None:
        """Let n more messages wait unclaimed."""
        self.limit += n

    def shrink(self, n: int = 1) -> None:
        """Let n fewer messages wait unclaimed; raise ValueError if none could."""
        if self.limit - n < 1:
            raise ValueError(
                f"This worker lets {self.limit} messages wait: it needs at least one to go on."
            )
        self.limit -= n

    def on_stop(self) -> None:
        """Let running tasks finish for the grace period, then cancel the rest."""
        cold: Any = state.should_terminate
        if cold is not None and cold is not False:
            # Cold shutdown calls this inside its signal handler, where nothing may wait;
            # `on_terminate`, or the `on_stop` that the signal interrupted, does the rest.
            self._runs.hurry()
            return
        self._shut_down(grace_s=self._stop_grace_s)

    def on_terminate(self) -> None:
        """Cancel running tasks at once."""
        self._shut_down(grace_s=0)

    def _get_info(self) -> dict[str, Any]:
        return {
            **super()._get_info(),  # type: ignore[misc]  # missing in the stubs
            "loop": f"{type(self.loop).__module__}.{type(self.loop).__qualname__}",
            "running": len(self._runs),
            "claimed": self._claimed_count,
            "waiting-callbacks": len(self._inbox),
        }

    # Shutting down, on the hub's thread.

    def _wake(self, **_: Any) -> None:
        self._inbox.wake()

    def _shut_down(self, *, grace_s: float) -> None:
        if self._draining:
            return
        self._draining = True
        if self._thread.alive:
            if self._hub is not None:
                # Lost if the worker is told to stop while it reconnects.
                self.register_with_event_loop(self._hub)
            drained = self._thread.submit(self._drain(grace_s))
            drained.add_done_callback(lambda _: self._inbox.wake())
            hooks_s = STOP_HOOK_TIMEOUT_S * len(self._stop_hooks)
            limit_s = grace_s + self._cancel_grace_s + hooks_s + DRAIN_SLACK_S
            self._serve_hub(drained, give_up_at_s=time.monotonic() + limit_s)
            self.publisher.close(PUBLISHER_CLOSE_TIMEOUT_S)
            if not self._thread.stop(THREAD_JOIN_TIMEOUT_S):
                logger.warning("The event loop does not end: it is left behind.")
        if self._hub is not None:
            self._inbox.detach(self._hub)
        self._inbox.close()

    def _serve_hub(self, drained: concurrent.futures.Future[None], *, give_up_at_s: float) -> None:
        def waits() -> bool:
            return not drained.done() and self._thread.alive and time.monotonic() < give_up_at_s

        # The hub's own loop has ended; without these turns acknowledgements would leave only
        # when the last task has ended, and a message that arrived late would be held back.
        hub = None if self._channel is None or self._channel.closed else self._hub
        while hub is not None and waits():
            try:
                hub.run_once()
            except Exception as error:  # noqa: BLE001 - acknowledgements are repeatable hints
                logger.warning("The broker is lost: %s", error)
                hub = None
        while waits():
            concurrent.futures.wait([drained], timeout=0.1)
        if not drained.done():
            logger.error("The event loop does not answer: a task blocks it, or it died.")
        elif (problem := drained.exception()) is not None:
            logger.error("Stopping went wrong.", exc_info=problem)
        if hub is None:
            if len(self._inbox):
                logger.warning("No broker can be told what ended: the messages come back later.")
            self._inbox.discard()
        else:
            self._inbox.empty()
            # What is left, such as messages with a countdown, kombu puts back as it closes.
            self._channel.qos.restore_at_shutdown = True

    # What the loop has the hub's thread do.

    def _settle(self, run: Run, callback: Callable[..., Any], *args: Any) -> None:
        try:
            callback(*args)
        finally:
            if run.counted_on is self._qos:
                self._shift_prefetch(-1)

    def _count(self, run: Run) -> None:
        """Have one more message fetched while this run goes on."""
        if run.counted_on is not self._qos:
            run.counted_on = self._qos
            self._shift_prefetch(1)

    def _shift_prefetch(self, n: int) -> None:
        qos = self._qos
        if qos is None:
            return
        self._claimed_count += n
        # The limit is on messages with a countdown, which this leaves as many as before.
        if qos.max_prefetch is not None:
            qos.max_prefetch += n
        if n > 0:
            qos.increment_eventually(n)
        else:
            qos.decrement_eventually(-n)

    # On the loop.

    async def _drain(self, grace_s: float) -> None:
        deadline_s = time.monotonic() + grace_s
        begun = [asyncio.ensure_future(hook(deadline_s)) for hook in self._drain_hooks]
        await self._runs.end_all(grace_s)
        for hook in begun:
            hook.cancel()
        for outcome in await asyncio.gather(*begun, return_exceptions=True):
            if isinstance(outcome, Exception):
                logger.error("A drain hook failed: %s", outcome, exc_info=outcome)
        for stop_hook in reversed(self._stop_hooks):
            try:
                async with asyncio.timeout(STOP_HOOK_TIMEOUT_S):
                    await stop_hook()
            except Exception:
                logger.exception("A stop hook failed.")

    def _on_loop_death(self) -> None:
        # Read by the hub in its next turn: the worker ends, and its supervisor restarts it.
        state.should_terminate = EX_FAILURE  # type: ignore[assignment]  # stubs: None alone
        self._inbox.wake()


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable

"""The runs of tasks in the asyncio pool: how they begin, end, and are interrupted, on its loop."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import logging
import time
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.exceptions import Reject, SoftTimeLimitExceeded, Terminated
from kombu.common import QoS
from sqlalchemy.util.concurrency import greenlet_spawn

from sluicegate.workers.loop_thread import AsyncioThread

logger = logging.getLogger(__name__)


class CancelledFor(enum.Enum):
    """Why the pool cancelled a task."""

    TERMINATED = "revoked or cancelled by a command"
    TIMED_OUT = "hard time limit"
    SHUT_DOWN = "the worker stops"


@dataclass(slots=True, weakref_slot=True, eq=False, kw_only=True)
class Run:
    """One run of a task in the pool."""

    runs: Runs
    #: Unique in the process; what Celery passes to `terminate_job`.
    pid: int
    target: Callable[..., Any]
    args: tuple[Any, ...]
    callback: Callable[..., Any]
    error_callback: Callable[..., Any]
    timeout_callback: Callable[..., Any]
    timeout_s: float | None
    soft_timeout_s: float | None
    task: asyncio.Task[None] | None = None
    started: bool = False
    claimed: bool = False
    #: The connection on which one more message is fetched for it; the hub's.
    counted_on: QoS | None = None
    #: Its one final callback has been handed to the hub.
    settled: bool = False
    soft_expired: bool = False
    cancelled_for: CancelledFor | None = None

    def terminate(self, signal: int | None = None) -> None:
        """Cancel the task: Celery calls this on what `apply_async` returned."""
        self.runs.terminate(self.pid)


_current_run: contextvars.ContextVar[Run] = contextvars.ContextVar("sluicegate_pool_run")


def claimed() -> None:
    """Say that the running task has claimed its message's work, so that another may be fetched.

    Call it in a task body or in a coroutine it awaits. The pool takes it back when the task ends.
    Repeating it does nothing, nor does calling it outside the pool (in an eager task).
    """
    run = _current_run.get(None)
    if run is not None and not run.claimed and not run.settled:
        run.claimed = True
        run.runs.count(run)


class Runs:
    """The runs of one pool, by pid.

    What Celery is to be told goes to the hub's thread: `settle` and `count` have the pool do it
    there, `tell` has anything called there.
    """

    def __init__(
        self,
        *,
        thread: AsyncioThread,
        cancel_grace_s: float,
        settle: Callable[..., None],
        count: Callable[[Run], None],
        tell: Callable[..., None],
    ) -> None:
        self._thread = thread
        self._cancel_grace_s = cancel_grace_s
        self._settle = settle
        #: Asks for one more message while a run that has claimed its own goes on.
        self.count = count
        self._tell = tell
        self._runs: dict[int, Run] = {}
        self._hurry = asyncio.Event()

    # On the hub's thread.

    def __len__(self) -> int:
        return len(self._runs)

    def unsettled(self) -> list[Run]:
        """Return the runs that Celery has not been told the end of."""
        return [run for run in tuple(self._runs.values()) if not run.settled]

    def add(self, run: Run) -> None:
        """Know a run, so that it can be terminated; it has yet to begin."""
        self._runs[run.pid] = run

    def begin(self, run: Run) -> None:
        """Have the loop begin a run."""
        self._thread.loop.call_soon_threadsafe(self._begin, run)
        # The interpreter changes threads every 5 ms; whoever waits for this task is to go first.
        time.sleep(0)

    def terminate(self, pid: int) -> None:
        """Cancel the run with this pid; a finished one is left alone."""
        run = self._runs.get(pid)
        if run is not None and self._thread.alive:
            self._thread.loop.call_soon_threadsafe(self._cancel, run, CancelledFor.TERMINATED)

    def hurry(self) -> None:
        """End the grace period of `end_all`, now or when it begins."""
        if self._thread.alive:
            self._thread.loop.call_soon_threadsafe(self._hurry.set)

    # On the loop.

    async def end_all(self, grace_s: float) -> None:
        """Let the runs go on for the grace period, then cancel the rest."""
        await self._wait(grace_s)
        if self._runs:
            logger.warning("The grace period is over: %d tasks are cancelled.", len(self._runs))
        for run in list(self._runs.values()):
            self._cancel(run, CancelledFor.SHUT_DOWN)
        left = [run.task for run in self._runs.values() if run.task is not None]
        if left:
            await asyncio.wait(left, timeout=self._cancel_grace_s)
        if self._runs:
            logger.error("%d tasks did not end when cancelled.", len(self._runs))

    def _begin(self, run: Run) -> None:
        task_name, task_id = run.args[:2]
        run.task = self._thread.loop.create_task(self._execute(run), name=f"{task_name}[{task_id}]")

    async def _execute(self, run: Run) -> None:
        _current_run.set(run)
        loop = self._thread.loop
        timers = []
        if run.timeout_s:
            timers.append(loop.call_later(run.timeout_s, self._on_hard_limit, run))
        if run.soft_timeout_s:
            timers.append(loop.call_later(run.soft_timeout_s, self._on_soft_limit, run))
        try:
            result = await self._traced(run)
        except BaseException as error:  # noqa: BLE001 - whatever it is, Celery is told
            self._end_with_error(run, error)
        else:
            self._end_with_result(run, result)
        finally:
            for timer in timers:
                timer.cancel()
            del self._runs[run.pid]

    async def _traced(self, run: Run) -> Any:
        run.started = True
        if run.cancelled_for is not None:
            raise asyncio.CancelledError
        tracing = greenlet_spawn(run.target, *run.args)
        return await (SoftLimited(tracing, run) if run.soft_timeout_s else tracing)

    def _end_with_result(self, run: Run, result: Any) -> None:
        match run.cancelled_for:
            case CancelledFor.TERMINATED:
                # Celery has announced the task as revoked: it stays so.
                self._end(run, run.error_callback, told(Terminated("SIGTERM")))
            case CancelledFor.TIMED_OUT:
                self._end(run, run.timeout_callback, False, run.timeout_s)
            case _:
                self._end(run, run.callback, result)

    def _end_with_error(self, run: Run, error: BaseException) -> None:
        match run.cancelled_for:
            case CancelledFor.TERMINATED:
                self._end(run, run.error_callback, told(Terminated("SIGTERM")))
            case CancelledFor.TIMED_OUT:
                self._end(run, run.timeout_callback, False, run.timeout_s)
            case CancelledFor.SHUT_DOWN if isinstance(error, asyncio.CancelledError):
                self._end(run, run.error_callback, told(Reject("the worker stops", requeue=True)))
            case _:
                self._end(run, run.error_callback, told(error))

    def _end(self, run: Run, callback: Callable[..., Any], *args: Any) -> None:
        if not run.settled:
            run.settled = True
            self._settle(run, callback, *args)

    def _cancel(self, run: Run, why: CancelledFor) -> None:
        # Once: a second cancellation would break into the cleaning up after the first.
        if run.cancelled_for is None:
            run.cancelled_for = why
            if run.started and run.task is not None:
                run.task.cancel()

    def _on_soft_limit(self, run: Run) -> None:
        if run.cancelled_for is None and run.task is not None:
            run.soft_expired = True
            run.task.cancel()
            self._tell(run.timeout_callback, True, run.soft_timeout_s)

    def _on_hard_limit(self, run: Run) -> None:
        self._cancel(run, CancelledFor.TIMED_OUT)
        if run.cancelled_for is CancelledFor.TIMED_OUT:
            # A body that does not end when cancelled keeps running, but not its message.
            self._thread.loop.call_later(
                self._cancel_grace_s,
                lambda: self._end(run, run.timeout_callback, False, run.timeout_s),
            )

    async def _wait(self, timeout_s: float) -> None:
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        if not tasks:
            return
        ended = asyncio.ensure_future(asyncio.wait(tasks))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({ended, hurry}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for waiter in (ended, hurry):
            waiter.cancel()


class SoftLimited:
    """A coroutine in which a soft time limit is raised where it waits, as a cancellation would be.

    asyncio can only throw `CancelledError` into a task; this turns that into Celery's exception on
    its way in.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], run: Run) -> None:
        self._coroutine = coroutine
        self._run = run

    def __await__(self) -> Generator[Any, Any, Any]:
        inner = self._coroutine.__await__()
        try:
            waiting_for = next(inner)
            while True:
                try:
                    value = yield waiting_for
                except BaseException as error:  # noqa: BLE001 - goes where it was meant for
                    waiting_for = inner.throw(self._translated(error))
                else:
                    waiting_for = inner.send(value)
        except StopIteration as stop:
            return stop.value

    def _translated(self, error: BaseException) -> BaseException:
        run = self._run
        if not (isinstance(error, asyncio.CancelledError) and run.soft_expired):
            return error
        run.soft_expired = False
        if run.cancelled_for is not None or run.task is None:
            return error
        run.task.uncancel()
        return SoftTimeLimitExceeded(run.soft_timeout_s)


def told(error: BaseException) -> ExceptionInfo:
    """Return an error as Celery is told of it.

    `Request.on_failure` acknowledges a `Terminated` and announces it as revoked, puts the message
    of a `Reject(requeue=True)` back on the queue, and fails the task for any other.
    """
    try:
        raise error
    except type(error):
        return ExceptionInfo()

"""One run of a task in the asyncio pool, and how it is interrupted."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo
from celery.exceptions import SoftTimeLimitExceeded
from kombu.common import QoS

if TYPE_CHECKING:
    from sluicegate.workers.pool import TaskPool

__all__ = ["CancelledFor", "Run", "SoftLimited", "told"]


class CancelledFor(enum.Enum):
    """Why the pool cancelled a task."""

    TERMINATED = "revoked or cancelled by a command"
    TIMED_OUT = "hard time limit"
    SHUT_DOWN = "the worker stops"


@dataclass(slots=True, weakref_slot=True, eq=False, kw_only=True)
class Run:
    """One run of a task in the pool."""

    pool: TaskPool
    #: Unique in the process; what Celery passes to `terminate_job`.
    pid: int
    target: Callable[..., Any]
    args: tuple[Any, ...]
    callback: Callable[..., Any]
    error_callback: Callable[..., Any]
    timeout_callback: Callable[..., Any]
    timeout_s: float | None
    soft_timeout_s: float | None
    #: Accounting of the connection that delivered the message.
    qos: QoS | None
    task: asyncio.Task[None] | None = None
    started: bool = False
    claimed: bool = False
    #: Its one final callback has been handed to the hub.
    settled: bool = False
    soft_expired: bool = False
    cancelled_for: CancelledFor | None = None

    def terminate(self, signal: int | None = None) -> None:
        """Cancel the task: Celery calls this on what `apply_async` returned."""
        self.pool.terminate_job(self.pid, signal)


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

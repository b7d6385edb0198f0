"""One statement for many: concurrent requests of a kind share a round trip.

Under load a call of ours costs less than the SDK's only because claims, dispatches and settlements
of many jobs travel together. Whoever waits gets an outcome of its own: a value that Postgres
refuses fails its own item, never its neighbours'.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from sluicegate.shared.database import is_bad_data, is_conflict

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

#: After a statement of so many items the next one waits for the whole spacing.
_WHOLE_SPACING: Final = 4

#: Runs one statement for all items and returns an outcome for each, in their order.
Statement = Callable[[Sequence[T]], Awaitable[Sequence[R]]]


class Coalescer(Generic[T, R]):
    """Collects items and hands them to `statement` together.

    The first statement after a pause starts at once; then they start up to `spacing_s` apart, and
    each carries what came meanwhile. Where that was little, the next need not wait for long: the
    spacing grows with what the last one carried. `max_items` bounds a statement, `parallel` how
    many run at the same time. `keeps` is for what must happen also when whoever asked for it is
    cancelled.
    """

    def __init__(
        self,
        *,
        statement: Statement[T, R],
        max_items: int,
        spacing_s: float,
        parallel: int = 2,
        keeps: bool = False,
    ) -> None:
        self._statement = statement
        self._keeps = keeps
        self._max_items = max_items
        self._spacing_s = spacing_s
        self._free = parallel
        self._next_start = 0.0
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        #: Whether the next statement has its time already.
        self._scheduled = False
        self._running: set[asyncio.Task[None]] = set()

    async def __call__(self, item: T) -> R:
        """Return the item's own outcome, or raise its own error."""
        future = self._add(item)
        return await (asyncio.shield(future) if self._keeps else future)

    def post(self, item: T) -> None:
        """Have it done soon, without waiting; an error is logged."""
        self._add(item).add_done_callback(_log_error)

    async def finish(self) -> None:
        """Wait until everything that was asked for has been answered."""
        while self._waiting or self._running:
            if self._running:
                await asyncio.wait(self._running)
            else:
                await asyncio.sleep(self._spacing_s)

    def _add(self, item: T) -> asyncio.Future[R]:
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._schedule()
        return future

    def _schedule(self) -> None:
        if self._scheduled or not self._free or not self._waiting:
            return
        self._scheduled = True
        loop = asyncio.get_running_loop()
        delay_s = self._next_start - loop.time()
        if delay_s <= 0 or len(self._waiting) >= self._max_items:
            self._start()
        else:
            loop.call_later(delay_s, self._start)

    def _start(self) -> None:
        # The task begins in the next turn of the loop: what is asked for in this one travels along.
        self._free -= 1
        task = asyncio.get_running_loop().create_task(self._run())
        self._running.add(task)
        task.add_done_callback(self._done)

    def _take(self) -> list[tuple[T, asyncio.Future[R]]]:
        """Take what the next statement is to carry."""
        self._scheduled = False
        batch = self._waiting[: self._max_items]
        del self._waiting[: self._max_items]
        spacing_s = self._spacing_s * min(1.0, len(batch) / _WHOLE_SPACING)
        self._next_start = asyncio.get_running_loop().time() + spacing_s
        self._schedule()
        # A caller that was cancelled while it waited wants nothing done any more.
        return [(item, future) for item, future in batch if not future.done()]

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._free += 1
        self._schedule()

    async def _run(self) -> None:
        batch = self._take()
        if not batch:
            return
        try:
            outcomes = await run_apart(self._statement, [item for item, _ in batch])
        except BaseException as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if future.done():
                continue
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)


def _log_error(future: asyncio.Future[R]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("what nobody waited for was not done", exc_info=error)


async def run_apart(statement: Statement[T, R], items: Sequence[T]) -> list[R | BaseException]:
    """Run a statement; where Postgres refuses a value, halve until only the culprit fails."""
    try:
        return list(await _through_conflicts(statement, items))
    except Exception as error:
        if not is_bad_data(error):
            raise
        if len(items) == 1:
            log.error("one item of a statement was refused: %s", type(error.__cause__ or error))
            return [error]
    middle = len(items) // 2
    return [
        *await run_apart(statement, items[:middle]),
        *await run_apart(statement, items[middle:]),
    ]


async def _through_conflicts(statement: Statement[T, R], items: Sequence[T]) -> Sequence[R]:
    """Repeat the whole statement after a deadlock or a serialisation failure."""
    # Nearly always once, which needs no machinery: it would cost every statement 15 µs.
    try:
        return await statement(items)
    except Exception as error:
        if not is_conflict(error):
            raise
    async for attempt in AsyncRetrying(
        retry=retry_if_exception(is_conflict),
        wait=wait_random_exponential(multiplier=0.01, max=0.5),
        stop=stop_after_attempt(9),
        reraise=True,
    ):
        with attempt:
            return await statement(items)
    raise AssertionError("unreachable: tenacity returns or raises")

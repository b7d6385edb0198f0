"""Slots: how many jobs a worker process runs at the same time, handed out first in, first out."""

from __future__ import annotations

import asyncio
from collections import deque


class Draining(Exception):
    """The worker stops: what waits for slots is not begun."""


class Slots:
    """A semaphore counted in jobs, of which a message takes several at once.

    First in, first out also when a small message would fit where a large one does not: a chunk
    must not wait for ever behind a stream of single jobs.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.free = limit
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._closed = False

    @property
    def taken(self) -> int:
        """How many jobs are running."""
        return self.limit - self.free

    async def acquire(self, n: int) -> None:
        """Take `n` slots, at most `limit`; raises `Draining` if the worker stops meanwhile."""
        if self._closed:
            raise Draining
        if not self._waiting and n <= self.free:
            self.free -= n
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((n, future))
        try:
            await future
        except BaseException:
            # Cancelled: either it still waits in the line, or it has its slots already.
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release(n)
            else:
                self._hand_out()
            raise

    def release(self, n: int) -> None:
        """Give back `n` slots."""
        self.free += n
        self._hand_out()

    def close(self) -> None:
        """Turn away everybody who waits, and whoever comes."""
        self._closed = True
        while self._waiting:
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_exception(Draining())

    def _hand_out(self) -> None:
        while self._waiting:
            n, future = self._waiting[0]
            if future.done():
                self._waiting.popleft()
            elif n <= self.free:
                self._waiting.popleft()
                self.free -= n
                future.set_result(None)
            else:
                return

"""What was looked up lately: kept for a moment, so that not each request asks Postgres."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")

_MOST: Final = 10_000
_MOST_MISSES: Final = 1000


class Recent(Generic[K, V]):
    """Looks things up, one look for all who ask at the same time.

    look: finds a thing, or None. ttl_s: how long a thing is kept. most: how many are; those that
    were not asked for longest go. miss_ttl_s, most_misses: the same of keys with nothing to find.
    """

    def __init__(
        self,
        look: Callable[[K], Awaitable[V | None]],
        *,
        ttl_s: float,
        most: int = _MOST,
        miss_ttl_s: float = 0.0,
        most_misses: int = _MOST_MISSES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look = look
        self._ttl_s = ttl_s
        self._most = most
        self._miss_ttl_s = miss_ttl_s
        self._most_misses = most_misses
        self._clock = clock
        self._kept: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._missed: OrderedDict[K, float] = OrderedDict()
        self._looking: dict[K, asyncio.Task[V | None]] = {}

    def __contains__(self, key: K) -> bool:
        """Whether this was there when it was last looked up, however long ago."""
        return key in self._kept

    async def get(self, key: K) -> V | None:
        """Return the thing as it was `ttl_s` ago at most; raises as `look`."""
        kept = self._kept.get(key)
        if kept is not None and self._clock() < kept[0]:
            self._kept.move_to_end(key)
            return kept[1]
        if self._clock() < self._missed.get(key, 0.0):
            return None
        task = self._looking.get(key)
        if task is None:
            task = self._looking[key] = asyncio.create_task(self._find(key))
            task.add_done_callback(lambda done: self._looked(key, done))
        # Whoever asked first may go away; the others still wait.
        return await asyncio.shield(task)

    async def _find(self, key: K) -> V | None:
        # It is as it was when it was asked for, not when the answer came.
        asked_at = self._clock()
        found = await self._look(key)
        self._kept.pop(key, None)
        self._missed.pop(key, None)
        if found is not None:
            self._kept[key] = (asked_at + self._ttl_s, found)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        elif self._miss_ttl_s:
            self._missed[key] = asked_at + self._miss_ttl_s
            if len(self._missed) > self._most_misses:
                self._missed.popitem(last=False)
        return found

    def _looked(self, key: K, done: asyncio.Task[V | None]) -> None:
        del self._looking[key]
        if not done.cancelled():
            done.exception()  # those who wait are told; if nobody does, it is nobody's any more

"""Keys that were never seen: how many wrong ones are looked up, so that no flood of them is felt.

Nothing tells a wrong key from a right one but looking it up. So those that this process has not
seen wait for one connection of their own, and when too many were wrong nobody new is looked up for
a moment. Whoever was let in before has to do with neither.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from sluicegate.producers.http.problems import Problem

#: Wrong keys that a process looks up: so many a second, and at once so many more.
PER_S: Final = 20.0
AT_ONCE: Final = 100


class Strangers:
    """Counts wrong keys: a token bucket for the whole process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = float(AT_ONCE)
        self._counted_at = clock()

    def check(self) -> None:
        """Raise `Problem` (429) if too many keys were wrong lately."""
        self._refill()
        if self._left < 1:
            raise Problem(
                429,
                "rate_limited",
                "too many requests have keys that are not known; wait and try again",
                retry_after_s=math.ceil((1 - self._left) / PER_S),
            )

    def count(self) -> None:
        """Count a key that was wrong."""
        self._refill()
        self._left = max(0.0, self._left - 1)

    def _refill(self) -> None:
        now = self._clock()
        self._left = min(AT_ONCE, self._left + (now - self._counted_at) * PER_S)
        self._counted_at = now

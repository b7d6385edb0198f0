"""Waiting for what other processes do: poll with a deadline, never sleep and hope."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

_POLL_S = 0.02
#: A look that costs much is not taken all the time: those who are waited for need the processors.
_PER_LOOK, _AT_MOST_S = 3, 0.4


def eventually(fn: Callable[[], T], timeout_s: float = 30.0) -> T:
    """Call `fn` until it returns something true, and return that.

    An `AssertionError` in `fn` means not yet; when time is up it is what the test fails with.
    """
    give_up_at = time.monotonic() + timeout_s
    while True:
        began = time.monotonic()
        late = began > give_up_at
        try:
            value = fn()
        except AssertionError:
            if late:
                raise
        else:
            if value:
                return value
            assert not late, f"after {timeout_s:g} s it is still {value!r}"
        time.sleep(_pause_s(time.monotonic() - began))


async def eventually_async(fn: Callable[[], Awaitable[T]], timeout_s: float = 30.0) -> T:
    """Await `fn()` until it returns something true, as `eventually` does."""
    give_up_at = time.monotonic() + timeout_s
    while True:
        began = time.monotonic()
        late = began > give_up_at
        try:
            value = await fn()
        except AssertionError:
            if late:
                raise
        else:
            if value:
                return value
            assert not late, f"after {timeout_s:g} s it is still {value!r}"
        await asyncio.sleep(_pause_s(time.monotonic() - began))


def _pause_s(look_s: float) -> float:
    return max(_POLL_S, min(_PER_LOOK * look_s, _AT_MOST_S))

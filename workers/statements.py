"""Running the fleet's own SQL: one JSON parameter in, typed rows out, through reconnects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import orjson
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncEngine
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_delay,
    wait_random_exponential,
)
from tenacity.stop import stop_base

from sluicegate.shared.database import is_disconnect

log = logging.getLogger(__name__)

R = TypeVar("R")


async def execute(
    engine: AsyncEngine, sql: str, items: Sequence[Mapping[str, Any]] | None = None, **values: Any
) -> Sequence[Row[Any]]:
    """Run one statement in a transaction of its own and return its rows.

    `items` becomes the parameter `%(items)s`, one JSON array: encoding it costs a tenth of what
    binding an array for each column does.
    """
    if items is not None:
        values["items"] = orjson.dumps(items).decode()
    async with engine.connect() as connection:
        result = await connection.exec_driver_sql(sql, values)
        return result.all() if result.returns_rows else []


async def through_disconnects(
    run: Callable[[], Awaitable[R]],
    *,
    give_up_after_s: float | None,
    stop: asyncio.Event | None = None,
    on_disconnect: Callable[[], Awaitable[None]] | None = None,
) -> R:
    """Repeat `run`, which must be idempotent, while Postgres is away.

    `give_up_after_s` None waits until `stop` is set. `on_disconnect` is awaited after each
    failure. Raises the last connection error when it gives up.
    """

    async def note(state: RetryCallState) -> None:
        if state.attempt_number in (1, 10) or state.attempt_number % 100 == 0:
            log.warning("Postgres does not answer (try %d); trying again", state.attempt_number)
        if on_disconnect is not None:
            await on_disconnect()

    async for attempt in AsyncRetrying(
        retry=retry_if_exception(is_disconnect),
        wait=wait_random_exponential(multiplier=0.1, max=2),
        stop=_Until(give_up_after_s, stop),
        after=note,
        reraise=True,
    ):
        with attempt:
            return await run()
    raise AssertionError("unreachable: tenacity returns or raises")


class _Until(stop_base):
    """Gives up after a delay, or once an event is set."""

    def __init__(self, delay_s: float | None, event: asyncio.Event | None) -> None:
        self._delay = None if delay_s is None else stop_after_delay(delay_s)
        self._event = event

    def __call__(self, retry_state: RetryCallState) -> bool:
        if self._event is not None and self._event.is_set():
            return True
        return self._delay is not None and self._delay(retry_state)

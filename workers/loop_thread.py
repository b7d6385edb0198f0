"""The thread that the worker's event loop runs in."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

__all__ = ["SLOW_CALLBACK_S", "AsyncioThread"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: What a callback may hold up the loop for before debug mode reports it.
SLOW_CALLBACK_S = 0.05

START_TIMEOUT_S = 30.0


class AsyncioThread:
    """An event loop in a thread of its own.

    name: of the thread.
    debug: use asyncio's loop in debug mode, which logs callbacks that take `SLOW_CALLBACK_S` or
        longer as warnings of the logger `asyncio` (uvloop does not).
    on_death: called, in the thread, if the loop ends with an error.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self, *, name: str, debug: bool, on_death: Callable[[], None]) -> None:
        self._debug = debug
        self._on_death = on_death
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._stopping: asyncio.Event | None = None

    @property
    def alive(self) -> bool:
        """Whether the loop takes work."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Return when the loop runs; raise what kept it from starting."""
        self._thread.start()
        self._started.result(START_TIMEOUT_S)

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on the loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def stop(self, timeout_s: float) -> bool:
        """Cancel what runs, end the loop and the thread; return whether that took under timeout_s.

        A daemon thread: one that does not end goes with the process.
        """
        if self._thread.is_alive() and self._stopping is not None:
            self.loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        factory = asyncio.new_event_loop if self._debug else uvloop.new_event_loop
        try:
            with asyncio.Runner(debug=self._debug, loop_factory=factory) as runner:
                runner.run(self._serve())
        except BaseException as error:
            if not self._started.done():
                self._started.set_exception(error)
                return
            logger.critical("The worker's event loop died: restart the worker.", exc_info=True)
            self._on_death()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.slow_callback_duration = SLOW_CALLBACK_S
        self.loop.set_exception_handler(_log_loop_error)
        self._stopping = asyncio.Event()
        self._started.set_result(None)
        await self._stopping.wait()


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    about = context.get("task") or context.get("future") or context.get("handle")
    logger.error(
        "On the event loop: %s (%r)", context["message"], about, exc_info=context.get("exception")
    )

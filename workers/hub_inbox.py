"""The inbox of the hub's thread: functions that another thread has it run."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from kombu.asynchronous import Hub

logger = logging.getLogger(__name__)


class HubInbox:
    """A deque and one pipe, which the hub reads as it reads the broker's socket.

    So acknowledgements made by what is put in are sent in the hub's next turn, while those made by
    `hub.call_soon` callbacks would wait for the next event, up to a second.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        #: Whether the hub has been woken for them.
        self._woken = False
        self._reader, self._writer = -1, -1

    def __len__(self) -> int:
        return len(self._waiting)

    def open(self) -> None:
        """Make the pipe."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def close(self) -> None:
        """Close the pipe; the hub must not listen any more."""
        reader, writer = self._reader, self._writer
        self._reader, self._writer = -1, -1
        os.close(reader)
        os.close(writer)

    def attach(self, hub: Hub) -> None:
        """Have the hub read the pipe."""
        hub.add_reader(self._reader, self._on_wake)

    def detach(self, hub: Hub) -> None:
        """Have the hub read it no more."""
        hub.remove_reader(self._reader)

    def put(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the hub's thread call this soon; from any thread."""
        self._waiting.append((function, args))
        if not self._woken:
            self._woken = True
            self.wake()

    def wake(self) -> None:
        """Have the hub take a turn; from any thread."""
        with suppress(OSError):  # a full pipe wakes as well; a closed one has nobody to wake
            os.write(self._writer, b"\0")

    def empty(self) -> None:
        """Call everything that waits; an error is logged, and the next is called."""
        # Before they are counted: one that is added later wakes the hub again.
        self._woken = False
        for _ in range(len(self._waiting)):
            function, args = self._waiting.popleft()
            try:
                function(*args)
            except MemoryError:
                raise
            except Exception:
                logger.exception("Celery's %r raised an error.", function)

    def discard(self) -> None:
        """Forget everything that waits."""
        self._waiting.clear()

    def _on_wake(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._reader, 4096)
        self.empty()

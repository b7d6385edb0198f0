"""A proxy in front of PostgreSQL that loses replies: what was asked is done, and nobody hears it.

Or it is done much later: what was asked lies in the proxy until it is released.

It runs on a thread of its own and carries everything else unchanged. TLS must be off.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Literal, Self

#: The end of every answer to a statement outside a transaction: ready for the next one.
_READY = b"Z\x00\x00\x00\x05I"
_CHUNK = 65536
_LONGEST_NEEDLE = 200

#: What becomes of a statement: its client is cut off when the server has answered, or as soon as
#: the server has the statement, or before it has it.
_Fate = Literal["answered", "asked", "held"]


class FaultProxy:
    """Listens on a port of its own between `with` and its end."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._port = 0
        self._lock = threading.Lock()
        #: How many more statements with this text are to go unanswered, and how.
        self._left: dict[bytes, tuple[int, _Fate]] = {}
        self._lost = 0
        self._held: list[bytes] = []
        self._released = asyncio.Event()
        self._listening = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fault proxy", daemon=True)
        self._lines: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(10)
        return self

    def __exit__(self, *_error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @property
    def port(self) -> int:
        """Where to connect on 127.0.0.1."""
        return self._port

    @property
    def lost(self) -> int:
        """How many replies were lost so far."""
        with self._lock:
            return self._lost

    @property
    def held(self) -> list[bytes]:
        """What was held back so far, a piece for each statement."""
        with self._lock:
            return list(self._held)

    def lose_replies(self, needle: bytes, times: int, *, at_once: bool = False) -> None:
        """Let the next `times` statements with this text through, and cut their connections.

        The cut comes when the server has answered, so what was asked is committed; or at once, so
        that whoever asks again may come before it is.
        """
        assert len(needle) <= _LONGEST_NEEDLE
        with self._lock:
            self._left[needle] = times, "asked" if at_once else "answered"

    def hold(self, needle: bytes, times: int) -> None:
        """Cut the connections of the next `times` statements with this text, and keep those."""
        assert len(needle) <= _LONGEST_NEEDLE
        with self._lock:
            self._left[needle] = times, "held"
        self._loop.call_soon_threadsafe(self._released.clear)

    def release(self) -> None:
        """Let the server have what was held back; its replies are lost."""
        self._loop.call_soon_threadsafe(self._released.set)

    def _run(self) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self._port = server.sockets[0].getsockname()[1]
        self._listening.set()
        try:
            loop.run_forever()
        finally:
            server.close()
            for line in self._lines:
                line.cancel()
            loop.run_until_complete(asyncio.gather(*self._lines, return_exceptions=True))
            loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = asyncio.current_task()
        assert line is not None
        self._lines.add(line)
        writers = [writer]
        try:
            answers, upstream = await asyncio.open_connection(*self._target)
            writers.append(upstream)
            doomed = asyncio.Event()
            both = [
                asyncio.ensure_future(self._ask(reader, upstream, doomed, writer)),
                asyncio.ensure_future(self._answer(answers, writer, doomed)),
            ]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in both:
                    one.cancel()
                await asyncio.gather(*both, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # the server is away, or the test is over: the client's line is cut below
        finally:
            for one_writer in writers:
                one_writer.transport.abort()
            self._lines.discard(line)

    async def _ask(
        self,
        reader: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
        doomed: asyncio.Event,
        writer: asyncio.StreamWriter,
    ) -> None:
        tail = b""
        while data := await reader.read(_CHUNK):
            # A text may stand across two pieces.
            tail += data
            fate = None if doomed.is_set() else self._take(tail)
            if fate is not None:
                doomed.set()
            tail = tail[-_LONGEST_NEEDLE:]
            if fate == "held":
                writer.transport.abort()
                await self._released.wait()
            upstream.write(data)
            await upstream.drain()
            if fate in ("asked", "held"):
                writer.transport.abort()
                await asyncio.Event().wait()  # until the server has answered

    async def _answer(
        self, answers: asyncio.StreamReader, writer: asyncio.StreamWriter, doomed: asyncio.Event
    ) -> None:
        tail = b""
        while data := await answers.read(_CHUNK):
            if not doomed.is_set():
                writer.write(data)
                await writer.drain()
                continue
            tail = (tail + data)[-len(_READY) :]
            if tail == _READY:
                with self._lock:
                    self._lost += 1
                return

    def _take(self, data: bytes) -> _Fate | None:
        """Return what becomes of this one; None: nothing."""
        with self._lock:
            for needle, (left, fate) in self._left.items():
                if left and needle in data:
                    self._left[needle] = left - 1, fate
                    if fate == "held":
                        self._held.append(data)
                    return fate
        return None

"""Answers that stay open: how many there are, what they say in silence, and how they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from typing import Any, Final

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sluicegate.producers.http.gate import log_defect
from sluicegate.producers.http.problems import Problem
from sluicegate.shared.settings import Settings

_FULL_RETRY_AFTER_S: Final = 5
#: The header in which whoever reads server-sent events says which was the last that he has.
LAST_EVENT_ID: Final = "Last-Event-ID"
#: For him: come back after this long, with the last id.
RETRY_HINT: Final = b"retry: 1000\n\n"
#: A comment of server-sent events, which clients leave out.
COMMENT: Final = b": waiting\n\n"

#: Proxies are to pass on each piece as it comes.
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
    # A browser looks no further, and shows each piece as it comes.
    "X-Content-Type-Options": "nosniff",
}


def server_sent(
    data: bytes | Mapping[str, Any], *, event: str | None = None, event_id: str | None = None
) -> bytes:
    """Write a server-sent event. data: JSON, which has no line breaks of its own, or its bytes."""
    head = b"" if event_id is None else b"id: %b\n" % event_id.encode()
    if event is not None:
        head += b"event: %b\n" % event.encode()
    return b"%bdata: %b\n\n" % (head, data if isinstance(data, bytes) else orjson.dumps(data))


class Broken(Exception):
    """What was sent is not the whole and cannot become it.

    The connection is cut, so that the client does not take it for whole.
    """


class Streams:
    """All that this process holds open for clients: streams, and requests that wait for a job."""

    def __init__(self, settings: Settings) -> None:
        self.keep_alive_s = settings.http_keep_alive_s
        self._most = settings.http_max_streams
        self._most_s = settings.http_stream_max_s
        self._open = 0
        #: Set when the process is to end.
        self.stopping = asyncio.Event()
        self._waits: set[asyncio.Timeout] = set()

    def __len__(self) -> int:
        return self._open

    def take(self) -> ExitStack:
        """Take a place; raise `Problem` (503) if all are taken.

        It is given back when the stack closes; whoever needs it for longer takes `pop_all` of it.
        """
        if self._open >= self._most:
            raise Problem(
                503,
                "too_many_streams",
                f"this server holds {self._most:,} streams and waiting requests already; try again "
                "later",
                retry_after_s=_FULL_RETRY_AFTER_S,
            )
        self._open += 1
        place = ExitStack()
        place.callback(self._give_back)
        return place

    def _give_back(self) -> None:
        self._open -= 1

    @asynccontextmanager
    async def patience(self, seconds: float, receive: Receive) -> AsyncIterator[None]:
        """Have a wait end after so long, when its client leaves, and when the process is to stop.

        receive: of the request, whose body has been read. Raises `TimeoutError` for each of them.
        """
        limit = asyncio.timeout(0 if self.stopping.is_set() else seconds)
        leaving = asyncio.ensure_future(_left(receive))
        leaving.add_done_callback(lambda _: self._end(limit))
        self._waits.add(limit)
        try:
            async with limit:
                yield
        finally:
            self._waits.discard(limit)
            leaving.cancel()

    async def until_end(self) -> None:
        """Wait until a stream that begins now is to end: it is too old, or the process stops."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._most_s):
                await self.stopping.wait()

    def stop(self) -> None:
        """End all waits now, and all streams in the way that each of them has."""
        self.stopping.set()
        for limit in self._waits:
            self._end(limit)

    def _end(self, limit: asyncio.Timeout) -> None:
        if limit in self._waits and limit.when() is not None and not limit.expired():
            limit.reschedule(asyncio.get_running_loop().time())


class Stream(Response):
    """An answer that is sent piece by piece.

    place: where it counts, kept until it has ended. pieces: ends with the answer; raises `Broken`
    to have the connection cut. keep_alive: sent when there was nothing for a while; empty for a
    protocol in which one cannot say nothing. farewell: sent when the stream has to end before its
    answer, because it is too old (so that its reader says again who he is) or the process stops;
    None has the connection cut.
    """

    def __init__(
        self,
        streams: Streams,
        place: ExitStack,
        pieces: AsyncGenerator[bytes, None],
        *,
        media_type: str,
        headers: Mapping[str, str] | None = None,
        keep_alive: bytes = b"",
        farewell: bytes | None = None,
    ) -> None:
        self._streams = streams
        self._pieces = pieces
        self._keep_alive = keep_alive
        self._farewell = farewell
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers({**_HEADERS, **(headers or {})})
        self._place = place.pop_all()
        #: When something was sent last, on the loop's clock.
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the pieces end, the client leaves, or the stream has to end."""
        with self._place:
            try:
                async with aclosing(self._pieces):
                    await send(
                        {
                            "type": "http.response.start",
                            "status": self.status_code,
                            "headers": self.raw_headers,
                        }
                    )
                    if scope["method"] == "HEAD" or await self._run(receive, send):
                        await send({"type": "http.response.body", "body": b"", "more_body": False})
            except Broken:
                pass  # what is not ended is cut
            except Exception as error:  # noqa: BLE001 - uvicorn would log what it says
                log_defect(error, scope["state"].get("request_id", "-"))

    async def _run(self, receive: Receive, send: Send) -> bool:
        """Send the pieces; return whether the answer may be ended as a whole one."""
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        sending = asyncio.ensure_future(self._send_pieces(send))
        left = asyncio.ensure_future(_left(receive))
        ending = asyncio.ensure_future(self._streams.until_end())
        tasks = sending, left, ending
        try:
            while True:
                silent_at = self._sent_at + self._streams.keep_alive_s
                done, _ = await asyncio.wait(
                    tasks,
                    timeout=max(0.0, silent_at - loop.time()),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if sending in done:
                    sending.result()
                    return True
                if left in done:
                    return False
                if ending in done:
                    if self._farewell is None:
                        return False
                    await _ended(sending)
                    await _send(send, self._farewell)
                    return True
                if loop.time() >= self._sent_at + self._streams.keep_alive_s:
                    if self._keep_alive:
                        await _send(send, self._keep_alive)
                    self._sent_at = loop.time()
        finally:
            await _ended(*tasks)

    async def _send_pieces(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        async for piece in self._pieces:
            await _send(send, piece)
            self._sent_at = loop.time()


async def _ended(*tasks: asyncio.Task[Any]) -> None:
    """End tasks whose outcome nobody waits for any more, whatever it is."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _send(send: Send, piece: bytes) -> None:
    # The connection is cut for a client that takes nothing, and this goes on then.
    await send({"type": "http.response.body", "body": piece, "more_body": True})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

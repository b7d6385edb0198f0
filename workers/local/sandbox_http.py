"""The sandbox provider's HTTP/1.1 server: httptools over an asyncio protocol, nothing else.

Requests of one connection are answered in order, one at a time. The handler gets an `Exchange`,
which can also do what no web framework lets one do: stop in the middle, or reset.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import cast
from urllib.parse import parse_qsl, unquote

import httptools

#: Anthropic takes 32 MB; OpenAI no more either.
MAX_BODY_BYTES = 32 * 1024 * 1024
MAX_HEAD_BYTES = 64 * 1024
#: Pipelined requests that wait on one connection before it is read no further.
MAX_WAITING = 16

_REASONS = {status.value: status.phrase for status in HTTPStatus} | {529: "Overloaded"}
#: Close with a reset instead of a clean end: linger on, for zero seconds.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(slots=True, kw_only=True)
class Request:
    """One request, whole. `too_large` ones come without their body."""

    method: str
    path: str
    query: dict[str, str]
    body: bytes
    anthropic: bool
    #: The key it came with; empty for none.
    key: bytes
    keep_alive: bool
    too_large: bool


class Exchange:
    """The answering side of one request."""

    __slots__ = ("_connection", "_keep_alive", "gone", "on_gone")

    def __init__(self, connection: Connection, *, keep_alive: bool) -> None:
        self._connection = connection
        self._keep_alive = keep_alive
        #: Whether the client has left; writing is harmless then.
        self.gone = False
        self.on_gone: Callable[[], None] | None = None

    @property
    def slow_reader(self) -> bool:
        """Whether the client reads more slowly than we write."""
        return self._connection.write_paused

    def respond(
        self, status: int, body: bytes, *, content_type: bytes = b"application/json", headers: bytes
    ) -> None:
        """Answer whole. `headers` are complete lines."""
        self._connection.write(self._head(status, content_type, headers, len(body)) + body)
        self.done()

    def start(
        self,
        status: int,
        *,
        content_type: bytes = b"application/json",
        headers: bytes,
        length: int | None = None,
    ) -> None:
        """Send the head only: of `length` bytes to come by `write`, or of chunks."""
        self._connection.write(self._head(status, content_type, headers, length))

    def write(self, data: bytes) -> None:
        """Send bytes of a body whose length was announced."""
        self._connection.write(data)

    def write_chunk(self, data: bytes) -> None:
        """Send a part of a chunked body."""
        self._connection.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end_chunks(self) -> None:
        """End a chunked body cleanly."""
        self._connection.write(b"0\r\n\r\n")
        self.done()

    def close(self) -> None:
        """Close the connection in order, wherever the answer stands."""
        self._connection.close()

    def reset(self) -> None:
        """Reset the connection."""
        self._connection.reset()

    def done(self) -> None:
        """Go on with the connection's next request, or close it."""
        self.on_gone = None
        self._connection.exchange_done(keep_alive=self._keep_alive)

    def _head(self, status: int, content_type: bytes, headers: bytes, length: int | None) -> bytes:
        sized = b"transfer-encoding: chunked" if length is None else b"content-length: %d" % length
        closing = b"" if self._keep_alive else b"connection: close\r\n"
        return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\n%b%b%b\r\n\r\n" % (
            status,
            _REASONS.get(status, "Unknown").encode(),
            content_type,
            headers,
            closing,
            sized,
        )


class Connection(asyncio.Protocol):
    """One client connection."""

    def __init__(
        self, handle: Callable[[Request, Exchange], None], connections: set[Connection]
    ) -> None:
        self._handle = handle
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._exchange: Exchange | None = None
        self._waiting: deque[Request] = deque()
        self._closing = False
        self.write_paused = False
        self._read_paused = False
        self._head_bytes = 0
        self._in_head = True
        #: Whether the data at hand ended a head or a request.
        self._got_on = False
        self.on_message_begin()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = cast("asyncio.Transport", transport)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the running exchange; a client may leave at any time."""
        self._connections.discard(self)
        self._closing = True
        self._waiting.clear()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.gone = True
            if exchange.on_gone is not None:
                exchange.on_gone()

    def data_received(self, data: bytes) -> None:
        """Parse what came, and take up the first request if none is running."""
        if self._closing:
            return
        self._got_on = False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._refuse(400)
            return
        # httptools holds back a header until it is whole, so a long head is seen only here.
        self._head_bytes = 0 if self._got_on or not self._in_head else self._head_bytes + len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431)
        elif self._body_bytes > 8 * MAX_BODY_BYTES:
            self._refuse(413)
        else:
            self._next()

    def pause_writing(self) -> None:
        """Remember that the client reads slowly."""
        self.write_paused = True

    def resume_writing(self) -> None:
        """Remember that it has caught up."""
        self.write_paused = False

    # httptools' side

    def on_message_begin(self) -> None:
        """Start a request."""
        self._url = b""
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._anthropic = False
        self._key = b""
        self._expects = False

    def on_url(self, url: bytes) -> None:
        """Gather the target, which may come in parts."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note the few headers that matter."""
        name = name.lower()
        if name == b"anthropic-version":
            self._anthropic = True
        elif name in (b"authorization", b"x-api-key"):
            self._key = value.removeprefix(b"Bearer ")
        elif name == b"expect":
            self._expects = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        """Ask for the body where the client waits to be asked."""
        self._in_head = False
        self._got_on = True
        if self._expects and self._exchange is None:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """Gather the body; what is above the limit is counted and dropped."""
        self._body_bytes += len(body)
        if self._body_bytes <= MAX_BODY_BYTES:
            self._body.append(body)
        else:
            self._body.clear()

    def on_message_complete(self) -> None:
        """Queue the request for its turn."""
        path, _, query = self._url.decode("latin-1").partition("?")
        request = Request(
            method=self._parser.get_method().decode("latin-1"),
            path=unquote(path) if "%" in path else path,
            query=dict(parse_qsl(query)) if query else {},
            body=b"".join(self._body),
            anthropic=self._anthropic,
            key=self._key,
            keep_alive=self._parser.should_keep_alive(),
            too_large=self._body_bytes > MAX_BODY_BYTES,
        )
        self.on_message_begin()
        self._in_head = True
        self._got_on = True
        self._waiting.append(request)
        if len(self._waiting) >= MAX_WAITING and self._transport is not None:
            self._read_paused = True
            self._transport.pause_reading()

    # the exchange's side

    def write(self, data: bytes) -> None:
        """Send, unless the client has left."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def exchange_done(self, *, keep_alive: bool) -> None:
        """Take up the next request."""
        if self._exchange is None:
            return  # the client left first
        self._exchange = None
        if not keep_alive:
            self.close()
        elif self._waiting:
            asyncio.get_running_loop().call_soon(self._next)

    def reset(self) -> None:
        """Close with a reset."""
        if self._transport is not None and not self._transport.is_closing():
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self._transport.abort()

    def close(self) -> None:
        """Close once everything written is sent."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()

    def _next(self) -> None:
        if self._exchange is not None or self._closing or not self._waiting:
            return
        request = self._waiting.popleft()
        if self._read_paused and len(self._waiting) < MAX_WAITING and self._transport is not None:
            self._read_paused = False
            self._transport.resume_reading()
        self._exchange = Exchange(self, keep_alive=request.keep_alive)
        self._handle(request, self._exchange)

    def _refuse(self, status: int) -> None:
        """End a connection that does not speak HTTP as it should."""
        Exchange(self, keep_alive=False).start(status, headers=b"", length=0)
        self.close()

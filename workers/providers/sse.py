"""Server-sent events from bytes, as both providers stream them.

Follows https://html.spec.whatwg.org/multipage/server-sent-events.html in what matters to a client
that never reconnects: `event` and `data`; `id`, `retry` and comments are passed over.
"""

from __future__ import annotations

from typing import Final, NamedTuple

#: No provider sends an event anywhere near this; without a bound a broken server fills the memory.
MAX_EVENT_BYTES: Final = 8 * 2**20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LINE_ENDS = (b"\n", b"\r")


class ServerSentEvent(NamedTuple):
    """One event; `data` is kept as bytes because JSON is decoded from bytes."""

    event: bytes
    data: bytes


class SseTooLongError(ValueError):
    """An event is longer than any that a provider sends."""


class SseDecoder:
    r"""Cuts a stream into events; the cuts between the chunks it is fed do not matter.

    Lines may end in \n, \r or \r\n. An event that the stream's end cuts off is not an event, as the
    standard demands: half an event is not an answer.
    """

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._line: list[bytes] = []
        self._data: list[bytes] = []
        self._event = b""
        self._size = 0
        self._after_cr = False
        self._at_start = True

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Take the next bytes; return the events that they complete.

        Raises SseTooLongError when an event grows beyond `max_event_bytes`.
        """
        if self._after_cr and chunk:
            self._after_cr = False
            chunk = chunk.removeprefix(b"\n")
        if not chunk:
            return []
        self._after_cr = chunk.endswith(b"\r")
        lines = chunk.splitlines()  # of bytes: splits at \n, \r and \r\n only
        rest = b"" if chunk.endswith(_LINE_ENDS) else lines.pop()
        if lines and self._line:
            lines[0] = b"".join((*self._line, lines[0]))
            self._line.clear()
        events: list[ServerSentEvent] = []
        for line in lines:
            self._take(line, events)
        if rest:
            self._line.append(rest)
            self._grow(len(rest))
        return events

    def _take(self, line: bytes, events: list[ServerSentEvent]) -> None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line:
            if self._data:
                events.append(ServerSentEvent(self._event, b"\n".join(self._data)))
                self._data.clear()
            self._event = b""
            self._size = 0
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._grow(len(line))
        elif name == b"event":
            self._event = value.removeprefix(b" ")

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > self._max_event_bytes:
            raise SseTooLongError(f"an event is longer than {self._max_event_bytes:,} bytes")

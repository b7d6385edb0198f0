"""The SSE decoder: the same events however the stream is cut."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.workers.providers.sse import ServerSentEvent, SseDecoder, SseTooLongError


def decode(*chunks: bytes) -> list[tuple[bytes, bytes]]:
    return decode_with(SseDecoder(), chunks)


def decode_with(decoder: SseDecoder, chunks: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
    return [(event.event, event.data) for chunk in chunks for event in decoder.feed(chunk)]


def by_the_book(stream: bytes) -> list[tuple[bytes, bytes]]:
    """The standard's algorithm, written down naively over a whole stream."""
    lines = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    kind = b""
    events: list[tuple[bytes, bytes]] = []
    data: list[bytes] = []
    for line in lines.split(b"\n")[:-1]:
        name, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if not line:
            if data:
                events.append((kind, b"\n".join(data)))
            kind, data = b"", []
        elif name == b"data":
            data.append(value)
        elif name == b"event":
            kind = value
    return events


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(stream) + 1) for place in places} | {len(stream)})
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]


_PIECES = st.sampled_from(
    [
        *(b"data: {}", b"data:x", b"data", b"data:  two", b"event: error", b"event:", b"id: 7"),
        *(b": ping", b"retry: 3", b"unknown: 1", b"datax: 1", b"\xef\xbb\xbf", b"\x85", b"\x0b"),
        *(b"\n", b"\n", b"\n", b"\r", b"\r\n", b"\n\n", b"\r\n\r\n", "ü€😀".encode()),
    ]
)
_STREAMS = st.lists(_PIECES, max_size=40).map(b"".join) | st.binary(max_size=60)


@given(stream=_STREAMS, places=st.lists(st.integers(0, 10_000), max_size=30))
def test_any_chunking_gives_the_same_events(stream: bytes, places: list[int]) -> None:
    expected = by_the_book(stream)
    assert decode(stream) == expected
    assert decode(*cut(stream, places)) == expected
    assert decode(*(stream[at : at + 1] for at in range(len(stream)))) == expected


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b'data: {"a":1}\n\n', [(b"", b'{"a":1}')]),
        (b"event: ping\ndata: {}\n\ndata: [DONE]\n\n", [(b"ping", b"{}"), (b"", b"[DONE]")]),
        (b"data: one\ndata: two\n\n", [(b"", b"one\ntwo")]),
        (b"event: nothing\n\ndata: x\n\n", [(b"", b"x")]),
        (b": keep-alive\n\n\n\n", []),
        (b"data: cut off\n", []),
    ],
)
def test_events(stream: bytes, events: list[tuple[bytes, bytes]]) -> None:
    assert decode(stream) == events


def test_a_bare_carriage_return_ends_an_event_without_waiting_for_more() -> None:
    decoder = SseDecoder()
    assert decoder.feed(b"data: x\r\r") == [ServerSentEvent(b"", b"x")]
    assert decoder.feed(b"\ndata: y\n\n") == [ServerSentEvent(b"", b"y")]


@pytest.mark.parametrize("chunk", [b"x" * 40, b"data: " + b"x" * 40 + b"\n", b"data: 1234567890\n"])
def test_an_endless_event_is_refused(chunk: bytes) -> None:
    decoder = SseDecoder(max_event_bytes=100)
    with pytest.raises(SseTooLongError, match="100 bytes"):
        decode_with(decoder, [chunk] * 20)


def test_many_events_are_not_one_long_event() -> None:
    decoder = SseDecoder(max_event_bytes=100)
    for _ in range(50):
        assert decoder.feed(b"data: 12345678") == []
        assert decoder.feed(b"90\n\n") == [ServerSentEvent(b"", b"1234567890")]

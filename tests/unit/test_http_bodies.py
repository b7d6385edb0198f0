"""The bodies of requests take limited memory together, and hold a limited number of values."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from starlette.requests import Request
from starlette.types import Message

from sluicegate.producers.http.problems import Problem
from sluicegate.producers.http.request_body import VALUES_MAX, Bodies, check_values
from sluicegate.shared.settings import Settings
from tests.polling import eventually_async


class Sender:
    """A client that sends a body piece by piece, when the test says so."""

    def __init__(self, told: int | None = None) -> None:
        self.pieces: asyncio.Queue[bytes] = asyncio.Queue()
        headers = [] if told is None else [(b"content-length", str(told).encode())]
        scope: dict[str, Any] = {"type": "http", "method": "POST", "headers": headers}
        self.request = Request(scope, self._receive)

    async def _receive(self) -> Message:
        piece = await self.pieces.get()
        return {"type": "http.request", "body": piece, "more_body": bool(piece)}

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.pieces.put_nowait(piece)


def _bodies(**changes: int) -> Bodies:
    return Bodies(Settings(_env_file=None, **changes))  # type: ignore[arg-type]


async def _is(seen: bool) -> bool:
    return seen


async def _code(bodies: Bodies, sender: Sender) -> tuple[int, str]:
    with pytest.raises(Problem) as caught:
        await bodies.read(sender.request)
    assert ("Retry-After" in caught.value.headers) == (caught.value.status == 503)
    return caught.value.status, caught.value.code


async def test_what_is_read_at_once_is_limited() -> None:
    bodies = _bodies(http_max_body_bytes=100, http_bodies_bytes=150)
    first, idle = Sender(told=90), Sender(told=100)
    reading = [asyncio.create_task(bodies.read(one.request)) for one in (idle, first)]
    first.send(b"x" * 90)
    await eventually_async(lambda: _is(bodies._held == 90))
    # Refused before it is read, and while it is; one that only says that it comes holds nothing.
    assert await _code(bodies, Sender(told=80)) == (503, "too_many_bodies")
    untold = Sender()
    untold.send(b"x" * 40, b"x" * 40)
    assert await _code(bodies, untold) == (503, "too_many_bodies")
    small = Sender(told=50)
    small.send(b"y" * 50, b"")
    assert await bodies.read(small.request) == b"y" * 50
    first.send(b"")
    assert len(await reading[1]) == 90
    idle.send(b"x" * 100, b"")
    assert len(await reading[0]) == 100
    last = Sender(told=100)
    last.send(b"z" * 100, b"")
    assert len(await bodies.read(last.request)) == 100


async def test_the_longest_body_is_read_whatever_the_budget() -> None:
    bodies = _bodies(http_max_body_bytes=100, http_bodies_bytes=1)
    for _ in range(3):
        longest = Sender(told=100)
        longest.send(b"x" * 100, b"")
        assert len(await bodies.read(longest.request)) == 100
    assert await _code(bodies, Sender(told=101)) == (413, "body_too_large")


@pytest.mark.parametrize(
    "body",
    [
        orjson.dumps({f"k{n}": 1 for n in range(VALUES_MAX + 1)}),
        orjson.dumps({"messages": [{"role": "user", "x": 1}] * (VALUES_MAX // 2)}),
        b"[" * (VALUES_MAX + 1),
        b'["' + b'","' * 100_000,
        b'{"a":' + b"[1,2]," * VALUES_MAX + b'"' + b'\\"' * 100_000,
    ],
)
def test_more_values_than_anybody_needs(body: bytes) -> None:
    with pytest.raises(Problem, match="holds more than 25,000 values") as caught:
        check_values(body)
    assert (caught.value.status, caught.value.field) == (400, "body")


@pytest.mark.parametrize(
    "text",
    ["a, b [c] {d} " * 50_000, '{"quoted": "\\"\\\\", "more": [1, 2, 3]}' * 30_000, "\\" * 100_000],
)
def test_what_stands_in_strings_does_not_count(text: str) -> None:
    check_values(orjson.dumps({"prompt": text, "messages": ["\\", text]}))


def test_text_that_ends_in_a_string() -> None:
    for end in (b"", b"\\", b'\\"', b"x" * 100):
        check_values(b'{"prompt": "' + b',\\"' * 1_000_000 + end)

"""Answers that stay open, before an ASGI server made of two queues."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.types import Message, Scope

from sluicegate.producers.http.problems import Problem
from sluicegate.producers.http.streams import COMMENT, RETRY_HINT, Broken, Stream, Streams
from sluicegate.shared.settings import Settings

SCOPE: Scope = {"type": "http", "method": "GET", "state": {"request_id": "r-1"}}
SECRET = "a piece of an answer"


def _streams(**changes: Any) -> Streams:
    return Streams(Settings(_env_file=None, **changes))


class Client:
    """Takes what is sent, and stays until it is told to leave."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.leaves = asyncio.Event()

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def text(self) -> bytes:
        return b"".join(one.get("body", b"") for one in self.sent)

    @property
    def is_whole(self) -> bool:
        return self.sent[-1].get("more_body") is False


async def _silent() -> AsyncGenerator[bytes, None]:
    yield b"first"
    await asyncio.Event().wait()


async def _busy() -> AsyncGenerator[bytes, None]:
    while True:
        yield b"more"
        await asyncio.sleep(0)


async def _failing(error: Exception) -> AsyncGenerator[bytes, None]:
    yield b"first"
    raise error


async def _failing_at_its_end(error: Exception) -> AsyncGenerator[bytes, None]:
    try:
        yield b"first"
        await asyncio.Event().wait()
    finally:
        raise error


def test_a_place_is_given_back_unless_a_stream_takes_it_over() -> None:
    streams = _streams(http_max_streams=1)
    with streams.take() as place:
        assert len(streams) == 1
        with pytest.raises(Problem) as caught, streams.take():
            pass
        assert (caught.value.status, caught.value.code) == (503, "too_many_streams")
        assert "Retry-After" in caught.value.headers
    assert len(streams) == 0
    with streams.take() as place:
        kept = place.pop_all()
    assert len(streams) == 1
    kept.close()
    assert len(streams) == 0


@pytest.mark.parametrize("pieces", [_silent, _busy])
@pytest.mark.parametrize("farewell", [RETRY_HINT, None])
async def test_a_stream_that_is_too_old_ends(pieces: Any, farewell: bytes | None) -> None:
    streams, client = _streams(http_stream_max_s=0.05), Client()
    with streams.take() as place:
        stream = Stream(
            streams, place, pieces(), media_type="x/y", keep_alive=COMMENT, farewell=farewell
        )
    assert len(streams) == 1
    await asyncio.wait_for(stream(SCOPE, client.receive, client.send), 20)
    assert client.is_whole == (farewell is not None)
    assert client.text.endswith(RETRY_HINT) == (farewell is not None)
    assert len(streams) == 0


@pytest.mark.parametrize("make", [_failing, _failing_at_its_end])
@pytest.mark.parametrize("error", [ValueError(SECRET), TimeoutError(SECRET), Broken(SECRET)])
async def test_a_stream_that_fails_is_cut_and_says_nothing(
    make: Any, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    streams, client = _streams(http_stream_max_s=0.05), Client()
    with streams.take() as place:
        stream = Stream(streams, place, make(error), media_type="x/y")
    with caplog.at_level(logging.DEBUG):
        await asyncio.wait_for(stream(SCOPE, client.receive, client.send), 20)
    assert not client.is_whole
    assert SECRET not in caplog.text
    if make is _failing:
        told = f"a defect of ours, {type(error).__name__} (request id: r-1)"
        assert (told in caplog.text) == (not isinstance(error, Broken))
    assert len(streams) == 0


@pytest.mark.parametrize("how", ["time", "client", "stop", "stopped before"])
async def test_a_wait_ends(how: str) -> None:
    streams, client = _streams(), Client()
    loop = asyncio.get_running_loop()
    if how == "client":
        loop.call_soon(client.leaves.set)
    elif how == "stop":
        loop.call_later(0.01, streams.stop)
    elif how == "stopped before":
        streams.stop()
    with pytest.raises(TimeoutError):
        async with (
            asyncio.timeout(20) as most,
            streams.patience(0.01 if how == "time" else 1000, client.receive),
        ):
            await asyncio.Event().wait()
    assert not most.expired()
    async with streams.patience(1000, Client().receive) if how == "time" else asyncio.timeout(1):
        pass
    streams.stop()

"""Clients of the HTTP door, as cheap as they can be: plain sockets, one process for all of them.

Prints one JSON line at the end: how long what took, in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import uvloop

from tests.benchmarks.prompts import ANSWER_TOKENS, STREAMED_TOKENS, prompt

_LIMIT_BYTES = 1024 * 1024


@dataclass(kw_only=True)
class Door:
    """Where to, as whom, and what for."""

    port: int
    api_key: str
    #: If given, the provider itself is asked for this model: what an answer takes without us.
    model: str = ""
    numbers: count[int] = field(default_factory=count)

    def request(self, *, stream: bool = False) -> bytes:
        """Return the next question."""
        text = prompt(next(self.numbers), STREAMED_TOKENS if stream else ANSWER_TOKENS)
        path, ask = "/api/llm", dict[str, Any](prompt=text, useCase="general", stream=stream)
        if self.model:
            messages = [{"role": "user", "content": text}]
            path, ask = (
                "/v1/chat/completions",
                {
                    "model": self.model,
                    "messages": messages,
                    "stream": stream,
                },
            )
        body = json.dumps(ask).encode()
        accept = "text/event-stream" if stream else "application/json"
        return self._head("POST", path, accept, len(body)) + body

    def follow(self, job_id: str) -> bytes:
        """Return the request for a job's events."""
        return self._head("GET", f"/api/llm/jobs/{job_id}/events", "text/event-stream", 0)

    def _head(self, method: str, path: str, accept: str, length: int) -> bytes:
        return (
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.api_key}"
            f"\r\nContent-Type: application/json\r\nAccept: {accept}\r\n"
            f"Content-Length: {length}\r\n\r\n"
        ).encode()

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect."""
        return await asyncio.open_connection("127.0.0.1", self.port, limit=_LIMIT_BYTES)


async def answer(reader: asyncio.StreamReader) -> bytes:
    """Read a whole answer that is no stream; raise if it is no success."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
    body = await reader.readexactly(length)
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError((head + body).decode())
    return body


async def first_token(reader: asyncio.StreamReader) -> float:
    """Read a stream to its end; return when its first token came."""
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError((head + await reader.read(2000)).decode())
    came_at = 0.0
    while True:
        size = int((await reader.readline()).split(b";")[0], 16)
        piece = await reader.readexactly(size + 2)
        if not size:
            return came_at
        if not came_at and (b"event: delta" in piece or b'"delta":{"content"' in piece):
            came_at = time.perf_counter()


async def ask_for_ever(door: Door) -> None:
    """Ask one question after the other on one connection."""
    reader, writer = await door.open()
    while True:
        writer.write(door.request())
        await answer(reader)


async def timed(door: Door, *, stream: bool) -> float:
    """Ask once on a connection of the pool; return what it took in ms, or its first token."""
    reader, writer = _idle.pop() if _idle else await door.open()
    began = time.perf_counter()
    writer.write(door.request(stream=stream))
    if stream:
        ended = await first_token(reader)
    else:
        await answer(reader)
        ended = time.perf_counter()
    _idle.append((reader, writer))
    return 1000 * (ended - began)


_idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []


async def at_a_rate(
    per_s: float, seconds: float, one: Callable[[], Coroutine[Any, Any, float]]
) -> list[float]:
    """Begin so many a second, however long each takes."""
    tasks: list[asyncio.Task[float]] = []
    began = time.perf_counter()
    for n in range(round(per_s * seconds)):
        await asyncio.sleep(max(0.0, began + n / per_s - time.perf_counter()))
        tasks.append(asyncio.create_task(one()))
    return list(await asyncio.gather(*tasks))


async def main(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    door = Door(port=options.port, api_key=options.api_key, model=options.model)
    match options.mode:
        case "closed":
            async with asyncio.TaskGroup() as clients:
                for _ in range(options.clients):
                    clients.create_task(ask_for_ever(door))
        case "rate" | "stream":
            stream = options.mode == "stream"
            for seconds in (options.warm_up_s, options.seconds):
                took = await at_a_rate(options.per_s, seconds, lambda: timed(door, stream=stream))
            sys.stdout.write(json.dumps({"ms": sorted(took)}) + "\n")
        case "readers":
            readers = []
            for job_id in options.jobs.read_text().split():
                reader, writer = await door.open()
                writer.write(door.follow(job_id))
                head = await reader.readuntil(b"\r\n\r\n")
                if not head.startswith(b"HTTP/1.1 200"):
                    raise RuntimeError(head.decode())
                readers.append((reader, writer))
            sys.stdout.write(json.dumps({"readers": len(readers)}) + "\n")
            sys.stdout.flush()
            await asyncio.Event().wait()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["closed", "rate", "stream", "readers"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--api-key", required=True)
    parser.add_argument("--model", default="", help="of a provider, whose port it is")
    parser.add_argument("--jobs", type=Path, help="a file with the ids of jobs to follow")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--per-s", type=float, default=50)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--warm-up-s", type=float, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    uvloop.run(main(_options()))

"""The HTTP process is killed in the middle of streams: no word is lost, nothing paid twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import httpx2

from tests.harness import FULL, Rig
from tests.http_servers import HttpServer, start_http
from tests.polling import eventually_async

CLIENTS = 50 if FULL else 10
WAIT_S = 120.0


@dataclass
class Reader:
    """A client as a browser is one: it comes back, with the last id that it has seen."""

    client: httpx2.AsyncClient
    marker: str = field(default_factory=lambda: f"[{uuid4().hex}]")
    url: str | None = None
    last_id: str | None = None
    text: str = ""
    comes_back: int = 0
    ended: dict[str, Any] | None = None

    async def run(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while self.ended is None:
                try:
                    await self._read()
                except httpx2.TransportError:
                    await asyncio.sleep(0.05)
                self.comes_back += 1

    async def _read(self) -> None:
        headers = {"Accept": "text/event-stream", "Idempotency-Key": self.marker}
        method, path, body = "POST", "/api/llm", None
        if self.url is None:
            prompt = f"Write a long letter.\n{self.marker}"
            body = {"prompt": prompt, "useCase": "draft", "stream": True}
        else:
            method, path = "GET", f"{self.url}/events"
            headers["Last-Event-ID"] = self.last_id or "0"
        async with self.client.stream(method, path, json=body, headers=headers) as response:
            assert response.status_code == 200, await response.aread()
            if self.url is None:
                self.url = response.headers["Location"]
            async for event_id, name, data in _events(response):
                self.last_id = event_id
                match name:
                    case "delta":
                        self.text += data["text"]
                    case "reset":
                        self.text = ""
                    case "completed" | "failed":
                        self.ended = data


async def _events(response: httpx2.Response) -> AsyncIterator[tuple[str, str, dict[str, Any]]]:
    lines: dict[str, str] = {}
    async for line in response.aiter_lines():
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            lines[name] = value
        elif lines:
            if "data" in lines:
                yield lines["id"], lines["event"], json.loads(lines["data"])
            lines = {}


async def test_kill_9_in_the_middle_of_streams(rig: Rig) -> None:
    rig.start_worker("anthropic", ["draft"])
    server = start_http(rig)
    rig.sandbox.settings(tokens_per_s=25)
    limits = httpx2.Limits(max_connections=CLIENTS)
    async with httpx2.AsyncClient(
        base_url=server.url, headers=server.headers, timeout=WAIT_S, limits=limits
    ) as client:
        readers = [Reader(client) for _ in range(CLIENTS)]
        running = asyncio.gather(*(reader.run() for reader in readers))

        async def in_the_middle() -> bool:
            assert not running.done()
            return all(len(reader.text) > 20 for reader in readers)

        await eventually_async(in_the_middle)
        assert not any(reader.ended for reader in readers)
        server.service.kill()
        _again(rig, server)
        await running

    job_ids = []
    for reader in readers:
        assert reader.comes_back > 1
        assert reader.ended is not None
        assert reader.ended["type"] == "completed"
        assert reader.text == reader.ended["text"] != ""
        job_id = UUID(reader.ended["id"])
        rig._markers[reader.marker] = job_id
        job_ids.append(job_id)
    assert len(set(job_ids)) == CLIENTS
    assert len(rig.sandbox.calls()) == CLIENTS
    rig.check_once(job_ids)


def _again(rig: Rig, server: HttpServer) -> None:
    port = int(server.url.rpartition(":")[2])
    start_http(rig, port=port, api_key=server.api_key)

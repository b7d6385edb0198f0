"""What tests of the compatible doors share: a server with workers behind it, and small files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final
from uuid import uuid4

import httpx2

from tests.command_line import Command
from tests.harness import Rig
from tests.http_servers import HttpServer, make_key, start_http

#: A transparent pixel, and the least of a PDF, in base64.
PNG: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg=="
)
PDF: Final = "JVBERi0xLjQKJSVFT0YK"


def open_doors(rig: Rig) -> HttpServer:
    """Start a server, and workers of both pools for what its tests ask."""
    workers = [
        rig.begin_worker("openai", ["general", "vision", "complex"]),
        rig.begin_worker("anthropic", ["draft", "general", "vision", "complex"]),
    ]
    rig.start_sweep()
    server = start_http(rig)
    for worker in workers:
        rig.await_worker(worker)
    return server


def key_without_money(rig: Rig, command_line: Callable[[Any], Command], account: str) -> str:
    """Make an account that can pay for nothing; return its key."""
    assert command_line(rig.settings)("account", "add", account).code == 0
    rig.client.set_budget(account, daily="0.000000001")
    return make_key(rig.settings, account=account)


async def ask_at_once(
    server: HttpServer, path: str, body: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[list[httpx2.Response], httpx2.Response]:
    """Send the body 20 times at once with one key, and then the other body with that key, too."""
    headers = {**server.headers, "Idempotency-Key": uuid4().hex}
    async with httpx2.AsyncClient(base_url=server.url, headers=headers, timeout=60) as client:
        answers = await asyncio.gather(*(client.post(path, json=body) for _ in range(20)))
        return answers, await client.post(path, json=other)

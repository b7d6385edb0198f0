"""What tests of the compatible doors share: a server with workers behind it, and small files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

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

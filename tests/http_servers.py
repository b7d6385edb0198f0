"""A real `sluice http` for a rig, and a key for it."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass
from typing import Any

import httpx2

from sluicegate.shared.api_keys import RoleName, create_key
from sluicegate.shared.connecting import transaction
from sluicegate.shared.settings import Settings
from tests.harness import Rig, Service, environment_of
from tests.polling import eventually


@dataclass(frozen=True)
class HttpServer:
    """A server that answers."""

    service: Service
    url: str
    #: Of an owner of the account `default`.
    api_key: str

    @property
    def headers(self) -> dict[str, str]:
        """What a request is let in with."""
        return {"Authorization": f"Bearer {self.api_key}"}


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def start_http(
    rig: Rig,
    *,
    port: int | None = None,
    api_key: str = "",
    is_sandbox: bool = False,
    **changes: Any,
) -> HttpServer:
    """Start a server and wait until it answers; it ends with the rig.

    is_sandbox: without credentials, too. `changes` are settings of its own.
    """
    port = port or free_port()
    argv = [sys.executable, *http_argv(port), *(["--sandbox"] if is_sandbox else [])]
    settings = rig.settings.model_copy(update=changes)
    service = rig._start(f"http-{port}", argv, environment_of(settings))
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert service.ended() is None, service.log
        try:
            return httpx2.get(f"{url}/health/live").is_success
        except httpx2.TransportError:
            return False

    eventually(answers, 60)
    return HttpServer(service, url, api_key or make_key(rig.settings))


def http_argv(port: int) -> list[str]:
    """Return the arguments of Python for a server on this port."""
    return ["-m", "sluicegate.cli", "http", "--port", str(port)]


def make_key(settings: Settings, role: RoleName = "owner", account: str | None = "default") -> str:
    """Make an API key."""
    with transaction(settings) as line:
        _, token = create_key(line, "test", role=role, account=account, created_by="test")
    return token.get_secret_value()

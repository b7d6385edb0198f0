"""What passes by: bytes through a proxy, and commands that a Redis server is given."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

import redis

_CHUNK = 65_536


class Proxy(ThreadingTCPServer):
    """Passes on what clients send to a server, and keeps it; between `with` and its end."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Line)
        self.target = host, port
        self.sent = bytearray()
        self.lock = threading.Lock()

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        port: int = self.server_address[1]
        return port


class _Line(BaseRequestHandler):
    server: Proxy

    def handle(self) -> None:
        with socket.create_connection(self.server.target) as onward:
            back = threading.Thread(target=_pass_on, args=(onward, self.request), daemon=True)
            back.start()
            with suppress(OSError):
                while piece := self.request.recv(_CHUNK):
                    with self.server.lock:
                        self.server.sent += piece
                    onward.sendall(piece)
                onward.shutdown(socket.SHUT_WR)
            back.join(10)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(_CHUNK):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def recording(host: str, port: int) -> Iterator[Proxy]:
    """Run a proxy in front of a server."""
    with Proxy(host, port) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join(10)


@contextmanager
def commands(url: str) -> Iterator[list[str]]:
    """Collect all commands that a Redis server is given, in a list that grows."""
    seen: list[str] = []
    with redis.Redis.from_url(url, socket_timeout=None) as client, client.monitor() as monitor:

        def listen() -> None:
            # Its connection is closed under it at the end. As they come: redis-py's own reading of
            # commands ends at the first that it does not understand.
            with suppress(redis.RedisError, OSError, ValueError, AttributeError):
                while True:
                    said: Any = monitor.connection.read_response(disable_decoding=True)
                    seen.append(said.decode(errors="replace"))

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield seen
        client.echo("the end")
        thread.join(5)

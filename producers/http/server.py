"""The process: uvicorn with our limits on connections, its signals, and its log."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, ClassVar, Final

import orjson
import uvicorn
from starlette.applications import Starlette
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from sluicegate.producers.http.app import make_app
from sluicegate.producers.http.identity import Identity
from sluicegate.producers.http.problems import Problem, body_of
from sluicegate.shared.addresses import Address, bind, is_loopback
from sluicegate.shared.errors import SettingsError
from sluicegate.shared.settings import Settings

log = logging.getLogger("sluicegate.http")

#: The longest head of a request: its address and its headers.
_HEAD_BYTES: Final = 65_536
#: How long an idle connection is kept: longer than reverse proxies keep theirs.
_KEEP_ALIVE_S: Final = 75
_BACKLOG: Final = 2048
#: What uvicorn says of a stream that we cut on purpose.
_CUT: Final = "ASGI callable returned without completing response."


def run(settings: Settings, address: Address, *, is_sandbox: bool = False) -> None:
    """Serve until SIGTERM or SIGINT.

    is_sandbox: callers on this machine need no credentials. Raises `SettingsError` for that on an
    address that others reach, and for one that is taken.
    """
    if is_sandbox and not is_loopback(address.host):
        raise SettingsError(
            f"--sandbox: lets everybody in without a key, and others reach {address.host}; use "
            "127.0.0.1, or leave it out"
        )
    line = bind(address, "--port:")
    _set_up_log()
    config = uvicorn.Config(
        _nothing,
        loop="uvloop",
        http=_protocol(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.http_grace_s),
        backlog=_BACKLOG,
    )
    listening = Address(address.host, line.getsockname()[1])
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(config, settings, line, listening, is_sandbox=is_sandbox))


async def _serve(
    config: uvicorn.Config,
    settings: Settings,
    line: socket.socket,
    listening: Address,
    *,
    is_sandbox: bool,
) -> None:
    async with Identity(settings, is_sandbox=is_sandbox) as identity:
        app = make_app(settings, identify=identity)
        config.app = app
        # What was made until now stays: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        log.info("listening on %s; its document is at /docs", listening.url)
        await _Server(config, app).serve(sockets=[line])


async def _nothing(*_: Any) -> None:
    """Stand for the application, which is made on the loop."""


class _Server(uvicorn.Server):
    """Ends streams before it waits for what is under way; leaves with 0 after a signal."""

    def __init__(self, config: uvicorn.Config, app: Starlette) -> None:
        super().__init__(config)
        self._app = app

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.services.streams.stop()
        await super().shutdown(sockets)


class _Protocol(HttpToolsProtocol):
    """A connection that has to say what it wants in good time, in not too many words, and listen.

    `_late` runs while the head of a request has to come, and the rest of a body that nobody waits
    for. `_watch` looks now and then whether the client takes what is written.
    """

    head_timeout_s: ClassVar[float]
    stall_timeout_s: ClassVar[float]
    most: ClassVar[int]

    _head_bytes = 0
    _in_head = True
    _late: asyncio.TimerHandle | None = None
    _watch: asyncio.TimerHandle | None = None
    #: What was still to be written at the last look, if nothing could be added to it since.
    _unsent = 0
    #: What is answered now; uvicorn's own `cycle` is the latest, which may have to wait for it.
    _answered: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch = self.loop.call_later(self.stall_timeout_s, self._look)
        if len(self.connections) > self.most:
            self._refuse(503, "too_many_connections", "this server holds enough connections")
            return
        self._late = self.loop.call_later(self.head_timeout_s, self._on_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        if self._watch is not None:
            self._watch.cancel()
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._late is None:
                # The next request on a connection that was kept.
                self._late = self.loop.call_later(self.head_timeout_s, self._on_late)
        super().data_received(data)
        if self._in_head and self._head_bytes > _HEAD_BYTES:
            message = f"the headers are longer than {_HEAD_BYTES:,} bytes"
            self._refuse(431, "headers_too_large", message)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._in_time()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            # It was answered before it was whole: only now the connection is idle.
            self._in_time()
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        is_whole = self._in_head or self.pipeline
        super().on_response_complete()
        if not is_whole and not self.transport.is_closing():
            # Closed at once, it would be reset, and the client might never read the answer.
            self._in_time()
            self._late = self.loop.call_later(self.head_timeout_s, self._on_late)

    def resume_writing(self) -> None:
        self._unsent = 0
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "invalid_request", "this is no HTTP request")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _look(self) -> None:
        """Cut the connection if its client has taken nothing since the last look."""
        self._watch = self.loop.call_later(self.stall_timeout_s, self._look)
        unsent = self.transport.get_write_buffer_size()
        # Nothing is added then, so what is no less has not moved.
        is_final = self.flow.write_paused or self.transport.is_closing()
        if is_final and 0 < self._unsent <= unsent:
            self.transport.abort()
        self._unsent = unsent if is_final else 0

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _on_late(self) -> None:
        self._late = None
        if self._head_bytes:
            message = f"the headers did not come within {self.head_timeout_s:g} s"
            self._refuse(408, "headers_too_slow", message)
        else:
            self.transport.close()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer in the native shape before there is a request, and close."""
        if self.transport.is_closing():
            return
        body = orjson.dumps(body_of(Problem(status, code, message), ""))
        head = (
            f"HTTP/1.1 {status} {code}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def _protocol(settings: Settings) -> type[_Protocol]:
    values = {
        "head_timeout_s": settings.http_head_timeout_s,
        "stall_timeout_s": settings.http_stall_timeout_s,
        "most": settings.http_max_connections,
    }
    return type("Protocol", (_Protocol,), values)


def _set_up_log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.setLevel(logging.WARNING)
    uvicorn_log.addFilter(lambda record: record.msg != _CUT)

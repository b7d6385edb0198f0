"""A fake provider for the demo, the tests and the benchmarks: both wire formats on one port.

`POST /v1/chat/completions`, `POST /v1/messages` and `GET /v1/models` behave as OpenAI's and
Anthropic's do, towards their official SDKs too. What it answers is in `sandbox_answers`, what it
bills in `sandbox_prices`, what can go wrong on demand in `sandbox_faults`, how much it takes in a
minute in `sandbox_limits` (without limits: anything). Any key is accepted.

Control, in JSON (`sandbox_control.SandboxControl` is a client for it):

- `GET /sandbox/health`
- `GET /sandbox/calls?after=SEQ&limit=N`, `DELETE /sandbox/calls` (forgets calls and totals)
- `GET /sandbox/bill`, with the counts of the limits
- `GET /sandbox/settings`, `PUT /sandbox/settings` with the fields to change
- `GET /sandbox/limits`, `PUT /sandbox/limits` with a model's whole limits, `DELETE /sandbox/limits`
- `GET /sandbox/faults`, `POST /sandbox/faults`, `DELETE /sandbox/faults[?id=ID]`

Run it with `python -m sluicegate.workers.local.sandbox`; it prints `{"port": N}` when it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import orjson
import uvloop
from pydantic import BaseModel, ValidationError

from sluicegate.shared.addresses import is_loopback
from sluicegate.workers.local.sandbox_answers import Ask
from sluicegate.workers.local.sandbox_anthropic import AnthropicWire
from sluicegate.workers.local.sandbox_calls import Pace, RunningCall, Wheel
from sluicegate.workers.local.sandbox_checks import RefusedError
from sluicegate.workers.local.sandbox_faults import Fault, FaultBook, FaultRule, Strike
from sluicegate.workers.local.sandbox_http import Connection, Exchange, Request
from sluicegate.workers.local.sandbox_limits import Dimension, Level, LimitBook, Limits
from sluicegate.workers.local.sandbox_log import Call, CallLog
from sluicegate.workers.local.sandbox_openai import OpenAIWire
from sluicegate.workers.local.sandbox_prices import PRICES, wire_of
from sluicegate.workers.local.sandbox_wire import MAX_MODEL_CHARS, Wire

M = TypeVar("M", bound=BaseModel)

MAX_CALLS_PER_PAGE = 10_000
BACKLOG = 4_096


class ControlError(Exception):
    """A control request that cannot be served."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Sandbox:
    """The provider: routes requests, runs calls, keeps the books."""

    def __init__(self, *, pace: Pace, log: CallLog) -> None:
        self._pace = pace
        self._log = log
        self._faults = FaultBook()
        self._limits = LimitBook()
        self._wheel = Wheel()
        self._openai: Wire = OpenAIWire()
        self._anthropic: Wire = AnthropicWire()
        self._headers: dict[tuple[str, int], bytes] = {}
        self._id_prefix = f"req_{secrets.token_hex(6)}"
        self._last_id = 0
        self._started_at = time.time()
        self._control: dict[tuple[str, str], Callable[[Request], object]] = {
            ("GET", "/sandbox/health"): self._health,
            ("GET", "/sandbox/calls"): self._list_calls,
            ("DELETE", "/sandbox/calls"): self._reset_calls,
            ("GET", "/sandbox/bill"): self._show_bill,
            ("GET", "/sandbox/settings"): lambda _: self._pace.model_dump(),
            ("PUT", "/sandbox/settings"): self._change_pace,
            ("GET", "/sandbox/limits"): lambda _: {"limits": self._limits.shown()},
            ("PUT", "/sandbox/limits"): self._set_limits,
            ("DELETE", "/sandbox/limits"): self._clear_limits,
            ("GET", "/sandbox/faults"): lambda _: {"faults": self._faults.rules()},
            ("POST", "/sandbox/faults"): self._add_fault,
            ("DELETE", "/sandbox/faults"): self._remove_faults,
        }

    def handle(self, request: Request, exchange: Exchange) -> None:
        """Serve one request."""
        match request.method, request.path:
            case "POST", "/v1/chat/completions":
                self._run(self._openai, request, exchange)
            case "POST", "/v1/messages":
                self._run(self._anthropic, request, exchange)
            case "GET", path if path == "/v1/models" or path.startswith("/v1/models/"):
                self._show_models(request, exchange)
            case _, path if path.startswith("/sandbox/"):
                self._serve_control(request, exchange)
            case method, path:
                wire = self._wire_of(request)
                request_id = self._next_id()
                message = f"Invalid URL ({method} {path})"
                status, body = wire.trouble(Fault.HTTP_404, request_id, message)
                exchange.respond(status, body, headers=self._head_lines(wire, request_id))

    # calls

    def _run(self, wire: Wire, request: Request, exchange: Exchange) -> None:
        request_id = self._next_id()
        parsed: object = None
        try:
            parsed = _parsed(request)
            ask = wire.read(parsed)
        except RefusedError as refused:
            model = parsed.get("model") if isinstance(parsed, dict) else None
            call = self._log.begin(
                wire=wire.name,
                model=model[:MAX_MODEL_CHARS] if isinstance(model, str) else "",
                request_id=request_id,
                key=request.key,
            )
            call.status, body = wire.trouble(
                refused.fault, request_id, refused.message, refused.param
            )
            self._log.finish(call)
            exchange.respond(call.status, body, headers=self._head_lines(wire, request_id))
            return
        digest = ask.digest()
        strike = self._faults.strike(ask)
        running = RunningCall(
            wire=wire,
            ask=ask,
            digest=digest,
            strike=strike,
            call=self._begin(ask, digest, strike, request_id, request.key),
            exchange=exchange,
            pace=self._pace,
            log=self._log,
            wheel=self._wheel,
        )
        meter = self._limits.meter(ask.model)
        if meter is None:
            running.start(self._head_lines(wire, request_id))
            return
        shortage = running.enter(meter)
        levels = meter.levels(asyncio.get_running_loop().time())
        lines = self._usual_lines(wire, time.time(), levels)
        running.start(lines + _id_line(wire, request_id), shortage)

    def _begin(
        self, ask: Ask, digest: bytes, strike: Strike | None, request_id: str, key: bytes
    ) -> Call:
        return self._log.begin(
            wire=ask.wire,
            model=ask.model,
            stream=ask.stream,
            fault=strike.fault.value if strike else None,
            digest=digest,
            last_user=ask.last_user,
            request_id=request_id,
            key=key,
        )

    def _next_id(self) -> str:
        self._last_id += 1
        return f"{self._id_prefix}{self._last_id:08x}"

    def _head_lines(self, wire: Wire, request_id: str) -> bytes:
        """Return a wire's usual headers far from all limits, made once a second, and the id."""
        now_s = int(time.time())
        lines = self._headers.get((wire.name, now_s))
        if lines is None:
            lines = self._usual_lines(wire, now_s, {})
            if len(self._headers) > 1:
                self._headers.clear()
            self._headers[wire.name, now_s] = lines
        return lines + _id_line(wire, request_id)

    def _usual_lines(self, wire: Wire, now_s: float, levels: Mapping[Dimension, Level]) -> bytes:
        now = datetime.fromtimestamp(now_s, UTC)
        named = wire.headers(now, levels)
        named |= {"date": f"{now:%a, %d %b %Y %H:%M:%S} GMT", "server": "sandbox"}
        named |= {name.lower(): value for name, value in self._pace.headers.items()}
        return "".join(f"{name}: {value}\r\n" for name, value in named.items()).encode()

    def _wire_of(self, request: Request) -> Wire:
        anthropic = request.anthropic or request.path.startswith("/v1/messages")
        return self._anthropic if anthropic else self._openai

    def _show_models(self, request: Request, exchange: Exchange) -> None:
        wire, request_id = self._wire_of(request), self._next_id()
        headers = self._head_lines(wire, request_id)
        models = {name: wire.model(name) for name in PRICES if wire_of(name) == wire.name}
        wanted = request.path.removeprefix("/v1/models").strip("/")
        if not wanted:
            names = list(models)
            shown: object = {"object": "list", "data": list(models.values())}
            if wire is self._anthropic:
                ends = {"first_id": names[0], "last_id": names[-1], "has_more": False}
                shown = {"data": list(models.values())} | ends
            exchange.respond(200, orjson.dumps(shown), headers=headers)
        elif wanted in models:
            exchange.respond(200, orjson.dumps(models[wanted]), headers=headers)
        else:
            message = f"The model `{wanted[:MAX_MODEL_CHARS]}` does not exist here."
            status, body = wire.trouble(Fault.HTTP_404, request_id, message, "model")
            exchange.respond(status, body, headers=headers)

    # control

    def _serve_control(self, request: Request, exchange: Exchange) -> None:
        serve = self._control.get((request.method, request.path), _no_such_control)
        try:
            status, shown = 200, serve(request)
        except ControlError as error:
            status, shown = error.status, {"error": str(error)}
        exchange.respond(status, orjson.dumps(shown), headers=b"")

    def _health(self, _request: Request) -> object:
        return {"ok": True, "pid": os.getpid(), "up_s": round(time.time() - self._started_at, 3)}

    def _list_calls(self, request: Request) -> object:
        after = _query_number(request, "after", 0)
        limit = min(_query_number(request, "limit", 1_000), MAX_CALLS_PER_PAGE)
        return self._log.calls(after=after, limit=limit)

    def _reset_calls(self, request: Request) -> object:
        self._log.reset()
        self._limits.reset()
        return self._show_bill(request)

    def _show_bill(self, _request: Request) -> object:
        return self._log.totals() | {"limits": self._limits.shown()}

    def _set_limits(self, request: Request) -> object:
        try:
            self._limits.set(_validated(Limits, _control_object(request)))
        except ValueError as error:
            raise ControlError(400, str(error)) from error
        return {"limits": self._limits.shown()}

    def _clear_limits(self, _request: Request) -> object:
        self._limits.clear()
        return {"limits": []}

    def _change_pace(self, request: Request) -> object:
        wanted = _control_object(request)
        self._pace = _validated(Pace, self._pace.model_dump() | wanted)
        self._headers.clear()
        return self._pace.model_dump()

    def _add_fault(self, request: Request) -> object:
        rule = _validated(FaultRule, _control_object(request))
        try:
            return {"id": self._faults.add(rule)}
        except ValueError as error:
            raise ControlError(400, str(error)) from error

    def _remove_faults(self, request: Request) -> object:
        if "id" in request.query:
            rule_id = _query_number(request, "id", 0)
            if not self._faults.remove(rule_id):
                raise ControlError(404, f"there is no fault rule {rule_id}")
        else:
            self._faults.clear()
        return {"faults": self._faults.rules()}


def _parsed(request: Request) -> object:
    if request.too_large:
        raise RefusedError(Fault.HTTP_413, "The request is larger than 32 MB.")
    try:
        return orjson.loads(request.body)
    except orjson.JSONDecodeError:
        message = "We could not parse the JSON body of your request."
        raise RefusedError(Fault.HTTP_400, message) from None


def _id_line(wire: Wire, request_id: str) -> bytes:
    return b"%b: %b\r\n" % (wire.request_id_header.encode(), request_id.encode())


def _query_number(request: Request, name: str, default: int) -> int:
    value = request.query.get(name, str(default))
    if not (value.isascii() and value.isdigit() and len(value) <= 15):
        raise ControlError(400, f"{name}: must be a whole number that is not negative")
    return int(value)


def _no_such_control(request: Request) -> object:
    raise ControlError(404, f"there is no {request.method} {request.path}")


def _control_object(request: Request) -> dict[str, object]:
    try:
        parsed = orjson.loads(request.body)
    except orjson.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ControlError(400, "the body must be a JSON object")
    return parsed


def _validated(model: type[M], values: object) -> M:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ControlError(400, f"{where}: {first['msg']}" if where else first["msg"]) from error


# the process


async def serve(sandbox: Sandbox, *, host: str, port: int, announce: Callable[[int], None]) -> None:
    """Serve until SIGTERM or SIGINT. Raises OSError if it cannot listen."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    connections: set[Connection] = set()
    server = await loop.create_server(
        lambda: Connection(sandbox.handle, connections), host, port, backlog=BACKLOG
    )
    announce(server.sockets[0].getsockname()[1])
    await stop.wait()
    server.close()
    for connection in list(connections):
        connection.close()
    await asyncio.sleep(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the provider from the command line."""
    options = _options(arguments)
    try:
        pace = _validated(
            Pace,
            {
                "latency_ms": options.latency_ms,
                "latency_jitter_ms": options.latency_jitter_ms,
                "first_token_ms": options.first_token_ms,
                "tokens_per_s": options.tokens_per_s,
            },
        )
        log = CallLog(keep_calls=options.keep_calls, path=options.log)
    except (ControlError, OSError) as error:
        sys.stderr.write(f"sandbox: {error}\n")
        return 2

    def announce(port: int) -> None:
        line = f'{{"port": {port}}}\n'
        if options.port_file is not None:
            part = options.port_file.with_name(options.port_file.name + ".part")
            part.write_text(line)
            part.replace(options.port_file)
        sys.stdout.write(line)
        sys.stdout.flush()

    _allow_many_connections()
    gc.freeze()  # what is loaded now stays: no need to look at it in every collection
    sandbox = Sandbox(pace=pace, log=log)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(sandbox, host=options.host, port=options.port, announce=announce))
    except OSError as error:
        sys.stderr.write(f"sandbox: cannot serve on {options.host}:{options.port}: {error}\n")
        return 1
    finally:
        log.close()
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sandbox", description="A fake LLM provider that speaks both wire formats."
    )
    pace = Pace()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--latency-ms", type=float, default=pace.latency_ms)
    parser.add_argument("--latency-jitter-ms", type=float, default=pace.latency_jitter_ms)
    parser.add_argument("--first-token-ms", type=float, default=pace.first_token_ms)
    parser.add_argument("--tokens-per-s", type=float, default=pace.tokens_per_s)
    parser.add_argument("--keep-calls", type=int, default=200_000, help="calls kept in memory")
    parser.add_argument("--log", type=Path, help="append every finished call as a JSON line")
    parser.add_argument("--port-file", type=Path, help="also write the port here")
    parser.add_argument("--allow-remote", action="store_true", help="let --host be any address")
    options = parser.parse_args(arguments)
    if not (options.allow_remote or is_loopback(options.host)):
        parser.error(f"{options.host} is not a loopback address; say --allow-remote to mean it")
    if not 0 <= options.port <= 65_535:
        parser.error("--port must be between 0 and 65535")
    if options.keep_calls < 1:
        parser.error("--keep-calls must be at least 1")
    return options


def _allow_many_connections() -> None:
    """Raise the limit of open files to what this process may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())

"""One call over HTTP with its deadlines: what the adapters of both wires share.

The SDKs send the request (address, authentication, version headers, error classes) through their
`post` method, with the body as bytes and the raw response back. Measured on one core with the
aiohttp client and uvloop, the SDK's part of a call takes 0.5 ms of CPU this way and 1.0 to 1.15 ms
through OpenAI's `chat.completions.create`; a stream of 120 tokens that comes at once takes 1.0 to
1.4 ms here, 11.6 ms through OpenAI's event models and 2.8 ms through Anthropic's.

A stream is read to its end marker (`[DONE]`, `message_stop`). Once the provider has said why it
stopped, nothing but that marker and the usage is still to come, so for those the call waits at most
`_TAIL_S`, whether the connection is then closed, broken, or held open: what has come is judged as
it is. OpenAI's answer is complete if its usage came, with `[DONE]` or without; without either, and
without Anthropic's `message_stop`, it is `truncated`, which is a failure and never an answer.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from functools import cache
from math import inf
from typing import Any, Final

import httpx2
import orjson

from sluicegate.shared.admission.headroom import Headroom
from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.messages import LARGE_BYTES, attachment_bytes
from sluicegate.shared.secrets import Secret
from sluicegate.workers.providers.base import Answer, Call, DeltaSink, ProviderError
from sluicegate.workers.providers.decoding import load_json
from sluicegate.workers.providers.failures import (
    TRANSPORT_ERRORS,
    Fault,
    error_object,
    fault_of_error,
    fault_of_exception,
    request_id,
    sentence,
)
from sluicegate.workers.providers.rate_headers import headroom
from sluicegate.workers.providers.reading import Reading
from sluicegate.workers.providers.sse import SseDecoder, SseTooLongError

#: The longest answer a model gives is a third of this as a stream; more is a broken server.
MAX_ANSWER_BYTES: Final = 96 * 2**20
#: How long an idle connection is kept for the next call.
KEEPALIVE_S: Final = 30.0
#: How long the end of the response may take after the answer's own end marker. Read to its end, a
#: connection can be used again; not read, it is closed and nothing is lost.
_DRAIN_S: Final = 0.1
#: How long the end markers may take after the answer's finish reason.
_TAIL_S: Final = 2.0
#: The part of itself by which the idle deadline may come late.
_IDLE_SLACK: Final = 0.05
#: Shapes that are not what the wire's documentation says.
_WRONG_SHAPE = (AttributeError, IndexError, KeyError, TypeError, ValueError)


@cache
def tls_context() -> ssl.SSLContext:
    """Return the TLS settings for all clients: making them takes 20 to 140 ms of CPU."""
    return httpx2.create_ssl_context()


class HttpAdapter(ABC):
    """Makes calls; a subclass knows its SDK and its wire. `provider` is its name in messages."""

    def __init__(self, *, provider: str, api_key: Secret, max_connections: int) -> None:
        self._provider = provider
        self._api_key = api_key
        self._max_connections = max_connections
        # Counts what the connection pool counts, so that nobody ever waits inside the pool: there
        # a full pool and a dead host end in the same exception.
        self._connections = asyncio.Semaphore(max_connections)
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        """Calls that run now."""
        return self._in_flight

    async def call(self, call: Call, on_delta: DeltaSink | None = None) -> Answer:
        """Make one call; see `Adapter.call`."""
        started = time.monotonic()
        reading = self._reading()
        run = _Run(self._provider, call, reading, on_delta, started)
        self._in_flight += 1
        try:
            is_large = attachment_bytes(call.spec.messages) > LARGE_BYTES
            body = await asyncio.to_thread(self._body, call) if is_large else self._body(call)
            async with _Connection(self._connections, call.deadlines.connect_s):
                await self._exchange(run, body)
            finish_reason, tool_calls = reading.conclude()
        except Fault as fault:
            raise ProviderError(
                sentence(fault, call.spec, self._api_key),
                error_class=fault.error_class,
                status=fault.status or run.status,
                retry_after_s=fault.retry_after_s,
                request_id=fault.request_id or run.request_id,
                sent=fault.sent,
                partial=reading.partial(),
                headroom=fault.headroom or run.headroom,
            ) from None
        finally:
            self._in_flight -= 1
        return Answer(
            text=reading.text,
            tool_calls=tool_calls,
            finish_reason=finish_reason,
            model=reading.model or call.model,
            usage=reading.usage(),
            raw_usage=reading.raw_usage,
            request_id=run.request_id,
            first_token_ms=run.first_token_ms,
            duration_ms=round((time.monotonic() - started) * 1000),
            service_tier=reading.service_tier,
            headroom=run.headroom,
        )

    @abstractmethod
    async def close(self) -> None:
        """Close all connections."""

    @abstractmethod
    def _request(self, call: Call) -> dict[str, Any]:
        """Build the wire's request. Raises Fault for what the wire cannot say."""

    @abstractmethod
    def _reading(self) -> Reading:
        """Return an empty reading of the wire's answer."""

    @abstractmethod
    async def _post(self, body: bytes, timeouts: httpx2.Timeout) -> httpx2.Response:
        """Send the request and return a 2xx response, its body unread; raise Fault otherwise."""

    def _body(self, call: Call) -> bytes:
        try:
            return orjson.dumps(self._request(call))
        except TypeError as error:
            raise Fault(
                ErrorClass.BAD_REQUEST, f"the request is no JSON: {error}", sent=False
            ) from None

    async def _exchange(self, run: _Run, body: bytes) -> None:
        """Send and read, within the deadlines."""
        deadlines = run.call.deadlines
        # Reading has no limit of its own: the deadline below covers all of it, and a timer in the
        # transport would be set anew at every piece of a stream.
        timeouts = httpx2.Timeout(None, connect=deadlines.connect_s, pool=deadlines.connect_s)
        try:
            async with asyncio.timeout(None) as deadline:
                run.start(deadline)
                response = await self._post(body, timeouts)
                try:
                    await run.read(response)
                finally:
                    # What the call came to is known by now; how its connection closes is not part.
                    with suppress(*TRANSPORT_ERRORS):
                        await response.aclose()
        except TRANSPORT_ERRORS as error:  # a TimeoutError is an OSError
            if run.only_the_end_is_missing:
                return  # `Reading.conclude` says what it comes to
            if deadline.expired():
                raise Fault(ErrorClass.TIMEOUT, f"{self._provider} {run.overdue}") from None
            raise fault_of_exception(
                self._provider, error, answering=run.status is not None
            ) from None


class _Run:
    """One call under way: its deadline, and what has been read."""

    def __init__(
        self,
        provider: str,
        call: Call,
        reading: Reading,
        on_delta: DeltaSink | None,
        started: float,
    ) -> None:
        self.call = call
        self.status: int | None = None
        self.request_id: str | None = None
        self.headroom: Headroom | None = None
        self.first_token_ms: int | None = None
        self._provider = provider
        self._reading = reading
        self._on_delta = on_delta
        self._started = started
        self._streamed = call.stream
        self._loop = asyncio.get_running_loop()
        #: What the passing of the present deadline means.
        self.overdue = ""

    @property
    def only_the_end_is_missing(self) -> bool:
        """Whether the provider has said why it stopped: only end markers and usage may follow."""
        return self._reading.stop is not None

    def start(self, deadline: asyncio.Timeout) -> None:
        """Take charge of the deadline, which waits for the first piece of the answer."""
        self._deadline = deadline
        if self._streamed:
            wait_s = self.call.deadlines.first_token_s
            self._wait(wait_s - self._elapsed_s(), f"sent no token within {wait_s:g} s")
        else:
            self._wait_for_the_whole()

    async def read(self, response: httpx2.Response) -> None:
        """Read a 2xx response into the reading."""
        self.status = response.status_code
        self.request_id = request_id(response.headers)
        self.headroom = headroom(response.headers.raw)
        # A compatible server may not stream although it was asked to, or answer with a web page.
        content_type = response.headers.get("content-type", "")
        if self._streamed and content_type.startswith(("application/json", "text/html")):
            self._streamed = False
            self._wait_for_the_whole()
        encoded = "content-encoding" in response.headers
        # Closed here, because the garbage collector would close it at some later time.
        async with aclosing(response.aiter_bytes() if encoded else response.aiter_raw()) as chunks:
            if self._streamed:
                await self._read_stream(chunks)
            else:
                await self._read_whole(chunks)

    def _wait_for_the_whole(self) -> None:
        wait_s = self.call.deadlines.response_s
        self._wait(wait_s - self._elapsed_s(), f"sent no whole answer within {wait_s:g} s")

    def _wait(self, wait_s: float, overdue: str) -> None:
        """Move the deadline `wait_s` from now, or to the total one if that is earlier."""
        total_s = self.call.deadlines.total_s
        remaining_s = total_s - self._elapsed_s()
        if remaining_s <= wait_s:
            wait_s, overdue = remaining_s, f"did not finish within {total_s:g} s"
        self.overdue = overdue
        self._deadline.reschedule(self._loop.time() + wait_s)

    async def _read_whole(self, chunks: AsyncGenerator[bytes]) -> None:
        body = bytearray()
        async for chunk in chunks:
            body += chunk
            self._check_size(len(body))
        try:
            answer = load_json(bytes(body))
            if answer.get("error"):
                raise fault_of_error(
                    self._provider, error_object(answer), otherwise=ErrorClass.GARBAGE
                )
            self._reading.whole(answer)
        except _WRONG_SHAPE:
            raise Fault(
                ErrorClass.GARBAGE, f"{self._provider} sent something that is not an answer"
            ) from None
        if self.call.stream:
            self._pass_on()

    async def _read_stream(self, chunks: AsyncGenerator[bytes]) -> None:
        decoder = SseDecoder()
        reading = self._reading
        idle_s = self.call.deadlines.idle_s
        silent = f"fell silent for {idle_s:g} s in its answer"
        renew_s = 0.0
        tail_s = inf
        received = 0
        async for chunk in chunks:
            received += len(chunk)
            self._check_size(received)
            self._take(decoder, chunk)
            if reading.began:
                elapsed_s = self._elapsed_s()
                if self.first_token_ms is None:
                    self.first_token_ms = round(elapsed_s * 1000)
                if elapsed_s >= renew_s and not self.only_the_end_is_missing:
                    # A timer costs as much as reading a piece, so it is set a little later than
                    # need be, and then left alone for as long.
                    self._wait(idle_s * (1 + _IDLE_SLACK), silent)
                    renew_s = elapsed_s + idle_s * _IDLE_SLACK
            self._pass_on()
            if reading.ended:
                self._deadline.reschedule(None)
                with suppress(*TRANSPORT_ERRORS):  # the answer is complete, see _DRAIN_S
                    async with asyncio.timeout(_DRAIN_S):
                        async for _ in chunks:
                            pass
                return
            if self.only_the_end_is_missing:
                wait_s = _DRAIN_S if reading.complete else min(_TAIL_S, idle_s)
                if wait_s < tail_s:  # set once for each, whatever else may come
                    tail_s = wait_s
                    self._wait(wait_s, "")

    def _take(self, decoder: SseDecoder, chunk: bytes) -> None:
        try:
            for event in decoder.feed(chunk):
                if not self._reading.ended:
                    self._reading.event(event)
        except _WRONG_SHAPE as error:
            why = f": {error}" if isinstance(error, SseTooLongError) else ""
            raise Fault(
                ErrorClass.STREAM_BROKEN,
                f"{self._provider} sent a piece of a stream that cannot be read{why}",
            ) from None

    def _pass_on(self) -> None:
        fresh = self._reading.fresh()
        if fresh is not None and self._on_delta is not None:
            self._on_delta(fresh.text, fresh.tool_calls)

    def _check_size(self, received: int) -> None:
        if received > MAX_ANSWER_BYTES:
            raise Fault(
                ErrorClass.GARBAGE,
                f"the answer of {self._provider} is longer than {MAX_ANSWER_BYTES:,} bytes",
            )

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started


class _Connection:
    """Holds one of the adapter's connections, and waits for one as long as for connecting."""

    def __init__(self, connections: asyncio.Semaphore, wait_s: float) -> None:
        self._connections = connections
        self._wait_s = wait_s

    async def __aenter__(self) -> None:
        if not self._connections.locked():
            await self._connections.acquire()
            return
        try:
            async with asyncio.timeout(self._wait_s):
                await self._connections.acquire()
        except TimeoutError:
            raise Fault(
                ErrorClass.POOL_TIMEOUT,
                f"all connections to the provider were busy for {self._wait_s:g} s",
                sent=False,
            ) from None

    async def __aexit__(self, *_: object) -> None:
        self._connections.release()

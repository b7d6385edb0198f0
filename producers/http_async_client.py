"""The client for an event loop over HTTP: `AsyncSluice("https://…", api_key=…)`.

As `http_client`, awaited.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from typing import Any, NoReturn, TypeVar, Unpack
from uuid import UUID

import httpx2
from pydantic import BaseModel
from tenacity import AsyncRetrying

from sluicegate.producers import http_wire
from sluicegate.producers.async_client import AsyncSluice
from sluicegate.producers.budgeting import Limit
from sluicegate.producers.forking import opening, register
from sluicegate.producers.handles import AsyncJobHandle
from sluicegate.producers.http_wire import PATIENCE_S, Busy, Call, EventText, Waiting
from sluicegate.producers.listing import JobFilters, JobSummary
from sluicegate.producers.outcomes import expecting
from sluicegate.producers.reply_channels import BATCH
from sluicegate.producers.submission import (
    JobOptions,
    Prompt,
    parse_job_id,
    read_request,
    read_requests,
)
from sluicegate.producers.views import JobView
from sluicegate.shared.budgets import Budget
from sluicegate.shared.events import Event
from sluicegate.shared.jobs import State

T = TypeVar("T")


class _Pools:
    """The connections of one process: for what is answered at once, and for what waits."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        #: Set when the client is closed.
        self.closing = asyncio.Event()
        self.quick = httpx2.AsyncClient(
            **options, limits=http_wire.pool(http_wire.QUICK_CONNECTIONS)
        )
        self.waiting = httpx2.AsyncClient(
            **options, limits=http_wire.pool(http_wire.WAITING_CONNECTIONS)
        )

    async def close(self) -> None:
        self.closing.set()
        await self.quick.aclose()
        await self.waiting.aclose()


class AsyncHttpSluice(AsyncSluice):
    """An `AsyncSluice` that talks to `sluice http`; it connects at first use.

    What it takes `HttpSluice` explains.
    """

    def __init__(
        self,
        settings: str,
        *,
        api_key: str | None = None,
        account: str | UUID | None = None,
        patience_s: float = PATIENCE_S,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self.url = http_wire.read_url(settings)
        self.patience_s = http_wire.read_patience(patience_s)
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "headers": http_wire.headers_of(api_key, account),
            "verify": verify,
        }
        self._pools: _Pools | None = None
        self._closed = False
        register(self)

    async def submit(
        self,
        use_case: str | None,
        prompt: Prompt,
        *,
        connection: object = None,
        **options: Unpack[JobOptions],
    ) -> AsyncJobHandle:
        """Accept one job; raise as `AsyncSluice.submit`.

        It is sent again until it is known to be there.
        Without an `idempotency_key` it gets one, so that a lost answer never makes two jobs.
        """
        http_wire.refuse_connection(connection)
        request = read_request(use_case, prompt, options)
        job_id = await self.ask(http_wire.submit(request))
        return AsyncHttpJobHandle(self, job_id, answer_type=request.answer_type)

    async def submit_many(
        self,
        use_case: str | None,
        jobs: Iterable[Prompt | Mapping[str, Any]],
        *,
        connection: object = None,
        **common: Unpack[JobOptions],
    ) -> list[AsyncJobHandle]:
        """Accept many jobs, all or none; raise as `AsyncSluice.submit_many`."""
        http_wire.refuse_connection(connection)
        requests = read_requests(use_case, jobs, common)
        if not requests:
            return []
        ids = await self.ask(http_wire.submit_many(requests))
        return [
            AsyncHttpJobHandle(self, job_id, answer_type=request.answer_type)
            for request, job_id in zip(requests, ids, strict=True)
        ]

    async def get(self, job_id: UUID | str) -> JobView:
        """Look at a job; raises `NotFound`."""
        return await self.ask(http_wire.look(parse_job_id(job_id)))

    def handle(
        self, job_id: UUID | str, response_format: type[BaseModel] | None = None
    ) -> AsyncJobHandle:
        """Return a handle of a job that was accepted before, here or elsewhere."""
        return AsyncHttpJobHandle(self, parse_job_id(job_id), answer_type=response_format)

    async def cancel(self, job_id: UUID | str) -> State:
        """Cancel a job; return its state, as `AsyncSluice.cancel`."""
        return await self.ask(http_wire.cancel(parse_job_id(job_id)))

    async def retry(self, job_id: UUID | str) -> AsyncJobHandle:
        """Try a failed, cancelled or expired job once more; raise as `AsyncSluice.retry`."""
        wanted = parse_job_id(job_id)
        await self.ask(http_wire.retry(wanted))
        return AsyncHttpJobHandle(self, wanted)

    async def list_jobs(self, **filters: Unpack[JobFilters]) -> list[JobSummary]:
        """List the jobs that the key may read, newest first; raise as `AsyncSluice.list_jobs`."""
        return await self.ask(http_wire.list_jobs(filters))

    def replies(
        self,
        channel: str,
        group: str,
        *,
        consumer: str | None = None,
        timeout: float | None = None,
        redeliver_after_s: float = 60.0,
        batch: int = BATCH,
    ) -> NoReturn:
        """Raise `SluiceError`: shared reply channels are read from Redis."""
        del group, consumer, timeout, redeliver_after_s, batch
        raise http_wire.not_here(f"the shared reply channel {channel!r}")

    async def set_budget(
        self,
        account: str | UUID,
        *,
        use_case: str | None = None,
        daily: Limit = ...,
        monthly: Limit = ...,
        thresholds: Sequence[int] | None = None,
    ) -> Budget:
        """Set what an account may spend; raise as `AsyncSluice.set_budget`."""
        return await self.ask(http_wire.set_budget(account, use_case, daily, monthly, thresholds))

    async def budgets(self, account: str | UUID | None = None) -> list[Budget]:
        """Return the budgets of an account, or of all that the key may read."""
        return await self.ask(http_wire.budgets(account))

    async def clear_budget(self, account: str | UUID, use_case: str | None = None) -> None:
        """Take a budget away; raises `NotFound` if there is none."""
        await self.ask(http_wire.clear_budget(account, use_case))

    async def close(self) -> None:
        """Close all connections; whoever still waits for a result gets a `SluiceError`."""
        pools = self.forget_lines()
        self._closed = True
        if pools is not None:
            await pools.close()

    def forget_lines(self) -> _Pools | None:  # type: ignore[override]  # its own kind of lines
        """Let go of what is open, as a forked process does; see `forking`."""
        pools, self._pools = self._pools, None
        return pools

    async def ask(self, call: Call[T]) -> T:
        """Send a request, again while that may help.

        Raises `QueueUnavailable` if the server cannot be reached, and what the answer says.
        """
        try:
            trying = AsyncRetrying(sleep=self.pause, **http_wire.repeat(call, self.patience_s))
            return await trying(self.send, call)
        except Busy as busy:
            raise busy.error from None
        except httpx2.TransportError as error:
            raise http_wire.unanswered(self.url, error) from error

    async def send(self, call: Call[T], left_s: float | None = None) -> T:
        """Send a request once, for a caller with so much time left.

        Raises `Busy`, `httpx2.TransportError`, and what the answer says.
        """
        pools = self._connected()
        client = pools.waiting if call.waits else pools.quick
        with self._until_closed():
            response = await client.request(
                call.method,
                call.path,
                params=call.parameters,
                content=call.content,
                timeout=call.timeout(left_s),
            )
        http_wire.check(self.url, response)
        return call.read(response.content)

    async def stream(self, job_id: UUID, waiting: Waiting) -> AsyncGenerator[bytes, None]:
        """Yield what the server sends of a job's events, until it or the connection ends.

        Raises `Busy`, `httpx2.TransportError`, and what the answer says.
        """
        left_s = waiting.left_s()
        call = http_wire.events(job_id, left_s)
        client = self._connected().waiting
        with self._until_closed():
            async with client.stream(
                call.method,
                call.path,
                params=call.parameters,
                headers={"Accept": "text/event-stream", "Last-Event-ID": waiting.last_id},
                timeout=call.timeout(left_s),
            ) as response:
                if not response.is_success:
                    await response.aread()
                http_wire.check(self.url, response)
                waiting.heard()
                async for piece in response.aiter_bytes():
                    yield piece

    async def pause(self, seconds: float) -> None:
        """Wait so long, or until the client is closed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._connected().closing.wait()

    @contextmanager
    def _until_closed(self) -> Iterator[None]:
        """Say what it is where a connection breaks because the client was closed."""
        try:
            yield
        except (httpx2.TransportError, RuntimeError) as error:
            if self._closed:
                raise http_wire.closed() from error
            raise

    def _connected(self) -> _Pools:
        if self._closed:
            raise http_wire.closed()
        if self._pools is None:
            with opening:
                self._pools = _Pools(self._options)
        return self._pools

    def _open(self) -> NoReturn:
        raise http_wire.not_here("this")


class AsyncHttpJobHandle(AsyncJobHandle):
    """A job that was accepted over HTTP."""

    def __init__(
        self, client: AsyncHttpSluice, job_id: UUID, *, answer_type: type[BaseModel] | None = None
    ) -> None:
        super().__init__(client, job_id, answer_type=answer_type)
        self._http = client

    async def _events(
        self,
        last_id: str,
        timeout: float | None,  # noqa: ASYNC109 - the interface of the other handle
        *,
        terminal_only: bool,
    ) -> AsyncGenerator[Event, None]:
        waiting = Waiting(self._http.url, self.id, last_id, timeout, self._http.patience_s)
        async with aclosing(
            self._ending(waiting) if terminal_only else self._stream(waiting)
        ) as found:
            async for event in found:
                yield expecting(event, self._answer_type)

    async def _ending(self, waiting: Waiting) -> AsyncGenerator[Event, None]:
        while True:
            began_at, wait_s = time.monotonic(), waiting.wait_s()
            try:
                event = await self._http.send(http_wire.ending(self.id, wait_s), waiting.left_s())
            except (httpx2.TransportError, Busy) as error:
                await self._http.pause(waiting.pause_after(error))
                continue
            if event is not None:
                yield event
                return
            waiting.heard()
            if time.monotonic() - began_at < wait_s / 2:  # the server is about to stop
                await self._http.pause(waiting.pause_after())
            else:
                waiting.progressed()
                waiting.check_deadline()

    async def _stream(self, waiting: Waiting) -> AsyncGenerator[Event, None]:
        while True:
            text = EventText()
            failure: httpx2.TransportError | Busy | None = None
            try:
                async with aclosing(self._http.stream(self.id, waiting)) as pieces:
                    async for piece in pieces:
                        for event in text.feed(piece):
                            waiting.last_id = event.id
                            yield event
                            if event.terminal:
                                return
                        if text.is_alive:
                            waiting.progressed()
                        if text.over:
                            return
            except (httpx2.TransportError, Busy) as error:
                failure = error
            await self._http.pause(waiting.pause_after(failure))

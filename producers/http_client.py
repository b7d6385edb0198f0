"""The client for threads over HTTP: `Sluice("https://…", api_key=…)`.

It has the interface of `Sluice` and raises the same errors; what needs the database itself (a
transaction of the caller's, batches, shared reply channels) it refuses in one sentence.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar, Unpack
from uuid import UUID
from weakref import WeakSet

import httpx2
from pydantic import BaseModel
from tenacity import Retrying

from sluicegate.producers import http_wire
from sluicegate.producers.budgeting import Limit
from sluicegate.producers.client import Sluice
from sluicegate.producers.forking import opening, register
from sluicegate.producers.handles import JobHandle
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
        self._lock = threading.Lock()
        self._lines: WeakSet[Any] = WeakSet()
        #: Set when the client is closed.
        self.closing = threading.Event()
        self.quick = httpx2.Client(**options, limits=http_wire.pool(http_wire.QUICK_CONNECTIONS))
        self.waiting = httpx2.Client(
            **options, limits=http_wire.pool(http_wire.WAITING_CONNECTIONS)
        )

    def note(self, step: str, info: Mapping[str, Any]) -> None:
        """Remember each line that a request has opened, as httpx2 tells of it."""
        if step.endswith(("connect_tcp.complete", "start_tls.complete")):
            line = info["return_value"]
            with self._lock:
                self._lines.add(line)
            if self.closing.is_set():
                _shut(line)

    def close(self) -> None:
        self.closing.set()
        with self._lock:
            lines = list(self._lines)
        for line in lines:
            _shut(line)
        self.quick.close()
        self.waiting.close()


def _shut(line: Any) -> None:
    """End a line on which another thread may be reading, which closing it would not."""
    with suppress(OSError):  # ended already
        # Not TLS's own way, which would take from that thread what it reads with.
        socket.socket.shutdown(line.get_extra_info("socket"), socket.SHUT_RDWR)


class HttpSluice(Sluice):
    """A `Sluice` that talks to `sluice http`. Threads may share one; it connects at first use.

    settings: the server's address, by the name that `Sluice` has for it. api_key: the key, or a
    token; None on a machine of your own, before `sluice up --http` with `--sandbox`. account: name
    or id of the account that it acts for, of service keys and administrators; others have their
    own. patience_s: how long it goes on trying while the server does not answer. verify: the
    `ssl.SSLContext` to check the server's certificate with, where the usual one will not do.
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

    def submit(
        self,
        use_case: str | None,
        prompt: Prompt,
        *,
        connection: object = None,
        **options: Unpack[JobOptions],
    ) -> JobHandle:
        """Accept one job; raise as `Sluice.submit`. It is sent again until it is known to be there.

        Without an `idempotency_key` it gets one, so that a lost answer never makes two jobs.
        """
        http_wire.refuse_connection(connection)
        request = read_request(use_case, prompt, options)
        job_id = self.ask(http_wire.submit(request))
        return HttpJobHandle(self, job_id, answer_type=request.answer_type)

    def submit_many(
        self,
        use_case: str | None,
        jobs: Iterable[Prompt | Mapping[str, Any]],
        *,
        connection: object = None,
        **common: Unpack[JobOptions],
    ) -> list[JobHandle]:
        """Accept many jobs, all or none; raise as `Sluice.submit_many`."""
        http_wire.refuse_connection(connection)
        requests = read_requests(use_case, jobs, common)
        if not requests:
            return []
        ids = self.ask(http_wire.submit_many(requests))
        return [
            HttpJobHandle(self, job_id, answer_type=request.answer_type)
            for request, job_id in zip(requests, ids, strict=True)
        ]

    def submit_batch(self, *_args: object, **_options: object) -> NoReturn:
        """Raise `SluiceError`: batches are stored beside the database."""
        raise http_wire.not_here("a batch")

    def batch(self, batch_id: UUID | str) -> NoReturn:
        """Raise `SluiceError`: batches are read beside the database."""
        raise http_wire.not_here(f"batch {batch_id}")

    def get(self, job_id: UUID | str) -> JobView:
        """Look at a job; raises `NotFound`."""
        return self.ask(http_wire.look(parse_job_id(job_id)))

    def handle(
        self, job_id: UUID | str, response_format: type[BaseModel] | None = None
    ) -> JobHandle:
        """Return a handle of a job that was accepted before, here or elsewhere."""
        return HttpJobHandle(self, parse_job_id(job_id), answer_type=response_format)

    def cancel(self, job_id: UUID | str) -> State:
        """Cancel a job; return its state, as `Sluice.cancel`."""
        return self.ask(http_wire.cancel(parse_job_id(job_id)))

    def retry(self, job_id: UUID | str) -> JobHandle:
        """Try a failed, cancelled or expired job once more; raise as `Sluice.retry`."""
        wanted = parse_job_id(job_id)
        self.ask(http_wire.retry(wanted))
        return HttpJobHandle(self, wanted)

    def list_jobs(self, **filters: Unpack[JobFilters]) -> list[JobSummary]:
        """List the jobs that the key may read, newest first; raise as `Sluice.list_jobs`."""
        return self.ask(http_wire.list_jobs(filters))

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

    def set_budget(
        self,
        account: str | UUID,
        *,
        use_case: str | None = None,
        daily: Limit = ...,
        monthly: Limit = ...,
        thresholds: Sequence[int] | None = None,
    ) -> Budget:
        """Set what an account may spend; raise as `Sluice.set_budget`."""
        return self.ask(http_wire.set_budget(account, use_case, daily, monthly, thresholds))

    def budgets(self, account: str | UUID | None = None) -> list[Budget]:
        """Return the budgets of an account, or of all that the key may read."""
        return self.ask(http_wire.budgets(account))

    def clear_budget(self, account: str | UUID, use_case: str | None = None) -> None:
        """Take a budget away; raises `NotFound` if there is none."""
        self.ask(http_wire.clear_budget(account, use_case))

    def close(self) -> None:
        """Close all connections; whoever still waits for a result gets a `SluiceError`."""
        with opening:
            pools = self.forget_lines()
            self._closed = True
        if pools is not None:
            pools.close()

    def forget_lines(self) -> _Pools | None:  # type: ignore[override]  # its own kind of lines
        """Let go of what is open, as a forked process does; see `forking`."""
        pools, self._pools = self._pools, None
        return pools

    def ask(self, call: Call[T]) -> T:
        """Send a request, again while that may help.

        Raises `QueueUnavailable` if the server cannot be reached, and what the answer says.
        """
        try:
            trying = Retrying(sleep=self.pause, **http_wire.repeat(call, self.patience_s))
            return trying(lambda: self.send(call))
        except Busy as busy:
            raise busy.error from None
        except httpx2.TransportError as error:
            raise http_wire.unanswered(self.url, error) from error

    def send(self, call: Call[T], left_s: float | None = None) -> T:
        """Send a request once, for a caller with so much time left.

        Raises `Busy`, `httpx2.TransportError`, and what the answer says.
        """
        pools = self._connected()
        client = pools.waiting if call.waits else pools.quick
        with self._until_closed():
            response = client.request(
                call.method,
                call.path,
                params=call.parameters,
                content=call.content,
                timeout=call.timeout(left_s),
                extensions={"trace": pools.note},
            )
        http_wire.check(self.url, response)
        return call.read(response.content)

    def stream(self, job_id: UUID, waiting: Waiting) -> Iterator[bytes]:
        """Yield what the server sends of a job's events, until it or the connection ends.

        Raises `Busy`, `httpx2.TransportError`, and what the answer says.
        """
        left_s = waiting.left_s()
        call = http_wire.events(job_id, left_s)
        pools = self._connected()
        with (
            self._until_closed(),
            pools.waiting.stream(
                call.method,
                call.path,
                params=call.parameters,
                headers={"Accept": "text/event-stream", "Last-Event-ID": waiting.last_id},
                timeout=call.timeout(left_s),
                extensions={"trace": pools.note},
            ) as response,
        ):
            if not response.is_success:
                response.read()
            http_wire.check(self.url, response)
            waiting.heard()
            yield from response.iter_bytes()

    def pause(self, seconds: float) -> None:
        """Wait so long, or until the client is closed."""
        self._connected().closing.wait(seconds)

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
        pools = self._pools
        if pools is not None:
            return pools
        with opening:
            if self._closed:
                raise http_wire.closed()
            if self._pools is None:
                self._pools = _Pools(self._options)
            return self._pools

    def _open(self) -> NoReturn:
        raise http_wire.not_here("this")


class HttpJobHandle(JobHandle):
    """A job that was accepted over HTTP."""

    def __init__(
        self, client: HttpSluice, job_id: UUID, *, answer_type: type[BaseModel] | None = None
    ) -> None:
        super().__init__(client, job_id, answer_type=answer_type)
        self._http = client

    def _events(
        self, last_id: str, timeout: float | None, *, terminal_only: bool
    ) -> Iterator[Event]:
        waiting = Waiting(self._http.url, self.id, last_id, timeout, self._http.patience_s)
        found = self._ending(waiting) if terminal_only else self._stream(waiting)
        for event in found:
            yield expecting(event, self._answer_type)

    def _ending(self, waiting: Waiting) -> Iterator[Event]:
        while True:
            began_at, wait_s = time.monotonic(), waiting.wait_s()
            try:
                event = self._http.send(http_wire.ending(self.id, wait_s), waiting.left_s())
            except (httpx2.TransportError, Busy) as error:
                self._http.pause(waiting.pause_after(error))
                continue
            if event is not None:
                yield event
                return
            waiting.heard()
            if time.monotonic() - began_at < wait_s / 2:  # the server is about to stop
                self._http.pause(waiting.pause_after())
            else:
                waiting.progressed()
                waiting.check_deadline()

    def _stream(self, waiting: Waiting) -> Iterator[Event]:
        while True:
            text = EventText()
            failure: httpx2.TransportError | Busy | None = None
            try:
                for piece in self._http.stream(self.id, waiting):
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
            self._http.pause(waiting.pause_after(failure))

"""Handles: a job that was accepted, to be waited for, followed and cancelled."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING
from uuid import UUID

from pydantic import BaseModel

from sluicegate.producers.outcomes import (
    check_timeout,
    expecting,
    not_committed,
    result_of,
    timed_out,
)
from sluicegate.shared.errors import NotFound
from sluicegate.shared.events import Event
from sluicegate.shared.jobs import Result, State
from sluicegate.shared.replies import parse_event_id

if TYPE_CHECKING:
    from sluicegate.producers.async_client import AsyncSluice
    from sluicegate.producers.client import Sluice


class JobHandle:
    """A job that was accepted."""

    def __init__(
        self,
        client: Sluice,
        job_id: UUID,
        *,
        fresh_until: float = 0.0,
        answer_type: type[BaseModel] | None = None,
        joined: bool = False,
    ) -> None:
        self.id = job_id
        self._client = client
        # A job that was submitted just now has not ended yet: its row need not be looked at.
        self._fresh_until = fresh_until
        self._answer_type = answer_type
        self._joined = joined

    def __repr__(self) -> str:
        return f"JobHandle({str(self.id)!r})"

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the answer, at most `timeout` seconds.

        Raises `JobFailed`, `JobExpired`, `JobCancelled`; `ResultTimeout`, which cancels nothing
        and says so if no server answered meanwhile; `NotFound` if there is no such job, or the
        transaction it is in has not committed; `Purged` if the answer is not kept any more.
        """
        (event,) = self._events("0", check_timeout(timeout), terminal_only=True)
        return result_of(event)

    def cancel(self) -> State:
        """Cancel the job; see `Sluice.cancel`."""
        return self._client.cancel(self.id)

    def events(self, last_id: str = "0", timeout: float | None = None) -> Iterator[Event]:
        """Iterate over the job's events after `last_id`, until the terminal one.

        Raises `ResultTimeout` when `timeout` seconds have passed; `NotFound`.
        """
        parse_event_id(last_id)
        return self._events(last_id, check_timeout(timeout), terminal_only=False)

    def _events(
        self, last_id: str, timeout: float | None, *, terminal_only: bool
    ) -> Iterator[Event]:
        now = time.monotonic()
        deadline = None if timeout is None else now + timeout
        reader = self._client.reader
        subscription = reader.subscribe(
            self.id,
            last_id,
            terminal_only=terminal_only,
            check_after_s=max(0.0, self._fresh_until - now),
        )
        try:
            while (event := reader.next(subscription, deadline)) is not None:
                yield expecting(event, self._answer_type)
        except TimeoutError:
            unheard = reader.unheard(subscription)
            raise timed_out(self.id, timeout, unheard=unheard) from None
        except NotFound:
            if self._joined:
                raise not_committed(self.id) from None
            raise
        finally:
            reader.unsubscribe(subscription)


class AsyncJobHandle:
    """A job that was accepted."""

    def __init__(
        self,
        client: AsyncSluice,
        job_id: UUID,
        *,
        fresh_until: float = 0.0,
        answer_type: type[BaseModel] | None = None,
        joined: bool = False,
    ) -> None:
        self.id = job_id
        self._client = client
        # A job that was submitted just now has not ended yet: its row need not be looked at.
        self._fresh_until = fresh_until
        self._answer_type = answer_type
        self._joined = joined

    def __repr__(self) -> str:
        return f"AsyncJobHandle({str(self.id)!r})"

    async def result(self, timeout: float | None = None) -> Result:  # noqa: ASYNC109 - the error is ours and tells that nothing was cancelled
        """Wait for the answer, at most `timeout` seconds.

        Raises `JobFailed`, `JobExpired`, `JobCancelled`; `ResultTimeout`, which cancels nothing
        and says so if no server answered meanwhile; `NotFound` if there is no such job, or the
        transaction it is in has not committed; `Purged` if the answer is not kept any more.
        """
        return result_of(await self.ending(timeout))

    async def ending(self, timeout: float | None = None) -> Event:  # noqa: ASYNC109 - as above
        """Wait for the terminal event, whatever it says; raises `ResultTimeout`, `NotFound`."""
        seconds = check_timeout(timeout)
        (event,) = [one async for one in self._events("0", seconds, terminal_only=True)]
        return event

    async def cancel(self) -> State:
        """Cancel the job; see `AsyncSluice.cancel`."""
        return await self._client.cancel(self.id)

    def events(
        self, last_id: str = "0", timeout: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """Iterate over the job's events after `last_id`, until the terminal one.

        Raises `ResultTimeout` when `timeout` seconds have passed; `NotFound`. Leave it early by
        way of `contextlib.aclosing`.
        """
        parse_event_id(last_id)
        return self._events(last_id, check_timeout(timeout), terminal_only=False)

    async def _events(
        self,
        last_id: str,
        timeout: float | None,  # noqa: ASYNC109 - as above
        *,
        terminal_only: bool,
    ) -> AsyncGenerator[Event, None]:
        now = time.monotonic()
        deadline = None if timeout is None else now + timeout
        reader = self._client.reader
        subscription = await reader.subscribe(
            self.id,
            last_id,
            terminal_only=terminal_only,
            check_after_s=max(0.0, self._fresh_until - now),
        )
        try:
            while (event := await reader.next(subscription, deadline)) is not None:
                yield expecting(event, self._answer_type)
        except TimeoutError:
            unheard = reader.unheard(subscription)
            raise timed_out(self.id, timeout, unheard=unheard) from None
        except NotFound:
            if self._joined:
                raise not_committed(self.id) from None
            raise
        finally:
            reader.unsubscribe(subscription)

"""The calls that are under way, so that one of them can be cut off and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar
from uuid import UUID

T = TypeVar("T")


class CutOffError(Exception):
    """The call was cut off because nobody wants its answer any more."""


class Calls:
    """Calls by job. Each runs in the task that makes it: there is none of its own."""

    def __init__(self) -> None:
        self._under_way: dict[UUID, asyncio.Task[Any]] = {}
        self._cut_off: set[asyncio.Task[Any]] = set()

    async def make(self, job_id: UUID, call: Coroutine[Any, Any, T]) -> T:
        """Await a call; raise `CutOffError` if it is cut off, in which case the task goes on.

        A task that is cancelled from elsewhere, too, stays cancelled.
        """
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call is made in a task")
        self._under_way[job_id] = task
        try:
            return await call
        except asyncio.CancelledError:
            if task in self._cut_off and task.cancelling() == 1:
                raise CutOffError from None
            raise
        finally:
            # A worker that was declared dead may by now call for the same job again.
            if self._under_way.get(job_id) is task:
                del self._under_way[job_id]
            if task in self._cut_off:
                self._cut_off.discard(task)
                task.uncancel()

    def cut_off(self, job_id: UUID) -> bool:
        """Cut off the job's call; False if none is under way. Once is enough, more does nothing."""
        task = self._under_way.get(job_id)
        if task is None:
            return False
        if task not in self._cut_off:
            self._cut_off.add(task)
            task.cancel()
        return True

"""Telling readers and workers what was steered. Postgres has it already: they find out anyway."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

import redis
import redis.asyncio
from celery import Celery
from kombu.exceptions import KombuError

from sluicegate.producers.steering import Command
from sluicegate.shared.celery_app import CANCEL_JOBS
from sluicegate.shared.errors import QueueUnavailable

log = logging.getLogger(__name__)

_ACQUIRE_S = 5.0


def tell_channel(client: redis.Redis, commands: Sequence[Command]) -> None:
    """Run commands on a reply channel; raise `QueueUnavailable` if Redis does not do them."""
    if not commands:
        return
    try:
        pipeline: Any
        with client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            _check(pipeline.execute(raise_on_error=False))
    except (redis.RedisError, OSError) as error:
        raise QueueUnavailable(f"Redis did not answer: {error}; try again") from error


async def tell_channel_async(client: redis.asyncio.Redis, commands: Sequence[Command]) -> None:
    """Do as `tell_channel`, on the event loop."""
    if not commands:
        return
    try:
        async with client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            _check(await pipeline.execute(raise_on_error=False))
    except (redis.RedisError, OSError) as error:
        raise QueueUnavailable(f"Redis did not answer: {error}; try again") from error


def _check(outcomes: Iterable[Any]) -> None:
    for outcome in outcomes:
        # An id that is not the greatest: this was said before.
        if isinstance(outcome, Exception) and "equal or smaller" not in str(outcome):
            raise outcome


def note_untold(error: QueueUnavailable) -> None:
    """Log that a reply channel has no terminal event: readers look at the row itself."""
    log.warning("the end of a job was not announced, readers find it in Postgres: %s", error)


def tell_worker(app: Celery, worker: str, job_ids: Sequence[UUID]) -> None:
    """Have a worker look at once for jobs to be cancelled; its next beat would find them.

    Blocks on the network, once: Celery's own `broadcast` would wait for a lost broker for ever.
    """
    control: Any = app.control
    exchange = control.mailbox.exchange
    command = {
        "method": CANCEL_JOBS,
        "arguments": {"job_ids": [str(job_id) for job_id in job_ids]},
        "destination": [worker],
    }
    try:
        with app.producer_pool.acquire(block=True, timeout=_ACQUIRE_S) as producer:
            producer.publish(
                command,
                exchange=exchange.name,
                declare=[exchange],
                serializer="json",
                retry=False,
            )
    except (KombuError, redis.RedisError, OSError) as error:
        log.warning("worker %s was not told, its next beat will find out: %s", worker, error)

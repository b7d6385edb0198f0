"""The one Celery configuration of producers, workers, the sweep and Flower."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import redis
from celery import Celery
from celery.app.amqp import AMQP
from kombu.exceptions import KombuError
from kombu.pools import ProducerPool
from kombu.transport.redis import Channel

from sluicegate.shared.errors import QueueUnavailable
from sluicegate.shared.ids import new_id
from sluicegate.shared.jobs import Lane
from sluicegate.shared.queues import POOLS, declare, queue_name
from sluicegate.shared.settings import Settings

#: The one task there is: it carries job ids and nothing else.
RUN_JOBS = "sluicegate.run_jobs"

#: The remote control command by which a worker hears at once of jobs to be cancelled.
CANCEL_JOBS = "sluice_cancel"

#: Header of a message: the row's `published_at`, so that the sweep can tell a backlog's age.
PUBLISHED_AT = "published_at"

#: The use cases that ship. Operators add others; their queues are declared when first used.
USE_CASES = ("draft", "summary", "complex", "vision", "voice", "general")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobMessage:
    """A hint that these jobs are ready. Losing or repeating one is harmless."""

    queue: str
    job_ids: tuple[UUID, ...]
    published_at: datetime
    #: Names the delivery of a single job after the job itself, so that Flower shows it.
    fence: int = 0

    @property
    def task_id(self) -> str:
        """The job's own id where there is one; a repeat after a fence has another."""
        if len(self.job_ids) > 1:
            return str(new_id())
        return str(self.job_ids[0]) + (f".{self.fence}" if self.fence else "")

    def describe(self) -> str:
        """Say in a word which jobs these are."""
        first, count = self.job_ids[0], len(self.job_ids)
        return str(first) if count == 1 else f"{count} jobs from {first}"


class _Amqp(AMQP):
    _producer_pool: ProducerPool | None = None

    @property
    def producer_pool(self) -> ProducerPool:
        if self._producer_pool is None:
            pool: Any = self.app.pool
            self._producer_pool = ProducerPool(pool, limit=pool.limit)
        return self._producer_pool


class _App(Celery):
    """Celery with a broker pool of its own.

    Celery's is one for the whole process: a back end's app would get our limit, and a forked
    child would find the parent's sockets in it.
    """

    amqp_cls = f"{__name__}:_Amqp"
    _pool: Any = None

    def __init__(self, *args: Any, **options: Any) -> None:
        # Threads that find no pool would make one each, and all but one would never be closed.
        self._making_pool = threading.Lock()
        super().__init__(*args, **options)

    @property
    def pool(self) -> Any:
        with self._making_pool:
            if self._pool is None:
                self._pool = self.connection_for_write().Pool(limit=self.conf.broker_pool_limit)
            return self._pool

    def close(self) -> None:
        """Close the connections to the broker too."""
        pool = self._pool
        super().close()
        if pool is not None:
            pool.force_close_all()


def make_celery(settings: Settings, **overrides: Any) -> Celery:
    """Build the app; `overrides` are Celery settings, for tests.

    It is not set as the current app: a back end's own Celery stays what it was.
    """
    app = _App("sluicegate", set_as_current=False, broker=settings.redis_dsn)
    names = [
        queue_name(use_case, pool, lane)
        for use_case in USE_CASES
        for pool in POOLS
        for lane in Lane
    ]
    app.conf.update(
        # Results live in Postgres; a backend would cost a SETEX and a PUBLISH for every state.
        result_backend=None,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        # Our messages are ids and times: nothing that needs pickle may be accepted.
        task_serializer="json",
        accept_content=["json"],
        task_queues=[declare(name) for name in names],
        # A use case that an operator adds gets its queue when it is first used.
        task_create_missing_queues=True,
        task_default_queue=queue_name("general", "openai", Lane.INTERACTIVE),
        task_default_exchange="",
        # A message is acknowledged once its settlement has committed, whatever its outcome:
        # what is left to do is in Postgres.
        task_acks_late=True,
        task_acks_on_failure_or_timeout=True,
        task_reject_on_worker_lost=False,
        # Our own pool: Celery runs unchanged in greenlets on an event loop.
        worker_pool="sluicegate.workers.pool:TaskPool",
        # One message waits unclaimed; the pool raises this by one for each claimed message.
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        # Calls go on while the broker is away: their result goes to Postgres, not through it.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # Celery's limits hold for one worker and block its prefetch; ours are in Redis.
        worker_disable_rate_limits=True,
        # Retries of up to 30 s wait in a worker's memory: bound how many.
        worker_eta_task_limit=2000,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        # Three events a task cost a quarter of the message: Flower switches them on while it
        # watches. Those that nobody reads must not pile up.
        worker_send_task_events=False,
        event_queue_ttl=10.0,
        event_queue_expires=60.0,
        broker_connection_retry_on_startup=True,
        # A worker outlives any outage of the broker: its calls go on, and there is nothing else.
        broker_connection_max_retries=None,
        # Every queue has the same priority: lanes are queues of their own.
        task_queue_max_priority=None,
        broker_transport_options={
            # Who has which job is in Postgres, and a dead worker's jobs are taken from there. To
            # note it in Redis too would hold up every message for a round trip.
            "ack_emulation": False,
            "global_keyprefix": settings.redis_prefix,
            "priority_steps": [0],
            # Without these a publish to a dead server hangs for ever.
            "socket_timeout": settings.command_timeout_s,
            "socket_connect_timeout": settings.connect_timeout_s,
            "socket_keepalive": True,
            "health_check_interval": 25,
            # A publisher does not wait for a broker that refuses: what it has to say is in
            # Postgres, and the sweep says it. Workers reconnect by a setting of their own.
            "max_retries": 1,
            "interval_start": 0,
        },
        broker_pool_limit=4,
        # A publish that fails is reported at once: the row is there, and the sweep publishes it.
        task_publish_retry=False,
        enable_utc=True,
        timezone="UTC",
    )
    app.conf.update(overrides)
    return app


def publish(app: Celery, messages: Sequence[JobMessage]) -> None:
    """Publish hints for jobs that are committed; raise `QueueUnavailable` if the broker is away.

    Blocks on the network. After an error some may have been sent: publish them again.
    """
    try:
        with app.producer_pool.acquire(block=True, timeout=30) as producer:
            keep_one_client(producer.channel)
            with producer.batch() if len(messages) > 1 else nullcontext():  # type: ignore[attr-defined]  # newer than the stubs
                for message in messages:
                    send(app, message, producer=producer)
    except (KombuError, redis.RedisError, OSError) as error:
        raise QueueUnavailable(f"the message broker did not answer: {error}") from error


def keep_one_client(channel: Any) -> None:
    """Have all operations of a channel of Redis' share a client, from now on.

    Kombu makes one for each, two a message: a quarter of what a message costs.
    """
    if isinstance(channel, Channel) and "conn_or_acquire" not in vars(channel):
        with channel.conn_or_acquire() as shared:
            vars(channel)["conn_or_acquire"] = lambda client=None: nullcontext(client or shared)


def send(
    app: Celery, message: JobMessage, *, producer: Any, countdown: float | None = None
) -> None:
    """Publish one message with this producer, to the queue itself; to run after `countdown` s."""
    app.send_task(
        RUN_JOBS,
        args=([str(job_id) for job_id in message.job_ids],),
        task_id=message.task_id,
        producer=producer,
        countdown=countdown or None,
        # To the queue itself: after a flush an exchange would drop it without an error.
        queue=declare(message.queue),  # type: ignore[arg-type]  # the stubs know names alone
        declare=(),  # nothing to bind: on Redis a queue is there once something is in it
        headers={PUBLISHED_AT: message.published_at.isoformat()},
        # Into events and Flower: which job, nothing of what is in it.
        argsrepr=message.describe(),
        kwargsrepr="{}",
        add_to_parent=False,
    )

"""The sweep process: its loops, each bounded, each safe to run in several processes at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
from celery import Celery
from redis.exceptions import RedisError
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from sluicegate.shared.alerts import ALERT_CHANNEL
from sluicegate.shared.bodies import Bodies
from sluicegate.shared.budgets import BUDGET_CHANNEL
from sluicegate.shared.celery_app import JobMessage, make_celery, publish
from sluicegate.shared.database import (
    BY_SIZE,
    CONNECTION_ERRORS,
    check_schema,
    connect_options,
    make_async_engine,
)
from sluicegate.shared.errors import QueueUnavailable
from sluicegate.shared.gate_changes import GATE_CHANNEL
from sluicegate.shared.jobs import Lane, State
from sluicegate.shared.queues import POOLS, STAGE_CHANNEL, queue_name
from sluicegate.shared.redis_client import make_async_redis
from sluicegate.shared.reply_channels import OUTBOX_CHANNEL
from sluicegate.shared.secrets import Keyring
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import Database
from sluicegate.shared.tables import use_cases
from sluicegate.workers.budget_copying import BudgetCopying
from sluicegate.workers.journal import Journal
from sluicegate.workers.replies import Replies
from sluicegate.workers.settlement import Settled, Settlement
from sluicegate.workers.sweep.alerter import Alerter
from sluicegate.workers.sweep.canceller import Canceller
from sluicegate.workers.sweep.deliverer import Deliverer
from sluicegate.workers.sweep.endings import tell_settled
from sluicegate.workers.sweep.expirer import Expirer
from sluicegate.workers.sweep.poster import SIZE, Poster, Terms
from sluicegate.workers.sweep.purger import Purger
from sluicegate.workers.sweep.reconciler import Reconciler
from sluicegate.workers.sweep.recorder import Recorder
from sluicegate.workers.sweep.republisher import Republisher
from sluicegate.workers.sweep.rescuer import Rescuer
from sluicegate.workers.sweep.stager import Stager
from sluicegate.workers.sweep.waker import Waker
from sluicegate.workers.webhook import WebhookClient

log = logging.getLogger(__name__)

#: How long the copies that are under way are waited for at the end.
_FINISH_S = 2.0
#: How long a loop that is woken waits for more of what woke it.
_GATHER_S = 0.02


class Sweep:
    """Owns the connections and runs the loops until it is cancelled."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app: Celery = make_celery(settings)
        self._engine = make_async_engine(settings, application_name="sluice sweep")
        self._db = Database(settings, application_name="sluice sweep", size=4, planner=BY_SIZE)
        self._redis = make_async_redis(settings)
        #: What wakes a loop before its time, by the Postgres channel on which it is said.
        self._woken = {
            name: asyncio.Event()
            for name in (
                STAGE_CHANNEL,
                OUTBOX_CHANNEL,
                GATE_CHANNEL,
                ALERT_CHANNEL,
                BUDGET_CHANNEL,
            )
        }
        #: What was told is posted, and who is done may post more.
        self._posting = asyncio.Event()
        self._replies = Replies(settings, self._redis)
        self._bodies = Bodies.of(settings)
        self._journal = Journal(client=self._redis, prefix=settings.redis_prefix)
        self._copying = BudgetCopying(client=self._redis, settings=settings)
        self._rescuer = Rescuer(
            db=self._db,
            replies=self._replies,
            dead_after_s=settings.dead_after_s,
            told=self._copying.told,
        )
        self._expirer = Expirer(db=self._db, replies=self._replies)
        self._canceller = Canceller(db=self._db)
        self._stager = Stager(
            db=self._db,
            ahead_jobs=settings.stage_ahead_jobs,
            chunk_size=settings.chunk_size,
        )
        self._republisher = Republisher(
            db=self._db,
            client=self._redis,
            prefix=settings.redis_prefix,
            lost_after_s=settings.lost_after_s,
            chunk_size=settings.chunk_size,
        )
        self._deliverer = Deliverer(
            db=self._db,
            client=self._redis,
            prefix=settings.redis_prefix,
            channel_max=settings.reply_channel_max,
        )
        self._recorder = Recorder(db=self._db, client=self._redis, prefix=settings.redis_prefix)
        self._waker = Waker(db=self._db)
        self._alerter = Alerter(db=self._db, client=self._redis, prefix=settings.redis_prefix)
        self._poster = Poster(
            db=self._db,
            client=WebhookClient(
                deadline_s=settings.alert_deadline_s,
                private_urls=settings.alert_private_urls,
                size=SIZE,
            ),
            keyring=Keyring.of(settings),
            terms=Terms.of(settings),
            free=self._posting.set,
        )
        self._reconciler = Reconciler(db=self._db, client=self._redis, prefix=settings.redis_prefix)
        self._purger = Purger(
            db=self._db,
            client=self._redis,
            prefix=settings.redis_prefix,
            retention_s=settings.body_retention_s,
        )

    async def run(self) -> None:
        """Sweep until cancelled; raises at once if the schema is not this version's."""
        async with self._engine.connect() as connection:
            await connection.run_sync(check_schema)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._listen())
                group.create_task(self._loop("rescue", self.rescue))
                group.create_task(self._loop("stage", self.stage, wake=self._woken[STAGE_CHANNEL]))
                group.create_task(self._loop("republish", self.republish))
                group.create_task(self._loop("expire", self.expire))
                group.create_task(self._loop("cancel", self.cancel))
                group.create_task(
                    self._loop("deliver", self.deliver, wake=self._woken[OUTBOX_CHANNEL])
                )
                group.create_task(self._loop("record", self.record))
                group.create_task(self._loop("wake", self.wake, wake=self._woken[GATE_CHANNEL]))
                group.create_task(self._loop("tell", self.tell, wake=self._woken[ALERT_CHANNEL]))
                group.create_task(self._loop("post", self.post, wake=self._posting))
                group.create_task(
                    self._loop(
                        "reconcile",
                        self.reconcile,
                        wake=self._woken[BUDGET_CHANNEL],
                        every_s=self._settings.reconcile_interval_s,
                    )
                )
                group.create_task(self._loop("purge", self.purge))
        finally:
            await self.close()

    async def close(self) -> None:
        """Close every connection."""
        await self._copying.finish(_FINISH_S)
        await self._poster.close()
        await self._replies.close()
        await self._redis.aclose()
        await self._engine.dispose()
        await self._db.close()
        self._app.close()

    async def rescue(self) -> None:
        """Drain the journal, then look for dead workers: a paid answer must not be called lost."""
        await self._book_journal()
        await self._publish(await self._rescuer.round())

    async def stage(self) -> None:
        """Publish what is parked and due."""
        await self._publish(await self._stager.round(await self._queues()))

    async def republish(self) -> None:
        """Publish again what the broker has lost."""
        await self._publish(await self._republisher.round(await self._queues()))

    async def expire(self) -> None:
        """End what waited past its deadline."""
        await self._expirer.round()

    async def deliver(self) -> None:
        """Bring results to the shared reply channels."""
        if await self._deliverer.round():
            self._woken[OUTBOX_CHANNEL].set()

    async def cancel(self) -> None:
        """Cancel what waits in cancelled batches."""
        await self._canceller.round()

    async def record(self) -> None:
        """Take what happened at the gates to Postgres."""
        if await self._recorder.round():
            self._woken[GATE_CHANNEL].set()

    async def wake(self) -> None:
        """Make due what was held back by something that has passed."""
        if await self._waker.round(await self._queues()):
            self._woken[STAGE_CHANNEL].set()

    async def purge(self) -> None:
        """Remove requests and answers that have been kept long enough."""
        await self._purger.round()

    async def reconcile(self) -> None:
        """Make the copies of budgets equal to the budgets."""
        await self._reconciler.round()

    async def tell(self) -> None:
        """Tell alerts on the channels of their accounts."""
        if await self._alerter.round():
            self._posting.set()

    async def post(self) -> None:
        """Begin to post alerts to the URLs of their accounts."""
        await self._poster.round()

    async def _book_journal(self) -> None:
        try:
            moved = await self._journal.drain(self._db, self._copying.told)
        except (RedisError, ConnectionError) as error:
            log.warning("the journal cannot be read (%s)", type(error).__name__)
            return
        jobs = [entry["job_id"] for entry, _ in moved]
        await tell_settled(self._db, self._replies, jobs, self._bodies)
        await self._publish(
            [_message(entry, settled) for entry, settled in moved if _is_queued(entry, settled)]
        )

    async def _queues(self) -> list[str]:
        async with self._engine.connect() as connection:
            names = await connection.scalars(select(use_cases.c.name))
            return [
                queue_name(name, pool, lane) for name in names for pool in POOLS for lane in Lane
            ]

    async def _publish(self, messages: list[JobMessage]) -> None:
        if messages:
            await asyncio.to_thread(publish, self._app, messages)

    async def _loop(
        self,
        name: str,
        round_: Callable[[], Awaitable[None]],
        wake: asyncio.Event | None = None,
        every_s: float | None = None,
    ) -> None:
        interval_s = every_s or self._settings.sweep_interval_s
        while True:
            try:
                await round_()
            except (*CONNECTION_ERRORS, RedisError, QueueUnavailable) as error:
                # The next round does it: everything a round does is decided by rows, anew.
                log.warning("sweep: %s is put off (%s)", name, type(error).__name__)
            except (SQLAlchemyError, psycopg.Error):
                log.exception("sweep: %s met a defect; the other loops go on", name)
            if wake is None:
                await asyncio.sleep(interval_s)
                continue
            try:
                # `wait_for` would lose a cancellation that comes together with the wish.
                async with asyncio.timeout(interval_s):
                    await wake.wait()
            except TimeoutError:
                continue
            # What is said at about the same time is one round's work.
            await asyncio.sleep(_GATHER_S)
            wake.clear()

    async def _listen(self) -> None:
        """Wake loops when somebody has committed work for them; polling covers what is missed."""
        dsn, options = connect_options(self._settings, "sluice sweep listen", ())
        while True:
            try:
                connection: psycopg.AsyncConnection[Any] = await psycopg.AsyncConnection.connect(
                    dsn, autocommit=True, **options
                )
                async with connection:
                    for name in self._woken:
                        await connection.execute(f"LISTEN {name}")
                    async for notice in connection.notifies():
                        self._woken[notice.channel].set()
            except (psycopg.Error, OSError) as error:
                log.warning("sweep: not listening (%s)", type(error).__name__)
            await asyncio.sleep(self._settings.sweep_interval_s)


def _is_queued(entry: Settlement, settled: Settled) -> bool:
    # A job that is to be cancelled has ended instead.
    waits = entry["job_state"] == State.QUEUED and settled.body is None
    return waits and settled.published_at is not None


def _message(entry: Settlement, settled: Settled) -> JobMessage:
    assert settled.published_at is not None
    return JobMessage(
        queue=settled.queue,
        job_ids=(entry["job_id"],),
        published_at=settled.published_at,
        fence=entry["fence"],
    )

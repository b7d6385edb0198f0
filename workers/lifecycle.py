"""A worker process from start to stop: its parts, its loops, and what it leaves behind."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from uuid import UUID

import redis.asyncio
from celery import Celery

from sluicegate.shared import database
from sluicegate.shared.bodies import Bodies
from sluicegate.shared.catalogue import AsyncCatalogueCache, Catalogue
from sluicegate.shared.celery_app import JobMessage, send
from sluicegate.shared.database import BY_KEY, CONNECTION_ERRORS, check_schema, make_async_engine
from sluicegate.shared.errors import QueueUnavailable, SettingsError, UnknownPrice
from sluicegate.shared.messages import Usage
from sluicegate.shared.pricing import baseline_nano_usd
from sluicegate.shared.queues import parse_queue, pool_queues
from sluicegate.shared.redis_client import make_async_redis
from sluicegate.shared.secrets import Keyring
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import DATABASE_ERRORS, Database
from sluicegate.workers.budget_copying import BudgetCopying
from sluicegate.workers.calling import Caller
from sluicegate.workers.claims import Claims
from sluicegate.workers.dispatch import Dispatcher
from sluicegate.workers.estimates import TokenEstimates
from sluicegate.workers.execution import Again, Execution, Parts
from sluicegate.workers.gates import Gates
from sluicegate.workers.heartbeat import Heartbeat, Load
from sluicegate.workers.journal import Journal
from sluicegate.workers.placement import Placement
from sluicegate.workers.presence import Presence
from sluicegate.workers.providers.base import Adapters, ProviderError
from sluicegate.workers.publishing import Publisher
from sluicegate.workers.replies import Replies
from sluicegate.workers.retry import RetryPolicy
from sluicegate.workers.settlement import Settler
from sluicegate.workers.slots import Slots
from sluicegate.workers.sweep.rescuer import resolve_lost

log = logging.getLogger(__name__)

#: Connections to the providers above the jobs in flight, so that ours is never the limit.
_SPARE_CONNECTIONS = 50
_RELEASE_INTERVAL_S = 10.0
#: How often a worker looks for new use cases: a GET of Redis each time, seldom more.
_FOLLOW_INTERVAL_S = 1.0
_FINISH_S = 2.0
_GC_THRESHOLDS = (10_000, 50, 100)


class Served:
    """Which queues a worker serves, and so its pool and lane."""

    def __init__(self, queues: Sequence[str]) -> None:
        names = [parse_queue(name) for name in queues]
        pools = {name.pool for name in names}
        lanes = {name.lane for name in names}
        if len(pools) != 1:
            raise SettingsError(
                "a worker serves one pool: start it with -Q and queues of one pool, "
                "such as -Q draft.anthropic,summary.anthropic"
            )
        if len(lanes) != 1:
            raise SettingsError(
                "a worker serves one lane, so that bulk work never delays interactive work: "
                "start one process for the queues ending in .bulk and one for the others"
            )
        self.queues = list(queues)
        self.pool = pools.pop()
        self.lane = lanes.pop()


class Worker:
    """What a worker process holds beside Celery.

    consume: has Celery take messages of one more queue, and may be called on the loop; with it the
    worker follows the catalogue. None: it serves the queues that it was started with.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        app: Celery,
        name: str,
        served: Served,
        consume: Callable[[str], None] | None = None,
    ) -> None:
        self._settings = settings
        self._app = app
        self._name = name
        self._served = served
        self._unclaimed: dict[object, datetime] = {}
        self._draining = False
        self._started = False
        self._consume = consume
        self._chores: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Connect, check the schema, enter the worker's row; raises a clear error."""
        # Thousands of calls in flight are no garbage, nor are the thousands of modules to come: at
        # Python's own thresholds a third of the CPU goes into looking for some.
        gc.set_threshold(*_GC_THRESHOLDS)
        settings = self._settings
        self._keyring = Keyring.of(settings)
        bodies = Bodies.of(settings)
        # The catalogue is read with SQLAlchemy; what every job takes goes past it.
        self._engine = make_async_engine(
            settings, application_name=f"sluice {self._name}", pool_size=1
        )
        self._db = Database(
            settings,
            application_name=f"sluice {self._name}",
            size=settings.database_pool_size,
            planner=BY_KEY,
        )
        self._beat_db = Database(
            settings, application_name=f"sluice beat {self._name}", size=1, planner=BY_KEY
        )
        await self._check_database()
        self._redis = make_async_redis(settings)
        # An SDK takes a second to import: now, before there is anything to hold up.
        importlib.import_module(f"sluicegate.workers.providers.{self._served.pool}")
        self._adapters = Adapters(max_connections=settings.jobs_in_flight + _SPARE_CONNECTIONS)
        self._heartbeat = Heartbeat(
            db=self._beat_db,
            name=self._name,
            pool=self._served.pool,
            lane=self._served.lane,
            queues=self._served.queues,
            keyring=self._keyring.fingerprints,
            interval_s=settings.beat_interval_s,
            valid_s=settings.beat_valid_s,
            load=self._load,
            renamed=self._rename,
            unwanted=self.cancel,
        )
        self._slots = Slots(settings.jobs_in_flight)
        self._claims = Claims(
            db=self._db,
            worker_id=self._heartbeat.worker_id,
            queues=self._served.queues,
            max_items=settings.coalesce_max,
            spacing_s=settings.spacing_s,
            give_up_after_s=settings.grace_s,
            bodies=bodies,
        )
        self._gates = Gates(client=self._redis, settings=settings)
        self._copying = BudgetCopying(client=self._redis, settings=settings)
        estimates = TokenEstimates()
        journal = Journal(client=self._redis, prefix=settings.redis_prefix)
        self._replies = Replies(settings, self._redis)
        catalogue = AsyncCatalogueCache(
            prefix=settings.redis_prefix, ttl_s=settings.catalogue_ttl_s
        )
        self._catalogue = catalogue
        self._settler = Settler(
            db=self._db,
            max_items=settings.coalesce_max,
            spacing_s=settings.spacing_s,
            journal=journal.append,
            forget=journal.forget,
            bodies=bodies,
            told=self._copying.told,
        )
        self._caller = Caller(
            settings=settings,
            adapters=self._adapters,
            keyring=self._keyring,
            gates=self._gates,
            estimates=estimates,
        )
        self.execution = Execution(
            Parts(
                settings=settings,
                engine=self._engine,
                redis=self._redis,
                catalogue=catalogue,
                heartbeat=self._heartbeat,
                claims=self._claims,
                placement=Placement(
                    settings=settings,
                    gates=self._gates,
                    presence=Presence(db=self._db, dead_after_s=settings.dead_after_s),
                    estimates=estimates,
                ),
                dispatcher=Dispatcher(
                    db=self._db,
                    max_items=settings.coalesce_max,
                    spacing_s=settings.spacing_s,
                    told=self._copying.told,
                ),
                caller=self._caller,
                gates=self._gates,
                settler=self._settler,
                replies=self._replies,
                slots=self._slots,
                retry=RetryPolicy(
                    base_s=settings.retry_base_s,
                    max_s=settings.retry_max_s,
                ),
            )
        )
        self._warm_up(await catalogue.get(self._engine, self._redis))
        # What is loaded by now stays: looking at it in every full collection of garbage would hold
        # up the loop for 0.15 s each time.
        gc.collect()
        gc.freeze()
        await self._heartbeat.start()
        self._gates.start()
        self._started = True
        loop = asyncio.get_running_loop()
        self._chores.append(loop.create_task(self._release_lost()))
        if self._consume is not None:
            self._chores.append(loop.create_task(self._follow_use_cases(self._consume)))
        log.info("worker %s serves %s", self._heartbeat.worker_id, ", ".join(self._served.queues))

    def _warm_up(self, catalogue: Catalogue) -> None:
        """Read prices and make clients now: a first job would wait for that, and all beside it."""
        baseline_nano_usd(Usage(), self._settings.baseline_model)
        for provider in catalogue.providers:
            if provider.provider != self._served.pool:
                continue
            try:
                _ = provider.card
                self._caller.adapter(provider, provider.account_id, catalogue)
            except (UnknownPrice, ProviderError) as problem:
                log.warning("jobs for %s will fail: %s", provider.name, problem)

    async def _check_database(self) -> None:
        try:
            async with self._engine.connect() as connection:
                await connection.run_sync(check_schema)
        except CONNECTION_ERRORS as error:
            # What follows the first line is advice of the libraries' own.
            reason = str(getattr(error, "orig", error)).partition("\n")[0]
            raise QueueUnavailable(
                f"Postgres did not answer ({reason}); start it, or check SLUICE_DATABASE_URL"
            ) from error

    async def run(
        self,
        job_ids: Sequence[UUID],
        *,
        published_at: datetime | None,
        begun: Callable[[], None],
    ) -> list[Again]:
        """Run the jobs of one message; see `Execution.run`."""
        token = object()
        if published_at is not None:
            self._unclaimed[token] = published_at

        def claimed() -> None:
            self._unclaimed.pop(token, None)

        try:
            return await self.execution.run(job_ids, begun=begun, claimed=claimed)
        finally:
            claimed()

    def cancel(self, job_ids: Sequence[UUID]) -> None:
        """Cancel jobs in hand; see `Execution.cancel`. On the loop's thread."""
        self.execution.cancel(job_ids)

    async def drain(self, _deadline_s: float) -> None:
        """Stop beginning work: messages that wait for slots go back to the broker."""
        self._draining = True
        self.execution.stopping = True
        self._slots.close()

    async def stop(self) -> None:
        """Hand back what is left, as the sweep would, and close everything."""
        if not self._started:
            return  # there is nothing to hand back, and the process ends
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        await self._heartbeat.stop()
        # What was paid for and cut off in the middle of its settlement is settled all the same.
        with suppress(TimeoutError):
            async with asyncio.timeout(_FINISH_S):
                await self._settler.finish()
        try:
            # Without its row this worker is dead to the fleet: jobs it had not dispatched are
            # queued again, calls that were cut off become unknown attempts.
            await self._heartbeat.leave()
            messages = await resolve_lost(self._db, self._replies, self._copying.told)
            await self._publish(messages)
        except DATABASE_ERRORS as error:
            log.warning(
                "Postgres is away (%s): the sweep will resolve what is left here",
                type(error).__name__,
            )
        await self._copying.finish(_FINISH_S)
        await self._gates.stop()
        await self._replies.close()
        await self._adapters.close()
        with suppress(redis.RedisError, OSError):
            await self._redis.aclose()
        await self._engine.dispose()
        await self._db.close()
        await self._beat_db.close()

    def _load(self) -> Load:
        return Load(
            running_jobs=self._slots.taken,
            oldest_unclaimed_at=min(self._unclaimed.values(), default=None),
            draining=self._draining,
        )

    def _rename(self, worker_id: UUID) -> None:
        self._claims.worker_id = worker_id

    async def _publish(self, messages: Sequence[JobMessage]) -> None:
        publisher = Publisher.here()
        if publisher is None or not messages:
            return
        futures = [publisher.publish(send, self._app, message) for message in messages]
        for outcome in await asyncio.gather(*futures, return_exceptions=True):
            if isinstance(outcome, BaseException):
                log.warning("a message was not published (%s); the sweep will", outcome)

    async def _follow_use_cases(self, consume: Callable[[str], None]) -> None:
        """Serve the queues of use cases that are added while this worker runs."""
        served = self._served
        while True:
            await asyncio.sleep(_FOLLOW_INTERVAL_S)
            try:
                catalogue = await self._catalogue.get(self._engine, self._redis)
            except database.DATABASE_ERRORS as error:
                log.warning("the use cases were not read again (%s)", type(error).__name__)
                continue
            for queue in pool_queues(sorted(catalogue.use_cases), served.pool, served.lane):
                if queue in served.queues:
                    continue
                served.queues.append(queue)
                # A message that comes may be claimed: that first.
                self._claims.serve(queue)
                self._heartbeat.serve(queue)
                consume(queue)
                log.info("worker %s now serves %s", self._heartbeat.worker_id, queue)

    async def _release_lost(self) -> None:
        while True:
            await asyncio.sleep(_RELEASE_INTERVAL_S)
            try:
                await self._publish(await self._claims.release_lost())
            except DATABASE_ERRORS as error:
                log.warning("lost jobs were not released (%s)", type(error).__name__)

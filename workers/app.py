"""The worker's Celery app: `celery -A sluicegate.workers.app worker -Q draft.anthropic`.

With `--follow-use-cases` a worker that was started with some queues of a pool and a lane also
serves those of use cases that are added later.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import Any

import click
from celery.signals import celeryd_after_setup, worker_init

from sluicegate.shared.celery_app import make_celery
from sluicegate.shared.errors import SluiceError
from sluicegate.shared.jobs import Lane
from sluicegate.shared.queues import declare
from sluicegate.shared.settings import get_settings
from sluicegate.workers import control
from sluicegate.workers.lifecycle import Served, Worker
from sluicegate.workers.pool import require_asyncio_pool
from sluicegate.workers.tasks import register

log = logging.getLogger(__name__)

try:
    _settings = get_settings()
except SluiceError as problem:
    sys.exit(f"sluice: {problem}")

#: Connections to the broker that a process may hold; they are made when needed, a worker needs one
#: or two. Flower's commands to workers hold one and ask for a second, from up to 33 threads: a
#: lower limit than twice that would make them wait for each other for ever.
_BROKER_CONNECTIONS = 70

#: When the broker fails to give a worker one more queue, it is asked again after this long.
_AGAIN_AFTER_S = 1.0

#: Messages of single jobs that may wait unclaimed; of chunks it is one.
_INTERACTIVE_PREFETCH = 8

app = make_celery(
    _settings,
    sluice_stop_grace_s=_settings.grace_s,
    # Celery's chatter between workers serves nothing here; heartbeats stay for Flower.
    worker_enable_mingle=False,
    broker_pool_limit=_BROKER_CONNECTIONS,
)
run_jobs = register(app)
control.register()
app.user_options["worker"].add(
    click.Option(
        ("--follow-use-cases",),
        is_flag=True,
        help="Also serve the queues of use cases that are added later.",
    )
)


@worker_init.connect(weak=False)
def _check(sender: Any, **_: Any) -> None:
    """Refuse a worker that is not started as the fleet needs it, in one sentence."""
    require_asyncio_pool(sender)
    try:
        served = Served(list(sender.app.amqp.queues.consume_from))
    except SluiceError as problem:
        sys.exit(f"sluice: {problem}")
    if served.lane is Lane.INTERACTIVE:
        # Small messages come one hand-over between two threads at a time: let a few come together.
        sender.prefetch_multiplier = _INTERACTIVE_PREFETCH


@celeryd_after_setup.connect(weak=False)
def _attach(instance: Any, **_: Any) -> None:
    """Give the pool this worker's parts, on its own loop."""
    worker = Worker(
        settings=_settings,
        app=app,
        name=instance.hostname,
        served=Served(list(instance.app.amqp.queues.consume_from)),
        consume=partial(_consume, instance) if instance.options.get("follow_use_cases") else None,
    )
    run_jobs.worker = worker
    instance.pool.add_start_hook(worker.start)
    instance.pool.add_drain_hook(worker.drain)
    instance.pool.add_stop_hook(worker.stop)


def _consume(instance: Any, queue: str) -> None:
    """Have this worker's consumer take messages of one more queue; from any thread."""
    instance.consumer.call_soon(_add_queue, instance.consumer, queue)


def _add_queue(consumer: Any, queue: str) -> None:
    # What is selected is consumed by every connection that is made from now on.
    consumer.app.amqp.queues.select_add(declare(queue))
    if consumer.task_consumer is None:
        return  # one is being made
    try:
        consumer.add_task_queue(queue)
    except consumer.connection_errors as error:
        log.warning("%s cannot be served yet (%s)", queue, type(error).__name__)
        consumer.timer.call_after(_AGAIN_AFTER_S, _add_queue, (consumer, queue))

"""The worker's Celery app: `celery -A sluicegate.workers.app worker -Q draft.anthropic`."""

from __future__ import annotations

import sys
from typing import Any

from celery.signals import celeryd_after_setup, worker_init

from sluicegate.shared.celery_app import make_celery
from sluicegate.shared.errors import SluiceError
from sluicegate.shared.jobs import Lane
from sluicegate.shared.settings import get_settings
from sluicegate.workers.lifecycle import Served, Worker
from sluicegate.workers.pool import require_asyncio_pool
from sluicegate.workers.tasks import register

try:
    _settings = get_settings()
except SluiceError as problem:
    sys.exit(f"sluice: {problem}")

#: Messages of single jobs that may wait unclaimed; of chunks it is one.
_INTERACTIVE_PREFETCH = 8

app = make_celery(
    _settings,
    sluice_stop_grace_s=_settings.grace_s,
    # Celery's chatter between workers serves nothing here; heartbeats stay for Flower.
    worker_enable_mingle=False,
)
run_jobs = register(app)


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
    )
    run_jobs.worker = worker
    instance.pool.add_start_hook(worker.start)
    instance.pool.add_drain_hook(worker.drain)
    instance.pool.add_stop_hook(worker.stop)

"""The one Celery task: it carries job ids, and its outcome is in Postgres."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any
from uuid import UUID

from celery import Celery
from celery.exceptions import Reject
from celery.worker.request import Request
from kombu.exceptions import OperationalError

from sluicegate.shared.celery_app import PUBLISHED_AT, RUN_JOBS, JobMessage, send
from sluicegate.shared.statements import DATABASE_ERRORS
from sluicegate.workers.execution import Again
from sluicegate.workers.lifecycle import Worker
from sluicegate.workers.pool import await_, claimed
from sluicegate.workers.publishing import AsyncTask, Publisher
from sluicegate.workers.slots import Draining

log = logging.getLogger(__name__)


class FromQueue(Request):
    """Tells Flower the queue, which Celery leaves to an event that each publisher would send."""

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002 - Celery's own name
        """Send an event of this task, if anybody watches."""
        super().send_event(type, routing_key=self.delivery_info["routing_key"], **fields)


class RunJobs(AsyncTask):
    """Runs the jobs of one message; registered by `register`."""

    name = RUN_JOBS
    Request = "sluicegate.workers.tasks:FromQueue"
    ignore_result = True
    acks_late = True
    #: The job's own attempt budget, kept in Postgres, is what ends its retries.
    max_retries = None
    #: The worker of this process; the pool's start hook puts it here.
    worker: Worker

    def run(self, job_ids: list[str]) -> str:
        """Take the jobs that can be claimed to an outcome; return how many messages follow."""
        try:
            ids = [UUID(job_id) for job_id in job_ids]
            # Celery makes a message's headers attributes of the request.
            sent = self.request.get(PUBLISHED_AT)
            published_at = datetime.fromisoformat(sent) if sent else None
        except (TypeError, ValueError, AttributeError):
            log.error("a message that is not ours was dropped: its arguments are not job ids")
            return "dropped"
        again = await_(self._run(ids, published_at))
        if len(ids) == 1 and again and not again[0].handed_off:
            # Celery's own retry, so that Flower shows it; the count of attempts is the row's.
            message = again[0].message
            options = {"argsrepr": message.describe(), "kwargsrepr": "{}"}
            raise self.retry(
                countdown=again[0].after_s,
                headers={PUBLISHED_AT: message.published_at.isoformat()},
                **options,  # type: ignore[arg-type]  # any option of apply_async
            )
        if again:
            await_(self._publish(again))
        return "done"

    async def _run(self, ids: list[UUID], published_at: datetime | None) -> list[Again]:
        try:
            return await self.worker.run(ids, published_at=published_at, begun=claimed)
        except Draining:
            raise Reject("the worker stops", requeue=True) from None
        except DATABASE_ERRORS as error:
            log.warning("Postgres stays away (%s): the message goes back", type(error).__name__)
            raise Reject("Postgres does not answer", requeue=True) from None

    async def _publish(self, again: list[Again]) -> None:
        publisher = Publisher.here()
        if publisher is None:
            raise RuntimeError("run_jobs runs in the asyncio pool only")
        for item in again:
            try:
                await publisher.publish(_send_later, self.app, item.message, item.after_s)
            except (OperationalError, OSError) as error:
                log.warning("a retry was not published (%s); the sweep will", error)


def _send_later(app: Celery, message: JobMessage, after_s: float, *, producer: Any) -> None:
    send(app, message, producer=producer, countdown=after_s)


def register(app: Celery) -> RunJobs:
    """Register the task with an app and return it."""
    task: RunJobs = app.register_task(RunJobs())
    return task

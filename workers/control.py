"""The remote control command of our own, beside Celery's: cancelling jobs."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from celery.worker.control import control_command

from sluicegate.shared.celery_app import CANCEL_JOBS, RUN_JOBS


def cancel_jobs(state: Any, job_ids: list[str], **_: Any) -> dict[str, str]:
    """Cancel jobs whose rows say that they are to be cancelled."""
    try:
        ids = [UUID(job_id) for job_id in job_ids]
    except (TypeError, ValueError, AttributeError):
        return {"error": "job_ids must be a list of UUIDs"}
    # Commands come in the hub's thread; jobs run in the loop's.
    worker = state.app.tasks[RUN_JOBS].worker
    state.consumer.pool.loop.call_soon_threadsafe(worker.cancel, ids)
    return {"ok": f"{len(ids)} jobs"}


def register() -> None:
    """Register the command with Celery, for every worker of this process."""
    control_command(name=CANCEL_JOBS, variadic="job_ids", signature="[id1 [id2 ... [idN]]]")(
        cancel_jobs
    )

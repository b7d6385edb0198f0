"""A task of your own Celery app that submits to Sluicegate, and one that takes the answer.

    pip install sluicegate
    celery -A inside_celery worker --pool prefork --concurrency 2
    python inside_celery.py 4711

The two apps stay apart: yours has its own broker, prefix, queues and pool, and knows nothing of
Sluicegate's. One `Sluice` is made at import and used after the fork: each child opens connections
of its own. No task waits for an answer, which would occupy a child for seconds: it submits, and
another task looks later.
"""

from __future__ import annotations

import os
import sys
from uuid import UUID

from celery import Celery

from sluicegate import ResultTimeout, Sluice

broker = os.environ.get("CRM_BROKER_URL", "redis://127.0.0.1:6379/0")
app = Celery("crm", broker=broker, backend=broker)
app.conf.broker_transport_options = {"global_keyprefix": "crm:"}
app.conf.result_backend_transport_options = {"global_keyprefix": "crm:"}
app.conf.task_default_queue = "crm"

sluice = Sluice()


@app.task(name="crm.summarise", acks_late=True)
def summarise(lead: int, note: str) -> str:
    """Submit a note; started twice, it is the same job."""
    job = sluice.submit("summary", note, idempotency_key=f"summary-{lead}")
    collect.apply_async((lead, str(job.id)), task_id=f"collect-{lead}")
    return str(job.id)


@app.task(name="crm.collect", max_retries=60)
def collect(lead: int, job_id: str) -> str:
    """Take the answer if it is there; look again later if it is not."""
    try:
        result = sluice.handle(UUID(job_id)).result(timeout=0.5)
    except ResultTimeout:
        raise collect.retry(countdown=1) from None
    return f"{lead}: {result.text} (${result.cost:.6f}, process {os.getpid()})"


if __name__ == "__main__":
    lead = int(sys.argv[1])
    summarise.delay(lead, "Ada called. She wants the renewal quote by Tuesday.").get(timeout=60)
    print(app.AsyncResult(f"collect-{lead}").get(timeout=60))

"""Publishing for jobs that are stored already: worth an effort, never an error."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from celery import Celery

from sluicegate.shared.celery_app import JobMessage, publish
from sluicegate.shared.errors import QueueUnavailable

log = logging.getLogger(__name__)

#: Messages that go to the broker in one pipeline.
_PIPELINE_MESSAGES = 500
#: A connection that broke while it lay idle is found out at once, and a new one takes over.
_QUICK_S = 1.0


def publish_accepted(app: Celery, messages: Sequence[JobMessage]) -> None:
    """Publish; where the broker is away leave it to the sweep, which publishes what was not.

    Blocks on the network.
    """
    for start in range(0, len(messages), _PIPELINE_MESSAGES):
        part = messages[start : start + _PIPELINE_MESSAGES]
        began_at = time.monotonic()
        try:
            try:
                publish(app, part)
            except QueueUnavailable:
                if time.monotonic() - began_at > _QUICK_S:
                    raise
                publish(app, part)
        except QueueUnavailable as error:
            log.warning(
                "the broker did not answer; the sweep will publish what is accepted (jobs: %d): %s",
                len(messages) - start,
                error,
            )
            return

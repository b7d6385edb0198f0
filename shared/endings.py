"""How a job ends without an answer: its result, and the event that tells its readers.

For whoever ends a job that nobody holds: the sweep, and `job cancel`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

import orjson

#: The result of a job `j` that ends in `state` without an answer, as a JSON object.
ENDED_BODY: Final = """json_build_object(
    'version', 1, 'job_id', j.id, 'state', {state}, 'use_case', j.use_case,
    'cost_nano_usd', j.cost_nano_usd, 'attempts', j.attempts_used,
    'error', json_build_object('error_class', {error_class}, 'message', {message}))"""

#: What the caller of a cancelled job reads.
CANCELLED: Final = "the job was cancelled"

#: The result of a job `j` that is cancelled.
CANCELLED_BODY: Final = ENDED_BODY.format(
    state="'cancelled'", error_class="'cancelled'", message=f"'{CANCELLED}'"
)


def terminal_payload(
    body: dict[str, Any], created_at: datetime | None, finished_at: datetime | None
) -> bytes:
    """Encode the terminal event of a job with this result, as a reader makes it from Postgres."""
    kind = "completed" if body["state"] == "succeeded" else "failed"
    times = {"created_at": created_at, "finished_at": finished_at}
    return orjson.dumps({"type": kind, "result": body | times})

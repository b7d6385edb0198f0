"""A stand-in for a worker: it moves jobs and writes reply channels as a worker would."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

import orjson
import redis
from sqlalchemy import Engine

from sluicegate.shared.events import event_id, reply_key, terminal_id
from sluicegate.shared.settings import Settings

_CLAIM = """
UPDATE jobs SET state = 'running', worker_id = gen_random_uuid(), fence = fence + 1
WHERE id = %(id)s RETURNING fence
"""

_SETTLE = """
WITH moved AS (
    UPDATE jobs SET state = %(state)s, worker_id = NULL, finished_at = now() - %(ago)s::interval
    WHERE id = %(id)s RETURNING id, fence, created_at, finished_at
), kept AS (
    INSERT INTO results (job_id, fence, body) SELECT id, fence, %(body)s::json FROM moved
)
SELECT * FROM moved
"""


def waiting(client: redis.Redis) -> int:
    """How many connections wait for reply channels."""
    found: Any = client.client_list()
    return sum(one["cmd"] == "xread" and "b" in one["flags"] for one in found)


class StandIn:
    """Works on one job."""

    def __init__(
        self, *, engine: Engine, client: redis.Redis, settings: Settings, job_id: UUID
    ) -> None:
        self._engine = engine
        self._client = client
        self.job_id = job_id
        self.key = settings.redis_prefix + reply_key(job_id)
        self.fence = int(self._run(_CLAIM, id=job_id).fence)
        self._n = 0

    def say(self, kind: str, **values: Any) -> None:
        """Append an event to the reply channel."""
        self._n += 1
        self.append(event_id(self.fence, self._n), {"type": kind, **values})

    def append(self, entry_id: str, payload: object) -> None:
        """Append an entry with an id of the caller's choice."""
        self._client.xadd(self.key, {"e": orjson.dumps(payload)}, id=entry_id)

    def settle(
        self, state: str = "succeeded", *, ago_s: float = 0.0, **result: Any
    ) -> dict[str, Any]:
        """End the job in Postgres, as if `ago_s` earlier; return the whole result as JSON."""
        body = {"version": 1, "job_id": str(self.job_id), "state": state, "use_case": "draft"}
        body |= result
        row = self._run(
            _SETTLE, id=self.job_id, state=state, body=orjson.dumps(body).decode(), ago=f"{ago_s} s"
        )
        times: dict[str, datetime] = {"created_at": row.created_at, "finished_at": row.finished_at}
        return {**body, **{name: time.isoformat() for name, time in times.items()}}

    def end(self, result: dict[str, Any]) -> None:
        """Append the terminal event."""
        kind = "completed" if result["state"] == "succeeded" else "failed"
        self.append(terminal_id(self.fence), {"type": kind, "result": result})

    def answer(self, *parts: str, **result: Any) -> None:
        """Do the whole job: stream the parts, settle, end the reply channel."""
        self.say("started", model="test-model")
        for part in parts:
            self.say("delta", text=part)
        self.end(self.settle(text="".join(parts), **result))

    def expire(self) -> None:
        """Let the reply channel go, as its time to live does."""
        self._client.delete(self.key)

    def _run(self, statement: str, **values: Any) -> Any:
        with self._engine.connect() as connection:
            return connection.exec_driver_sql(statement, values).one()

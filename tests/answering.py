"""A stand-in for a fleet: it answers every queued job with the job's own prompt."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import orjson
import redis
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from sluicegate.shared.events import FIELD, reply_key, terminal_id
from sluicegate.shared.settings import Settings

_ANSWER = """
WITH due AS (
    SELECT id FROM jobs WHERE state = 'queued' ORDER BY id LIMIT 200 FOR UPDATE SKIP LOCKED
), moved AS (
    UPDATE jobs j SET state = 'succeeded', fence = fence + 1, finished_at = now()
    FROM due WHERE j.id = due.id RETURNING j.id, j.fence, j.created_at, j.finished_at
), answers AS (
    SELECT moved.*, json_build_object(
        'version', 1, 'job_id', id, 'state', 'succeeded', 'use_case', 'draft',
        'text', request -> 'messages' -> 0 -> 'content' -> 0 ->> 'text') AS body
    FROM moved JOIN job_bodies ON job_id = id
), kept AS (
    INSERT INTO results (job_id, fence, body) SELECT id, fence, body FROM answers
)
SELECT * FROM answers
"""


class Answering:
    """Answers in a thread of its own, for the length of a `with`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="answering")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        engine = create_engine(
            self._settings.database_dsn, poolclass=NullPool, isolation_level="AUTOCOMMIT"
        )
        prefix = self._settings.redis_prefix
        with redis.Redis.from_url(self._settings.redis_dsn) as client, engine.connect() as at:
            while not self._over.wait(0.005):
                rows = at.exec_driver_sql(_ANSWER).all()
                pipeline = client.pipeline(transaction=False)
                for row in rows:
                    times = {"created_at": row.created_at, "finished_at": row.finished_at}
                    event = {"type": "completed", "result": row.body | times}
                    fields: dict[bytes, bytes] = {FIELD: orjson.dumps(event)}
                    pipeline.xadd(prefix + reply_key(row.id), fields, id=terminal_id(row.fence))
                pipeline.execute()

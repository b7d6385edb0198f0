"""Queues as an operator sees them: what waits where, and who serves it. No I/O here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Row

from sluicegate.shared.jobs import Lane
from sluicegate.shared.messages import Frozen
from sluicegate.shared.queues import POOLS, parse_queue, queue_name

# Each state has an index of its own, so jobs that are over are not looked at. A worker that has
# not been heard of for `%(dead_after_s)s` serves nothing, even if nobody has declared it dead yet.
QUEUES_QUERY: Final = """
WITH live AS (
    SELECT queue, state, run_at FROM jobs WHERE state = 'queued'
    UNION ALL SELECT queue, state, run_at FROM jobs WHERE state = 'parked'
    UNION ALL SELECT queue, state, NULL FROM jobs WHERE state = 'running'
), jobs_of AS (
    SELECT queue, count(*) FILTER (WHERE state = 'queued') AS queued,
           count(*) FILTER (WHERE state = 'parked') AS parked,
           count(*) FILTER (WHERE state = 'running') AS running,
           extract(epoch FROM now() - min(run_at))::float8 AS oldest_s
    FROM live GROUP BY queue
), served AS (
    SELECT queue, count(*) AS consumers FROM workers w, unnest(w.queues) AS queue
    WHERE NOT w.draining AND w.seen_at > now() - make_interval(secs => %(dead_after_s)s)
    GROUP BY queue
)
SELECT queue, coalesce(queued, 0) AS queued, coalesce(parked, 0) AS parked,
       coalesce(running, 0) AS running, oldest_s, coalesce(consumers, 0) AS consumers
FROM jobs_of FULL JOIN served USING (queue)
"""

USE_CASES_QUERY: Final = "SELECT name FROM use_cases"


class QueueView(Frozen):
    """One queue as it stands."""

    queue: str
    lane: Lane
    pool: str
    #: Messages that wait in the broker; one of the bulk lane carries several jobs.
    depth: int
    queued: int
    parked: int
    running: int
    #: For how long the oldest waiting job has been due, in seconds; None if none is.
    oldest_s: float | None
    #: Live workers that take messages from it.
    consumers: int


def queue_names(rows: Iterable[Row[Any]], use_cases: Iterable[str]) -> list[str]:
    """Return every queue that there may be something in, sorted.

    `rows` are those of `QUEUES_QUERY`.
    """
    possible = {
        queue_name(name, pool, lane) for name in use_cases for pool in POOLS for lane in Lane
    }
    return sorted(possible | {row.queue for row in rows})


def queue_views(
    rows: Sequence[Row[Any]], depths: Mapping[str, int], *, include_empty: bool = False
) -> list[QueueView]:
    """Put together the queues with anything in them, or anybody at them.

    `depths` are the messages of each queue in the broker.
    """
    found = {row.queue: row for row in rows}
    views = []
    for queue, depth in depths.items():
        row = found.get(queue)
        if row is None and not depth and not include_empty:
            continue
        name = parse_queue(queue)
        views.append(
            QueueView(
                queue=queue,
                lane=name.lane,
                pool=name.pool,
                depth=depth,
                queued=row.queued if row else 0,
                parked=row.parked if row else 0,
                running=row.running if row else 0,
                oldest_s=max(0.0, row.oldest_s) if row and row.oldest_s is not None else None,
                consumers=row.consumers if row else 0,
            )
        )
    return views

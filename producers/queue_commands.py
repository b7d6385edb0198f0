"""Commands for queues: `sluice queue list`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from sluicegate.shared.connecting import connection
from sluicegate.shared.jobs import Lane
from sluicegate.shared.terminal import AsJson, age, note, print_json, print_table

if TYPE_CHECKING:
    from sluicegate.producers.queue_listing import QueueView
    from sluicegate.shared.settings import Settings

app = typer.Typer(pretty_exceptions_enable=False)
queue = typer.Typer(help="Queues: what waits, and who serves it.")
app.add_typer(queue, name="queue")

_COLUMNS = (
    *("queue", "lane", "pool", "depth"),
    *("queued", "parked", "running", "oldest", "consumers"),
)


@queue.command("list", epilog="Example: sluice queue list --json")
def list_queues(
    *,
    everything: Annotated[
        bool, typer.Option("--all", help="Also queues with nothing in them and nobody at them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List queues: messages in the broker, jobs by state, the oldest one's age, live workers."""
    from sluicegate.producers.queue_listing import (
        QUEUES_QUERY,
        USE_CASES_QUERY,
        queue_names,
        queue_views,
    )
    from sluicegate.shared.settings import get_settings

    settings = get_settings()
    with connection() as line:
        rows = line.exec_driver_sql(QUEUES_QUERY, {"dead_after_s": settings.dead_after_s}).all()
        use_cases = line.exec_driver_sql(USE_CASES_QUERY).scalars().all()
    depths = _depths(settings, queue_names(rows, use_cases))
    views = queue_views(rows, depths, include_empty=everything)
    if as_json:
        print_json({"queues": [view.model_dump(mode="json") for view in views]})
    else:
        print_table(_COLUMNS, [_cells(view) for view in views])
    for view in views:
        if not view.consumers and (view.depth or view.queued or view.parked):
            lane = " --lane bulk" if view.lane is Lane.BULK else ""
            note(f"nobody serves {view.queue}; start `sluice worker {view.pool}{lane}`")


def _cells(view: QueueView) -> tuple[str, ...]:
    counts = (view.depth, view.queued, view.parked, view.running)
    oldest = _age(view.oldest_s)
    return (view.queue, view.lane, view.pool, *map(str, counts), oldest, str(view.consumers))


def _age(seconds: float | None) -> str:
    return "" if seconds is None else age(datetime.now(UTC) - timedelta(seconds=seconds))


def _depths(settings: Settings, queues: list[str]) -> dict[str, int]:
    """Count the messages of each queue in the broker."""
    import redis

    from sluicegate.shared.errors import QueueUnavailable
    from sluicegate.shared.redis_client import make_redis

    try:
        with make_redis(settings) as client, client.pipeline(transaction=False) as pipeline:
            for name in queues:
                pipeline.llen(settings.redis_prefix + name)
            return dict(zip(queues, pipeline.execute(), strict=True))
    except (redis.RedisError, OSError) as error:
        raise QueueUnavailable(
            f"Redis did not answer: {error}; try again, and check SLUICE_REDIS_URL"
        ) from error

"""Commands for shared reply channels: `sluice reply list|tail|forget`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sluicegate.shared.connecting import connection
from sluicegate.shared.terminal import AsJson, age, money, note, print_json, print_table

if TYPE_CHECKING:
    import redis

    from sluicegate.producers.reply_channels import Delivery
    from sluicegate.shared.errors import QueueUnavailable
    from sluicegate.shared.settings import Settings

app = typer.Typer(pretty_exceptions_enable=False)
reply = typer.Typer(help="Shared reply channels: results on their way to a back end.")
app.add_typer(reply, name="reply")

# Results that some group has yet to acknowledge; those without a number wait for room in Redis.
_CHANNELS = """
SELECT channel, count(*) AS kept, count(*) FILTER (WHERE number IS NULL) AS waiting,
       min(created_at) AS oldest_at
FROM outbox GROUP BY channel
UNION ALL
SELECT DISTINCT channel, 0, 0, NULL::timestamptz FROM reply_groups
WHERE channel NOT IN (SELECT channel FROM outbox)
ORDER BY channel
"""

#: What is shown of a group; how much it has not read yet Redis does not always know.
_GROUP = ("group", "unread", "unacknowledged", "consumers")

_FORGET_GROUP = "DELETE FROM reply_groups WHERE channel = %(channel)s AND name = %(group)s"

_Channel = Annotated[str, typer.Argument(help="The channel: what jobs name as reply_to.")]


@reply.command("list", epilog="Example: sluice reply list --json")
def list_channels(*, as_json: AsJson = False) -> None:
    """List channels: results that are kept, and what each consumer group has still to do."""
    from sluicegate.shared.settings import get_settings

    with connection() as line:
        rows = line.exec_driver_sql(_CHANNELS).all()
    channels = [
        {
            "channel": row.channel,
            "kept": row.kept,
            "waiting": row.waiting,
            "oldest_at": row.oldest_at,
            "groups": groups,
        }
        for row, groups in zip(
            rows, _groups(get_settings(), [row.channel for row in rows]), strict=True
        )
    ]
    if as_json:
        print_json({"channels": channels})
        return
    print_table(
        ("channel", "kept", "waiting", "oldest", *_GROUP),
        [
            (
                one["channel"],
                str(one["kept"]),
                str(one["waiting"]),
                age(one["oldest_at"]),
                *("" if group[name] is None else str(group[name]) for name in _GROUP),
            )
            for one in channels
            for group in one["groups"] or [dict.fromkeys(_GROUP)]
        ],
    )


def _groups(settings: Settings, channels: list[str]) -> list[list[dict[str, Any]]]:
    """Ask Redis for the groups of each channel."""
    from sluicegate.shared.reply_channels import channel_key

    with _redis(settings) as client:
        pipeline = client.pipeline(transaction=False)
        for channel in channels:
            pipeline.xinfo_groups(settings.redis_prefix + channel_key(channel))
        found = pipeline.execute(raise_on_error=False)
    # Of a channel that nothing was brought to yet there is no stream.
    return [
        []
        if isinstance(groups, Exception)
        else [
            {
                "group": group["name"].decode(),
                "unread": group["lag"],
                "unacknowledged": group["pending"],
                "consumers": group["consumers"],
            }
            for group in groups
        ]
        for groups in found
    ]


@contextmanager
def _redis(settings: Settings) -> Iterator[redis.Redis]:
    """Connect to Redis for one command."""
    import redis

    from sluicegate.shared.redis_client import make_redis

    client = make_redis(settings)
    try:
        yield client
    except redis.RedisError as error:
        raise _away(error) from error
    finally:
        client.connection_pool.disconnect()


def _away(reason: object) -> QueueUnavailable:
    from sluicegate.shared.errors import QueueUnavailable

    return QueueUnavailable(f"Redis did not answer ({reason}); check SLUICE_REDIS_URL")


@reply.command("tail", epilog="Example: sluice reply tail crm-eu --group ops --timeout 5")
def tail(
    channel: _Channel,
    *,
    group: Annotated[str, typer.Option(help="The consumer group to read as.")],
    timeout: Annotated[
        float | None, typer.Option(help="End after so many seconds without a result.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print results as they come, and acknowledge them for the group.

    A new group begins with what is kept. From then on results are kept until it has them, so
    `sluice reply forget` it when you are done. The exit code is 1 if Redis is away at the end.
    """
    from sluicegate.producers.client import Sluice
    from sluicegate.shared.settings import get_settings

    with Sluice() as sluice, sluice.replies(channel, group, timeout=timeout) as replies:
        # A server that is not there is told at once; one that goes away meanwhile is waited for.
        with _redis(get_settings()) as client:
            client.ping()
        for one in replies:
            if as_json:
                print_json(_plain(one))
            else:
                typer.echo("\t".join(" ".join(cell.split()) for cell in _cells(one)))
            one.ack()
        if replies.problem:
            raise _away(replies.problem)


def _plain(one: Delivery) -> dict[str, Any]:
    return {
        "id": one.id,
        "deliveries": one.deliveries,
        "metadata": one.metadata,
        "idempotency_key": one.idempotency_key,
        "request_id": one.request_id,
        "result": one.result.model_dump(mode="json"),
    }


def _cells(one: Delivery) -> tuple[str, ...]:
    result = one.result
    said = result.error.message if result.error is not None else result.text
    return (str(one.job_id), result.state, money(result.cost_nano_usd), said[:200])


@reply.command("forget", epilog="Example: sluice reply forget crm-eu --group ops")
def forget(
    channel: _Channel,
    *,
    group: Annotated[str, typer.Option(help="The consumer group to remove.")],
) -> None:
    """Remove a consumer group that nobody reads as any more: results are not kept for it."""
    from sluicegate.shared.errors import NotFound
    from sluicegate.shared.reply_channels import channel_key
    from sluicegate.shared.settings import get_settings

    settings = get_settings()
    key = settings.redis_prefix + channel_key(channel)
    with _redis(settings) as client:
        # First here: while the stream is whole, the sweep takes a group that is gone as removed.
        known = bool(client.exists(key)) and bool(client.xgroup_destroy(key, group))
    with connection() as line:
        result = line.exec_driver_sql(_FORGET_GROUP, {"channel": channel, "group": group})
    if not known and not result.rowcount:
        raise NotFound(f"reply channel {channel} has no group {group}; see `sluice reply list`")
    note(f"group {group} of {channel} is removed; a consumer that still reads makes it again")

"""What the gates look like now, and an operator's ways to change it; for commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from uuid import UUID

import redis

from sluicegate.shared.admission import keys
from sluicegate.shared.admission.breaker import WINDOW_BUCKETS

BreakerState = Literal["closed", "open", "half_open"]

_FIELDS = ("last", "state", "open_until", "generation", "window", "streak", "cooldown", "cap")


@dataclass(frozen=True, slots=True, kw_only=True)
class GateState:
    """The gate of one provider row, at one moment. A row without traffic has a closed breaker."""

    provider_id: UUID
    state: BreakerState = "closed"
    #: Until an open breaker lets probes through; 0 otherwise.
    half_open_in_s: float = 0.0
    #: How many probes are under way.
    probes: int = 0
    generation: int = 0
    #: Of the window.
    calls: int = 0
    failures: int = 0
    #: Failures in a row, now.
    streak: int = 0
    cooldown_left_s: float = 0.0
    #: Calls under way, of both lanes, and of the bulk lane.
    in_flight: int = 0
    in_flight_bulk: int = 0
    #: How many calls at a time the row takes at present, when it was found to take fewer.
    concurrency_cap: int | None = None
    #: Seconds that are left, by account.
    suspensions: Mapping[UUID, float] = field(default_factory=dict)


def read_states(
    client: redis.Redis, prefix: str, provider_ids: Sequence[UUID], *, clock_offset_us: int = 0
) -> list[GateState]:
    """Return the gates of these rows, in their order; nothing is written."""
    if not provider_ids:
        return []
    with client.pipeline(transaction=False) as pipeline:
        for provider_id in provider_ids:
            pipeline.hmget(keys.row_key(prefix, provider_id), _FIELDS)
        rows = [_named(values) for values in pipeline.execute()]
        seconds, micros = client.time()
        now = seconds * 1_000_000 + micros + clock_offset_us
        # As in the scripts, time does not go back.
        times = [max(now, int(row.get("last", 0))) for row in rows]
        for provider_id, now in zip(provider_ids, times, strict=True):
            live = (f"({now}", "+inf")
            pipeline.zcount(keys.flight_key(prefix, provider_id), *live)
            pipeline.zcount(keys.bulk_key(prefix, provider_id), *live)
            pipeline.zcount(keys.probes_key(prefix, provider_id), *live)
            suspended = keys.suspended_key(prefix, provider_id)
            pipeline.zrangebyscore(suspended, *live, withscores=True)
        replies = iter(pipeline.execute())
    return [
        _state(provider_id, row, [next(replies) for _ in range(4)], now=now)
        for provider_id, row, now in zip(provider_ids, rows, times, strict=True)
    ]


def _named(values: Sequence[bytes | None]) -> dict[str, str]:
    named = zip(_FIELDS, values, strict=True)
    return {name: value.decode() for name, value in named if value is not None}


def _state(
    provider_id: UUID, row: Mapping[str, str], counted: Sequence[Any], *, now: int
) -> GateState:
    interactive, bulk, probes, suspended = counted

    def left_s(name: str) -> float:
        return max(0, int(row.get(name, 0)) - now) / 1e6

    state = row.get("state", "closed")
    if state == "open" and not left_s("open_until"):
        # Whoever asks next is its probe.
        state = "half_open"
    window = _window(row.get("window", ""), now)
    return GateState(
        provider_id=provider_id,
        state=cast("BreakerState", state),
        half_open_in_s=left_s("open_until") if state == "open" else 0.0,
        probes=probes,
        generation=int(row.get("generation", 0)),
        calls=sum(calls for calls, _ in window),
        failures=sum(failures for _, failures in window),
        streak=int(row.get("streak", 0)),
        cooldown_left_s=left_s("cooldown"),
        in_flight=interactive + bulk,
        in_flight_bulk=bulk,
        concurrency_cap=int(row["cap"]) // 1_000_000 if "cap" in row else None,
        suspensions={UUID(account.decode()): (until - now) / 1e6 for account, until in suspended},
    )


def _window(packed: str, now: int) -> list[tuple[int, int]]:
    """Return calls and failures of the buckets that still count."""
    if not packed:
        return []
    bucket_us, *buckets = packed.split()
    oldest = now // int(bucket_us) - WINDOW_BUCKETS
    counts = (tuple(map(int, bucket.split(":"))) for bucket in buckets)
    return [(calls, failures) for at, calls, failures in counts if at > oldest]


def reset(client: redis.Redis, prefix: str, provider_id: UUID, *, reason: str = "reset") -> None:
    """Close the row's breaker, end its cooldown and forget what it learned; a new generation.

    Suspensions stay (`lift_suspension` ends them), and so do calls in flight and limits.
    """
    client.eval(
        keys.RESET.source,
        3,
        keys.row_key(prefix, provider_id),
        keys.probes_key(prefix, provider_id),
        keys.changes_key(prefix),
        str(provider_id),
        reason,
    )


def lift_suspension(
    client: redis.Redis,
    prefix: str,
    provider_id: UUID,
    account_id: UUID | None = None,
    *,
    reason: str = "lifted",
    clock_offset_us: int = 0,
) -> int:
    """Let an account (None: all) use the row again; return how many were suspended."""
    return cast(
        "int",
        client.eval(
            keys.LIFT.source,
            3,
            keys.row_key(prefix, provider_id),
            keys.suspended_key(prefix, provider_id),
            keys.changes_key(prefix),
            str(provider_id),
            "" if account_id is None else str(account_id),
            reason,
            clock_offset_us,
        ),
    )

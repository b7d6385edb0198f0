"""Books that a test writes: cost entries and attempts, in Postgres and in its own memory."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection

from sluicegate.shared.accounts import add_account
from tests.spending import percentiles

#: What a report adds up; the last six are tokens.
FIGURES = (
    *("requests", "failures", "cost_nano_usd", "baseline_nano_usd"),
    *("estimates", "estimated_nano_usd"),
    *("input_tokens", "cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens"),
    *("output_tokens", "reasoning_tokens"),
)


@dataclass(frozen=True)
class Entry:
    """One row of the books, as a test writes it."""

    account: str
    use_case: str
    provider: str
    model: str
    dispatched_at: datetime
    kind: str = "actual"
    attempt_id: UUID = field(default_factory=uuid4)
    cost: int = 0
    baseline: int = 0
    tokens: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)
    first_token_ms: int | None = None
    duration_ms: int | None = None


@dataclass(frozen=True)
class Attempt:
    """One attempt that is of interest: most are not in this table of the test's."""

    entry: Entry
    state: str
    error_class: str | None

    @property
    def has_failed(self) -> bool:
        return self.state in ("failed", "unknown") or (
            self.state == "corrected" and self.error_class is not None
        )


class Books:
    """What a test has written, and the same in Postgres."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.entries: list[Entry] = []
        self.attempts: list[Attempt] = []

    def account(self, name: str, time_zone: str = "UTC") -> None:
        add_account(self.connection, name, time_zone)

    def enter(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.connection.exec_driver_sql(
            "INSERT INTO cost_entries (attempt_id, job_id, account_id, use_case, provider_id,"
            " provider, model, kind, amount_nano_usd, baseline_nano_usd, input_tokens,"
            " cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, output_tokens,"
            " reasoning_tokens, price_version, first_token_ms, duration_ms, dispatched_at)"
            " SELECT %(attempt_id)s, gen_random_uuid(), id, %(use_case)s, gen_random_uuid(),"
            " %(provider)s, %(model)s, %(kind)s, %(cost)s, %(baseline)s, %(t0)s, %(t1)s, %(t2)s,"
            " %(t3)s, %(t4)s, %(t5)s, 'test', %(first_token_ms)s, %(duration_ms)s,"
            " %(dispatched_at)s FROM accounts WHERE name = %(account)s",
            vars(entry) | {f"t{n}": tokens for n, tokens in enumerate(entry.tokens)},
        )

    def attempt(self, entry: Entry, state: str, error_class: str | None = None) -> None:
        """Write the attempt of an entry, or, of one that is not entered, an attempt without."""
        self.attempts.append(Attempt(entry, state, error_class))
        self.connection.exec_driver_sql(
            "WITH job AS (INSERT INTO jobs (id, account_id, use_case, lane, queue, state,"
            " max_attempts, deadline_at, request_hash)"
            " SELECT gen_random_uuid(), id, 'draft', 'bulk', 'q', 'succeeded', 5, now(), ''"
            " FROM accounts WHERE name = %(account)s RETURNING id, account_id)"
            " INSERT INTO attempts (id, job_id, fence, number, worker_id, account_id, use_case,"
            " provider_id, provider, model, state, reserved_nano_usd, baseline_reserved_nano_usd,"
            " dispatched_at, error_class)"
            " SELECT %(attempt_id)s, id, 1, 1, gen_random_uuid(), account_id, %(use_case)s,"
            " gen_random_uuid(), %(provider)s, %(model)s, %(state)s, 0, 0, %(dispatched_at)s,"
            " %(error_class)s FROM job",
            vars(entry) | {"state": state, "error_class": error_class},
        )

    def naive(
        self, key: Callable[[Entry], str], within: Callable[[Entry], bool]
    ) -> dict[str, dict[str, Any]]:
        """Add up by key, and for `all`, going over everything one by one."""
        found: dict[str, dict[str, Any]] = defaultdict(lambda: defaultdict(int))
        latencies: dict[tuple[str, str], list[int]] = defaultdict(list)
        corrected = {one.attempt_id for one in self.entries if one.kind == "correction"}
        for one in filter(within, self.entries):
            for name in (key(one), "all"):
                _count(found[name], one, is_open=one.attempt_id not in corrected)
                for what in ("duration", "first_token"):
                    latency_ms = getattr(one, f"{what}_ms")
                    if latency_ms is not None:
                        latencies[name, what].append(latency_ms)
        entered = {one.attempt_id for one in self.entries}
        for attempt in self.attempts:
            if attempt.has_failed and within(attempt.entry):
                for name in (key(attempt.entry), "all"):
                    found[name]["failures"] += 1
                    found[name]["requests"] += attempt.entry.attempt_id not in entered
        for (name, what), values in latencies.items():
            found[name][what] = percentiles(values)
        return found


def _count(sums: dict[str, Any], one: Entry, *, is_open: bool) -> None:
    sums["requests"] += one.kind != "correction"
    sums["cost_nano_usd"] += one.cost
    sums["baseline_nano_usd"] += one.baseline
    if one.kind == "estimate" and is_open:
        sums["estimates"] += 1
        sums["estimated_nano_usd"] += one.cost
    for column, tokens in zip(FIGURES[-6:], one.tokens, strict=True):
        sums[column] += tokens


def random_books(books: Books, seed: int, around: datetime, *, attempts: int = 250) -> None:
    """Write attempts of all kinds, in the days around a moment, many of them near midnight."""
    chance = random.Random(seed)
    books.account("acme", "Europe/Berlin")
    books.account("birch", "America/New_York")
    for _ in range(attempts):
        hours = chance.choice([chance.uniform(-80, 80), round(chance.uniform(-80, 80) * 2) / 2])
        one = Entry(
            account=chance.choice(["acme", "birch"]),
            use_case=chance.choice(["draft", "voice", "summary"]),
            provider=chance.choice(["one", "two"]),
            model=chance.choice(["m1", "m2", "m3"]),
            dispatched_at=around + timedelta(hours=hours, microseconds=chance.choice([-1, 0, 1])),
            attempt_id=UUID(int=chance.getrandbits(128)),
            cost=chance.randrange(10**12),
            baseline=chance.randrange(10**12),
        )
        _write(books, one, chance)


def _write(books: Books, one: Entry, chance: random.Random) -> None:
    """Write one attempt, as any of those there are."""
    answer: dict[str, Any] = {
        "tokens": tuple(chance.randrange(10**6) for _ in range(6)),
        "first_token_ms": chance.choice([None, chance.randrange(3000)]),
        "duration_ms": chance.choice([0, 1, chance.randrange(300_000)]),
    }
    estimate = replace(one, kind="estimate")
    match chance.choice(["actual"] * 6 + ["failed", "billed", "cancelled", "unknown", "corrected"]):
        case "actual":
            books.enter(replace(one, **answer))
            books.attempt(one, "succeeded")
        case "failed":
            books.attempt(one, "failed", "server")
        case "billed":
            books.enter(replace(one, tokens=answer["tokens"]))
            books.attempt(one, "failed", "server")
        case "cancelled":
            books.enter(estimate)
            books.attempt(one, "cancelled")
        case "unknown":
            books.enter(estimate)
            books.attempt(one, "unknown", "lost")
        case "corrected":
            books.enter(estimate)
            less: dict[str, Any] = {
                "cost": -chance.randrange(10**9),
                "baseline": -chance.randrange(10**9),
            }
            books.enter(replace(one, kind="correction", **less, **answer))
            books.attempt(one, "corrected", chance.choice([None, "timeout"]))

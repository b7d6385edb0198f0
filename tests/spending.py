"""Many cost entries, each known by its number alone: what reports are measured and checked with."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection

START = datetime(2026, 10, 1, tzinfo=UTC)
DAYS = 31
ACCOUNTS = ("acme", "birch", "cedar", "dune", "elm")
USE_CASES = ("draft", "summary", "complex", "vision", "voice", "general")
#: Provider rows and their models.
PROVIDERS = (
    ("anthropic-claude-haiku-5-5", "claude-haiku-5-5"),
    ("anthropic-claude-sonnet-5-5", "claude-sonnet-5-5"),
    ("openai-gpt-6-luna", "gpt-6-luna"),
    ("openai-gpt-6.1-sol", "gpt-6.1-sol"),
    ("openai-gpt-6.1-sol-eu", "gpt-6.1-sol"),
)
_SPAN_US = DAYS * 86_400_000_000

# One in 100 is an estimate, one in 400 is corrected; besides, one attempt in 50 is refused and has
# no entry, and one in 50 is in the table of attempts as one that answered. One in four is streamed.
_NUMBERED = f"""
WITH numbered AS (
    SELECT n, accounts[1 + n %% {len(ACCOUNTS)}] AS account_id,
           use_cases[1 + n / {len(ACCOUNTS)} %% {len(USE_CASES)}] AS use_case,
           providers[p] AS provider, models[p] AS model, md5(providers[p])::uuid AS provider_id,
           md5('attempt ' || n)::uuid AS attempt_id, md5('job')::uuid AS job_id,
           %(start)s::timestamptz + n * {_SPAN_US} / %(entries)s * interval '1 microsecond'
               AS dispatched_at,
           n %% 100 = 7 AS is_estimate, n %% 400 = 7 AS is_corrected
    FROM generate_series(0, %(entries)s::bigint - 1) AS n,
         LATERAL (SELECT 1 + n / 30 %% {len(PROVIDERS)} AS p) AS place,
         (SELECT %(accounts)s::uuid[] AS accounts, %(use_cases)s::text[] AS use_cases,
                 %(providers)s::text[] AS providers, %(models)s::text[] AS models) AS given
)
"""

_ENTRY = """
INSERT INTO cost_entries (
    attempt_id, job_id, account_id, use_case, provider_id, provider, model, kind, amount_nano_usd,
    baseline_nano_usd, input_tokens, cache_read_tokens, cache_write_5m_tokens,
    cache_write_1h_tokens, output_tokens, reasoning_tokens, price_version,
    first_token_ms, duration_ms, dispatched_at, created_at)
"""

_FIRST = f"""
{_NUMBERED}
{_ENTRY}
SELECT attempt_id, job_id, account_id, use_case, provider_id, provider, model,
       CASE WHEN is_estimate THEN 'estimate' ELSE 'actual' END,
       1000000 + n %% 977 * 13, 3000000 + n %% 7,
       t * (200 + n %% 811), t * (n %% 4 * 55), t * (n %% 9), t * (n %% 2), t * (100 + n %% 301),
       t * (n %% 40), 'genai-prices 0.2.3',
       CASE WHEN t = 1 AND n %% 4 = 1 THEN 100 + n * 104729 %% 3001 END,
       CASE WHEN t = 1 THEN 300 + n * 7919 %% 20011 END, dispatched_at, dispatched_at
FROM (SELECT *, CASE WHEN is_estimate THEN 0 ELSE 1 END AS t FROM numbered) AS numbered
ORDER BY n
"""

_CORRECTIONS = f"""
{_NUMBERED}
{_ENTRY}
SELECT attempt_id, job_id, account_id, use_case, provider_id, provider, model, 'correction',
       -400000, -1000000, 70, 0, 0, 0, 30, 0, 'genai-prices 0.2.3',
       NULL, 60000, dispatched_at, dispatched_at
FROM numbered WHERE is_corrected
"""

_ATTEMPTS = f"""
{_NUMBERED}
INSERT INTO attempts (
    id, job_id, fence, number, worker_id, account_id, use_case, provider_id, provider, model, state,
    reserved_nano_usd, baseline_reserved_nano_usd, dispatched_at, ended_at, error_class)
SELECT CASE WHEN n %% 50 = 3 THEN md5('refused ' || n)::uuid ELSE attempt_id END, job_id, 1, 1,
       job_id, account_id, use_case, provider_id, provider, model,
       CASE WHEN n %% 50 = 3 THEN 'failed' WHEN n %% 50 = 4 THEN 'succeeded'
            WHEN is_corrected THEN 'corrected' ELSE 'unknown' END,
       9000000, 9000000, dispatched_at, dispatched_at,
       CASE WHEN n %% 50 = 3 THEN 'server' WHEN n %% 50 = 4 THEN NULL
            WHEN n %% 800 = 7 THEN NULL WHEN is_corrected THEN 'timeout' ELSE 'lost' END
FROM numbered WHERE n %% 50 IN (3, 4) OR is_estimate
"""

_ACCOUNTS = """
INSERT INTO accounts (id, name) SELECT md5('account ' || name)::uuid, name
FROM unnest(%(names)s::text[]) AS name RETURNING id, name
"""
_JOB = """
INSERT INTO jobs (id, account_id, use_case, lane, queue, state, max_attempts, deadline_at,
                  request_hash)
SELECT md5('job')::uuid, id, 'draft', 'bulk', 'draft.openai.bulk', 'succeeded', 5, now(), ''
FROM accounts WHERE name = 'acme'
"""


def fill(connection: Connection, entries: int) -> None:
    """Insert so many first entries, with what belongs to them; the tables are empty before."""
    rows = connection.exec_driver_sql(_ACCOUNTS, {"names": list(ACCOUNTS)}).all()
    ids = {row.name: row.id for row in rows}
    connection.exec_driver_sql(_JOB)
    values = {
        "entries": entries,
        "start": START,
        "accounts": [ids[name] for name in ACCOUNTS],
        "use_cases": list(USE_CASES),
        "providers": [provider for provider, _ in PROVIDERS],
        "models": [model for _, model in PROVIDERS],
    }
    for statement in (_FIRST, _CORRECTIONS, _ATTEMPTS):
        connection.exec_driver_sql(statement, values)
    connection.exec_driver_sql("VACUUM ANALYZE cost_entries, attempts")


@dataclass
class Expected:
    """What a report should say of some entries; latencies are all of them, for the naive way."""

    figures: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    durations_ms: list[int] = field(default_factory=list)
    first_tokens_ms: list[int] = field(default_factory=list)

    def add(self, **figures: int) -> None:
        for name, figure in figures.items():
            self.figures[name] += figure


def expected(entries: int, by: str) -> dict[str, Expected]:
    """Work out what a report over all of `fill` should say, by key and for `all`, one by one."""
    found: dict[str, Expected] = defaultdict(Expected)
    for n in range(entries):
        for one in (found[_key(n, entries, by)], found["all"]):
            _count(one, n)
    return dict(found)


def _key(n: int, entries: int, by: str) -> str:
    provider, model = PROVIDERS[n // 30 % len(PROVIDERS)]
    if by == "day":
        return (START + timedelta(microseconds=n * _SPAN_US // entries)).date().isoformat()
    return {
        "account": ACCOUNTS[n % len(ACCOUNTS)],
        "use_case": USE_CASES[n // len(ACCOUNTS) % len(USE_CASES)],
        "provider": provider,
        "model": model,
    }[by]


def _count(one: Expected, n: int) -> None:
    is_estimate, is_corrected = n % 100 == 7, n % 400 == 7
    amount = 1_000_000 + n % 977 * 13
    one.add(requests=1, cost_nano_usd=amount, baseline_nano_usd=3_000_000 + n % 7)
    if n % 50 == 3:
        one.add(requests=1, failures=1)
    if not is_estimate:
        one.add(
            input_tokens=200 + n % 811,
            cache_read_tokens=n % 4 * 55,
            cache_write_5m_tokens=n % 9,
            cache_write_1h_tokens=n % 2,
            output_tokens=100 + n % 301,
            reasoning_tokens=n % 40,
        )
        one.durations_ms.append(300 + n * 7919 % 20011)
        if n % 4 == 1:
            one.first_tokens_ms.append(100 + n * 104_729 % 3001)
    elif is_corrected:
        one.add(cost_nano_usd=-400_000, baseline_nano_usd=-1_000_000)
        one.add(input_tokens=70, output_tokens=30, failures=int(n % 800 != 7))
        one.durations_ms.append(60_000)
    else:
        one.add(failures=1, estimates=1, estimated_nano_usd=amount)


def percentiles(values: list[int]) -> dict[str, int]:
    """Return the exact ones, the naive way."""
    ordered = sorted(values)
    return {
        f"p{percent}_ms": ordered[-(-len(ordered) * percent // 100) - 1] for percent in (50, 95, 99)
    }

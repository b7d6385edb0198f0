"""The doctor: looks at the servers, schema, clocks, keys, catalogue and processes of a fleet."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from typing import Any, Final, cast

import redis
from sqlalchemy import Connection, text

from sluicegate.producers.diagnosis import (
    ALERTS_SHOWN,
    Finding,
    judge_alert_urls,
    judge_catalogue,
    judge_clocks,
    judge_drift,
    judge_gates,
    judge_keyrings,
    judge_keys,
    judge_postgres,
    judge_processes,
    judge_redis,
    judge_settings,
    ok,
    problem,
)
from sluicegate.shared.admission.budget_copies import drift_key
from sluicegate.shared.catalogue import Catalogue, read
from sluicegate.shared.connecting import connected
from sluicegate.shared.database import DATABASE_ERRORS, check_schema
from sluicegate.shared.errors import SchemaOutdated, SettingsError
from sluicegate.shared.gate_changes import last_changes, list_alerts, list_pauses
from sluicegate.shared.jobs import Lane
from sluicegate.shared.provider_keys import KEY_VARIABLES, environment_key, readers
from sluicegate.shared.queues import POOLS, pool_queues
from sluicegate.shared.redis_client import make_redis
from sluicegate.shared.secrets import Keyring, SecretUnreadable
from sluicegate.shared.settings import Settings

_SERVER: Final = """
SELECT name, setting FROM pg_settings
WHERE name IN ('server_version', 'server_version_num', 'fsync', 'synchronous_commit',
               'max_connections')
"""
#: Our processes: a worker, a sweep and a producer each name their connections.
_PROCESSES: Final = """
SELECT count(DISTINCT (application_name, client_addr)) AS processes,
       count(*) FILTER (WHERE application_name = 'sluice sweep listen') AS sweeps
FROM pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'sluice %'
"""
#: Keys that are kept encrypted, of providers that are in use.
_STORED: Final = """
SELECT name, provider AS pool, account_id IS NULL AND base_url IS NULL AS is_global,
       api_key_encrypted
FROM llm_providers WHERE is_active AND api_key_encrypted IS NOT NULL
UNION ALL
SELECT coalesce(a.name || ' for ', '') || k.provider, k.provider, k.account_id IS NULL,
       k.api_key_encrypted
FROM provider_keys k LEFT JOIN accounts a ON a.id = k.account_id
UNION ALL
SELECT 'the alerts of account ' || name, '', false, alert_secret_encrypted
FROM accounts WHERE alert_secret_encrypted IS NOT NULL
"""
#: The last alert of each account that its URL did not take, unless somebody has seen it.
_NOT_TAKEN: Final = """
SELECT DISTINCT ON (a.account_id) c.name, a.post_error
FROM alerts a JOIN accounts c ON c.id = a.account_id
WHERE a.posted_at IS NULL AND a.post_error IS NOT NULL AND a.acked_at IS NULL
  AND c.alert_url IS NOT NULL
ORDER BY a.account_id, a.id DESC
"""
_SERVED: Final = (
    "SELECT DISTINCT unnest(queues) FROM workers WHERE seen_at > now() - interval '30 s'"
)


def examine(settings: Settings) -> list[Finding]:
    """Look at all there is; what cannot be reached is a finding too, and raises nothing."""
    findings = judge_settings(settings)
    clocks: dict[str, float] = {}
    try:
        with connected(settings) as connection:
            findings += _look_at_postgres(connection, settings, clocks)
    except DATABASE_ERRORS as error:
        reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
        findings.append(
            problem(
                "postgres",
                f"did not answer: {reason}",
                "start it, or check SLUICE_DATABASE_URL",
            )
        )
    try:
        with closing(make_redis(settings)) as client:
            clocks["Redis"] = _redis_difference_s(client)
            findings += judge_redis(cast("Mapping[str, Any]", client.info()))
            drift = cast("dict[bytes, bytes]", client.hgetall(drift_key(settings.redis_prefix)))
            findings += judge_drift({name.decode(): int(float(n)) for name, n in drift.items()})
    except redis.RedisError as error:
        findings.append(
            problem("redis", f"did not answer: {error}", "start it, or check SLUICE_REDIS_URL")
        )
    return [*findings, *judge_clocks(clocks)]


def _look_at_postgres(
    connection: Connection, settings: Settings, clocks: dict[str, float]
) -> list[Finding]:
    before_s = time.time()
    now_s = connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())::float8"))
    clocks["Postgres"] = now_s - (before_s + time.time()) / 2
    server = {row.name: row.setting for row in connection.execute(text(_SERVER))}
    processes = connection.execute(text(_PROCESSES)).one()
    findings = judge_postgres(
        server | {"pool_size": str(settings.database_pool_size)},
        int(server["server_version_num"]),
        processes=processes.processes,
    )
    try:
        check_schema(connection)
    except SchemaOutdated as outdated:
        found, _, advice = str(outdated).partition("; ")
        return [*findings, problem("schema", found, advice)]
    findings.append(ok("schema", "is this version's"))
    return findings + _look_at_fleet(connection, settings, sweeps=processes.sweeps)


def _look_at_fleet(connection: Connection, settings: Settings, *, sweeps: int) -> list[Finding]:
    catalogue = read(connection)
    names = sorted(catalogue.use_cases)
    now = datetime.now(UTC)
    return [
        *judge_catalogue(catalogue, settings, now),
        *_look_at_keys(connection, catalogue, settings),
        *_look_at_gates(connection, catalogue, now),
        *judge_alert_urls(
            (row.name, row.post_error) for row in connection.execute(text(_NOT_TAKEN))
        ),
        *judge_processes(
            connection.scalars(text(_SERVED)).all(),
            [queue for pool in POOLS for lane in Lane for queue in pool_queues(names, pool, lane)],
            sweeps=sweeps,
        ),
    ]


def _look_at_gates(connection: Connection, catalogue: Catalogue, now: datetime) -> list[Finding]:
    moved = last_changes(connection, "lever")
    levers = [
        (row.name, row.breaker, moved[row.id][1])
        for row in catalogue.providers
        if row.breaker != "auto" and row.id in moved
    ]
    alerts = list_alerts(connection, limit=ALERTS_SHOWN + 1)
    return judge_gates(alerts, list_pauses(connection), levers, now)


def _look_at_keys(
    connection: Connection, catalogue: Catalogue, settings: Settings
) -> list[Finding]:
    try:
        keyring = Keyring.of(settings)
    except SettingsError as refusal:
        found, _, advice = str(refusal).partition("; ")
        return [problem("keys", found, advice)]
    sources: dict[str, str] = {
        pool: "from the environment" for pool in KEY_VARIABLES if environment_key(settings, pool)
    }
    unreadable = []
    for row in connection.execute(text(_STORED)):
        try:
            keyring.decrypt(row.api_key_encrypted)
        except SecretUnreadable:
            unreadable.append(row.name)
        else:
            if row.is_global:
                sources.setdefault(row.pool, "from the database")
    findings = judge_keys(catalogue.providers, sources, unreadable)
    if not keyring.fingerprints:
        return findings
    return findings + judge_keyrings(readers(connection, keyring))


def _redis_difference_s(client: redis.Redis) -> float:
    """Return how far Redis' clock is from ours, in seconds."""
    before_s = time.time()
    seconds, microseconds = client.time()
    return seconds + microseconds / 1e6 - (before_s + time.time()) / 2

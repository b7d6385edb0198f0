"""What the doctor makes of what it was shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from sluicegate.producers.diagnosis import (
    Finding,
    Level,
    judge_catalogue,
    judge_clocks,
    judge_drift,
    judge_keyrings,
    judge_keys,
    judge_postgres,
    judge_processes,
    judge_redis,
    judge_settings,
)
from sluicegate.shared.catalogue import Catalogue, Provider, UseCase
from sluicegate.shared.provider_keys import Readers
from sluicegate.shared.settings import Settings

NOW = datetime(2026, 11, 23, tzinfo=UTC)

POSTGRES = {
    "server_version": "18.6 (Debian)",
    "fsync": "on",
    "synchronous_commit": "on",
    "max_connections": "100",
    "pool_size": "8",
}
REDIS: dict[str, object] = {
    "redis_version": "7.2.4",
    "valkey_version": "9.1.2",
    "role": "master",
    "maxmemory": 1000,
    "used_memory": 100,
    "maxmemory_policy": "noeviction",
    "aof_enabled": 1,
}


def settings(**values: Any) -> Settings:
    return Settings(_env_file=None, **values)


def bad(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    """Level and text of what is not well; each such finding says what to do."""
    found = [finding for finding in findings if finding.level is not Level.OK]
    assert all(finding.advice for finding in found)
    return [(finding.level.value, finding.found) for finding in found]


def row(name: str = "one", **values: Any) -> Provider:
    given: dict[str, Any] = {
        "id": UUID(int=len(name)),
        "name": name,
        "provider": "openai",
        "model": "gpt-4o",
        "base_url": None,
        "is_default": False,
        "use_case": frozenset({"draft"}),
        "failover": frozenset(),
        "max_tokens": 1000,
        "context_tokens": 100_000,
        "capabilities": frozenset(),
        "account_id": None,
        "catalogue": None,
        "priority": 100,
        "retires_at": None,
        "successor": None,
        "price_override": None,
    }
    return Provider(**(given | values))


def catalogue(*rows: Provider, use_cases: tuple[str, ...] = ("draft",)) -> Catalogue:
    return Catalogue(
        rows,
        {
            name: UseCase(
                name=name,
                description="",
                prefer="priority",
                max_tokens=100,
                unknown_policy="retry_once",
            )
            for name in use_cases
        },
    )


def test_the_settings_that_ship_fit_together() -> None:
    (finding,) = judge_settings(settings())
    assert finding.level is Level.OK


@pytest.mark.parametrize(
    ("values", "level", "text"),
    [
        ({"idle_deadline_s": 400}, "warning", "SLUICE_TOTAL_DEADLINE_S (300) is below"),
        ({"interactive_deadline_s": 5}, "warning", "SLUICE_INTERACTIVE_DEADLINE_S (5) is below"),
        ({"reply_ttl_s": 60}, "warning", "SLUICE_REPLY_TTL_S (60) is below"),
        ({"jobs_in_flight": 10}, "warning", "SLUICE_JOBS_IN_FLIGHT (10) is below"),
        ({"baseline_model": "no-such-model"}, "problem", "'no-such-model' is not known"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, Any], level: str, text: str) -> None:
    ((found_level, found),) = bad(judge_settings(settings(**values)))
    assert found_level == level
    assert text in found


@pytest.mark.parametrize(
    ("changes", "version", "level", "text"),
    [
        ({}, 140_010, "problem", "is version 14"),
        ({"fsync": "off"}, 180_006, "problem", "fsync off"),
        ({"synchronous_commit": "off"}, 180_006, "warning", "before the disk has it"),
        ({"max_connections": "40"}, 180_006, "warning", "5 processes may take 8"),
    ],
)
def test_postgres(changes: dict[str, str], version: int, level: str, text: str) -> None:
    ((found_level, found),) = bad(judge_postgres(POSTGRES | changes, version, processes=5))
    assert found_level == level
    assert text in found


def test_the_drift_of_budgets_is_told_and_is_no_problem() -> None:
    assert judge_drift({}) == judge_drift({"budgets": 0, "rounds": 9}) == []
    (well,) = judge_drift({"budgets": 2, "rounds": 9, "missing": 0})
    assert (well.level, well.found) == (
        "ok",
        "2 budgets; their copies in Redis in 9 rounds: all as they should be",
    )
    (told,) = judge_drift({"budgets": 2, "rounds": 9, "missing": 3, "wrong": 1, "at_s": 5})
    assert told.level == "ok"
    assert told.found.endswith("in 9 rounds: 3 missing, 1 wrong")


def test_servers_that_are_well() -> None:
    assert judge_postgres(POSTGRES, 180_006, processes=5)[0].found == "version 18.6"
    assert judge_redis(REDIS)[0].found == "Valkey 9.1.2"
    assert bad(judge_redis(REDIS | {"maxmemory": 0, "maxmemory_policy": "allkeys-lru"})) == []


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({"valkey_version": "6.2.14"}, "problem", "is version 6.2.14"),
        ({"role": "slave"}, "problem", "replica"),
        ({"maxmemory_policy": "allkeys-lru"}, "problem", "throws keys away"),
        ({"aof_enabled": 0}, "warning", "keeps nothing over a restart"),
        ({"used_memory": 900}, "warning", "90% of its memory"),
    ],
)
def test_redis(changes: dict[str, object], level: str, text: str) -> None:
    ((found_level, found),) = bad(judge_redis(REDIS | changes))
    assert found_level == level
    assert text in found


@pytest.mark.parametrize(
    ("difference_s", "expected"),
    [
        (0.2, []),
        (-0.9, [("warning", "the clock of Redis is 0.9 s behind this machine's")]),
        (3.0, [("problem", "the clock of Redis is 3.0 s ahead of this machine's")]),
    ],
)
def test_clocks(difference_s: float, expected: list[tuple[str, str]]) -> None:
    assert bad(judge_clocks({"Postgres": 0.0, "Redis": difference_s})) == expected


def test_a_model_that_retires_is_spoken_of_for_60_days() -> None:
    ends = row(retires_at=NOW + timedelta(days=60, hours=1), successor="next")
    assert bad(judge_catalogue(catalogue(ends), settings(), NOW)) == []
    soon = replace(ends, retires_at=NOW + timedelta(days=7, hours=1))
    (finding,) = judge_catalogue(catalogue(soon), settings(), NOW)
    assert finding.found == "one retires in 7 days, on 2026-11-30"
    assert finding.advice == "move to next"


def test_a_model_that_nobody_uses_may_retire() -> None:
    idle = row("idle", use_case=frozenset(), retires_at=NOW + timedelta(days=7))
    assert bad(judge_catalogue(catalogue(row(), idle), settings(), NOW)) == []


def test_a_use_case_that_nobody_serves() -> None:
    found = bad(judge_catalogue(catalogue(row(), use_cases=("draft", "poems")), settings(), NOW))
    assert found == [
        ("problem", "use case poems: use_case: no active provider serves 'poems'"),
    ]


def test_a_model_without_a_price() -> None:
    unpriced = row("odd", model="no-such-model")
    found = bad(judge_catalogue(catalogue(row(), unpriced), settings(), NOW))
    assert ("problem", "odd: the price of no-such-model is not known, so its jobs fail") in found


def test_keys() -> None:
    rows = [row(), row("claude", provider="anthropic")]
    assert bad(judge_keys(rows, {"openai": "from the environment"}, [])) == [
        ("problem", "there is no key for anthropic: its jobs fail")
    ]
    sources = {"openai": "from the environment", "anthropic": "from the database"}
    assert bad(judge_keys(rows, sources, [])) == []
    assert bad(judge_keys(rows, sources, ["acme for openai"])) == [
        ("problem", "the key of acme for openai cannot be decrypted")
    ]


def test_workers_that_do_not_hold_the_newest_key() -> None:
    assert judge_keyrings(Readers(live=2, without=())) == []
    assert bad(judge_keyrings(Readers(live=2, without=("a@h", "b@h")))) == [
        ("warning", "a@h, b@h cannot decrypt what the newest key encrypts")
    ]


def test_a_pool_whose_models_are_all_elsewhere_needs_no_key() -> None:
    assert judge_keys([row(base_url="http://127.0.0.1:1/v1")], {}, []) == []


def test_processes() -> None:
    wanted = ["draft.openai", "draft.openai.bulk"]
    assert bad(judge_processes(wanted, wanted, sweeps=1)) == []
    assert bad(judge_processes([], wanted, sweeps=0)) == [
        ("warning", "none runs"),
        ("warning", "none runs: bulk jobs wait, nothing is repaired"),
    ]
    assert bad(judge_processes(wanted[:1], wanted, sweeps=1)) == [
        ("warning", "nobody serves 1 of the queues: draft.openai.bulk")
    ]

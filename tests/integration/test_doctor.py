"""`sluice doctor` and `sluice health`, against real servers."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable

import pytest
from sqlalchemy import Engine, text

from sluicegate.shared.secrets import Keyring, new_key
from sluicegate.shared.settings import Settings
from tests.command_line import Command, Outcome

Environment = Callable[[Settings], dict[str, str]]


@pytest.fixture
def sluice(settings: Settings, command_line: Callable[[Settings], Command]) -> Command:
    def call(*arguments: str, **changes: object) -> Outcome:
        return command_line(settings.model_copy(update=changes))(*arguments)

    return call


def findings(outcome: Outcome) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for one in json.loads(outcome.out)["findings"]:
        found.setdefault(one["subject"], []).append((one["level"], one["found"]))
    return found


@pytest.fixture
def away() -> str:
    """Return host and port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_a_fleet_without_keys_and_workers(sluice: Command) -> None:
    outcome = sluice("doctor", "--json")
    found = findings(outcome)
    assert outcome.code == 1
    assert found["schema"] == [("ok", "is this version's")]
    assert found["clocks"] == [("ok", "agree")]
    assert ("problem", "there is no key for openai: its jobs fail") in found["keys"]
    assert found["workers"] == [("warning", "none runs")]
    assert found["sweep"][0][0] == "warning"
    assert found["settings"] == [("ok", "fit together")]


def test_what_is_well_has_no_problem(sluice: Command, engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(
            text(
                "INSERT INTO workers (id, name, pool, lane, queues) VALUES"
                " (gen_random_uuid(), 'w@h', 'openai', 'interactive', '{draft.openai}')"
            )
        )
        # Tests run without fsync: it is the server that is not well.
        fsync = connection.scalar(text("SHOW fsync"))
    outcome = sluice("doctor", openai_api_key="k", anthropic_api_key="k")
    lines = [line.split("\t") for line in outcome.out.splitlines()]
    problems = [line for line in lines if line[0] == "problem"]
    assert len(problems) == (fsync == "off"), problems
    assert outcome.code == len(problems)
    assert ["ok", "keys", "openai: from the environment", ""] in lines
    assert any(line[1] == "workers" and "nobody serves" in line[2] for line in lines)


def test_an_old_schema(sluice: Command, empty_database: str) -> None:
    outcome = sluice("doctor", "--json", database_url=empty_database)
    assert outcome.code == 1
    ((level, found),) = findings(outcome)["schema"]
    assert level == "problem"
    assert "is at nothing" in found
    assert "sluice db upgrade" in outcome.out


def test_servers_that_are_away(sluice: Command, away: str) -> None:
    outcome = sluice(
        "doctor",
        "--json",
        database_url=f"postgresql+psycopg://sluice@{away}/sluice",
        redis_url=f"redis://{away}/0",
    )
    found = findings(outcome)
    assert outcome.code == 1
    assert [level for level, _ in found["postgres"] + found["redis"]] == ["problem", "problem"]
    assert "SLUICE_DATABASE_URL" in outcome.out
    assert "SLUICE_REDIS_URL" in outcome.out


def test_a_stored_key_that_cannot_be_read(sluice: Command, engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(
            text(
                "INSERT INTO provider_keys (id, provider, api_key_encrypted)"
                " VALUES (gen_random_uuid(), 'openai', 'of-another-fleet')"
            )
        )
    found = findings(sluice("doctor", "--json"))
    assert ("problem", "the key of openai cannot be decrypted") in found["keys"]


def test_a_worker_without_the_newest_key(sluice: Command, engine: Engine) -> None:
    key = new_key()
    with engine.connect() as connection:
        connection.execute(
            text(
                "INSERT INTO workers (id, name, pool, lane, queues)"
                " VALUES (gen_random_uuid(), 'w@h', 'openai', 'interactive', '{}')"
            )
        )
    warned = ("warning", "w@h cannot decrypt what the newest key encrypts")
    assert warned not in findings(sluice("doctor", "--json"))["keys"]
    assert warned in findings(sluice("doctor", "--json", encryption_keys=key))["keys"]
    with engine.connect() as connection:
        connection.execute(
            text("UPDATE workers SET keyring = :held"), {"held": [*Keyring([key]).fingerprints]}
        )
    assert warned not in findings(sluice("doctor", "--json", encryption_keys=key))["keys"]


def test_health(sluice: Command, engine: Engine, away: str, empty_database: str) -> None:
    assert sluice("health") == (0, "healthy\n", "")
    assert json.loads(sluice("health", "--json").out) == {"healthy": True, "part": "servers"}

    assert sluice("health", "worker").code == 1
    with engine.connect() as connection:
        connection.execute(
            text(
                "INSERT INTO workers (id, name, pool, lane, queues)"
                " VALUES (gen_random_uuid(), :name, 'openai', 'interactive', '{}')"
            ),
            {"name": f"openai-interactive@{socket.gethostname()}"},
        )
    assert sluice("health", "worker").code == 0
    assert "no sweep" in sluice("health", "sweep").err

    for changes, says in (
        ({"redis_url": f"redis://{away}/0"}, "SLUICE_REDIS_URL"),
        ({"database_url": f"postgresql+psycopg://sluice@{away}/sluice"}, "SLUICE_DATABASE_URL"),
        ({"database_url": empty_database}, "sluice db upgrade"),
    ):
        outcome = sluice("health", **changes)
        assert outcome.code == 1
        assert len(outcome.err.splitlines()) == 1
        assert says in outcome.err

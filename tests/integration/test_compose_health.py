"""The health checks of `docker-compose.yml`, run as the containers run them."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from sqlalchemy import Engine, text

from sluicegate.shared.database import make_engine
from sluicegate.shared.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]

Check = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture
def check(settings: Settings, environment: Callable[[Settings], dict[str, str]]) -> Check:
    """Return a function that runs the health check of a service."""

    def run(service: str) -> subprocess.CompletedProcess[str]:
        kind, program, *arguments = SERVICES[service]["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "sluice")
        return subprocess.run(
            [sys.executable, "-m", "sluicegate.cli", *arguments],
            env=environment(settings),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_a_worker_is_healthy_while_it_beats(check: Check, engine: Engine) -> None:
    assert check("worker-openai").returncode != 0
    with engine.connect() as connection:
        connection.execute(
            text(
                "INSERT INTO workers (id, name, pool, lane, queues)"
                " VALUES (gen_random_uuid(), :name, 'openai', 'interactive', '{}')"
            ),
            {"name": f"openai-interactive@{socket.gethostname()}"},
        )
        healthy = check("worker-openai")
        assert healthy.returncode == 0, healthy.stderr
        connection.execute(text("UPDATE workers SET seen_at = now() - interval '1 minute'"))
    assert check("worker-openai").returncode != 0


def test_the_sweep_is_healthy_while_it_is_connected(check: Check, settings: Settings) -> None:
    assert check("sweep").returncode != 0
    listening = make_engine(settings, application_name="sluice sweep listen")
    with listening.connect():
        healthy = check("sweep")
    listening.dispose()
    assert healthy.returncode == 0, healthy.stderr


def test_migrations_are_done_when_the_schema_is_of_their_version(
    check: Check, engine: Engine
) -> None:
    healthy = check("migrate")
    assert healthy.returncode == 0, healthy.stderr
    with engine.connect() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    assert "sluice db upgrade" in check("migrate").stderr

"""A worker that cannot do its work says why, in one sentence, and ends."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sluicegate.shared import migrations
from sluicegate.shared.settings import Settings
from tests.harness import Service, environment_of

CELERY = [sys.executable, "-m", "celery", "-A", "sluicegate.workers.app", "worker"]
SLUICE = [sys.executable, "-m", "sluicegate.cli"]

Run = Callable[..., str]


@pytest.fixture
def run(settings: Settings, tmp_path: Path) -> Run:
    """Return a function that runs a program which must fail; it returns what was said."""

    def start(*argv: str, **changes: object) -> str:
        given = settings.model_copy(update=changes)
        service = Service("refused", list(argv), environment_of(given), tmp_path / "refused.log")
        try:
            code = service.wait(60)
        finally:
            service.end()
        said = service.log
        assert code > 0, said
        assert "Traceback" not in said
        return re.sub(r"\s+", " ", said)

    return start


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-Q", "draft.anthropic,draft.anthropic.bulk"], "a worker serves one lane"),
        (["-Q", "draft.anthropic,draft.openai"], "a worker serves one pool"),
        (["-Q", "draft"], "'draft' is not a queue of this fleet"),
        # Celery takes `-P prefork`, its own default, for the configured pool.
        (["-Q", "draft.anthropic", "-P", "threads"], "runs on the asyncio pool only"),
        (["-Q", "draft.anthropic", "-P", "solo"], "runs on the asyncio pool only"),
        ([], "a worker serves one"),
    ],
)
def test_a_worker_that_is_started_wrongly(run: Run, arguments: list[str], sentence: str) -> None:
    assert sentence in run(*CELERY, *arguments)


def test_a_worker_without_postgres(run: Run) -> None:
    away = f"postgresql+psycopg://sluice@127.0.0.1:{_closed_port()}/sluice"
    said = run(*CELERY, "-Q", "draft.anthropic", database_url=away)
    assert "The worker cannot start: Postgres did not answer" in said
    assert said.strip().endswith("check SLUICE_DATABASE_URL")


def test_a_worker_with_an_old_schema(run: Run, empty_database: str) -> None:
    migrations.upgrade(Settings(_env_file=None, database_url=empty_database), "0001")
    said = run(*CELERY, "-Q", "draft.anthropic", database_url=empty_database)
    assert "run `sluice db upgrade`" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["worker", "nobody"], "'nobody' is not a pool"),
        (["worker", "anthropic", "-Q", "draft"], "'draft' is not a queue of this fleet"),
    ],
)
def test_the_command_line_says_it_too(run: Run, arguments: list[str], sentence: str) -> None:
    assert sentence in run(*SLUICE, *arguments)


@pytest.mark.parametrize("arguments", [["worker", "anthropic"], ["sweep"]])
def test_the_command_line_without_postgres(run: Run, arguments: list[str]) -> None:
    away = f"postgresql+psycopg://sluice@127.0.0.1:{_closed_port()}/sluice"
    assert "Postgres" in run(*SLUICE, *arguments, database_url=away)


def test_the_sweep_with_an_old_schema(run: Run, empty_database: str) -> None:
    assert "run `sluice db upgrade`" in run(*SLUICE, "sweep", database_url=empty_database)

"""What is forked for a test is what it would be if it were started."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from sluicegate.shared.settings import Settings
from tests import prefork
from tests.harness import environment_of
from tests.polling import eventually

CELERY = [sys.executable, "-m", "celery"]


@pytest.fixture
def started(settings: Settings, tmp_path: Path) -> Any:
    def start(argv: list[str], env: Mapping[str, str] = environment_of(settings)) -> Any:
        with (tmp_path / "said").open("wb") as output:
            return prefork.start(argv, env=env, cwd=tmp_path, output=output)

    return start


def test_it_runs_with_its_own_arguments_output_and_exit_code(started: Any, tmp_path: Path) -> None:
    assert started([*CELERY, "--version"]).wait(30) == 0
    assert (tmp_path / "said").read_text().startswith("5.")
    assert started([*CELERY, "no-such-command"]).wait(30) == 2
    assert "No such command" in (tmp_path / "said").read_text()


def test_it_is_a_child_with_a_group_of_its_own_and_ends_by_signals(
    started: Any, tmp_path: Path
) -> None:
    process = started([sys.executable, "-m", "sluicegate.cli", "sweep"])
    assert process.poll() is None
    assert psutil.Process(process.pid).ppid() == os.getpid()
    assert os.getpgid(process.pid) == process.pid
    assert psutil.Process(process.pid).cwd() == str(tmp_path)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    assert not psutil.pid_exists(process.pid)


def test_it_has_its_own_environment(started: Any, settings: Settings, tmp_path: Path) -> None:
    away = settings.model_copy(update={"database_url": "postgresql+psycopg://s@127.0.0.1:1/s"})
    env = {name: str(value) for name, value in environment_of(settings).items()}
    env["SLUICE_DATABASE_URL"] = str(away.database_url)
    process = started([sys.executable, "-m", "sluicegate.cli", "sweep"], env)
    assert process.wait(60) == 1
    assert "check SLUICE_DATABASE_URL" in (tmp_path / "said").read_text()


def test_what_looks_at_its_environment_while_it_is_imported_is_started(
    started: Any, settings: Settings
) -> None:
    env = {**environment_of(settings), "SLUICE_FAILPOINTS": "opened=kill"}
    process = started([*CELERY, "--version"], env)
    assert not isinstance(process, prefork.Forked)
    eventually(lambda: process.poll() is not None, 60)

"""What cannot do its work says why, in one sentence, and ends: a worker, and the whole fleet."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import urllib.request
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

from sluicegate.shared import migrations
from sluicegate.shared.settings import Settings
from tests.command_line import Command
from tests.harness import Service, environment_of
from tests.polling import eventually

CELERY = [sys.executable, "-m", "celery", "-A", "sluicegate.workers.app", "worker"]
SLUICE = [sys.executable, "-m", "sluicegate.cli"]
UP = ["up", "--data-dir", "data"]

#: Each has something refused, and returns what was said.
Run = Callable[..., str]


@pytest.fixture
def refused(
    settings: Settings,
    command_line: Callable[[Settings], Command],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Return a function that gives `sluice`, in this process, a command that it must refuse."""
    monkeypatch.delenv("FLOWER_BASIC_AUTH", raising=False)

    def ask(*words: str, **changes: object) -> str:
        before = psutil.Process().children()
        ended = command_line(settings.model_copy(update=changes))(*words)
        assert (ended.code in (1, 2), ended.out) == (True, ""), ended
        return _only_line(ended.err, set(psutil.Process().children()) - set(before))

    return ask


def _only_line(said: str, left: Collection[psutil.Process]) -> str:
    """Return the one sentence of a refusal, which leaves no process behind."""
    lines = [line for line in said.splitlines() if line != "Starting the fleet ..."]
    assert len(lines) == 1, said
    assert lines[0].startswith("sluice: "), said
    assert not left, left
    return lines[0]


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
        # Celery takes `-P prefork`, its own default, for the configured pool.
        (["-Q", "draft.anthropic", "-P", "threads"], "runs on the asyncio pool only"),
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


def test_the_command_line_says_it_too(run: Run, refused: Run) -> None:
    assert "'nobody' is not a pool" in refused("worker", "nobody")
    # It becomes the worker.
    said = run(*SLUICE, "worker", "anthropic", "-Q", "draft")
    assert "'draft' is not a queue of this fleet" in said


def test_the_command_line_without_postgres(run: Run, refused: Run) -> None:
    away = f"postgresql+psycopg://sluice@127.0.0.1:{_closed_port()}/sluice"
    assert "Postgres" in refused("worker", "anthropic", database_url=away)
    assert "Postgres" in run(*SLUICE, "sweep", database_url=away)


def test_the_sweep_with_an_old_schema(run: Run, empty_database: str) -> None:
    assert "run `sluice db upgrade`" in run(*SLUICE, "sweep", database_url=empty_database)


# The whole fleet

_MARKER = "SLUICE_TEST_UP_ID"
UP_S = 120.0

Up = Callable[..., "_Up"]


class _Up:
    """A `sluice up`; all it starts bears its marker."""

    def __init__(self, options: tuple[str, ...], variables: dict[str, str], folder: Path) -> None:
        self._marker = uuid4().hex
        self.service = Service(
            "up",
            [*SLUICE, *UP, *options],
            variables | {_MARKER: self._marker},
            folder / f"up-{self._marker}.log",
        )

    def refused(self) -> str:
        """Wait for its end, which must be as a refusal is; return the one sentence."""
        code = self.service.wait(UP_S)
        said = self.service.log
        assert code in (1, 2), said
        return _only_line(said, self._left())

    def says(self, sentence: str) -> str:
        """Wait until it says this, a regular expression; return its first group or all of it."""

        def said() -> str | None:
            if self.service.ended() is not None:
                pytest.fail(self.service.log)
            found = re.search(sentence, self.service.log)
            return (found.group(found.lastindex or 0) or "-") if found else None

        return eventually(said, UP_S) or ""

    def stop(self) -> None:
        """End it with a Ctrl-C."""
        self.service.signal(signal.SIGINT)
        assert self.service.wait(UP_S) == 0, self.service.log
        assert self.service.log.splitlines()[-1] == "The fleet has stopped."
        assert "Warm shutdown" not in self.service.log
        assert "Traceback" not in self.service.log
        left = self._left()
        assert not left, left

    def _left(self) -> list[psutil.Process]:
        """Its processes that live."""
        return [process for process in psutil.process_iter() if self._started(process)]

    def _started(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return (
                process.status() != psutil.STATUS_ZOMBIE
                and process.environ().get(_MARKER) == self._marker
            )
        return False


@pytest.fixture
def up(settings: Settings, tmp_path: Path) -> Iterator[Up]:
    """Return a function that runs `sluice up` with options, on the test's own servers.

    Settings are by their names, other variables by theirs; None takes one away.
    """
    started: list[_Up] = []

    def start(*options: str, **changes: object) -> _Up:
        fields = {name: value for name, value in changes.items() if name in Settings.model_fields}
        variables = environment_of(settings.model_copy(update=fields))
        variables.pop("FLOWER_BASIC_AUTH", None)
        for name in changes.keys() - fields.keys():
            variables.pop(name, None)
            if changes[name] is not None:
                variables[name] = str(changes[name])
        started.append(_Up(options, variables, tmp_path))
        return started[-1]

    yield start
    for one in started:
        one.service.end()


@contextmanager
def _taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def _run_sql(settings: Settings, statement: str) -> None:
    engine = create_engine(settings.database_dsn, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))


def test_up_with_a_port_that_is_taken(refused: Run, tmp_path: Path) -> None:
    with _taken_port() as port:
        said = refused(*UP, "--sandbox", "--flower", str(port))
    assert re.search(rf"cannot listen on port {port} of 127\.0\.0\.1 .*choose another", said)
    assert not (tmp_path / "data").exists()


def test_up_with_a_flower_that_others_could_open(refused: Run, tmp_path: Path) -> None:
    said = refused(*UP, "--sandbox", "--flower", "0.0.0.0:0")
    assert "set FLOWER_BASIC_AUTH=user:password, or use 127.0.0.1" in said
    assert not (tmp_path / "data").exists()


def test_up_with_an_address_for_http_that_cannot_be(refused: Run, tmp_path: Path) -> None:
    assert "--http: 'here' is not PORT or HOST:PORT" in refused(*UP, "--sandbox", "--http", "here")
    said = refused(*UP, "--sandbox", "--http", "0.0.0.0:0")
    assert said.endswith("others reach 0.0.0.0; use 127.0.0.1")
    with _taken_port() as port:
        said = refused(*UP, "--sandbox", "--http", str(port))
    assert said.startswith(f"sluice: --http: cannot listen on port {port} of 127.0.0.1 ")
    assert not (tmp_path / "data").exists()


def test_up_with_http_beside_it(up: Up) -> None:
    fleet = up("--sandbox", "--no-bulk", "--http", "0", PYTHONUNBUFFERED="1")
    url = fleet.says(r"HTTP: (http://127\.0\.0\.1:\d+)/docs\n")
    body = json.dumps({"prompt": "ECHO: hello", "useCase": "draft"}).encode()
    with urllib.request.urlopen(f"{url}/api/llm", data=body, timeout=60) as answer:
        assert json.loads(answer.read())["text"] == "hello"
    fleet.stop()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sandbox", "--host", "0.0.0.0"], "--sandbox: lets everybody in without a key"),
        (["--host", "nowhere.invalid"], "--port: cannot listen on port 3002 of nowhere.invalid"),
        (["--port", "70000"], "less than or equal to 65535"),
    ],
)
def test_http_that_is_started_wrongly(refused: Run, arguments: list[str], sentence: str) -> None:
    assert sentence in refused("http", *arguments)


def test_http_with_a_port_that_is_taken(refused: Run) -> None:
    with _taken_port() as port:
        said = refused("http", "--port", str(port))
    assert re.search(
        rf"--port: cannot listen on port {port} of 127\.0\.0\.1 .*choose another", said
    )


def test_up_without_a_key(refused: Run) -> None:
    said = refused(*UP)
    assert "set OPENAI_API_KEY or ANTHROPIC_API_KEY" in said
    assert said.endswith("or use --sandbox")


def test_up_without_postgres(refused: Run) -> None:
    away = f"postgresql+psycopg://sluice@127.0.0.1:{_closed_port()}/sluice"
    said = refused(*UP, "--sandbox", database_url=away)
    assert said.endswith("check SLUICE_DATABASE_URL and that PostgreSQL is running")


def test_up_without_postgres_where_it_would_run_redis_itself(up: Up) -> None:
    away = f"postgresql+psycopg://sluice@127.0.0.1:{_closed_port()}/sluice"
    said = up("--sandbox", database_url=away, SLUICE_REDIS_URL=None).refused()
    assert said.endswith("check SLUICE_DATABASE_URL and that PostgreSQL is running")


def test_up_without_redis(refused: Run) -> None:
    said = refused(*UP, "--sandbox", redis_url=f"redis://127.0.0.1:{_closed_port()}/0")
    assert said.endswith("check SLUICE_REDIS_URL and that Redis is running")


def test_up_with_a_schema_that_is_newer_than_the_code(refused: Run, settings: Settings) -> None:
    _run_sql(settings, "UPDATE alembic_version SET version_num = '9999'")
    said = refused(*UP, "--sandbox")
    assert "the database is at revision 9999" in said
    assert "install the newer version" in said


def test_up_with_an_old_schema_that_it_may_not_change(refused: Run, empty_database: str) -> None:
    old = Settings(_env_file=None, database_url=empty_database)
    migrations.upgrade(old, "0001")
    name = make_url(empty_database).database
    _run_sql(old, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    said = refused(*UP, "--sandbox", database_url=empty_database)
    assert "refused the migration, nothing was changed: " in said


@pytest.mark.parametrize("place", ["below a file", "a file", "a folder nobody may write to"])
def test_up_with_a_data_folder_that_it_cannot_use(refused: Run, tmp_path: Path, place: str) -> None:
    folder = tmp_path / "no-folder"
    match place:
        case "below a file":
            folder.touch()
            folder = folder / "data"
        case "a file":
            folder.touch()
        case _ if os.geteuid() != 0:
            folder.mkdir(mode=0o500)
        case _:  # root may write wherever there is a disk
            folder = Path("/proc")
    said = refused(*UP, "--sandbox", "--data-dir", str(folder))
    assert re.search(rf"data folder {folder} cannot be used .*choose another with --data-dir", said)


def test_up_with_a_key_for_one_pool_and_flower_beside_it(up: Up) -> None:
    fleet = up("--no-bulk", "--flower", "0", OPENAI_API_KEY="sk-test", PYTHONUNBUFFERED="1")
    url = fleet.says(r"Flower: (http://127\.0\.0\.1:\d+)\n")
    said = fleet.service.log
    assert "no key for anthropic, so its jobs will fail: set ANTHROPIC_API_KEY" in said
    assert "no key for openai" not in said
    assert "Postgres: your own, Redis: your own" in said

    def workers() -> set[str]:
        with urllib.request.urlopen(f"{url}/api/workers?refresh=1", timeout=20) as answer:
            return {name.partition("@")[0] for name in json.loads(answer.read())}

    eventually(lambda: workers() == {"openai-interactive", "anthropic-interactive"}, UP_S)
    another = up("--sandbox").refused()
    assert "another fleet runs on the data folder data; stop that one" in another
    fleet.stop()


def test_up_with_a_key_in_the_database(up: Up, settings: Settings) -> None:
    _run_sql(
        settings,
        "INSERT INTO provider_keys (id, provider, api_key_encrypted)"
        " VALUES (gen_random_uuid(), 'anthropic', 'unreadable')",
    )
    fleet = up("--no-bulk")
    fleet.says("The fleet runs")
    assert "no key for openai" in fleet.service.log
    assert "no key for anthropic" not in fleet.service.log
    fleet.stop()

"""What all tests share: real servers, a database and a corner of Redis of their own, no leaks.

Each test process starts an embedded PostgreSQL and Valkey when the first test asks for one.
SLUICE_TEST_DATABASE_URL and SLUICE_TEST_REDIS_URL name servers to be used instead; the user of
the first must be allowed to create databases.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
import redis.asyncio
from hypothesis import settings as hypothesis_settings
from pydantic import SecretStr
from sqlalchemy import Engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from sluicegate.cli import run
from sluicegate.shared import migrations, price_lists
from sluicegate.shared.database import make_async_engine, make_engine
from sluicegate.shared.settings import Settings, get_settings
from sluicegate.workers.local.processes import end, spawn
from sluicegate.workers.local.sandbox_control import SandboxControl
from sluicegate.workers.local.servers import EmbeddedPostgres, EmbeddedValkey
from tests.command_line import Command, Outcome
from tests.databases import Databases, Rows
from tests.https_server import Certificate, make_certificate

pytest.register_assert_rewrite("tests.harness")

from tests.harness import Rig, open_rig  # noqa: E402 - once its assertions say what they saw

ROOT = Path(__file__).resolve().parents[1]

_DEVELOPERS_OWN = ("SLUICE_", "OPENAI_", "ANTHROPIC_")
_FOR_TESTS = "SLUICE_TEST_"

#: Test files that take ten seconds and more, the longest first. They are begun before the others,
#: which `./dev test` hands out in their order: no process is left alone with one at the end.
_LONG = """
integration/test_bench_smoke integration/test_bulk integration/test_pool
integration/test_bench_http integration/test_sealed_bodies integration/test_replies
integration/test_catalogue_commands integration/test_erasing integration/test_adapters
integration/test_client_fork integration/test_migrations integration/test_servers
integration/test_producer_cli integration/test_client integration/test_reply_channels
integration/test_steering integration/test_gate_limits

faults/test_held_back acceptance/test_refused_starts acceptance/test_demo faults/test_budget_faults
faults/test_gates acceptance/test_help_examples acceptance/test_contract acceptance/test_event_loop
faults/test_budgets faults/test_dead_workers acceptance/test_examples acceptance/test_failover
acceptance/test_openai_door acceptance/test_http_document faults/test_servers_lost
acceptance/test_rotation acceptance/test_refusals acceptance/test_http_gate
acceptance/test_every_job_once acceptance/test_http_llm acceptance/test_flower
acceptance/test_new_use_case acceptance/test_cancel acceptance/test_http_document_admin
acceptance/test_http_canaries faults/test_alerts acceptance/test_asked_for acceptance/test_bulk
acceptance/test_reply_consumer acceptance/test_npm_clients acceptance/test_client_answers
acceptance/test_fresh_install acceptance/test_anthropic_door acceptance/test_http_client
faults/test_budget_locks acceptance/test_http_deaths acceptance/test_budgets
"""

# The same examples in every run: a failure is found by the one who caused it.
hypothesis_settings.register_profile("quick", derandomize=True, deadline=None, database=None)
hypothesis_settings.register_profile(
    "full", derandomize=True, deadline=None, database=None, max_examples=2000
)


def pytest_configure() -> None:
    """Forget the developer's settings, here and for the processes that tests start."""
    for name in list(os.environ):
        if name.startswith(_DEVELOPERS_OWN) and not name.startswith(_FOR_TESTS):
            del os.environ[name]
    # A child process finds this checkout wherever it is started.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    hypothesis_settings.load_profile("full" if os.environ.get("SLUICE_TEST_FULL") else "quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long; the others stay as they are shuffled."""
    places = {name: place for place, name in enumerate(_LONG.split())}
    items.sort(key=lambda one: places.get(f"{one.path.parent.name}/{one.path.stem}", len(places)))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run each test in an empty folder: a developer's `.env` is not read, nothing is left."""
    monkeypatch.chdir(tmp_path)
    yield
    get_settings.cache_clear()


@pytest.fixture(autouse=True)
def _installed_prices() -> Iterator[None]:
    """Book by the installed price list again: a test's fleet may have adopted another."""
    yield
    price_lists.use(None)


@pytest.fixture(scope="session")
def server_folder() -> Iterator[Path]:
    """Return a folder for servers' data, gone at the end (pytest keeps its own)."""
    folder = Path(tempfile.mkdtemp(prefix="sluice-tests-"))
    yield folder
    shutil.rmtree(folder)


def _settings(**values: object) -> Settings:
    return Settings(_env_file=None, **values)  # type: ignore[arg-type]  # as in load_settings


@pytest.fixture(scope="session")
def postgres(server_folder: Path) -> Iterator[Databases]:
    """Return the PostgreSQL server of this test process."""
    with _postgres_url(server_folder) as given:
        url = _settings(database_url=given).database_dsn
        empty = Databases(url, template="template1")
        with empty.database() as template_url:
            migrations.upgrade(_settings(database_url=template_url))
            databases = Databases(url, template=str(make_url(template_url).database))
            yield databases
            databases.close()


@contextmanager
def _postgres_url(folder: Path) -> Iterator[str]:
    if given := os.environ.get("SLUICE_TEST_DATABASE_URL"):
        yield given
        return
    with EmbeddedPostgres(data_dir=folder / "postgres", fsync=False) as server:
        yield server.url


@pytest.fixture(scope="session")
def valkey(server_folder: Path) -> Iterator[str]:
    """Return the URL of the Valkey or Redis server of this test process."""
    if given := os.environ.get("SLUICE_TEST_REDIS_URL"):
        yield given
        return
    with EmbeddedValkey(data_dir=server_folder / "valkey") as server:
        yield server.url


@pytest.fixture
def empty_database(postgres: Databases) -> Iterator[str]:
    """Return the URL of a database with nothing in it."""
    with postgres.database() as url:
        yield url


@pytest.fixture
def settings(postgres: Databases, valkey: str) -> Iterator[Settings]:
    """Return settings with a fresh, migrated database and a Redis prefix of the test's own.

    Values may be changed with `settings.model_copy(update={...})`.
    """
    prefix = f"test-{uuid4().hex}:"
    with postgres.migrated() as url:
        yield _settings(database_url=url, redis_url=valkey, redis_prefix=prefix)
    with redis.Redis.from_url(valkey) as client:
        for key in client.scan_iter(match=f"{prefix}*", count=1000):
            client.delete(key)


@pytest.fixture
def environment() -> Callable[[Settings], dict[str, str]]:
    """Return a function that gives a child process's environment for some settings."""

    def build(settings: Settings) -> dict[str, str]:
        variables = dict(os.environ)
        for name, field in Settings.model_fields.items():
            value = getattr(settings, name)
            if value is None:
                continue
            variable = str(field.validation_alias or f"SLUICE_{name.upper()}")
            plain = value.get_secret_value() if isinstance(value, SecretStr) else value
            variables[variable] = str(plain)
        return variables

    return build


@pytest.fixture
def command_line(
    environment: Callable[[Settings], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[Settings], Command]:
    """Return a function that gives `sluice`, run in this process, for some settings."""

    def with_settings(settings: Settings) -> Command:
        for name in os.environ.keys() - environment(settings).keys():
            if name.startswith(_DEVELOPERS_OWN):
                monkeypatch.delenv(name)
        for name, value in environment(settings).items():
            monkeypatch.setenv(name, value)

        def command(*arguments: object, stdin: str | bytes = "") -> Outcome:
            get_settings.cache_clear()
            data = stdin.encode() if isinstance(stdin, str) else stdin
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
            code = run([str(argument) for argument in arguments])
            return Outcome(code, *capsys.readouterr())

        return command

    return with_settings


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    """Return a synchronous engine for the test's database."""
    engine = make_engine(settings, application_name="test")
    yield engine
    engine.dispose()


@pytest.fixture
def rows(engine: Engine) -> Rows:
    """Return a function that runs a statement and returns its rows, if it has any."""

    def run(statement: str, **values: Any) -> list[Any]:
        with engine.connect() as connection:
            result = connection.exec_driver_sql(statement, values)
            return list(result.all()) if result.returns_rows else []

    return run


@pytest.fixture
async def async_engine(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """Return an asyncio engine for the test's database."""
    engine = make_async_engine(settings, application_name="test")
    yield engine
    await engine.dispose()


@pytest.fixture
def redis_client(settings: Settings) -> Iterator[redis.Redis]:
    """Return a client of the test's Redis; keys need `settings.redis_prefix`."""
    with redis.Redis.from_url(settings.redis_dsn) as client:
        yield client


@pytest.fixture
async def async_redis(settings: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    """Return an asyncio client of the test's Redis; keys need `settings.redis_prefix`."""
    async with redis.asyncio.Redis.from_url(settings.redis_dsn) as client:
        yield client


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """Return the certificate of `tests.https_server`; its authority is not trusted."""
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="session")
def _sandbox_process() -> Iterator[SandboxControl]:
    argv = [sys.executable, "-m", "sluicegate.workers.local.sandbox"]
    argv += ["--latency-ms", "5", "--first-token-ms", "2", "--tokens-per-s", "5000"]
    process = spawn(argv, death_signal=signal.SIGTERM, output=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as said:
        try:
            first_line = said.readline()
            assert first_line.startswith(b"{"), first_line + said.read()
            port = json.loads(first_line)["port"]
            yield SandboxControl(f"http://127.0.0.1:{port}")
        finally:
            end(process, (signal.SIGTERM, 5.0))


@pytest.fixture
def sandbox(_sandbox_process: SandboxControl) -> Iterator[SandboxControl]:
    """Return the control of this test process's sandbox provider, its books empty.

    It answers in 5 ms; `sandbox.settings(latency_ms=300)` slows it for the length of a test.
    """
    usual = _sandbox_process.settings()
    _sandbox_process.reset()
    _sandbox_process.clear_limits()
    yield _sandbox_process
    _sandbox_process.reset()
    _sandbox_process.clear_limits()
    _sandbox_process.settings(**usual)


@pytest.fixture(scope="module")
def rig_settings() -> dict[str, Any]:
    """Return settings of the module's rig; a module that wants some overrides this."""
    return {}


@pytest.fixture(scope="module")
def module_rig(
    postgres: Databases,
    valkey: str,
    _sandbox_process: SandboxControl,
    tmp_path_factory: pytest.TempPathFactory,
    rig_settings: dict[str, Any],
) -> Iterator[Rig]:
    """Return the module's rig, without processes: fixtures of the module start those.

    Its tests share what runs there; each has jobs of its own.
    """
    with (
        postgres.database(template=postgres.template) as url,
        open_rig(
            database_url=url,
            redis_url=valkey,
            sandbox=_sandbox_process,
            folder=tmp_path_factory.mktemp("rig"),
            **rig_settings,
        ) as rig,
    ):
        yield rig


@pytest.fixture
def sandbox_settings(settings: Settings, sandbox: SandboxControl) -> Settings:
    """Return `settings` with the sandbox as both providers."""
    return settings.model_copy(
        update={
            "openai_api_key": SecretStr("sandbox"),
            "openai_base_url": sandbox.openai_base_url,
            "anthropic_api_key": SecretStr("sandbox"),
            "anthropic_base_url": sandbox.anthropic_base_url,
        }
    )

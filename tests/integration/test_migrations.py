"""Migrations on a real PostgreSQL: there and back, what they leave, two at once, and in a wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal
from uuid import UUID

import genai_prices
import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from anthropic.resources.messages.messages import DEPRECATED_MODELS
from sqlalchemy import Connection, create_engine, inspect, make_url, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.pool import NullPool

from sluicegate.shared import migrations
from sluicegate.shared.accounts import DEFAULT_ACCOUNT, list_accounts
from sluicegate.shared.catalogue import Catalogue, Provider, read
from sluicegate.shared.database import SCHEMA_REVISION, check_schema
from sluicegate.shared.errors import SchemaOutdated, SluiceError
from sluicegate.shared.jobs import build_spec
from sluicegate.shared.migrations import MigrationError
from sluicegate.shared.routing import needs_of, route
from sluicegate.shared.settings import Settings
from sluicegate.shared.tables import metadata
from tests.polling import eventually

ROOT = Path(__file__).resolve().parents[2]
SEEDED_ACCOUNT = UUID("00000000-0000-7000-8000-000000000001")
TODAY = datetime(2026, 11, 22, tzinfo=UTC)
AFTER_SONNET = datetime(2026, 11, 30, tzinfo=UTC)
AFTER_GPT_4O = datetime(2027, 1, 14, tzinfo=UTC)


Mode = Literal["current", "original"]
Environment = Callable[[Settings], dict[str, str]]
Alembic = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def empty(empty_database: str) -> Settings:
    """Return settings with a database that nothing was done to."""
    return Settings(_env_file=None, database_url=empty_database)


@contextmanager
def connected(settings: Settings) -> Iterator[Connection]:
    engine = create_engine(settings.database_dsn, poolclass=NullPool)
    with engine.begin() as connection:
        yield connection


@pytest.fixture
def alembic(environment: Environment) -> Alembic:
    """Return a function that runs the `alembic` command in the project folder."""

    def run(*arguments: str, settings: Settings) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=ROOT,
            env=environment(settings),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def routed(catalogue: Catalogue, use_case: str, mode: Mode, now: datetime) -> list[str]:
    candidates = route(
        needs_of(build_spec(use_case, "Hello")),
        catalogue,
        account_id=SEEDED_ACCOUNT,
        mode=mode,
        now=now,
        first_token_ms={},
    )
    return [row.name for row in candidates]


def by_name(catalogue: Catalogue) -> dict[str, Provider]:
    return {row.name: row for row in catalogue.providers}


def schema(connection: Connection) -> dict[str, list[tuple[object, ...]]]:
    """Everything PostgreSQL knows of our tables, in its own words."""
    queries = {
        "columns": """
            SELECT table_name, column_name, data_type, udt_name, is_nullable, column_default
            FROM information_schema.columns JOIN information_schema.tables
                 USING (table_schema, table_name)
            WHERE table_schema = current_schema() AND table_type = 'BASE TABLE'""",
        "constraints": """
            SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)
            FROM pg_constraint WHERE connamespace = current_schema()::regnamespace""",
        "indexes": "SELECT tablename, indexdef FROM pg_indexes WHERE schemaname = current_schema()",
        "options": """
            SELECT relname, reloptions::text FROM pg_class
            WHERE relnamespace = current_schema()::regnamespace AND reloptions IS NOT NULL""",
    }
    return {
        name: sorted(
            tuple(map(str, row))
            for row in connection.execute(text(query))
            if "alembic_version" not in str(row[0])
        )
        for name, query in queries.items()
    }


def test_upgrade_downgrade_and_upgrade_again(empty: Settings) -> None:
    assert migrations.current(empty) is None
    migrations.upgrade(empty)
    assert migrations.current(empty) == SCHEMA_REVISION
    with connected(empty) as connection:
        first = schema(connection)
        check_schema(connection)

    migrations.downgrade(empty, "base")
    assert migrations.current(empty) is None
    with connected(empty) as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]
        with pytest.raises(SchemaOutdated, match="sluice db upgrade"):
            check_schema(connection)

    migrations.upgrade(empty)
    with connected(empty) as connection:
        assert schema(connection) == first
    migrations.upgrade(empty)


def test_the_schema_is_that_of_the_tables(empty: Settings, settings: Settings) -> None:
    with connected(empty) as connection:
        migrations.make_schema(connection, empty)
        metadata.create_all(connection)
        wanted = schema(connection)
    with connected(settings) as connection:
        assert schema(connection) == wanted
    assert all(wanted.values())


def test_tables_of_a_back_end_in_the_same_database_are_left_alone(empty: Settings) -> None:
    theirs = ("accounts", "jobs", "results", "alembic_version")
    with connected(empty) as connection:
        for table in theirs:
            connection.execute(text(f"CREATE TABLE public.{table} (theirs int)"))
    migrations.upgrade(empty)
    migrations.downgrade(empty, "base")
    migrations.upgrade(empty)
    with connected(empty) as connection:
        check_schema(connection)
        assert set(inspect(connection).get_table_names("public")) == set(theirs)
        for table in theirs:
            assert connection.execute(text(f"SELECT * FROM public.{table}")).keys() == ["theirs"]


def test_our_schema_may_have_been_made_by_somebody_else(empty: Settings) -> None:
    named = empty.model_copy(update={"database_schema": "crm_llm"})
    with connected(empty) as connection:
        connection.execute(text("CREATE SCHEMA crm_llm"))
    migrations.upgrade(named)
    assert migrations.current(named) == SCHEMA_REVISION
    assert migrations.current(empty) is None


def test_autogenerate_finds_nothing(settings: Settings) -> None:
    plugins = ["alembic.autogenerate.*", "alembic.ext.checkconstraint_byname"]
    with connected(settings) as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "autogenerate_plugins": plugins}
        )
        assert compare_metadata(context, metadata) == []
        # It would find something if there were something.
        connection.execute(text("DROP INDEX jobs_running_idx"))
        connection.execute(text("ALTER TABLE jobs DROP CONSTRAINT jobs_holder_check"))
        connection.execute(text("ALTER TABLE jobs ALTER COLUMN lane DROP NOT NULL"))
        assert len(compare_metadata(context, metadata)) == 3


def test_the_alembic_command_works_from_the_project_folder(
    empty: Settings, alembic: Alembic
) -> None:
    assert alembic("upgrade", "head", settings=empty).returncode == 0
    assert migrations.current(empty) == SCHEMA_REVISION
    assert alembic("check", settings=empty).returncode == 0
    assert alembic("downgrade", "base", settings=empty).returncode == 0
    assert migrations.current(empty) is None


def test_the_alembic_command_says_what_is_wrong_in_one_line(
    empty: Settings, alembic: Alembic
) -> None:
    url = make_url(empty.database_dsn).set(port=1, password="secret-password")
    dead = Settings(_env_file=None, database_url=url.render_as_string(hide_password=False))
    run = alembic("upgrade", "head", settings=dead)
    assert run.returncode != 0
    assert "Traceback" not in run.stderr + run.stdout
    assert "check SLUICE_DATABASE_URL" in run.stderr + run.stdout
    assert "secret-password" not in run.stderr + run.stdout


def test_sql_written_offline_makes_the_same_database(
    empty: Settings, settings: Settings, alembic: Alembic
) -> None:
    run = alembic("upgrade", "head", "--sql", settings=empty)
    assert run.returncode == 0, run.stderr
    with psycopg.connect(
        empty.database_dsn.replace("+psycopg", "", 1), autocommit=True
    ) as connection:
        connection.execute(run.stdout.encode())
    assert migrations.current(empty) == SCHEMA_REVISION
    with connected(empty) as ours, connected(settings) as theirs:
        assert schema(ours) == schema(theirs)
        assert by_name(read(ours)) == by_name(read(theirs))


def test_two_upgrades_at_once(empty: Settings, environment: Environment) -> None:
    # Both wait here until both have started.
    with migrations.exclusive_connection(empty) as gate:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "alembic", "upgrade", "head"],
                cwd=ROOT,
                env=environment(empty),
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        waiting = text(
            "SELECT count(*) = 3 FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'sluice migrations'"
        )

        def both_wait() -> bool:
            gate.rollback()  # until a transaction ends, Postgres shows it one and the same list
            return bool(gate.scalar(waiting))

        eventually(both_wait)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    # One did the work, and the other found nothing to do.
    assert sorted(error.count("Running upgrade") for error in errors) == [0, int(SCHEMA_REVISION)]
    assert migrations.current(empty) == SCHEMA_REVISION


def test_an_upgrade_waits_for_the_one_that_runs_but_not_for_ever(empty: Settings) -> None:
    with migrations.exclusive_connection(empty):
        second = migrations.exclusive_connection(empty, lock_wait_s=0.2)
        with pytest.raises(MigrationError, match="another migration"):
            second.__enter__()
    with migrations.exclusive_connection(empty, lock_wait_s=5):
        pass


def test_a_failed_upgrade_leaves_nothing(empty: Settings) -> None:
    with connected(empty) as connection:
        migrations.make_schema(connection, empty)
        connection.execute(text("CREATE TABLE results (foreign_to_us int)"))
    with pytest.raises(MigrationError, match='nothing was changed: relation "results" already'):
        migrations.upgrade(empty)
    with connected(empty) as connection:
        assert inspect(connection).get_table_names() == ["results"]


@pytest.mark.parametrize(
    ("replace", "says"),
    [
        ({"username": "nobody-here", "password": "wrong-password"}, "nobody-here"),
        ({"database": "no_such_database"}, "does not exist"),
        ({"port": 1}, "cannot be used"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_sentence(
    empty: Settings, replace: dict[str, object], says: str
) -> None:
    url = make_url(empty.database_dsn).set(**replace)  # type: ignore[arg-type]  # mixed values
    bad = Settings(_env_file=None, database_url=url.render_as_string(hide_password=False))
    for act in (migrations.upgrade, migrations.current):
        with pytest.raises(SluiceError) as caught:
            act(bad)
        message = str(caught.value)
        assert says in message
        assert "SLUICE_DATABASE_URL" in message
        assert "\n" not in message
        assert str(url.password) not in message


def test_an_unknown_revision_is_one_sentence(empty: Settings) -> None:
    with pytest.raises(MigrationError, match=r"could not be migrated: .*'9999'"):
        migrations.upgrade(empty, "9999")


def test_a_database_of_a_newer_version_is_left_alone(empty: Settings) -> None:
    migrations.upgrade(empty)
    with connected(empty) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(MigrationError, match="at revision 9999, which this version"):
        migrations.upgrade(empty)


def test_constraints_are_in_force(settings: Settings) -> None:
    with connected(settings) as connection, pytest.raises(IntegrityError, match="prefer_check"):
        connection.execute(text("INSERT INTO use_cases (name, prefer) VALUES ('x', 'dearest')"))
    with connected(settings) as connection, pytest.raises(IntegrityError, match="name_key"):
        connection.execute(
            text(
                "INSERT INTO llm_providers (id, name, provider, model, max_tokens, context_tokens)"
                " SELECT gen_random_uuid(), name, provider, model, 1, 1 FROM llm_providers"
            )
        )


# What is seeded


def test_the_default_account(settings: Settings) -> None:
    with connected(settings) as connection:
        (account,) = list_accounts(connection)
    assert (account.id, account.name, account.time_zone) == (SEEDED_ACCOUNT, DEFAULT_ACCOUNT, "UTC")


def test_the_use_cases(settings: Settings) -> None:
    with connected(settings) as connection:
        use_cases = read(connection).use_cases
    assert {name: row.max_tokens for name, row in use_cases.items()} == {
        "draft": 1024,
        "summary": 1024,
        "complex": 4096,
        "vision": 1024,
        "voice": 512,
        "general": 1024,
    }
    assert [name for name, row in use_cases.items() if row.prefer == "fastest"] == ["voice"]
    assert {row.unknown_policy for row in use_cases.values()} == {"retry_once"}
    assert all(row.description for row in use_cases.values())


@pytest.mark.parametrize(
    ("mode", "now", "chosen"),
    [
        (
            "current",
            TODAY,
            {
                "draft": ["anthropic-claude-haiku-5-5", "openai-gpt-6-luna"],
                "summary": ["anthropic-claude-haiku-5-5", "openai-gpt-6-luna"],
                "complex": ["anthropic-claude-sonnet-5-5", "openai-gpt-6.1-sol"],
                "vision": ["openai-gpt-6.1-sol", "anthropic-claude-sonnet-5-5"],
                "voice": ["openai-gpt-6-luna", "anthropic-claude-haiku-5-5"],
                "general": ["openai-gpt-6-luna", "anthropic-claude-haiku-5-5"],
            },
        ),
        (
            "original",
            TODAY,
            {
                "draft": ["anthropic-claude-haiku-4-5", "anthropic-claude-haiku-5-5"],
                "summary": ["anthropic-claude-haiku-4-5", "anthropic-claude-haiku-5-5"],
                "complex": ["anthropic-claude-sonnet-4-5", "anthropic-claude-sonnet-5-5"],
                "vision": ["openai-gpt4o", "openai-gpt-6.1-sol"],
                "voice": ["openai-gpt4o-mini", "openai-gpt-6-luna"],
                "general": ["openai-gpt4o-mini", "openai-gpt-6-luna"],
            },
        ),
        (
            "original",
            AFTER_SONNET - timedelta(seconds=1),
            {"complex": ["anthropic-claude-sonnet-4-5"]},
        ),
        ("original", AFTER_SONNET, {"complex": ["anthropic-claude-sonnet-5-5"]}),
        ("original", AFTER_SONNET, {"vision": ["openai-gpt4o"]}),
        (
            "original",
            AFTER_GPT_4O,
            {
                "draft": ["anthropic-claude-haiku-4-5"],
                "vision": ["openai-gpt-6.1-sol"],
                "voice": ["openai-gpt-6-luna"],
                "general": ["openai-gpt-6-luna"],
            },
        ),
    ],
)
def test_seeds_route_as_designed(
    settings: Settings, mode: Mode, now: datetime, chosen: dict[str, list[str]]
) -> None:
    with connected(settings) as connection:
        catalogue = read(connection)
    for use_case, names in chosen.items():
        assert routed(catalogue, use_case, mode, now)[: len(names)] == names


def test_a_use_case_of_an_operator_goes_to_the_default_row(settings: Settings) -> None:
    with connected(settings) as connection:
        connection.execute(text("INSERT INTO use_cases (name) VALUES ('translate')"))
        catalogue = read(connection)
    wanted: dict[Mode, str] = {"current": "openai-gpt-6-luna", "original": "openai-gpt4o-mini"}
    for mode, name in wanted.items():
        assert routed(catalogue, "translate", mode, TODAY)[0] == name


def test_seeded_rows_agree_with_the_installed_packages(settings: Settings) -> None:
    with connected(settings) as connection:
        catalogue = read(connection)
    names = {row.name for row in catalogue.providers}
    for row in catalogue.providers:
        listed = genai_prices.calc_price(
            genai_prices.Usage(input_tokens=1), row.model, provider_id=row.provider
        ).model
        assert row.context_tokens == listed.context_window
        assert row.card.reserve_nano_usd(1000, 1000) > 0
        assert (row.successor in names) == (row.catalogue == "original")
        if row.provider == "anthropic":
            # Printed by the SDK as "November 30th, 2026".
            day = DEPRECATED_MODELS.get(row.model)
            assert (row.retires_at is None) == (day is None)
            if row.retires_at is not None:
                assert day == f"{row.retires_at:%B} {row.retires_at.day}th, {row.retires_at.year}"


def _provider_names(connection: Connection) -> list[str]:
    """Names as an older schema has them; `read` knows this version's alone."""
    return list(connection.scalars(text("SELECT name FROM llm_providers")))


def test_rows_of_an_operator_survive_the_seed_and_its_removal(settings: Settings) -> None:
    migrations.downgrade(settings, "0001")
    with connected(settings) as connection:
        assert _provider_names(connection) == []
        connection.execute(
            text(
                "INSERT INTO llm_providers (id, name, provider, model, max_tokens, context_tokens)"
                " VALUES (gen_random_uuid(), 'openai-gpt-6-luna', 'openai', 'gpt-6-luna', 7, 7)"
            )
        )
        connection.execute(text("INSERT INTO use_cases (name, max_tokens) VALUES ('draft', 99)"))
    migrations.upgrade(settings)
    with connected(settings) as connection:
        catalogue = read(connection)
        assert by_name(catalogue)["openai-gpt-6-luna"].max_tokens == 7
        assert catalogue.use_cases["draft"].max_tokens == 99
        connection.execute(
            text(
                "INSERT INTO jobs (id, account_id, use_case, lane, queue, state, max_attempts,"
                " deadline_at, request_hash) VALUES (gen_random_uuid(), :account, 'draft',"
                " 'bulk', 'draft.openai.bulk', 'queued', 1, now(), '')"
            ),
            {"account": SEEDED_ACCOUNT},
        )
    migrations.downgrade(settings, "0001")
    with connected(settings) as connection:
        assert _provider_names(connection) == ["openai-gpt-6-luna"]
        assert [account.name for account in list_accounts(connection)] == [DEFAULT_ACCOUNT]
    migrations.upgrade(settings)


def test_the_usage_of_an_entry_moves_to_its_attempt_and_back(settings: Settings) -> None:
    migrations.downgrade(settings, "0005")
    usages = (("actual", '{"whole": 1}'), ("estimate", None), ("correction", '{"late": 2}'))
    with connected(settings) as connection:
        for number, state in ((1, "succeeded"), (2, "corrected")):
            connection.execute(
                text(
                    "WITH job AS (INSERT INTO jobs (id, account_id, use_case, lane, queue, state,"
                    " max_attempts, deadline_at, request_hash) VALUES (gen_random_uuid(), :account,"
                    " 'draft', 'bulk', 'q', 'succeeded', 1, now(), '') RETURNING id)"
                    " INSERT INTO attempts (id, job_id, fence, number, worker_id, account_id,"
                    " use_case, provider_id, provider, model, state, reserved_nano_usd,"
                    " baseline_reserved_nano_usd) SELECT gen_random_uuid(), id, 1, :number, id,"
                    " :account, 'draft', id, 'p', 'm', :state, 5, 5 FROM job"
                ),
                {"account": SEEDED_ACCOUNT, "number": number, "state": state},
            )
        for kind, usage in usages:
            connection.execute(
                text(
                    "INSERT INTO cost_entries (attempt_id, job_id, account_id, use_case,"
                    " provider_id, provider, model, kind, amount_nano_usd, baseline_nano_usd,"
                    " price_version, dispatched_at, raw_usage, duration_ms) SELECT id, job_id,"
                    " account_id, use_case, provider_id, provider, model, :kind, 1, 1, 'v',"
                    " dispatched_at, CAST(:usage AS json), 1000 FROM attempts"
                    " WHERE number = CASE :kind WHEN 'actual' THEN 1 ELSE 2 END"
                ),
                {"kind": kind, "usage": usage},
            )
    migrations.upgrade(settings)
    with connected(settings) as connection:
        moved = connection.execute(text("SELECT number, raw_usage FROM attempts ORDER BY number"))
        assert [tuple(row) for row in moved] == [(1, {"whole": 1}), (2, {"late": 2})]
        # 25 buckets are a factor of e: 1,000 ms is e to the power of 6.9.
        buckets = connection.scalars(text("SELECT DISTINCT duration_bucket FROM cost_entries"))
        assert list(buckets) == [172]
    migrations.downgrade(settings, "0005")
    with connected(settings) as connection:
        back = connection.execute(text("SELECT kind, raw_usage::text FROM cost_entries"))
        assert sorted(tuple(row) for row in back) == sorted(usages)
    migrations.upgrade(settings)


# In a wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Return the wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=60,
    )
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_a_wheel_holds_the_packages_the_scripts_and_the_licence(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package in ("shared", "workers", "producers"):
        assert f"sluicegate/{package}/__init__.py" in names
    assert "sluicegate/py.typed" in names
    versions = {f"versions/{path.name}" for path in (ROOT / "alembic" / "versions").glob("*.py")}
    for script in {"env.py", "script.py.mako"} | versions:
        assert f"sluicegate/migrations/{script}" in names
    # It would shadow the library of that name.
    assert not (ROOT / "alembic" / "__init__.py").exists()
    assert {name.split("/")[0] for name in names} == {"sluicegate", "sluicegate-0.1.0.dist-info"}
    assert not [name for name in names if "__pycache__" in name or ".env" in name]

    def read_info(name: str) -> str:
        return wheel.read(f"sluicegate-0.1.0.dist-info/{name}").decode()

    assert "License-Expression: LicenseRef-Proprietary" in read_info("METADATA")
    assert "All rights reserved" in read_info("licenses/LICENSE")
    assert "sluice = sluicegate.entry:main" in read_info("entry_points.txt")


def test_an_installed_wheel_migrates(
    wheel: zipfile.ZipFile, tmp_path: Path, empty: Settings, environment: Environment
) -> None:
    wheel.extractall(tmp_path / "site")
    program = (
        "import sluicegate.shared.migrations as migrations\n"
        "from sluicegate.shared.settings import load_settings\n"
        "print(migrations.__file__)\n"
        "migrations.upgrade(load_settings())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(empty) | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path / "site"))
    assert migrations.current(empty) == SCHEMA_REVISION

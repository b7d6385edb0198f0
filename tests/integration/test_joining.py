"""Submitting inside the caller's own transaction, by every kind of connection."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import redis
from psycopg import AsyncRawCursor, RawCursor
from psycopg.rows import dict_row
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from sluicegate import (
    AsyncSluice,
    IdempotencyConflict,
    InvalidJob,
    NotFound,
    ResultTimeout,
    Sluice,
    SluiceError,
)
from sluicegate.shared.queues import STAGE_CHANNEL
from sluicegate.shared.settings import Settings
from tests.databases import Databases
from tests.polling import eventually_async
from tests.stand_in import StandIn

QUEUE = "draft.anthropic"


def plain_url(settings: Settings) -> str:
    """The database as a back end knows it: nothing of our schema in it."""
    return settings.database_url.get_secret_value()


def psycopg_url(settings: Settings) -> str:
    return plain_url(settings).replace("postgresql+psycopg", "postgresql")


@pytest.fixture
def callers_engine(settings: Settings) -> Iterator[Engine]:
    engine = create_engine(plain_url(settings))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE notes (body text)"))
    yield engine
    engine.dispose()


@pytest.fixture
def sluice(settings: Settings) -> Iterator[Sluice]:
    with Sluice(settings) as client:
        yield client


@pytest.fixture
def states(engine: Engine) -> Callable[[], dict[UUID, str]]:
    def read() -> dict[UUID, str]:
        with engine.connect() as connection:
            found = connection.exec_driver_sql("SELECT id, state FROM jobs ORDER BY id").all()
        return {row.id: row.state for row in found}

    return read


@pytest.fixture
def published(redis_client: redis.Redis, settings: Settings) -> Callable[[], list[str]]:
    """Return the jobs that were published, oldest first."""

    def read() -> list[str]:
        found: Any = redis_client.lrange(settings.redis_prefix + QUEUE, 0, -1)
        return [json.loads(one)["headers"]["id"] for one in reversed(found)]

    return read


# A transaction of each kind


@contextmanager
def by_session(settings: Settings) -> Iterator[Any]:
    engine = create_engine(plain_url(settings), poolclass=NullPool)
    with Session(engine) as session:
        yield session


@contextmanager
def by_scoped_session(settings: Settings) -> Iterator[Any]:
    sessions = scoped_session(sessionmaker(create_engine(plain_url(settings), poolclass=NullPool)))
    yield sessions
    sessions.remove()


@contextmanager
def by_connection(settings: Settings) -> Iterator[Any]:
    engine = create_engine(plain_url(settings), poolclass=NullPool)
    with engine.connect() as connection:
        # A connection that was made for reading much.
        yield connection.execution_options(stream_results=True)


@contextmanager
def by_outer_transaction(settings: Settings) -> Iterator[Any]:
    """A session that does not own its transaction, as test suites have it."""
    engine = create_engine(plain_url(settings), poolclass=NullPool)
    with engine.connect() as connection, Session(connection) as session:
        yield _Outer(session, connection)


class _Outer:
    def __init__(self, session: Session, connection: Any) -> None:
        connection.begin()
        self.joined = session
        self._connection = connection

    def commit(self) -> None:
        self.joined.commit()
        self._connection.commit()

    def rollback(self) -> None:
        self.joined.commit()
        self._connection.rollback()


@contextmanager
def by_psycopg(settings: Settings) -> Iterator[Any]:
    url = psycopg_url(settings)
    with psycopg.connect(url, row_factory=dict_row, cursor_factory=RawCursor) as connection:
        yield connection
        connection.rollback()


HEARD = {"session": by_session, "scoped session": by_scoped_session}
SILENT = {
    "connection": by_connection,
    "session in an outer transaction": by_outer_transaction,
    "psycopg": by_psycopg,
}


@pytest.mark.parametrize("kind", HEARD | SILENT)
def test_a_rollback_leaves_no_job_and_a_commit_leaves_one(
    kind: str,
    settings: Settings,
    sluice: Sluice,
    states: Callable[[], dict[UUID, str]],
    published: Callable[[], list[str]],
) -> None:
    listen = psycopg.connect(psycopg_url(settings), autocommit=True)
    with listen, (HEARD | SILENT)[kind](settings) as transaction:
        listen.execute(f"LISTEN {STAGE_CHANNEL}")
        joined = getattr(transaction, "joined", transaction)
        sluice.submit("draft", "never", connection=joined)
        assert states() == {}
        transaction.rollback()
        assert states() == {}
        one = sluice.submit("draft", "one", connection=joined)
        two, three = sluice.submit_many("draft", ["two", "three"], connection=joined)
        assert (states(), published()) == ({}, [])
        transaction.commit()
        ids = [one.id, two.id, three.id]
        heard = [notice.channel for notice in listen.notifies(timeout=0.2, stop_after=1)]
        if kind in HEARD:
            assert states() == dict.fromkeys(ids, "queued")
            assert published() == [str(job_id) for job_id in ids]
            assert heard == []
        else:
            assert states() == dict.fromkeys(ids, "parked")
            assert published() == []
            assert heard == [STAGE_CHANNEL]
        # Nothing of the first transactions is left for the next one.
        four = sluice.submit("draft", "four", connection=joined)
        transaction.commit()
        assert list(states()) == [*ids, four.id]
        assert published() == ([*map(str, ids), str(four.id)] if kind in HEARD else [])


@pytest.mark.parametrize("kind", HEARD | SILENT)
def test_the_callers_transaction_stays_whole(
    kind: str, settings: Settings, callers_engine: Engine, sluice: Sluice
) -> None:
    """What is refused costs no statement; a conflict no error of Postgres."""
    sluice.submit("draft", "first", idempotency_key="k")
    with (HEARD | SILENT)[kind](settings) as transaction:
        joined = getattr(transaction, "joined", transaction)
        statement: Any = "INSERT INTO notes VALUES ('a')"
        if kind == "psycopg":
            joined.execute(statement)
        else:
            joined.execute(text(statement), execution_options={"stream_results": False})
        with pytest.raises(InvalidJob, match="max_tokens"):
            sluice.submit("draft", "x", max_tokens=0, connection=joined)
        with pytest.raises(InvalidJob, match="account"):
            sluice.submit("draft", "x", account="nobody", connection=joined)
        with pytest.raises(IdempotencyConflict, match="'k'"):
            sluice.submit("draft", "another", idempotency_key="k", connection=joined)
        with pytest.raises(IdempotencyConflict, match="'k'"):
            sluice.submit_many(
                "draft",
                ["not stored", {"prompt": "another", "idempotency_key": "k"}],
                connection=joined,
            )
        same = sluice.submit("draft", "first", idempotency_key="k", connection=joined)
        twice = [
            sluice.submit("draft", "new", idempotency_key="n", connection=joined).id
            for _ in range(2)
        ]
        assert len(set(twice)) == 1
        transaction.commit()
    with callers_engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM notes")) == 1
        found = connection.execute(text("SELECT id FROM sluicegate.jobs")).scalars()
        assert set(found) == {same.id, twice[0]}


def test_savepoints_publish_nothing_until_the_outermost_commit(
    callers_engine: Engine,
    sluice: Sluice,
    states: Callable[[], dict[UUID, str]],
    published: Callable[[], list[str]],
) -> None:
    with Session(callers_engine) as session:
        with session.begin_nested():
            kept = sluice.submit("draft", "kept", connection=session)
        assert published() == []
        dropped = session.begin_nested()
        sluice.submit("draft", "dropped", connection=session)
        dropped.rollback()
        last = sluice.submit("draft", "last", connection=session)
        assert published() == []
        session.commit()
    assert states() == {kept.id: "queued", last.id: "queued"}
    # A message for a job that is not there is dropped by whoever takes it.
    assert [one for one in published() if one in {str(kept.id), str(last.id)}] == [
        str(kept.id),
        str(last.id),
    ]


def test_a_session_that_is_closed_publishes_nothing_later(
    callers_engine: Engine,
    sluice: Sluice,
    states: Callable[[], dict[UUID, str]],
    published: Callable[[], list[str]],
) -> None:
    session = Session(callers_engine)
    sluice.submit("draft", "given up", connection=session)
    session.close()
    session.execute(text("INSERT INTO notes VALUES ('later')"))
    session.commit()
    session.close()
    assert (states(), published()) == ({}, [])


def test_a_session_is_held_by_nobody(callers_engine: Engine, sluice: Sluice) -> None:
    session = Session(callers_engine)
    sluice.submit("draft", "hello", connection=session)
    session.commit()
    session.close()
    held = weakref.ref(session)
    del session
    gc.collect()
    assert held() is None


def test_two_clients_may_join_one_transaction(
    callers_engine: Engine, settings: Settings, published: Callable[[], list[str]]
) -> None:
    with Sluice(settings) as one, Sluice(settings) as other, Session(callers_engine) as session:
        ids = [
            client.submit("draft", "hello", connection=session).id for client in (one, one, other)
        ]
        session.commit()
    assert sorted(published()) == sorted(map(str, ids))


@pytest.mark.parametrize("broken", ["the broker is away", "the client is closed"])
def test_a_commit_never_fails_for_want_of_a_message(
    broken: str,
    callers_engine: Engine,
    settings: Settings,
    states: Callable[[], dict[UUID, str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    away = settings.model_copy(
        update={"redis_url": type(settings.redis_url)("redis://127.0.0.1:9")}
    )
    client = Sluice(away if broken == "the broker is away" else settings)
    with Session(callers_engine) as session, caplog.at_level(logging.WARNING):
        job = client.submit("draft", "hello", connection=session)
        if broken == "the client is closed":
            client.close()
        session.commit()
    client.close()
    assert states() == {job.id: "queued"}
    assert "the sweep will publish" in caplog.text


@pytest.mark.parametrize("kind", ["engine", "connection", "psycopg"])
def test_autocommit_stores_at_once(
    kind: str, settings: Settings, sluice: Sluice, states: Callable[[], dict[UUID, str]]
) -> None:
    if kind == "psycopg":
        with psycopg.connect(psycopg_url(settings), autocommit=True) as connection:
            job = sluice.submit("draft", "hello", connection=connection)
            assert states() == {job.id: "parked"}
        return
    level = "AUTOCOMMIT"
    engine = create_engine(plain_url(settings), poolclass=NullPool)
    if kind == "engine":
        engine = create_engine(plain_url(settings), poolclass=NullPool, isolation_level=level)
    with engine.connect() as on, Session(engine) as session:
        joined: Any = session if kind == "engine" else on.execution_options(isolation_level=level)
        job = sluice.submit("draft", "hello", connection=joined)
        assert states() == {job.id: "parked"}


def test_a_handle_is_good_after_the_commit_and_clear_before(
    callers_engine: Engine,
    engine: Engine,
    redis_client: redis.Redis,
    settings: Settings,
    sluice: Sluice,
) -> None:
    with Session(callers_engine) as session:
        job = sluice.submit("draft", "hello", connection=session)
        with pytest.raises(NotFound, match="has not committed"):
            job.result(timeout=20)
        session.commit()
        with pytest.raises(ResultTimeout):
            job.result(timeout=0.1)
        worker = StandIn(engine=engine, client=redis_client, settings=settings, job_id=job.id)
        worker.answer("done")
        assert job.result(timeout=20).text == "done"


def test_a_database_that_is_not_ours_is_named(
    postgres: Databases, settings: Settings, sluice: Sluice
) -> None:
    with postgres.database() as url:
        engine = create_engine(url.partition("?")[0], poolclass=NullPool)
        with Session(engine) as session, pytest.raises(InvalidJob) as refused:
            sluice.submit("draft", "hello", connection=session)
    name = plain_url(settings).partition("?")[0].rpartition("/")[2]
    assert refused.value.field == "connection"
    assert "without this version's tables" in str(refused.value)
    assert name in str(refused.value)


def test_a_user_without_rights_is_told_which(
    callers_engine: Engine, sluice: Sluice, states: Callable[[], dict[UUID, str]]
) -> None:
    role = f"crm_{uuid4().hex}"
    with callers_engine.connect() as connection:
        connection.execute(text(f"CREATE ROLE {role}"))
        connection.execute(text(f"SET LOCAL ROLE {role}"))
        with pytest.raises(InvalidJob, match="grant USAGE on the schema sluicegate"):
            sluice.submit("draft", "hello", connection=connection)
        connection.rollback()
    with callers_engine.connect() as connection:
        # What the message says is enough.
        connection.execute(text(f"CREATE ROLE {role}"))
        connection.execute(text(f"GRANT USAGE ON SCHEMA sluicegate TO {role}"))
        grant = f"GRANT SELECT, INSERT, DELETE ON sluicegate.jobs, sluicegate.job_bodies TO {role}"
        connection.execute(text(grant))
        connection.execute(text(f"SET LOCAL ROLE {role}"))
        sluice.submit("draft", "hello", connection=connection)
        connection.rollback()
    assert states() == {}


def test_what_else_goes_wrong_is_the_callers_own(
    callers_engine: Engine, sluice: Sluice, settings: Settings
) -> None:
    with psycopg.connect(psycopg_url(settings)) as connection:
        with pytest.raises(psycopg.errors.DivisionByZero):
            connection.execute("SELECT 1 / 0")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            sluice.submit("draft", "hello", connection=connection)


@pytest.mark.parametrize("wrong", ["a string", "an engine", "sqlite", "async", "unknown driver"])
def test_other_things_are_refused_by_name(
    wrong: str, callers_engine: Engine, sluice: Sluice, settings: Settings
) -> None:
    lite = create_engine("sqlite://")
    given: dict[str, tuple[Any, str]] = {
        "a string": ("postgresql://", "it is a str"),
        "an engine": (callers_engine, "it is a Engine"),
        "sqlite": (Session(lite), "goes to sqlite"),
        "async": (AsyncSession(), "needs an AsyncSluice"),
        "unknown driver": (object(), "it is a object"),
    }
    connection, match = given[wrong]
    with pytest.raises(InvalidJob, match=match) as refused:
        sluice.submit("draft", "hello", connection=connection)
    assert refused.value.field == "connection"
    lite.dispose()


# On an event loop


@asynccontextmanager
async def by_async_session(settings: Settings) -> AsyncIterator[Any]:
    engine = create_async_engine(plain_url(settings), poolclass=NullPool)
    async with AsyncSession(engine) as session:
        yield session
    await engine.dispose()


@asynccontextmanager
async def by_async_scoped_session(settings: Settings) -> AsyncIterator[Any]:
    engine = create_async_engine(plain_url(settings), poolclass=NullPool)
    sessions = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
    yield sessions
    await sessions.remove()
    await engine.dispose()


@asynccontextmanager
async def by_async_connection(settings: Settings) -> AsyncIterator[Any]:
    engine = create_async_engine(plain_url(settings), poolclass=NullPool)
    async with engine.connect() as connection:
        yield connection
    await engine.dispose()


@asynccontextmanager
async def by_async_psycopg(settings: Settings) -> AsyncIterator[Any]:
    async with await psycopg.AsyncConnection.connect(
        psycopg_url(settings), row_factory=dict_row, cursor_factory=AsyncRawCursor
    ) as connection:
        yield connection
        await connection.rollback()


ASYNC_HEARD = {"session": by_async_session, "scoped session": by_async_scoped_session}
ASYNC_SILENT = {"connection": by_async_connection, "psycopg": by_async_psycopg}


@pytest.mark.parametrize("kind", ASYNC_HEARD | ASYNC_SILENT)
async def test_the_same_on_a_loop(
    kind: str,
    settings: Settings,
    states: Callable[[], dict[UUID, str]],
    published: Callable[[], list[str]],
) -> None:
    async with (
        AsyncSluice(settings) as sluice,
        (ASYNC_HEARD | ASYNC_SILENT)[kind](settings) as transaction,
    ):
        await sluice.submit("draft", "never", connection=transaction)
        await transaction.rollback()
        assert states() == {}
        one = await sluice.submit("draft", "one", connection=transaction)
        with pytest.raises(InvalidJob, match="max_tokens"):
            await sluice.submit("draft", "x", max_tokens=0, connection=transaction)
        two, three = await sluice.submit_many("draft", ["two", "three"], connection=transaction)
        assert (states(), published()) == ({}, [])
        with pytest.raises(NotFound, match="has not committed"):
            await one.result(timeout=20)
        await transaction.commit()
        ids = [one.id, two.id, three.id]
        if kind in ASYNC_SILENT:
            assert states() == dict.fromkeys(ids, "parked")
            return

        async def all_published() -> bool:
            return published() == [str(job_id) for job_id in ids]

        await eventually_async(all_published)
        assert states() == dict.fromkeys(ids, "queued")


async def test_a_commit_does_not_wait_for_the_broker(
    settings: Settings,
    states: Callable[[], dict[UUID, str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A broker that never answers holds up the publisher's thread, not the loop."""
    silent = socket.create_server(("127.0.0.1", 0))
    url = type(settings.redis_url)(f"redis://127.0.0.1:{silent.getsockname()[1]}")
    mute = settings.model_copy(update={"redis_url": url, "command_timeout_s": 1.0})
    async with AsyncSluice(mute) as sluice, by_async_session(settings) as session:
        job = await sluice.submit("draft", "hello", connection=session)
        await session.commit()
        assert "the sweep will publish" not in caplog.text
        assert states() == {job.id: "queued"}
        silent.close()
    assert "the sweep will publish" in caplog.text


async def test_closing_the_client_after_the_commit_loses_no_message(
    settings: Settings, published: Callable[[], list[str]]
) -> None:
    async with by_async_session(settings) as session:
        async with AsyncSluice(settings) as sluice:
            job = await sluice.submit("draft", "hello", connection=session)
            await session.commit()
        assert published() == [str(job.id)]


async def test_a_connection_that_would_block_the_loop_is_refused(
    settings: Settings, callers_engine: Engine
) -> None:
    async with AsyncSluice(settings) as sluice:
        with pytest.raises(InvalidJob, match="use Sluice"):
            await sluice.submit("draft", "hello", connection=Session(callers_engine))
        with pytest.raises(SluiceError, match="it is a str"):
            await sluice.submit("draft", "hello", connection="postgresql://")


# Django


@pytest.fixture
def django_connection(settings: Settings) -> Iterator[Any]:
    from django import setup
    from django.conf import settings as django
    from django.db import connection, connections
    from sqlalchemy import make_url

    url = make_url(plain_url(settings))
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": url.database,
        "HOST": url.host,
        "PORT": url.port,
        "USER": url.username,
        "PASSWORD": url.password or "",
    }
    if not django.configured:
        # Without USE_TZ Django reads times without a zone.
        django.configure(DATABASES={"default": database}, USE_TZ=False, TIME_ZONE="Asia/Tokyo")
        setup()
    connections.databases["default"] = connections.configure_settings({"default": database})[
        "default"
    ]
    yield connection
    connection.close()
    del connections["default"]


def test_django_publishes_by_its_own_hook(
    django_connection: Any,
    sluice: Sluice,
    states: Callable[[], dict[UUID, str]],
    published: Callable[[], list[str]],
) -> None:
    from django.db import transaction

    class GivenUpError(Exception):
        pass

    def give_up() -> None:
        with transaction.atomic():
            sluice.submit("draft", "never", connection=django_connection)
            raise GivenUpError

    with pytest.raises(GivenUpError):
        give_up()
    assert (states(), published()) == ({}, [])
    with transaction.atomic():
        one = sluice.submit("draft", "one", connection=django_connection)
        with pytest.raises(GivenUpError):
            give_up()
        assert (states(), published()) == ({}, [])
    assert states() == {one.id: "queued"}
    assert published() == [str(one.id)]
    two = sluice.submit("draft", "outside of atomic", connection=django_connection)
    assert published() == [str(one.id), str(two.id)]
    django_connection.set_autocommit(False)
    three = sluice.submit("draft", "by hand", connection=django_connection)
    django_connection.commit()
    django_connection.set_autocommit(True)
    assert states() == {one.id: "queued", two.id: "queued", three.id: "parked"}


def test_django_times_are_read_right(
    django_connection: Any,
    sluice: Sluice,
    engine: Engine,
    settings: Settings,
    redis_client: redis.Redis,
) -> None:
    sluice.submit("draft", "one", connection=django_connection)
    found: Any = redis_client.lindex(settings.redis_prefix + QUEUE, 0)
    with engine.connect() as connection:
        at = connection.exec_driver_sql("SELECT published_at FROM jobs").scalar_one()
    assert json.loads(found)["headers"]["published_at"] == at.isoformat()

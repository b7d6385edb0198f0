"""Submitting through both clients, to a real Postgres and Valkey."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from uuid import UUID, uuid4

import psycopg
import pytest
import redis
from sqlalchemy import Engine

from sluicegate import AsyncSluice, JobView, Sluice
from sluicegate.shared import accounts, catalogue
from sluicegate.shared.errors import (
    IdempotencyConflict,
    InvalidJob,
    NotFound,
    QueueUnavailable,
    SchemaOutdated,
    SluiceError,
)
from sluicegate.shared.jobs import State
from sluicegate.shared.queues import STAGE_CHANNEL
from sluicegate.shared.settings import Settings
from tests.databases import Rows
from tests.polling import eventually
from tests.stand_in import StandIn

T = TypeVar("T")


class Client:
    """Either client behind one face, so that each test holds for both."""

    def __init__(self, settings: Settings, *, threads: bool) -> None:
        self._settings = settings
        self._threads = threads

    def submit(self, use_case: Any, prompt: Any, **options: Any) -> UUID:
        job_id: UUID = self._run("submit", use_case, prompt, **options).id
        return job_id

    def submit_many(self, use_case: Any, jobs: Any, **options: Any) -> list[UUID]:
        return [handle.id for handle in self._run("submit_many", use_case, jobs, **options)]

    def get(self, job_id: Any) -> JobView:
        view: JobView = self._run("get", job_id)
        return view

    def _run(self, method: str, *args: Any, **options: Any) -> Any:
        if self._threads:
            with Sluice(self._settings) as sluice:
                return getattr(sluice, method)(*args, **options)

        async def call() -> Any:
            async with AsyncSluice(self._settings) as sluice:
                return await getattr(sluice, method)(*args, **options)

        return asyncio.run(call())


@pytest.fixture(params=["threads", "loop"])
def make_client(request: pytest.FixtureRequest) -> Callable[[Settings], Client]:
    return lambda settings: Client(settings, threads=request.param == "threads")


@pytest.fixture
def client(make_client: Callable[[Settings], Client], settings: Settings) -> Client:
    return make_client(settings)


@pytest.fixture
def messages(redis_client: redis.Redis, settings: Settings) -> Callable[[str], list[Any]]:
    def waiting(queue: str) -> list[Any]:
        found: Any = redis_client.lrange(settings.redis_prefix + queue, 0, -1)
        return [json.loads(one) for one in found]

    return waiting


def test_an_interactive_job_is_stored_and_published(
    client: Client, rows: Rows, messages: Callable[[str], list[Any]]
) -> None:
    job_id = client.submit(
        "draft", "hello", system="Be brief.", request_id="r-7", metadata={"lead": "4711"}
    )
    (row,) = rows("SELECT * FROM jobs JOIN job_bodies ON job_id = id")
    assert (row.id, row.state, row.queue) == (job_id, "queued", "draft.anthropic")
    assert row.request["system"] == "Be brief."
    assert row.request["metadata"] == {"lead": "4711"}
    assert (row.request_id, row.submitted_from) == ("r-7", socket.gethostname())
    assert row.published_at is not None
    assert 299 < (row.deadline_at - row.created_at).total_seconds() < 301
    (message,) = messages("draft.anthropic")
    assert message["headers"]["published_at"] == row.published_at.isoformat()
    assert message["headers"]["id"] == str(job_id)
    assert "hello" not in json.dumps(message)


def test_bulk_jobs_wait_in_postgres_and_the_sweep_is_told(
    client: Client,
    settings: Settings,
    rows: Rows,
    messages: Callable[[str], list[Any]],
) -> None:
    plain = settings.database_dsn.replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(plain, autocommit=True) as listener:
        listener.execute(f"LISTEN {STAGE_CHANNEL}")
        client.submit_many("summary", ["one", "two"], lane="bulk")
        told = [notice.channel for notice in listener.notifies(timeout=10, stop_after=1)]
    assert told == [STAGE_CHANNEL]
    found = rows("SELECT state, queue, published_at FROM jobs")
    assert found == [("parked", "summary.anthropic.bulk", None)] * 2
    assert messages("summary.anthropic.bulk") == []


def test_many_jobs_are_stored_and_published_in_order(
    client: Client, rows: Rows, messages: Callable[[str], list[Any]]
) -> None:
    ids = client.submit_many("draft", (f"note {n}" for n in range(1201)))
    assert [row.id for row in rows("SELECT id FROM jobs ORDER BY id")] == ids
    published = [message["headers"]["id"] for message in messages("draft.anthropic")]
    assert sorted(published) == [str(job_id) for job_id in ids]


def test_no_jobs_are_no_work(client: Client) -> None:
    assert client.submit_many("draft", []) == []


@pytest.mark.parametrize(
    ("field", "arguments", "options"),
    [
        ("use_case", ("nope", "hi"), {}),
        ("prompt", ("draft", ""), {}),
        ("prompt", ("draft", "x" * 2_000_000), {}),
        ("prompt", ("draft", 7), {}),
        ("max_tokens", ("draft", "hi"), {"max_tokens": 0}),
        ("max_tokens", ("draft", "hi"), {"max_tokens": 10_000_000}),
        ("account", ("draft", "hi"), {"account": "nobody"}),
        ("account", ("draft", "hi"), {"account": uuid4()}),
        ("deadline", ("draft", "hi"), {"deadline": -1}),
    ],
)
def test_bad_input_is_refused_before_anything_is_stored(
    client: Client,
    rows: Rows,
    field: str,
    arguments: tuple[Any, Any],
    options: dict[str, Any],
) -> None:
    with pytest.raises(InvalidJob) as refused:
        client.submit(*arguments, **options)
    assert refused.value.field == field
    with pytest.raises(InvalidJob):
        client.submit_many(None, [
            {"use_case": "draft", "prompt": "fine"},
            {"use_case": arguments[0], "prompt": arguments[1], **options},
        ])  # fmt: skip
    assert rows("SELECT id FROM jobs") == []


def test_an_account_may_be_named_or_given_by_id_and_must_be_active(
    client: Client, engine: Engine, rows: Rows
) -> None:
    with engine.connect() as connection:
        acme = accounts.add_account(connection, "acme")
        closed = accounts.add_account(connection, "closed")
        connection.exec_driver_sql("UPDATE accounts SET is_active = false WHERE name = 'closed'")
    for name in ("acme", acme.id, str(acme.id).upper()):
        client.submit("draft", "hi", account=name)
    assert {row.account_id for row in rows("SELECT account_id FROM jobs")} == {acme.id}
    with pytest.raises(InvalidJob, match="account"):
        client.submit("draft", "hi", account=closed.id)


def test_an_idempotency_key_gives_the_same_job_or_a_conflict(
    client: Client, rows: Rows, messages: Callable[[str], list[Any]]
) -> None:
    first = client.submit("draft", "hi", idempotency_key="k")
    assert client.submit("draft", "hi", idempotency_key="k") == first
    with pytest.raises(IdempotencyConflict, match="'k'"):
        client.submit("draft", "something else", idempotency_key="k")
    same = {"prompt": "hi", "idempotency_key": "k"}
    twice = {"prompt": "new", "idempotency_key": "new"}
    again, new, newer = client.submit_many("draft", [same, twice, twice])
    assert again == first
    assert new == newer
    assert len(rows("SELECT id FROM jobs")) == 2
    assert len(messages("draft.anthropic")) == 2


def test_a_conflict_in_a_list_stores_nothing_of_it(client: Client, rows: Rows) -> None:
    client.submit("draft", "hi", idempotency_key="k")
    jobs = ["a"] * 600 + [{"prompt": "something else", "idempotency_key": "k"}]
    with pytest.raises(IdempotencyConflict):
        client.submit_many("draft", jobs)
    assert len(rows("SELECT id FROM jobs")) == 1


def test_keys_submitted_by_many_at_once_are_one_job_each(settings: Settings, rows: Rows) -> None:
    found: list[list[UUID]] = []
    with Sluice(settings) as sluice:

        def submit() -> None:
            jobs = [{"prompt": "hi", "idempotency_key": f"k{n}"} for n in range(20)]
            found.append([handle.id for handle in sluice.submit_many("draft", jobs)])

        threads = [threading.Thread(target=submit) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 6
    assert len({tuple(ids) for ids in found}) == 1
    assert len(rows("SELECT id FROM jobs")) == 20


def test_a_changed_catalogue_is_seen(
    settings: Settings, engine: Engine, redis_client: redis.Redis
) -> None:
    with Sluice(settings) as sluice:
        sluice.submit("draft", "hi")
        with engine.connect() as connection:
            connection.exec_driver_sql("INSERT INTO use_cases (name) VALUES ('sentiment')")
        catalogue.invalidate(redis_client, settings.redis_prefix)

        def submitted() -> bool:
            try:
                return bool(sluice.submit("sentiment", "hi").id)
            except InvalidJob:
                return False

        eventually(submitted, timeout_s=5)


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_without_postgres_a_job_is_not_accepted(
    make_client: Callable[[Settings], Client], valkey: str
) -> None:
    away = f"postgresql+psycopg://sluice@127.0.0.1:{_closed_port()}/sluice"
    client = make_client(Settings(_env_file=None, database_url=away, redis_url=valkey))
    for act in (lambda: client.submit("draft", "hi"), lambda: client.get(uuid4())):
        with pytest.raises(QueueUnavailable, match="Postgres did not answer"):
            act()


def test_without_a_schema_the_error_says_what_to_run(
    make_client: Callable[[Settings], Client], empty_database: str, valkey: str
) -> None:
    client = make_client(Settings(_env_file=None, database_url=empty_database, redis_url=valkey))
    with pytest.raises(SchemaOutdated, match="sluice db upgrade"):
        client.submit("draft", "hi")


def test_without_redis_a_job_is_accepted_and_left_to_the_sweep(
    make_client: Callable[[Settings], Client],
    settings: Settings,
    rows: Rows,
    caplog: pytest.LogCaptureFixture,
) -> None:
    away = f"redis://127.0.0.1:{_closed_port()}/0"
    client = make_client(Settings(**{**dict(settings), "redis_url": away}, _env_file=None))
    with caplog.at_level(logging.WARNING, logger="sluicegate"):
        job_id = client.submit("draft", "hi")
    assert rows("SELECT id, state FROM jobs") == [(job_id, "queued")]
    assert "the sweep will publish" in caplog.text


@pytest.mark.parametrize("count", [1, 700])
def test_a_connection_lost_during_the_insert_stores_the_jobs_once(
    client: Client, settings: Settings, rows: Rows, count: int
) -> None:
    plain = settings.database_dsn.replace("postgresql+psycopg", "postgresql")
    found: list[UUID] = []
    with psycopg.connect(plain) as blocker, psycopg.connect(plain, autocommit=True) as other:
        # The insert waits for the account's row, and its backend is ended while it does.
        blocker.execute("SELECT * FROM accounts FOR UPDATE")
        submitting = threading.Thread(
            target=lambda: found.extend(client.submit_many("draft", ["hi"] * count))
        )
        submitting.start()

        def ended() -> bool:
            return bool(
                other.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE wait_event_type = 'Lock' AND application_name = 'sluice producer'"
                ).fetchall()
            )

        eventually(ended)
        blocker.rollback()
        submitting.join(60)
    assert sorted(row.id for row in rows("SELECT id FROM jobs")) == sorted(found)
    assert len(set(found)) == count


def test_a_job_can_be_looked_at(
    client: Client, engine: Engine, redis_client: redis.Redis, settings: Settings
) -> None:
    job_id = client.submit("draft", "hi", request_id="r")
    view = client.get(str(job_id))
    assert (view.id, view.state, view.account) == (job_id, State.QUEUED, "default")
    assert (view.attempts, view.result, view.history, view.request_id) == (0, None, (), "r")
    StandIn(engine=engine, client=redis_client, settings=settings, job_id=job_id).answer(
        "Dear ", "Ada", cost_nano_usd=1200
    )
    with engine.connect() as connection:
        _book(connection, job_id)
    view = client.get(job_id)
    assert view.state is State.SUCCEEDED
    assert view.result is not None
    assert (view.result.text, view.result.finished_at) == ("Dear Ada", view.finished_at)
    ((number, state, cost),) = [(a.number, a.state, a.cost_nano_usd) for a in view.history]
    assert (number, state, cost) == (1, "corrected", 900)


def _book(connection: Any, job_id: UUID) -> None:
    connection.exec_driver_sql(
        """
        WITH attempt AS (
            INSERT INTO attempts (id, job_id, fence, number, worker_id, account_id, use_case,
                provider_id, provider, model, state, reserved_nano_usd,
                baseline_reserved_nano_usd)
            SELECT gen_random_uuid(), id, 1, 1, gen_random_uuid(), account_id, use_case,
                gen_random_uuid(), 'openai', 'm', 'corrected', 1000, 1000 FROM jobs
            WHERE id = %(id)s RETURNING *
        )
        INSERT INTO cost_entries (attempt_id, job_id, account_id, use_case, provider_id, provider,
            model, kind, amount_nano_usd, baseline_nano_usd, price_version, dispatched_at)
        SELECT id, job_id, account_id, use_case, provider_id, provider, model, kind, amount, 0, 'x',
               dispatched_at
        FROM attempt, (VALUES ('estimate', 1000), ('correction', -100)) AS entry(kind, amount)
        """,
        {"id": job_id},
    )


def test_what_does_not_exist_is_not_found(client: Client) -> None:
    with pytest.raises(NotFound):
        client.get(uuid4())
    with pytest.raises(InvalidJob, match="job_id"):
        client.get("not-an-id")


def test_a_closed_client_says_so(settings: Settings) -> None:
    sluice = Sluice(settings)
    sluice.submit("draft", "hi")
    sluice.close()
    sluice.close()
    with pytest.raises(SluiceError, match="closed"):
        sluice.submit("draft", "hi")


def test_threads_share_a_client(settings: Settings, rows: Rows) -> None:
    with Sluice(settings) as sluice:
        threads = [
            threading.Thread(target=lambda: [sluice.submit("draft", "hi") for _ in range(10)])
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(rows("SELECT id FROM jobs")) == 160


async def test_tasks_share_a_client(settings: Settings, async_engine: Any) -> None:
    async with AsyncSluice(settings) as sluice:
        handles = await asyncio.gather(*(sluice.submit("draft", f"{n}") for n in range(100)))
    assert len({handle.id for handle in handles}) == 100
    async with async_engine.connect() as connection:
        count = await connection.exec_driver_sql("SELECT count(*) FROM jobs")
    assert count.scalar() == 100


def test_settings_come_from_the_environment_and_may_be_replaced(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_REDIS_PREFIX", "from-env:")
    with Sluice(max_attempts=2) as sluice:
        assert (sluice.settings.redis_prefix, sluice.settings.max_attempts) == ("from-env:", 2)
    with Sluice(settings, max_attempts=3) as sluice:
        assert sluice.settings == settings.model_copy(update={"max_attempts": 3})


@pytest.fixture
def forked(settings: Settings) -> Iterator[Sluice]:
    with Sluice(settings) as sluice:
        yield sluice


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_submits_on_connections_of_its_own(forked: Sluice, rows: Rows) -> None:
    forked.submit("draft", "from the parent")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            forked.submit("draft", "from the child")
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    forked.submit("draft", "from the parent again")
    assert len(rows("SELECT id FROM jobs")) == 3

"""Bulk, from file to results, on real servers; who works on the jobs is a stand-in."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
import redis
from sqlalchemy import Engine

from sluicegate import (
    Batch,
    IdempotencyConflict,
    InvalidJob,
    JobCancelled,
    NotFound,
    QueueUnavailable,
    ResultTimeout,
    Sluice,
)
from sluicegate.producers.bulk import Form, Template
from sluicegate.producers.bulk_rows import batch_rows, refuse
from sluicegate.producers.bulk_storing import store_batch
from sluicegate.shared.catalogue import read
from sluicegate.shared.database import BY_SIZE
from sluicegate.shared.ids import new_id
from sluicegate.shared.queues import STAGE_CHANNEL
from sluicegate.shared.settings import Settings
from sluicegate.shared.statements import Database
from sluicegate.workers.sweep.canceller import Canceller
from tests.command_line import Command, Outcome
from tests.harness import FULL
from tests.polling import eventually
from tests.stand_in import StandIn

MANY = 200_000 if FULL else 20_000


@pytest.fixture
def client(settings: Settings) -> Iterator[Sluice]:
    with Sluice(settings) as sluice:
        yield sluice


@pytest.fixture
def variables(
    settings: Settings, environment: Callable[[Settings], dict[str, str]]
) -> dict[str, str]:
    return environment(settings)


@pytest.fixture
def bulk(settings: Settings, command_line: Callable[[Settings], Command]) -> Command:
    """Run `sluice bulk` in this process."""
    return partial(command_line(settings), "bulk")


def rows(engine: Engine, statement: str, **values: Any) -> list[Any]:
    with engine.connect() as connection:
        result = connection.exec_driver_sql(statement, values)
        return list(result.all()) if result.returns_rows else []


def count(engine: Engine, table: str) -> int:
    return int(rows(engine, f"SELECT count(*) FROM {table}")[0][0])


def nothing_is_stored(engine: Engine) -> bool:
    return [count(engine, table) for table in ("batches", "jobs", "job_bodies")] == [0, 0, 0]


def write(name: str, *lines: object) -> Path:
    path = Path(name)
    path.write_text(
        "".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines)
    )
    return path


def notes(jobs: int, name: str = "notes.csv") -> Path:
    return write(name, "id,note", *(f"{n},note {n}" for n in range(1, jobs + 1)))


NOTES = ("--use-case", "summary", "--template", "Summarise: {note}")


@pytest.fixture
def stand_in(
    engine: Engine, redis_client: redis.Redis, settings: Settings
) -> Callable[[UUID], StandIn]:
    def work(job_id: UUID) -> StandIn:
        return StandIn(engine=engine, client=redis_client, settings=settings, job_id=job_id)

    return work


def jobs_of(engine: Engine, batch_id: UUID) -> list[UUID]:
    found = rows(
        engine, "SELECT id FROM jobs WHERE batch_id = %(id)s ORDER BY batch_line", id=batch_id
    )
    return [row.id for row in found]


# What is stored


def test_a_table_becomes_jobs_of_a_batch(bulk: Command, engine: Engine, settings: Settings) -> None:
    notes(3)
    with psycopg.connect(settings.database_dsn.replace("+psycopg", ""), autocommit=True) as line:
        line.execute(f"LISTEN {STAGE_CHANNEL}")
        outcome = bulk("submit", "notes.csv", *NOTES, "--account", "default", "--deadline", 3600)
        assert [notice.channel for notice in line.notifies(timeout=10, stop_after=1)]
    assert outcome.code == 0, outcome.err
    (batch,) = rows(engine, "SELECT * FROM batches")
    assert batch.id == outcome.id
    assert (batch.name, batch.use_case, batch.total, batch.rejected) == (
        "notes.csv",
        "summary",
        3,
        0,
    )
    assert outcome.err == (
        f"sluice: 3 jobs are stored; follow them with `sluice bulk watch {batch.id}`\n"
    )
    found = rows(
        engine,
        "SELECT *, extract(epoch FROM deadline_at - created_at) AS deadline_s FROM jobs"
        " JOIN job_bodies ON job_id = id ORDER BY id",
    )
    assert [row.batch_line for row in found] == [2, 3, 4]
    for n, row in enumerate(found, 1):
        assert (row.lane, row.state, row.queue) == ("bulk", "parked", "summary.anthropic.bulk")
        assert (row.batch_id, row.submitted_by) == (batch.id, batch.submitted_by)
        assert (row.deadline_s, row.published_at) == (3600, None)
        assert row.request["metadata"] == {"id": str(n)}
        assert row.request["messages"][0]["content"][0]["text"] == f"Summarise: note {n}"


_OPTIONS: list[dict[str, Any]] = [
    {},
    {"system": "Be brief.", "max_tokens": 7, "metadata": {"a": "b"}, "effort": "low"},
    {"max_attempts": 3, "deadline": 60, "request_id": "r", "submitted_by": "me"},
    {"model": "claude-haiku-5-5", "reply_to": "crm", "idempotency_key": "k"},
    {"tools": [{"name": "f"}], "tool_choice": "f"},
]


def test_a_line_is_stored_as_submit_would_store_it(
    bulk: Command, client: Sluice, engine: Engine
) -> None:
    write("jobs.jsonl", *({"prompt": f"Hello {n}", **one} for n, one in enumerate(_OPTIONS)))
    outcome = bulk("submit", "jobs.jsonl", "--use-case", "general")
    assert outcome.code == 0, outcome.err
    compared = """
        SELECT request::text, account_id, use_case, lane, queue, state, max_attempts, fence,
               extract(epoch FROM deadline_at - created_at)::float8, published_at, request_hash,
               idempotency_key, submitted_by, submitted_from, request_id, reply_to, refused
        FROM jobs JOIN job_bodies ON job_id = id
        WHERE (batch_id IS NOT NULL) = %(batch)s ORDER BY id
    """
    by_file = rows(engine, compared, batch=True)
    rows(engine, "UPDATE jobs SET idempotency_key = 'other' WHERE idempotency_key = 'k'")
    for n, options in enumerate(_OPTIONS):
        client.submit("general", f"Hello {n}", lane="bulk", **options)
    assert by_file == rows(engine, compared, batch=False)


def test_options_of_the_command_hold_where_a_line_says_nothing(
    bulk: Command, engine: Engine
) -> None:
    write("jobs.jsonl", {"prompt": "a"}, {"prompt": "b", "max_attempts": 4, "system": "Long."})
    options = ["--system", "Brief.", "--max-attempts", 2, "--max-tokens", 9, "--reply-to", "crm"]
    assert bulk("submit", "jobs.jsonl", "--use-case", "summary", *options).code == 0
    found = rows(engine, "SELECT * FROM jobs JOIN job_bodies ON job_id = id ORDER BY id")
    assert [(row.max_attempts, row.request["system"], row.reply_to) for row in found] == [
        (2, "Brief.", "crm"),
        (4, "Long.", "crm"),
    ]
    assert [row.request["max_tokens"] for row in found] == [9, 9]


# What is not stored


def test_bad_lines_go_into_the_rejects_file(bulk: Command, engine: Engine) -> None:
    write(
        "jobs.jsonl",
        {"prompt": "good"},
        "{not json",
        {"prompt": "x", "max_token": 5},
        {"prompt": "x", "account": "nobody"},
        {"prompt": "good too"},
    )
    outcome = bulk("submit", "jobs.jsonl", "--use-case", "summary", "--json")
    told = json.loads(outcome.out)
    assert outcome.code == 1
    assert (told["jobs"], told["rejected"], told["rejects"]) == (2, 3, "jobs.jsonl.rejects.jsonl")
    assert "3 lines are rejected; see jobs.jsonl.rejects.jsonl" in outcome.err
    entries = [json.loads(line) for line in Path(told["rejects"]).read_text().splitlines()]
    assert [(entry["line"], entry["reason"].partition(":")[0]) for entry in entries] == [
        (2, "row"),
        (3, "max_token"),
        (4, "account"),
    ]
    assert entries[0]["raw"] == "{not json"
    assert rows(engine, "SELECT total, rejected FROM batches") == [(2, 3)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--strict"], "sluice: line 2: is not JSON: it goes wrong at column 1;"),
        (["--max-rejects", "1"], "more than 1 lines cannot be jobs (line 2: is not JSON"),
    ],
)
def test_too_many_bad_lines_end_it_and_nothing_is_stored(
    bulk: Command, engine: Engine, options: list[str], reason: str
) -> None:
    write("jobs.jsonl", *[{"prompt": "good"}], "bad", "bad", *[{"prompt": "good"}] * 6000)
    outcome = bulk(
        "submit", "jobs.jsonl", "--use-case", "summary", *options, "--rejects", "bad.jsonl"
    )
    assert (outcome.code, outcome.out) == (1, "")
    assert reason in outcome.err
    assert "nothing is stored, see bad.jsonl" in outcome.err
    assert Path("bad.jsonl").exists()
    assert nothing_is_stored(engine)


@pytest.mark.parametrize(
    ("file", "options", "expected"),
    [
        (("a.csv", ""), ["--template", "{note}"], (2, "a.csv is empty")),
        (("a.jsonl", ""), [], (2, "a.jsonl is empty")),
        (("a.jsonl", "\n\n"), [], (2, "a.jsonl is empty")),
        (("a.csv", "id,note\n"), ["--template", "{note}"], (2, "a.csv has a header and no rows")),
        (
            ("a.csv", "prompt\ncaf\xe9\na,b\n"),
            [],
            (1, "no line can be a new job (line 2: is not UTF-8 text); nothing is stored, see a."),
        ),
        (("a.jsonl", '{"prompt": ""}\n'), [], (1, "no line can be a new job (line 1: prompt:")),
        (("a.csv", "id,note\n1,x\n"), ["--template", "{notes}"], (2, "no column 'notes', only id")),
        (("a.csv", "id,note\n1,x\n"), [], (2, "no column 'prompt'")),
        (("a.jsonl", '{"prompt": "x"}\n'), ["--template", "{note"], (2, "template: has a single")),
        (("a.jsonl", '{"prompt": "x"}\n'), ["--model", "none"], (2, "model: 'none' is not in use")),
        (("a.jsonl", '{"prompt": "x"}\n'), ["--account", "none"], (2, "no active account 'none'")),
        (("a.jsonl", '{"prompt": "x"}\n'), ["--use-case", "nope"], (2, "'nope' is not known")),
        (("a.txt", "x"), [], (2, "say which with --format")),
        (("a.jsonl", "x"), ["--rejects", "no/such/folder"], (1, "choose another place")),
    ],
)
def test_what_cannot_be_a_batch_is_one_sentence(
    bulk: Command,
    engine: Engine,
    file: tuple[str, str],
    options: list[str],
    expected: tuple[int, str],
) -> None:
    (name, content), (code, reason) = file, expected
    Path(name).write_text(content, encoding="latin-1")
    outcome = bulk("submit", name, "--use-case", "summary", *options)
    assert (outcome.code, outcome.out) == (code, "")
    assert reason in outcome.err
    assert outcome.err.startswith("sluice: ")
    assert outcome.err.count("\n") == 1
    assert nothing_is_stored(engine)


def test_a_file_that_is_not_there_is_one_sentence(bulk: Command) -> None:
    outcome = bulk("submit", "none.csv", "--use-case", "summary")
    assert outcome == (2, "", "sluice: file: none.csv cannot be read: No such file or directory\n")


# Twice


def test_the_same_file_is_stored_once(bulk: Command, engine: Engine) -> None:
    notes(3)
    first = bulk("submit", "notes.csv", *NOTES)
    again = bulk("submit", "notes.csv", *NOTES)
    assert (again.code, again.id) == (0, first.id)
    assert f"was submitted before as batch {first.id}" in again.err
    assert "--again" in again.err
    assert count(engine, "jobs") == 3
    # Other options, or another file, are another batch; and so is one that is asked for.
    assert bulk("submit", "notes.csv", *NOTES, "--max-tokens", 5).id != first.id
    assert bulk("submit", "notes.csv", *NOTES, "--again").id != first.id
    notes(4)
    assert bulk("submit", "notes.csv", *NOTES).id != first.id
    assert count(engine, "batches") == 4


def test_the_same_standard_input_is_stored_once(bulk: Command, engine: Engine) -> None:
    content = notes(3).read_bytes()

    def submit(*options: str) -> Outcome:
        return bulk("submit", "-", *NOTES, *options, stdin=content)

    assert "say with --format (jsonl or csv)" in submit().err
    first = submit("--format", "csv")
    assert first.code == 0, first.err
    assert submit("--format", "csv").id == first.id
    assert bulk("submit", "notes.csv", *NOTES).id == first.id
    assert rows(engine, "SELECT name, total FROM batches") == [("standard input", 3)]


def test_two_who_submit_the_same_at_once_get_the_same(client: Sluice, engine: Engine) -> None:
    both = threading.Barrier(2, timeout=30)

    def prompts() -> Iterator[str]:
        yield "one"
        both.wait()
        yield "two"

    found: list[Batch] = []

    def submit() -> None:
        found.append(client.submit_batch("summary", prompts(), idempotency_key="nightly"))

    threads = [threading.Thread(target=submit) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].id == found[1].id
    assert sorted(batch.is_new for batch in found) == [False, True]
    assert (count(engine, "batches"), count(engine, "jobs")) == (1, 2)


def test_rows_with_keys_that_have_jobs_are_left_out(bulk: Command, engine: Engine) -> None:
    line = {"prompt": "a", "idempotency_key": "a"}
    write("one.jsonl", line)
    bulk("submit", "one.jsonl", "--use-case", "summary")
    write(
        "two.jsonl",
        line,
        {"prompt": "b", "idempotency_key": "b"},
        {"prompt": "b", "idempotency_key": "b"},
        {"prompt": "not a", "idempotency_key": "a"},
        {"prompt": "c"},
        {"prompt": ""},
        {"prompt": "b", "idempotency_key": "b"},
    )
    outcome = bulk("submit", "two.jsonl", "--use-case", "summary", "--json")
    told = json.loads(outcome.out)
    assert (outcome.code, told["jobs"], told["rejected"], told["repeated"]) == (1, 2, 2, 3)
    keys = {row.idempotency_key: str(row.id) for row in rows(engine, "SELECT * FROM jobs")}
    entries = [json.loads(one) for one in Path(told["rejects"]).read_text().splitlines()]
    assert [(entry["line"], entry.get("job_id")) for entry in entries] == [
        (1, keys["a"]),
        (3, keys["b"]),
        (4, None),
        (6, None),
        (7, keys["b"]),
    ]
    assert "used before with another request" in entries[2]["reason"]
    # All of it a second time, in a file that is not the same.
    write("three.jsonl", line, {"prompt": "b", "idempotency_key": "b"})
    outcome = bulk("submit", "three.jsonl", "--use-case", "summary")
    assert outcome.code == 1
    assert "all lines were submitted before; nothing is stored, see three.jsonl" in outcome.err
    assert count(engine, "jobs") == 3


# All or nothing


def _kill_connections(settings: Settings) -> None:
    with psycopg.connect(settings.database_dsn.replace("+psycopg", ""), autocommit=True) as line:
        killed = line.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'sluice bulk' AND datname = current_database()"
        ).fetchall()
    assert killed == [(True,)]


def test_a_connection_that_breaks_half_way_leaves_nothing(
    client: Sluice, engine: Engine, settings: Settings
) -> None:
    def prompts() -> Iterator[str]:
        for n in range(20_000):
            if n == 12_345:
                _kill_connections(settings)
            yield f"note {n}"

    with pytest.raises(QueueUnavailable, match="nothing of the batch is stored"):
        client.submit_batch("summary", prompts())
    assert nothing_is_stored(engine)


def test_a_commit_without_an_answer_says_so(client: Sluice, engine: Engine) -> None:
    rows(
        engine,
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$;"
        "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON batches DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION die()",
    )
    with pytest.raises(QueueUnavailable, match="did not say whether it has stored the batch"):
        client.submit_batch("summary", ["a"])
    assert nothing_is_stored(engine)


def test_an_error_of_the_rows_own_leaves_nothing(client: Sluice, engine: Engine) -> None:
    def prompts() -> Iterator[str]:
        yield from ("note" for _ in range(6000))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client.submit_batch("summary", prompts())
    assert nothing_is_stored(engine)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_ends_half_way_leaves_nothing(
    variables: dict[str, str], engine: Engine, number: signal.Signals
) -> None:
    argv = [sys.executable, "-m", "sluicegate.cli", "bulk", "submit", "-", *NOTES]
    with subprocess.Popen(
        [*argv, "--format", "csv"],
        env=variables,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b"id,note\n" + b"1,note\n" * 12_000)
        process.stdin.flush()

        def written() -> bool:
            """Whether it has written a block, and waits for more to read."""
            assert process.poll() is None
            return bool(
                rows(
                    engine,
                    "SELECT FROM pg_stat_activity WHERE application_name = 'sluice bulk'"
                    " AND state = 'idle in transaction' AND query LIKE 'COPY job_bodies%%'",
                )
            )

        eventually(written, 60)
        process.send_signal(number)
        # Not `communicate`, which would end its input.
        process.wait(30)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert said == ("sluice: stopped; nothing is stored\n" if number == signal.SIGINT else "")
    eventually(
        lambda: (
            not rows(engine, "SELECT FROM pg_stat_activity WHERE application_name = 'sluice bulk'")
        )
    )
    assert nothing_is_stored(engine)


_PEAK = """
import resource, sys
from sluicegate.cli import run
code = run(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("peak", peak if sys.platform == "darwin" else peak * 1024, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.timeout(900 if FULL else 180)
def test_a_large_file_takes_no_more_memory_than_a_small_one(
    variables: dict[str, str], engine: Engine
) -> None:
    text = "Anna called about the invoice that came twice. " * 40

    def peak(jobs: int) -> int:
        path = Path(f"{jobs}.csv")
        with path.open("w") as file:
            file.write("id,note\n")
            file.writelines(f"{n},{text}{n}\n" for n in range(jobs))
        argv = [sys.executable, "-c", _PEAK, "bulk", "submit", str(path), *NOTES]
        done = subprocess.run(argv, env=variables, capture_output=True, text=True, check=True)
        return int(done.stderr.split()[-1])

    small = peak(6000)
    large = peak(MANY)
    assert Path(f"{MANY}.csv").stat().st_size > 1.8 * MANY * 1000
    assert large - small < 20_000_000, (small, large)
    totals = rows(engine, "SELECT total FROM batches ORDER BY created_at")
    assert [row.total for row in totals] == [6000, MANY]
    assert count(engine, "job_bodies") == count(engine, "jobs") == 6000 + MANY
    # Every line once, and in its place.
    (misplaced,) = rows(
        engine,
        "SELECT count(*) FROM jobs JOIN job_bodies ON job_id = id"
        " WHERE (request->'metadata'->>'id')::int <> batch_line - 2",
    )[0]
    assert misplaced == 0


# From a program


def test_rows_of_a_program(client: Sluice, engine: Engine) -> None:
    batch = client.submit_batch(
        "summary",
        ["plain", {"prompt": "own options", "max_tokens": 3}],
        name="calls of May",
        system="Be brief.",
    )
    assert batch.is_new
    view = client.batch(str(batch.id)).view()
    assert (view.id, view.name, view.total, view.ended) == (batch.id, "calls of May", 2, 0)
    assert (view.account, view.cost_nano_usd) == ("default", 0)
    assert view.finished_at is None
    found = rows(engine, "SELECT batch_line, request FROM jobs JOIN job_bodies ON job_id = id")
    assert [(row.batch_line, row.request.get("max_tokens")) for row in found] == [(1, None), (2, 3)]
    assert all(row.request["system"] == "Be brief." for row in found)


def test_a_template_of_a_program(client: Sluice, engine: Engine) -> None:
    fields = [{"note": f"n{n}", "id": n} for n in range(3)]
    client.submit_batch("summary", iter(fields), template="Summarise: {note}")
    found = rows(engine, "SELECT request FROM job_bodies ORDER BY job_id")
    assert [row.request["metadata"] for row in found] == [{"id": str(n)} for n in range(3)]


def test_a_bad_row_of_a_program_is_named_and_nothing_is_stored(
    client: Sluice, engine: Engine
) -> None:
    with pytest.raises(InvalidJob, match=r"max_tokens: .*\(row 6001\)"):
        client.submit_batch("summary", [*["x"] * 6000, {"prompt": "x", "max_tokens": 0}])
    keyed = [{"prompt": text, "idempotency_key": "k"} for text in ("a", "b")]
    with pytest.raises(IdempotencyConflict, match=r"\(row 2\)"):
        client.submit_batch("summary", keyed)
    with pytest.raises(InvalidJob, match="rows: is empty"):
        client.submit_batch("summary", [])
    with pytest.raises(InvalidJob, match="name"):
        client.submit_batch("summary", ["x"], name="a\nb")
    with pytest.raises(InvalidJob, match="lane"):
        client.submit_batch("summary", ["x"], lane="interactive")
    with pytest.raises(InvalidJob, match="idempotency_key"):
        client.submit_batch("summary", ["x"], idempotency_key="")
    assert nothing_is_stored(engine)


def test_a_batch_that_is_not_there(client: Sluice, bulk: Command) -> None:
    nobody = new_id()
    for ask in (Batch.view, Batch.wait, Batch.results, Batch.cancel):
        with pytest.raises(NotFound, match=f"there is no batch {nobody}"):
            ask(client.batch(nobody))
    with pytest.raises(InvalidJob, match="is not a batch's id"):
        client.batch("nonsense")
    for command in ("show", "watch", "results", "cancel"):
        assert bulk(command, nobody) == (1, "", f"sluice: there is no batch {nobody}\n")
        assert bulk(command, "nonsense").code == 2


# Following it


def test_counters_and_cost_are_those_of_the_jobs(
    client: Sluice, engine: Engine, stand_in: Callable[[UUID], StandIn]
) -> None:
    batch = client.submit_batch("summary", [f"note {n}" for n in range(5)])
    ids = jobs_of(engine, batch.id)
    with pytest.raises(ResultTimeout, match="0 of 5 jobs have ended"):
        batch.wait(timeout=0)
    for job_id, state in zip(ids, ["succeeded", "succeeded", "failed", "expired"], strict=False):
        rows(engine, "UPDATE jobs SET cost_nano_usd = 7 WHERE id = %(id)s", id=job_id)
        stand_in(job_id).settle(state)
    assert batch.progress().finished_at is None
    assert batch.cancel() == 1
    view = batch.wait(timeout=10)
    assert (view.succeeded, view.failed, view.expired, view.cancelled) == (2, 1, 1, 1)
    assert (view.ended, view.total, view.cost_nano_usd) == (5, 5, 28)
    assert view.finished_at is not None
    with pytest.raises(JobCancelled):
        client.handle(ids[4]).result(timeout=10)


def test_watch_ends_with_the_batch(
    bulk: Command, client: Sluice, engine: Engine, stand_in: Callable[[UUID], StandIn]
) -> None:
    good, bad = (client.submit_batch("summary", ["a", "b"]) for _ in range(2))

    def work() -> None:
        for batch, state in ((good, "succeeded"), (bad, "failed")):
            for job_id in jobs_of(engine, batch.id):
                stand_in(job_id).settle(state)

    thread = threading.Thread(target=work)
    thread.start()
    outcome = bulk("watch", good.id)
    assert outcome.code == 0, outcome.err
    first, *_, last = ["", *outcome.out.splitlines()]
    assert last == "2 of 2 have ended, 2 succeeded, $0.000000"
    assert "a second" not in first
    outcome = bulk("watch", bad.id, "--json")
    assert (outcome.code, outcome.err) == (1, "")
    told = json.loads(outcome.out)
    assert (told["failed"], told["total"], told["cost_nano_usd"]) == (2, 2, 0)
    thread.join()


def test_a_watch_says_that_postgres_does_not_answer(
    client: Sluice,
    engine: Engine,
    settings: Settings,
    variables: dict[str, str],
    stand_in: Callable[[UUID], StandIn],
) -> None:
    batch = client.submit_batch("summary", ["a"])
    (job_id,) = jobs_of(engine, batch.id)
    client.close()
    engine.dispose()
    name = settings.database_dsn.rpartition("/")[2].partition("?")[0]
    server = settings.database_dsn.replace("+psycopg", "").replace(f"/{name}", "/postgres")

    def let_in(yes: bool) -> None:
        with psycopg.connect(server, autocommit=True) as line:
            line.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {yes}".encode())
            if not yes:
                line.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
                    [name],
                )

    argv = [sys.executable, "-m", "sluicegate.cli", "bulk", "watch", str(batch.id)]
    with subprocess.Popen(
        argv, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert process.stdout.readline() == "0 of 1 have ended, $0.000000\n"
            let_in(False)
            assert process.stderr.readline() == "sluice: Postgres does not answer; still trying\n"
            let_in(True)
            stand_in(job_id).settle("succeeded")
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
            let_in(True)
    assert (process.returncode, err) == (0, "")
    assert out.splitlines()[-1] == "1 of 1 have ended, 1 succeeded, $0.000000"


def test_show_and_list(bulk: Command, client: Sluice) -> None:
    older = client.submit_batch("summary", ["a"], name="older")
    newer = client.submit_batch("general", ["a", "b"], name="newer")
    newer.cancel()
    told = json.loads(bulk("list", "--json").out)["batches"]
    assert [(one["id"], one["total"]) for one in told] == [(str(newer.id), 2), (str(older.id), 1)]
    lines = [line.split("\t") for line in bulk("list").out.splitlines()]
    assert [(line[1], line[6]) for line in lines] == [
        ("name", "state"),
        ("newer", "cancelled"),
        ("older", "under way"),
    ]
    assert len(bulk("list", "--limit", 1).out.splitlines()) == 2
    shown = dict(line.split("\t") for line in bulk("show", newer.id).out.splitlines())
    assert (shown["jobs"], shown["cancelled"], shown["state"]) == ("2", "2", "cancelled")
    assert json.loads(bulk("show", older.id, "--json").out)["name"] == "older"


# Results


@pytest.fixture
def done(client: Sluice, engine: Engine, stand_in: Callable[[UUID], StandIn]) -> Batch:
    """A batch of 2,500: all but the last three succeeded, one failed, two wait."""
    fields = [{"note": f"n{n}", "id": n} for n in range(1, 2501)]
    batch = client.submit_batch("summary", fields, template="{note}")
    rows(
        engine,
        "WITH moved AS (UPDATE jobs SET state = 'succeeded', finished_at = now()"
        " WHERE batch_line <= 2497 RETURNING id, batch_line)"
        " INSERT INTO results (job_id, fence, body) SELECT id, 1, json_build_object('version', 1,"
        " 'job_id', id, 'state', 'succeeded', 'use_case', 'summary',"
        " 'text', 'answer, \"' || batch_line || '\"') FROM moved",
    )
    stand_in(jobs_of(engine, batch.id)[2497]).settle(
        "failed", error={"error_class": "server", "message": "it did not answer"}
    )
    return batch


def test_results_come_by_line_page_by_page(bulk: Command, done: Batch) -> None:
    found = list(done.results())
    assert [one.line for one in found] == list(range(1, 2501))
    assert [one.metadata["id"] for one in found] == [str(one.line) for one in found]
    assert Counter(one.state for one in found) == {"succeeded": 2497, "failed": 1, "parked": 2}
    assert found[6].result is not None
    assert found[6].result.text == 'answer, "7"'
    assert [one.line for one in done.results("failed")] == [2498]
    with pytest.raises(InvalidJob, match="state"):
        done.results("gone")

    outcome = bulk("results", done.id)
    lines = [json.loads(line) for line in outcome.out.splitlines()]
    assert [line["line"] for line in lines] == list(range(1, 2501))
    assert (lines[6]["text"], lines[6]["metadata"]) == ('answer, "7"', {"id": "7"})
    assert (lines[2497]["error"], lines[2497]["text"]) == ("it did not answer", "")
    assert (lines[2498]["state"], lines[2498]["text"]) == ("parked", None)
    assert outcome.err == "sluice: 2 of 2,500 jobs have not ended yet\n"


def test_results_as_a_table(bulk: Command, done: Batch) -> None:
    outcome = bulk("results", done.id, "-o", "out.csv", "--state", "succeeded")
    assert outcome.out == ""
    assert "2,497 results are in out.csv" in outcome.err
    with Path("out.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(one["line"], one["text"], one["metadata.id"]) for one in table] == [
        (str(n), f'answer, "{n}"', str(n)) for n in range(1, 2498)
    ]
    assert bulk("results", done.id, "--format", "csv").out.count("\r\n") == 2501


def test_a_file_of_results_is_whole_or_not_there(
    bulk: Command, done: Batch, engine: Engine
) -> None:
    Path("out.jsonl").write_text("as it was")
    rows(
        engine,
        "UPDATE results SET body = '{}' WHERE job_id ="
        " (SELECT id FROM jobs WHERE batch_line = 2000)",
    )
    assert bulk("results", done.id, "-o", "out.jsonl").code == 1
    assert Path("out.jsonl").read_text() == "as it was"
    assert [path.name for path in Path.cwd().iterdir()] == ["out.jsonl"]
    outcome = bulk("results", done.id, "-o", "no/folder/out.jsonl")
    assert outcome == (
        1,
        "",
        "sluice: no/folder/out.jsonl cannot be written: No such file or directory\n",
    )
    assert bulk("results", done.id, "-o", "out.txt").code == 2


# Cancelling


def test_cancel_ends_what_waits_and_nothing_that_runs(
    bulk: Command, client: Sluice, engine: Engine, stand_in: Callable[[UUID], StandIn]
) -> None:
    batch = client.submit_batch("summary", [f"note {n}" for n in range(2500)])
    other = client.submit_batch("summary", ["another"])
    ids = jobs_of(engine, batch.id)
    running = stand_in(ids[1200])
    rows(engine, "UPDATE jobs SET state = 'queued' WHERE batch_line < 100")
    outcome = bulk("cancel", batch.id)
    assert (outcome.code, outcome.out) == (0, "2,499 jobs are cancelled\n")
    assert outcome.err == "sluice: 1 jobs run and may finish; none is started any more\n"
    view = batch.view()
    assert (view.cancelled, view.ended, view.finished_at) == (2499, 2499, None)
    assert view.cancelled_at is not None
    assert rows(engine, "SELECT cancel_requested_at FROM jobs WHERE state = 'running'") == [(None,)]
    assert other.view().ended == 0
    running.settle("succeeded")
    view = batch.wait(timeout=10)
    assert (view.cancelled, view.succeeded) == (2499, 1)
    again = bulk("cancel", batch.id, "--json")
    assert (again.json["newly_cancelled"], again.json["cancelled"]) == (0, 2499)
    assert "was over before" in again.err
    assert batch.view().cancelled_at == view.cancelled_at


def test_a_batch_that_is_over_is_not_cancelled(
    bulk: Command, client: Sluice, engine: Engine, stand_in: Callable[[UUID], StandIn]
) -> None:
    batch = client.submit_batch("summary", ["a"])
    stand_in(jobs_of(engine, batch.id)[0]).settle("succeeded")
    said = f"sluice: batch {batch.id} was over before: 1 of 1 have ended, 1 succeeded\n"
    assert bulk("cancel", batch.id) == (1, "", said)
    outcome = bulk("cancel", batch.id, "--json")
    assert (outcome.code, outcome.err) == (1, said)
    assert json.loads(outcome.out)["newly_cancelled"] == 0
    assert batch.view().cancelled_at is None


def test_cancel_does_not_pass_over_what_is_staged_at_that_moment(
    client: Sluice, engine: Engine
) -> None:
    batch = client.submit_batch("summary", ["a", "b"])
    with ThreadPoolExecutor(1) as pool:
        with engine.execution_options(isolation_level="READ COMMITTED").begin() as staging:
            staging.exec_driver_sql("SELECT FROM jobs FOR NO KEY UPDATE")  # as the stager begins
            cancelling = pool.submit(batch.cancel)
            waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = "
            eventually(lambda: cancelling.done() or rows(engine, f"{waits} current_database()"))
        assert cancelling.result(30) == 2
    assert batch.progress().cancelled == 2


async def test_what_comes_back_in_a_cancelled_batch_is_cancelled_too(
    client: Sluice, engine: Engine, settings: Settings, stand_in: Callable[[UUID], StandIn]
) -> None:
    batch = client.submit_batch("summary", ["a", "b", "c"])
    other = client.submit_batch("summary", ["a"])
    ids = jobs_of(engine, batch.id)
    stand_in(ids[0])
    stand_in(ids[1])
    assert batch.cancel() == 1
    db = Database(settings, application_name="test", size=1, planner=BY_SIZE)
    canceller = Canceller(db=db)
    await canceller.round()
    assert batch.view().cancelled == 1
    back = "UPDATE jobs SET state = %(state)s, worker_id = NULL WHERE id = %(id)s"
    rows(engine, back, id=ids[0], state="parked")
    rows(engine, back, id=ids[1], state="queued")
    await canceller.round()
    await canceller.round()
    await db.close()
    view = batch.view()
    assert (view.cancelled, view.finished_at is None) == (3, False)
    assert other.view().ended == 0


async def test_a_job_that_is_tried_again_after_all_is_not_cancelled_again(
    client: Sluice, engine: Engine, settings: Settings
) -> None:
    batch = client.submit_batch("summary", ["a", "b"])
    batch.cancel()
    (job_id, _) = jobs_of(engine, batch.id)
    client.retry(job_id)
    db = Database(settings, application_name="test", size=1, planner=BY_SIZE)
    await Canceller(db=db).round()
    await db.close()
    view = batch.view()
    assert (view.cancelled, view.finished_at, view.cancelled_at) == (1, None, None)
    assert client.get(job_id).state in ("queued", "parked")


def test_many_jobs_are_stored_in_blocks_of_rows_and_of_bytes(
    settings: Settings, engine: Engine
) -> None:
    with engine.connect() as connection:
        catalogue = read(connection)
    form = Form(use_case="summary", common={}, template=Template("{note}"))
    fields = [{"note": "x" * 900_000}] * 12 + [{"note": "y"}] * 10
    stored = store_batch(
        batch_rows(fields),
        settings=settings,
        catalogue=catalogue,
        form=form,
        name="wide",
        rejects=refuse,
        key=lambda: None,
    )
    assert stored.jobs == 22
    (size,) = rows(engine, "SELECT sum(length(request::text)) FROM job_bodies")[0]
    assert size > 12 * 900_000

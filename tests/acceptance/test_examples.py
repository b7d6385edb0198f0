"""The examples do what they say, as a reader would start them, before a real fleet."""

from __future__ import annotations

import csv
import http.client
import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode
from uuid import UUID, uuid4

import pytest
import redis
from sqlalchemy import make_url

from sluicegate import Lane, State
from tests.harness import Rig, Service, environment_of
from tests.polling import eventually

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

Start = Callable[..., Service]


@pytest.fixture(scope="module", autouse=True)
def _fleet(module_rig: Rig) -> None:
    workers = [
        module_rig.begin_worker("openai", ["voice"]),
        module_rig.begin_worker("anthropic", ["draft", "summary"]),
        module_rig.begin_worker("anthropic", ["summary"], Lane.BULK),
    ]
    module_rig.start_sweep()
    for worker in workers:
        module_rig.await_worker(worker)


@pytest.fixture
def start(rig: Rig, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a process of an example, which ends with the test."""
    started: list[Service] = []

    def begin(*arguments: str, **variables: str) -> Service:
        env = environment_of(rig.settings, **variables)
        log = tmp_path / f"{len(started)}.log"
        service = Service(arguments[0], [sys.executable, *arguments], env, log)
        started.append(service)
        return service

    yield begin
    for service in started:
        service.end()


def run(rig: Rig, folder: Path, *arguments: str, **variables: str) -> str:
    """Run an example to its end; return what it said."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment_of(rig.settings, **variables),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Reply(NamedTuple):
    """What an HTTP server answered."""

    status: int
    text: str


def send(port: int, method: str, path: str, body: str = "", **headers: str) -> Reply:
    """Make one request; an `AssertionError` as long as nobody listens."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
        except ConnectionRefusedError:
            raise AssertionError(f"nobody listens on {port}") from None
        return Reply(response.status, response.read().decode())


def read_events(text: str) -> list[dict[str, str]]:
    """Read server-sent events."""
    return [
        dict(line.split(": ", 1) for line in block.splitlines())
        for block in text.strip().split("\n\n")
    ]


def test_fastapi_streams_an_answer_and_its_rest(rig: Rig, start: Start) -> None:
    server = start("-m", "uvicorn", "fastapi_stream:app", "--app-dir", str(EXAMPLES), "--port=0")

    def listening() -> int:
        found = re.search(r"running on http://127\.0\.0\.1:(\d+)", server.log)
        assert found is not None, server.log
        return int(found[1])

    port = eventually(listening, 60)
    query = urlencode({"question": "Who do I call at ten?"})
    reply = send(port, "GET", f"/answer?{query}")
    assert reply.status == 200, server.log
    events = read_events(reply.text)
    assert [one["event"] for one in (events[0], events[1], events[-1])] == [
        "started",
        "delta",
        "completed",
    ]
    said = "".join(json.loads(one["data"])["text"] for one in events[1:-1])
    assert json.loads(events[-1]["data"])["result"]["text"] == said != ""
    last_seen = {"Last-Event-ID": events[1]["id"]}
    assert read_events(send(port, "GET", f"/answer?{query}", **last_seen).text) == events[2:]
    job_id = UUID(events[0]["id"].partition("/")[0])
    assert rig.client.get(job_id).state is State.SUCCEEDED


def test_django_saves_a_lead_and_its_job_or_neither(rig: Rig, start: Start, tmp_path: Path) -> None:
    project = str(EXAMPLES / "django_view" / "crm.py")
    run(rig, tmp_path, project, "create")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    server = start(project, "runserver", "--noreload", str(port))
    form = {"Content-Type": "application/x-www-form-urlencoded"}

    def added() -> Reply:
        assert server.ended() is None, server.log
        return send(port, "POST", "/leads", "name=Ada", **form)

    reply = eventually(added, 60)
    assert reply.status == 201, server.log
    lead = json.loads(reply.text)

    def shown() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(send(port, "GET", f"/leads/{lead['lead']}").text)
        assert found["draft"], found
        return found

    assert eventually(shown)["state"] == "succeeded"
    assert rig.client.get(lead["job"]).state is State.SUCCEEDED
    # The name is taken: the job that was submitted before that was found out is not there.
    jobs = rig.client.list_jobs(use_case="draft")
    assert send(port, "POST", "/leads", "name=Ada", **form).status == 409
    assert rig.client.list_jobs(use_case="draft") == jobs


def test_replies_are_saved_once(rig: Rig, start: Start, tmp_path: Path) -> None:
    channel = f"crm-{uuid4().hex}"
    handles = rig.client.submit_many(
        "draft",
        [{"prompt": f"ECHO: {n}", "metadata": {"lead": str(n)}} for n in range(3)],
        reply_to=channel,
    )
    consumer = start(str(EXAMPLES / "reply_consumer.py"), channel)
    eventually(lambda: consumer.log.count("succeeded") == 3, 60)
    consumer.signal(signal.SIGTERM)
    assert consumer.wait(30) == 0, consumer.log
    assert consumer.log.endswith("stopped; what was not acknowledged comes again\n")
    with closing(sqlite3.connect(tmp_path / "answers.sqlite")) as database:
        rows = database.execute("SELECT job_id, lead, state, text FROM answers").fetchall()
        (paid,) = database.execute("SELECT min(cast(cost AS real)) FROM answers").fetchone()
    wanted = [(str(one.id), str(n), "succeeded", str(n)) for n, one in enumerate(handles)]
    assert sorted(rows) == sorted(wanted)
    assert paid > 0
    with rig.client.replies(channel, "crm", timeout=0.5) as left:
        assert list(left) == []


def test_a_csv_file_becomes_one_batch(rig: Rig, tmp_path: Path) -> None:
    arguments = [str(EXAMPLES / name) for name in ("bulk_from_csv.py", "notes.csv")]
    said = run(rig, tmp_path, *arguments, "summaries.csv")
    found = re.match(r"batch (\S+): submitted\n3 of 3 succeeded for \$0\.0\d+\n$", said)
    assert found is not None, said
    written = (tmp_path / "summaries.csv").read_text()
    rows = list(csv.DictReader(written.splitlines()))
    assert [(row["lead"], row["state"]) for row in rows] == [
        ("4711", "succeeded"),
        ("4712", "succeeded"),
        ("4713", "succeeded"),
    ]
    assert all(row["summary"] for row in rows)
    again = run(rig, tmp_path, *arguments, "summaries.csv")
    assert again.startswith(f"batch {found[1]}: goes on\n")
    assert (tmp_path / "summaries.csv").read_text() == written


def test_a_script_without_its_files_says_which_it_needs() -> None:
    argv = [sys.executable, str(EXAMPLES / "bulk_from_csv.py")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    said = "usage: python bulk_from_csv.py NOTES.csv SUMMARIES.csv\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_another_celery_app_submits_and_stays_apart(rig: Rig, start: Start, tmp_path: Path) -> None:
    # Its broker is a database of its own on the same server.
    broker = make_url(rig.settings.redis_dsn).set(database="1")
    url = broker.render_as_string(hide_password=False)
    path = {"PYTHONPATH": f"{EXAMPLES}:{EXAMPLES.parent}", "CRM_BROKER_URL": url}
    worker = start(
        "-m", "celery", "-A", "inside_celery", "worker", "--pool=prefork", "--concurrency=2", **path
    )
    with redis.Redis.from_url(url) as own:
        own.flushdb()
        said = run(rig, tmp_path, str(EXAMPLES / "inside_celery.py"), "4711", **path)
        found = re.fullmatch(r"4711: .+ \(\$0\.0\d+, process (\d+)\)\n", said, re.DOTALL)
        assert found is not None, (said, worker.log)
        assert int(found[1]) != worker.pid
        (job,) = rig.client.list_jobs(use_case="summary", lane="interactive")
        assert rig.client.get(job.id).idempotency_key == "summary-4711"
        # Asked again it is the same job, done without another call.
        assert run(rig, tmp_path, str(EXAMPLES / "inside_celery.py"), "4711", **path)
        assert rig.client.list_jobs(use_case="summary", lane="interactive") == [job]
        keys: Any = own.keys()
        assert keys
        assert not [key for key in keys if b"sluice" in key]
        worker.signal(signal.SIGTERM)
        assert worker.wait(60) == 0, worker.log
        own.flushdb()
    others: Any = rig.redis.keys("crm:*")
    assert others == []

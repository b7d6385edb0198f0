"""What the help pages show as an example works, as it stands there."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from sluicegate.cli import run
from sluicegate.producers import erasing
from sluicegate.shared.jobs import Lane
from sluicegate.shared.secrets import new_key
from sluicegate.shared.settings import Settings, get_settings
from sluicegate.workers.local.sandbox_control import SandboxControl
from tests.command_tree import COMMANDS
from tests.harness import Rig, Service, environment_of, with_sandbox
from tests.polling import eventually

EXAMPLES = {words: command.epilog.removeprefix("Example: ") for words, command in COMMANDS.items()}
#: These run until they are stopped, or bring a fleet of their own.
FOREGROUND = {"sluice up", "sluice worker", "sluice sweep", "sluice demo", "sluice http"}
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_FAIL = """
WITH failed AS (
    UPDATE jobs SET state = 'failed', finished_at = now() WHERE id = %(id)s RETURNING id, fence
)
INSERT INTO results (job_id, fence, body)
SELECT id, fence, json_build_object('state', 'failed', 'use_case', 'vision', 'error',
    json_build_object('error_class', 'server', 'message', 'it broke')) FROM failed RETURNING job_id
"""


@pytest.fixture
def rig(settings: Settings, sandbox: SandboxControl, tmp_path: Path) -> Iterator[Rig]:
    given = with_sandbox(settings, sandbox, encryption_keys=new_key())
    with Rig(settings=given, sandbox=sandbox, folder=tmp_path) as rig:
        yield rig


@pytest.fixture
def call(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str]]:
    """Return a function that runs an example; it returns the code and all that was said."""
    for name, value in environment_of(rig.settings).items():
        monkeypatch.setenv(name, value)
    # The workers of a rig call their host this.
    monkeypatch.setattr(socket, "gethostname", lambda: "test")
    get_settings.cache_clear()

    def once(example: str) -> tuple[int, str]:
        program, *arguments = shlex.split(example)
        assert program == "sluice"
        if "<" in arguments:
            arguments, (_, name) = arguments[:-2], arguments[-2:]
            given = io.TextIOWrapper(io.BytesIO(Path(name).read_bytes()))
            monkeypatch.setattr(sys, "stdin", given)
        code = run(arguments)
        said = capsys.readouterr()
        return code, said.out + said.err

    return once


def test_each_example_runs(
    rig: Rig, call: Callable[[str], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # No client knows the account that is erased: it need not wait until all have forgotten it.
    monkeypatch.setattr(erasing, "_CLOSED_AFTER_S", 0.0)
    rig.start_sweep()
    for worker in [rig.begin_worker("anthropic", ["draft", "summary"], lane) for lane in Lane]:
        rig.await_worker(worker)
    Path("notes.csv").write_text("note\nThe customer is happy.\nThe invoice came twice.\n")
    Path("key.txt").write_text("sk-of-acme\n")
    client = rig.client
    answered = client.submit("draft", "hello")
    waiting, failed = client.submit_many("vision", ["waits", "fails"])
    batch = client.submit_batch("summary", ["one", "two"])
    idle = client.submit_batch("vision", ["waits"])
    # Of its own, as it is erased.
    rig.rows("INSERT INTO accounts (id, name) VALUES (gen_random_uuid(), 'initech') RETURNING id")
    answered.result(timeout=60)
    rig.rows(_FAIL, id=failed.id)
    ids: dict[str, UUID] = {"sluice job cancel": waiting.id, "sluice bulk cancel": idle.id}

    problems = []
    for words, example in EXAMPLES.items():
        if words in FOREGROUND:
            continue
        other = batch.id if words.startswith("sluice bulk") else answered.id
        code, said = call(_UUID.sub(str(ids.get(words, other)), example))
        # The doctor may well find something: the servers of tests keep nothing over a crash.
        if code != 0 and words != "sluice doctor":
            problems.append(f"{example}: {code}, {said}")
    assert problems == []

    states = {job.id: job.state for job in client.list_jobs()}
    assert states[waiting.id] == "cancelled"
    assert states[failed.id] == "queued"
    assert len(Path("out.csv").read_text().splitlines()) == 3


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str, dict[str, str]], Service]]:
    """Return a function that runs an example as a process of its own."""
    running: list[Service] = []

    def once(example: str, environment: dict[str, str]) -> Service:
        _, *arguments = shlex.split(example)
        argv = [sys.executable, "-m", "sluicegate.cli", *arguments]
        running.append(Service("example", argv, environment, tmp_path / "example.log"))
        return running[-1]

    yield once
    for service in running:
        service.end()


Start = Callable[[str, dict[str, str]], Service]


def _stop(service: Service, runs: Callable[[], object]) -> None:
    def begun() -> bool:
        assert service.ended() is None, service.log
        return bool(runs())

    eventually(begun, 120)
    service.signal(signal.SIGTERM)
    assert service.wait(60) == 0, service.log


def test_the_worker(rig: Rig, start: Start) -> None:
    service = start(EXAMPLES["sluice worker"], environment_of(rig.settings))
    _stop(service, lambda: rig.rows("SELECT 1 FROM workers WHERE name LIKE 'anthropic-bulk@%%'"))


def test_the_sweep(rig: Rig, start: Start) -> None:
    service = start(EXAMPLES["sluice sweep"], environment_of(rig.settings))
    listens = (
        "SELECT 1 FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'sluice sweep listen'"
    )
    _stop(service, lambda: rig.rows(listens))


def test_up(start: Start) -> None:
    service = start(EXAMPLES["sluice up"], dict(os.environ))
    _stop(service, lambda: "export SLUICE_DATABASE_URL" in service.log)

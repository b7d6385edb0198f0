"""The producers' commands, as somebody at a terminal or a script sees them."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis
from sqlalchemy import Engine

from sluicegate import Sluice
from sluicegate.shared.settings import Settings
from tests.command_line import Command
from tests.polling import eventually
from tests.stand_in import StandIn, waiting

Serve = Callable[[Callable[[StandIn], None]], Any]


@pytest.fixture
def given(settings: Settings) -> Settings:
    return settings.model_copy(update={"reply_recheck_s": 0.3})


@pytest.fixture
def variables(given: Settings, environment: Callable[[Settings], dict[str, str]]) -> dict[str, str]:
    return environment(given)


@pytest.fixture
def sluice(given: Settings, command_line: Callable[[Settings], Command]) -> Command:
    return command_line(given)


@pytest.fixture
def serve(engine: Engine, redis_client: redis.Redis, settings: Settings) -> Serve:
    """Let a stand-in do the next job while a command waits for it."""

    @contextmanager
    def serving(work: Callable[[StandIn], None]) -> Iterator[None]:
        def look() -> Any:
            with engine.connect() as connection:
                return connection.exec_driver_sql(
                    "SELECT id FROM jobs WHERE state IN ('queued', 'parked')"
                ).scalar()

        over = threading.Event()

        def serve() -> None:
            job_id = eventually(lambda: over.is_set() or look())
            if isinstance(job_id, UUID):
                work(StandIn(engine=engine, client=redis_client, settings=settings, job_id=job_id))

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        over.set()
        thread.join()

    return serving


def request_of(engine: Engine) -> Any:
    with engine.connect() as connection:
        return connection.exec_driver_sql("SELECT * FROM jobs JOIN job_bodies ON job_id = id").one()


def test_submit_prints_the_answer(sluice: Command, serve: Serve, engine: Engine) -> None:
    with serve(lambda worker: worker.answer("Dear ", "Ada")):
        outcome = sluice(
            *("submit", "draft", "hello", "--system", "Be brief.", "--max-tokens", "50"),
            *("--idempotency-key", "k", "--deadline", "60", "--lane", "bulk"),
        )
    assert outcome == (0, "Dear Ada\n", "")
    row = request_of(engine)
    assert (row.lane, row.idempotency_key) == ("bulk", "k")
    assert (row.request["system"], row.request["max_tokens"]) == ("Be brief.", 50)


def test_submit_reads_the_prompt_from_stdin(sluice: Command, serve: Serve, engine: Engine) -> None:
    with serve(lambda worker: worker.answer("ok")):
        assert sluice("submit", "draft", "-", stdin="Grüße").code == 0
    assert request_of(engine).request["messages"][0]["content"][0]["text"] == "Grüße"


def test_submit_reads_a_pipe_when_there_is_no_prompt(
    sluice: Command, serve: Serve, engine: Engine
) -> None:
    with serve(lambda worker: worker.answer("ok")):
        assert sluice("submit", "draft", stdin="piped").code == 0
    assert request_of(engine).request["messages"][0]["content"][0]["text"] == "piped"


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [(("Write to Ada.",), ""), ((), "Write to Ada.")],
    ids=["named", "piped"],
)
def test_submit_without_a_use_case_has_it_chosen(
    sluice: Command, serve: Serve, engine: Engine, arguments: tuple[str, ...], stdin: str
) -> None:
    with serve(lambda worker: worker.answer("ok")):
        assert sluice("submit", *arguments, stdin=stdin).code == 0
    request = request_of(engine).request
    assert (request["use_case"], request["use_case_detected"]) == ("general", True)
    assert "Write to Ada." in str(request["messages"])


def test_submit_takes_prompt_and_schema_from_files(
    sluice: Command, serve: Serve, engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "note.txt").write_text("Grüße")
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    with serve(lambda worker: worker.answer('{"name": "Ada"}')):
        outcome = sluice(
            *("submit", "draft", "--file", "note.txt", "--schema", "schema.json"),
            *("--metadata", "lead=4711", "--metadata", "source=a=b"),
            *("--reply-to", "crm-eu", "--request-id", "r-7"),
        )
    assert outcome == (0, '{"name": "Ada"}\n', "")
    row = request_of(engine)
    assert row.request["messages"][0]["content"][0]["text"] == "Grüße"
    assert row.request["response_format"]["json_schema"] == schema
    assert row.request["metadata"] == {"lead": "4711", "source": "a=b"}
    assert (row.reply_to, row.request_id) == ("crm-eu", "r-7")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("hello", "--file", "note.txt"), "given twice"),
        (("--file", "nowhere.txt"), "nowhere.txt cannot be read: No such file"),
        (("--file", "latin.txt"), "latin.txt is not UTF-8 text"),
        (("hello", "--schema", "note.txt"), "note.txt is not JSON"),
        (("hello", "--metadata", "lead"), "must be KEY=VALUE, not 'lead'"),
        (("hello", "--reply-to", "no spaces"), "--reply-to: must be 1 to 128 letters, digits"),
    ],
)
def test_submit_refuses_what_it_cannot_use(
    sluice: Command,
    engine: Engine,
    tmp_path: Path,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    outcome = sluice("submit", "draft", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("sluice: ")
    assert outcome.err.count("\n") == 1
    assert says in outcome.err
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM jobs").scalar() == 0


def test_submit_prints_one_json_object(sluice: Command, serve: Serve) -> None:
    with serve(lambda worker: worker.answer("a", "b", cost_nano_usd=5)):
        outcome = sluice("submit", "draft", "hello", "--json", "--stream")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert (result["text"], result["state"], result["cost_nano_usd"]) == ("ab", "succeeded", 5)


def _restart(worker: StandIn) -> None:
    worker.say("started", model="m")
    worker.say("delta", text="half an")
    worker.say("reset", model="n", attempt=2)
    worker.say("delta", text="the whole ")
    worker.say("delta", text="answer")
    worker.end(worker.settle(text="the whole answer"))


def test_a_stream_says_when_it_starts_again(sluice: Command, serve: Serve) -> None:
    with serve(_restart):
        outcome = sluice("submit", "draft", "hello", "--stream")
    assert outcome.code == 0
    assert outcome.out == "half an\nthe whole answer\n"
    assert outcome.err == "sluice: starting again at n\n"


def _lose_some(worker: StandIn) -> None:
    worker.say("delta", text="the end")
    worker.end(worker.settle(text="the beginning and the end"))


def test_a_stream_with_a_gap_ends_in_the_whole_answer(sluice: Command, serve: Serve) -> None:
    with serve(_lose_some):
        outcome = sluice("submit", "draft", "hello", "--stream")
    assert outcome.code == 0, outcome.err
    assert outcome.out == "the end\nthe beginning and the end\n"
    assert "lost" in outcome.err


def _fail(worker: StandIn) -> None:
    reason = {"error_class": "content_filter", "message": "the model will not say"}
    worker.end(worker.settle("failed", error=reason))


@pytest.mark.parametrize("options", [[], ["--stream"]])
def test_a_failed_job_is_one_line_and_code_1(
    sluice: Command, serve: Serve, options: list[str]
) -> None:
    with serve(_fail):
        outcome = sluice("submit", "draft", "hello", *options)
    assert outcome.code == 1
    assert outcome.out == ""
    assert re.fullmatch(r"sluice: job \S{36} failed: the model will not say\n", outcome.err)
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("submit", "nope", "hi"), "use_case"),
        (("submit", "draft", ""), "prompt"),
        (("submit",), "prompt: must not be empty"),
        (("submit", "draft", "hi", "--max-tokens", "0"), "--max-tokens: must be"),
        (("submit", "draft", "hi", "--max-tokens", "many"), "--max-tokens"),
        (("submit", "draft", "hi", "--account", "nobody"), "account"),
        (("submit", "draft", "hi", "--lane", "fast"), "'--lane': 'fast' is not one of"),
        (("submit", "draft", "hi", "--deadline", "-1"), "deadline"),
        (("submit", "draft"), "prompt"),
        (("submit", "draft", "hi", "--temperature", "1"), "--temperature"),
        (("job", "show", "7"), "job_id"),
        (("job",), "command"),
        (("account", "add", "no;name"), "account"),
        (("account", "add", "acme", "--time-zone", "Mars/North"), "--time-zone"),
        (("account", "add", "default"), "exists already"),
        (("sumbit", "draft", "hi"), "'submit'"),
        (("nonsense",), "nonsense"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    sluice: Command, arguments: tuple[str, ...], said: str
) -> None:
    outcome = sluice(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert said in outcome.err
    assert outcome.err.startswith("sluice: ")
    assert outcome.err.count("\n") == 1


def test_a_bad_setting_is_one_line_and_code_2(
    sluice: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_DATABASE_URL", "mysql://x")
    outcome = sluice("account", "list")
    assert outcome.code == 2
    assert outcome.err.startswith("sluice: SLUICE_DATABASE_URL: ")


def test_without_postgres_it_is_one_line_and_code_1(
    sluice: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_DATABASE_URL", "postgresql://x@127.0.0.1:1/x")
    for arguments in (
        ("account", "list"),
        ("submit", "draft", "hi"),
        ("job", "show", str(uuid4())),
        ("job", "events", str(uuid4())),
    ):
        outcome = sluice(*arguments)
        assert outcome.code == 1
        assert "Postgres did not answer" in outcome.err
        assert outcome.err.count("\n") == 1


def test_job_show_tells_what_became_of_a_job(sluice: Command, serve: Serve, engine: Engine) -> None:
    with serve(lambda worker: worker.answer("Dear Ada", model="m-1")):
        sluice("submit", "draft", "hello")
    job_id = str(request_of(engine).id)
    shown = dict(line.split("\t") for line in sluice("job", "show", job_id).out.splitlines())
    assert (shown["job"], shown["state"], shown["answer"]) == (job_id, "succeeded", "Dear Ada")
    assert (shown["cost"], shown["attempts"], shown["model"]) == ("$0.000000", "0 of 5", "m-1")
    view = json.loads(sluice("job", "show", job_id, "--json").out)
    assert (view["id"], view["result"]["text"], view["history"]) == (job_id, "Dear Ada", [])


def test_a_job_that_is_not_there_is_code_1(sluice: Command) -> None:
    outcome = sluice("job", "show", str(uuid4()))
    assert outcome.code == 1
    assert "there is no job" in outcome.err


def test_accounts_are_added_and_listed(sluice: Command) -> None:
    assert sluice("account", "add", "acme", "--time-zone", "Europe/Berlin").code == 0
    accounts = json.loads(sluice("account", "list", "--json").out)["accounts"]
    assert [(one["name"], one["time_zone"]) for one in accounts] == [
        ("acme", "Europe/Berlin"),
        ("default", "UTC"),
    ]
    lines = sluice("account", "list").out.splitlines()
    assert lines[0].split("\t") == ["name", "id", "time zone", "active"]
    assert lines[1].split("\t") == ["acme", accounts[0]["id"], "Europe/Berlin", "yes"]


def test_help_names_the_commands(sluice: Command) -> None:
    for arguments in ((), ("--help",)):
        outcome = sluice(*arguments)
        assert outcome.code == 0
        for command in ("submit", "job", "account"):
            assert command in outcome.out


def test_the_version_is_printed(sluice: Command) -> None:
    assert sluice("--version") == (0, f"sluice {version('sluicegate')}\n", "")


def test_an_interrupted_import_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    paths = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "sluicegate", "--help"],
        env=dict(os.environ) | {"PYTHONPATH": paths},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sluicegate.cli", *arguments]


def test_ctrl_c_ends_the_wait_and_not_the_job(
    variables: dict[str, str], engine: Engine, redis_client: redis.Redis
) -> None:
    with subprocess.Popen(
        command("submit", "draft", "hello"), env=variables, stderr=subprocess.PIPE, text=True
    ) as process:
        eventually(lambda: waiting(redis_client))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    row = request_of(engine)
    assert process.returncode == 130
    assert row.state == "queued"
    assert err == f"sluice: job {row.id} goes on; see `sluice job show {row.id}`\n"


def at_terminal(process: Callable[[int], subprocess.Popen[bytes]]) -> tuple[int, str]:
    """Start a process with a terminal; return its exit code, and what the terminal showed."""
    ours, theirs = pty.openpty()
    with process(theirs) as running:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # what Linux says at the end of a terminal
            pass
        os.close(ours)
    return running.returncode, shown.decode()


def test_a_terminal_gets_a_table(variables: dict[str, str]) -> None:
    code, shown = at_terminal(
        lambda theirs: subprocess.Popen(command("account", "list"), env=variables, stdout=theirs)
    )
    assert code == 0
    assert "default" in shown
    assert "┃" in shown


def test_ids_are_whole_in_a_narrow_terminal(given: Settings, variables: dict[str, str]) -> None:
    with Sluice(given) as client:
        job_id = client.submit("draft", "hello").id
    argv = command("job", "list")
    code, shown = at_terminal(
        lambda theirs: subprocess.Popen(argv, env=variables | {"COLUMNS": "80"}, stdout=theirs)
    )
    assert code == 0
    assert str(job_id) in shown
    assert "attempts 0 of 5" in shown
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", shown).split("\r\n"))) <= 80


def test_somebody_at_a_terminal_is_told_what_the_answer_took(
    variables: dict[str, str], serve: Serve, engine: Engine
) -> None:
    with serve(lambda worker: worker.answer("Dear Ada", model="m-1", cost_nano_usd=5_000)):
        argv = command("submit", "draft", "hello")
        code, said = at_terminal(
            lambda theirs: subprocess.Popen(
                argv, env=variables, stdout=subprocess.DEVNULL, stderr=theirs
            )
        )
    assert code == 0
    assert f"job {request_of(engine).id}, m-1, $0.000005, " in said


def test_a_command_imports_no_provider_sdk_and_no_worker_library() -> None:
    probe = (
        "import sys, sluicegate.cli;"
        "import sluicegate.producers.client, sluicegate.producers.async_client;"
        "print([m for m in ('openai', 'anthropic', 'uvloop', 'flower') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_root_starts_without_what_commands_import() -> None:
    probe = (
        "import sys, sluicegate.cli; sluicegate.cli.run(['submit', '--unknown']);"
        "print([m for m in ('sqlalchemy', 'celery', 'redis') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

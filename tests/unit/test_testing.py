"""The fake of the clients: what a test can script, and what it can look at. No servers."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from sluicegate import (
    AsyncReplies,
    AsyncSluice,
    Batch,
    Delta,
    ErrorClass,
    InvalidAnswer,
    InvalidJob,
    JobExpired,
    JobFailed,
    NotFound,
    Replies,
    ResultTimeout,
    Sluice,
    SluiceError,
    State,
)
from sluicegate.shared.settings import Settings
from sluicegate.testing import AsyncFakeSluice, FakeSluice, ScriptError
from sluicegate.testing.batches import FakeBatch
from sluicegate.testing.replies import AsyncFakeReplies, FakeReplies

ROOT = Path(__file__).resolve().parents[2]


class Sentiment(BaseModel):
    mood: str


@pytest.fixture
def fake() -> FakeSluice:
    return FakeSluice()


# Answers


def test_without_a_script_the_prompt_comes_back(fake: FakeSluice) -> None:
    result = fake.submit("draft", "Dear Ada").result()
    assert result.text == "Dear Ada"
    assert 0 < result.cost < result.baseline_cost


def test_a_strict_fake_refuses_what_is_not_scripted() -> None:
    fake = FakeSluice(strict=True)
    fake.on("draft").answers("Hello")
    assert fake.submit("draft", "hi").result().text == "Hello"
    with pytest.raises(ScriptError, match=r"'summary' was submitted, 'hi', .*answers\(\.\.\.\)"):
        fake.submit("summary", "hi")
    assert len(fake.jobs) == 1


def test_the_newest_rule_that_fits_decides(fake: FakeSluice) -> None:
    fake.on().answers("anything")
    fake.on("draft").answers("a draft")
    fake.on(prompt="Ada").answers("for Ada")
    fake.on(prompt=re.compile("^Grace")).answers("for Grace")
    fake.on("draft", when=lambda job: job.account == "acme").answers("for acme")
    said = [
        fake.submit(use_case, prompt, account=account).result().text
        for use_case, prompt, account in [
            ("voice", "hi", "default"),
            ("draft", "hi", "default"),
            ("draft", "Dear Ada", "default"),
            ("draft", "Grace", "default"),
            ("draft", "To Grace", "default"),
            ("draft", "Dear Ada", "acme"),
            ("voice", "Dear Ada", "acme"),
        ]
    ]
    assert said == [
        "anything", "a draft", "for Ada", "for Grace", "a draft", "for acme", "for Ada",
    ]  # fmt: skip


def test_outcomes_are_used_in_turn_and_the_last_one_stays(fake: FakeSluice) -> None:
    fake.on("draft").fails(ErrorClass.OVERLOADED, "busy", status=529).answers("one").answers("two")
    job = fake.submit("draft", "hi")
    with pytest.raises(JobFailed, match="busy"):
        job.result()
    with pytest.raises(JobFailed, match="busy"):
        job.result()
    view = fake.get(job.id)
    assert view.result is not None
    assert view.result.error is not None
    assert (view.result.error.error_class, view.result.error.status) == (ErrorClass.OVERLOADED, 529)
    assert fake.retry(job.id).result().text == "one"
    assert [fake.submit("draft", "hi").result().text for _ in range(2)] == ["two", "two"]


def test_a_function_answers_by_the_job(fake: FakeSluice) -> None:
    fake.on("draft").answers(lambda job: f"Dear {job.metadata['name']}")
    assert fake.submit("draft", "hi", metadata={"name": "Ada"}).result().text == "Dear Ada"


def test_what_a_function_of_the_test_raises_leaves_the_job_as_it_was(fake: FakeSluice) -> None:
    fake.on("draft").answers(lambda job: job.metadata["name"])
    job = fake.submit("draft", "hi")
    with pytest.raises(KeyError):
        job.result()
    assert fake.get(job.id).state is State.QUEUED


def test_data_is_answered_as_json(fake: FakeSluice) -> None:
    fake.on("general").answers(Sentiment(mood="good")).answers({"mood": "bad"}).answers("no JSON")
    jobs = [fake.submit("general", "hi", response_format=Sentiment) for _ in range(3)]
    assert jobs[0].result().parsed == Sentiment(mood="good")
    assert jobs[1].result().parsed == Sentiment(mood="bad")
    with pytest.raises(InvalidAnswer):
        _ = jobs[2].result().parsed
    assert fake.jobs[0].options == {"response_format": Sentiment}


def test_an_echo_is_no_json(fake: FakeSluice) -> None:
    job = fake.submit("general", "hi", response_format=Sentiment)
    with pytest.raises(ScriptError, match="it wants JSON"):
        job.result()


def test_a_tool_call_is_answered_whole_and_in_deltas(fake: FakeSluice) -> None:
    fake.on("general").calls_tool("find", {"name": "Ada"})
    job = fake.submit("general", "hi", tools=[{"name": "find"}], stream=True)
    result = job.result()
    assert (result.finish_reason, result.text) == ("tool_calls", "")
    assert [(call.name, call.arguments) for call in result.tool_calls] == [
        ("find", {"name": "Ada"})
    ]
    (delta,) = [one.payload for one in job.events() if isinstance(one.payload, Delta)]
    assert [(call.name, call.arguments) for call in delta.tool_calls] == [
        ("find", '{"name":"Ada"}')
    ]


def test_what_was_not_done_as_asked_is_in_the_result(fake: FakeSluice) -> None:
    result = fake.submit(None, "hi", temperature=0.5).result(0)
    assert result.warnings == (
        "no use case was named, and the job was taken for general",
        "temperature is not taken by gpt-6-luna and was left out",
    )
    with pytest.raises(InvalidJob, match="use_case: must be named"):
        fake.submit_batch(None, ["a"])  # type: ignore[arg-type]  # what is tested


def test_a_stream_comes_in_the_pieces_that_the_test_says(fake: FakeSluice) -> None:
    fake.on("voice").streams("Good ", "mor", "ning")
    job = fake.submit("voice", "hi", stream=True)
    assert [one.payload.text for one in job.events() if isinstance(one.payload, Delta)] == [
        "Good ",
        "mor",
        "ning",
    ]
    assert fake.submit("voice", "hi").result().text == "Good morning"


def test_a_job_that_never_ends_is_cancelled_in_the_middle(fake: FakeSluice) -> None:
    fake.on("voice").never_ends("Good ")
    job = fake.submit("voice", "hi", stream=True)
    events = job.events(timeout=5)
    assert [next(events).type for _ in range(2)] == ["started", "delta"]
    assert job.cancel() is State.RUNNING
    assert [one.type for one in events] == ["failed"]


def test_waiting_for_ever_is_an_error_of_the_test(fake: FakeSluice) -> None:
    fake.on("voice").never_ends()
    job = fake.submit("voice", "hi")
    with pytest.raises(ResultTimeout, match="did not end within 3600 s"):
        job.result(3600)
    with pytest.raises(ScriptError, match="nobody gave a timeout"):
        job.result()


def test_a_rule_without_an_outcome_is_an_error_of_the_test(fake: FakeSluice) -> None:
    fake.on("voice")
    with pytest.raises(ScriptError, match="not told what happens"):
        fake.submit("voice", "hi").result()


def test_a_deadline_that_has_passed_expires_the_job(fake: FakeSluice) -> None:
    job = fake.submit("draft", "hi", deadline=30)
    fake.jobs[0].deadline_at = datetime.now(UTC) - timedelta(seconds=1)
    with pytest.raises(JobExpired):
        job.result()
    fake.on("draft").expires()
    with pytest.raises(JobExpired):
        fake.submit("draft", "hi").result()


# When


def test_jobs_wait_until_somebody_asks(fake: FakeSluice) -> None:
    ids = [fake.submit("draft", "hi").id, fake.submit("draft", "hi", lane="bulk").id]
    assert [fake.get(one).state for one in ids] == [State.QUEUED, State.PARKED]
    fake.work()
    assert [fake.get(one).state for one in ids] == [State.SUCCEEDED] * 2


def test_an_eager_fake_does_them_at_once() -> None:
    fake = FakeSluice(eager=True)
    job = fake.submit("draft", "hi")
    assert fake.get(job.id).state is State.SUCCEEDED


def test_an_eager_fake_does_them_at_the_commit(engine: Engine) -> None:
    fake = FakeSluice(eager=True)
    with Session(engine) as session:
        job = fake.submit("draft", "hi", connection=session)
        session.commit()
    assert fake.get(job.id).state is State.SUCCEEDED


# What was submitted


def test_what_was_submitted_can_be_looked_at(fake: FakeSluice) -> None:
    fake.submit(
        "draft",
        "Dear Ada",
        account="acme",
        system="Be brief.",
        metadata={"lead": "1"},
        idempotency_key="k",
        reply_to="crm",
        deadline=timedelta(minutes=1),
    )
    (job,) = fake.jobs
    assert (job.use_case, job.prompt, job.account, job.system) == (
        "draft",
        "Dear Ada",
        "acme",
        "Be brief.",
    )
    assert (job.idempotency_key, job.reply_to, job.lane) == ("k", "crm", "interactive")
    assert job.options == {
        "account": "acme",
        "system": "Be brief.",
        "metadata": {"lead": "1"},
        "idempotency_key": "k",
        "reply_to": "crm",
        "deadline": 60.0,
    }
    assert repr(job) == "FakeJob('draft', 'Dear Ada', queued)"


def test_accounts_may_be_listed() -> None:
    anybody, listed = FakeSluice(), FakeSluice(accounts=["acme"])
    some_id = UUID(int=5)
    assert anybody.submit("draft", "hi", account=some_id).result().text == "hi"
    assert anybody.get(anybody.jobs[0].id).account == str(some_id)
    listed.submit("draft", "hi", account="acme")
    listed.submit("draft", "hi")
    with pytest.raises(InvalidJob, match="there is no active account 'other'"):
        listed.submit("draft", "hi", account="other")


def test_a_use_case_of_ones_own(fake: FakeSluice) -> None:
    with pytest.raises(InvalidJob, match="'sentiment' is not known"):
        fake.submit("sentiment", "hi")
    fake.add_use_case("sentiment", like="summary")
    result = fake.submit("sentiment", "hi").result()
    assert (result.use_case, result.provider) == ("sentiment", "anthropic-claude-haiku-5-5")


def test_settings_are_the_defaults_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLUICE_MAX_ATTEMPTS", "2")
    assert FakeSluice().settings.max_attempts == Settings.model_fields["max_attempts"].default
    assert FakeSluice(max_attempts=3).settings.max_attempts == 3
    with pytest.raises(SluiceError, match="SLUICE_MAX_ATTEMPTS"):
        FakeSluice(max_attempts=0)


# Transactions, in any database


@pytest.fixture
def engine() -> Any:
    engine = create_engine("sqlite://", poolclass=StaticPool)

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # SQLAlchemy begins, and savepoints work

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    yield engine
    engine.dispose()


def test_a_job_comes_with_the_commit(fake: FakeSluice, engine: Engine) -> None:
    with Session(engine) as session:
        job = fake.submit("draft", "hi", connection=session)
        assert fake.jobs == []
        with pytest.raises(NotFound):
            fake.get(job.id)
        session.commit()
        assert [one.id for one in fake.jobs] == [job.id]
        session.rollback()
    assert job.result().text == "hi"


def test_a_job_goes_with_the_rollback(fake: FakeSluice, engine: Engine) -> None:
    with Session(engine) as session:
        job = fake.submit("draft", "hi", connection=session, idempotency_key="k")
    with pytest.raises(NotFound, match="has not committed, or was rolled back"):
        job.result()
    assert fake.jobs == []
    assert fake.submit("draft", "another", idempotency_key="k").result().text == "another"


def test_a_job_goes_with_its_savepoint(fake: FakeSluice, engine: Engine) -> None:
    with engine.connect() as connection, connection.begin():
        kept = fake.submit("draft", "kept", connection=connection)
        with connection.begin_nested() as savepoint:
            fake.submit("draft", "lost", connection=connection)
            savepoint.rollback()
        with connection.begin_nested():
            released = fake.submit("draft", "released", connection=connection)
        with connection.begin_nested() as savepoint:
            with connection.begin_nested():
                fake.submit("draft", "lost with what is around it", connection=connection)
            savepoint.rollback()
    assert [one.id for one in fake.jobs] == [kept.id, released.id]


class Django:
    """What Django's `connection` does."""

    vendor = "sqlite"

    def __init__(self) -> None:
        self.in_atomic_block = True
        self.hooks: list[Any] = []

    def on_commit(self, hook: Any) -> None:
        self.hooks.append(hook)


def test_django_tells_by_its_hooks(fake: FakeSluice) -> None:
    kept, lost = Django(), Django()
    job = fake.submit("draft", "kept", connection=kept)
    fake.submit("draft", "lost", connection=lost)
    assert fake.jobs == []
    kept.hooks[0]()
    lost.in_atomic_block = False
    assert [one.id for one in fake.jobs] == [job.id]


def test_what_is_no_connection_is_refused(fake: FakeSluice) -> None:
    with pytest.raises(InvalidJob, match="connection"):
        fake.submit("draft", "hi", connection=object())


# Both kinds


async def test_two_fakes_may_share_their_jobs(fake: FakeSluice) -> None:
    fake.on("draft").answers("Hello")
    async with AsyncFakeSluice(beside=fake) as other:
        job = await other.submit("draft", "hi")
        assert fake.handle(job.id).result().text == "Hello"
        assert [event.type async for event in job.events()] == ["started", "completed"]
    with pytest.raises(SluiceError, match="closed"):
        await job.result()
    assert [one.id for one in fake.jobs] == [job.id]


def test_what_another_consumer_holds_is_not_given_twice(fake: FakeSluice) -> None:
    fake.submit_many("draft", ["one", "two"], reply_to="crm")
    with fake.replies("crm", "g") as first, fake.replies("crm", "g") as second:
        held = next(first)
        assert [one.result.text for one in second] == ["two"]
        held.ack()
    with fake.replies("crm", "g") as third:
        assert [(one.result.text, one.deliveries) for one in third] == [("two", 2)]
    with fake.replies("crm", "h") as other:
        assert len(list(other)) == 2


@pytest.mark.parametrize(
    ("real", "faked", "same"),
    [
        (Sluice, FakeSluice, {"reader", "forget_lines"}),
        (AsyncSluice, AsyncFakeSluice, {"reader", "forget_lines"}),
        (Replies, FakeReplies, {"consumer", "problem"}),
        (AsyncReplies, AsyncFakeReplies, {"consumer", "problem"}),
        (Batch, FakeBatch, {"results"}),
    ],
)
def test_whatever_a_client_can_do_is_faked_with_the_same_signature(
    real: type, faked: type, same: set[str]
) -> None:
    for name, method in vars(real).items():
        if name.startswith("_") or name in same:
            continue
        fake_method = getattr(faked, name)
        assert fake_method is not method, f"{name} is not faked"
        given, wanted = (
            [(one.name, one.kind, one.default) for one in inspect.signature(f).parameters.values()]
            for f in (fake_method, method)
        )
        assert given == wanted, name


# The plugin

_TESTS = """
import sys

def test_a(fake_sluice):
    fake_sluice.on("draft").answers("Hello")
    assert fake_sluice.submit("draft", "hi").result().text == "Hello"

def test_each_test_has_its_own(fake_sluice):
    assert fake_sluice.jobs == []

def test_both_share(fake_sluice, async_fake_sluice):
    import asyncio
    job = asyncio.run(async_fake_sluice.submit("draft", "hi"))
    assert fake_sluice.handle(job.id).result().text == "hi"

def test_no_worker_library():
    assert {"openai", "anthropic", "uvloop"} & set(sys.modules) == set()
    assert not [name for name in sys.modules if name.startswith("sluicegate.workers")]
"""
_LIGHT = """
import sys

def test_nothing_was_imported():
    heavy = {"celery", "kombu", "redis", "sqlalchemy", "psycopg", "pydantic", "alembic", "openai"}
    assert heavy & set(sys.modules) == set()
"""
_GUIDE = ROOT / "docs" / "guides" / "crm-developers.md"


def run_pytest(folder: Path) -> str:
    """Run a back end's tests with our plugin alone: others import what they like."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plugin = project["entry-points"]["pytest11"]["sluicegate"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", plugin, "-p", "no:cacheprovider", "-W", "error"],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(("source", "count"), [(_TESTS, 4), (_LIGHT, 1)])
def test_the_plugin_brings_fixtures(tmp_path: Path, source: str, count: int) -> None:
    (tmp_path / "test_theirs.py").write_text(source)
    said = run_pytest(tmp_path)
    assert f"{count} passed" in said, said


def test_the_tests_in_the_guide_pass(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", _GUIDE.read_text(), re.DOTALL)
    for name, code in blocks:
        (tmp_path / name).write_text(code)
    said = run_pytest(tmp_path)
    assert "2 passed" in said, said

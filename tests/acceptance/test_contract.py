"""The contract of the clients: the same cases on the real thing, over HTTP and on the fake.

Each in both kinds. The real thing is both clients before real workers and a sandbox provider. What
a prompt says is what happens: `ECHO: text` is answered with the text, FAILS is refused, HANGS never
ends. Nobody works on `complex`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from pydantic import BaseModel
from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from sluicegate import (
    AsyncSluice,
    BudgetExceeded,
    IdempotencyConflict,
    IllegalTransition,
    InvalidJob,
    JobCancelled,
    JobExpired,
    JobFailed,
    Lane,
    NotFound,
    Result,
    ResultTimeout,
    Sluice,
    SluiceError,
    State,
)
from sluicegate.shared.accounts import add_account, list_accounts
from sluicegate.shared.admission.keys import budgets_key
from sluicegate.shared.catalogue import read
from sluicegate.shared.secrets import Secret
from sluicegate.shared.settings import Settings
from sluicegate.testing import AsyncFakeSluice, FakeSluice
from sluicegate.testing.catalogue import fresh_catalogue
from tests.databases import Databases
from tests.harness import Rig
from tests.http_servers import HttpServer, make_key, start_http
from tests.polling import eventually

WAIT_S = 30.0


class Card(BaseModel):
    """What a business card says."""

    name: str
    company: str


TOOL = {"name": "find_customer", "description": "Finds one.", "parameters": {"type": "object"}}


def script(fake: FakeSluice | AsyncFakeSluice) -> None:
    """Have a fake do what the sandbox does."""
    fake.on().answers("A sentence of several words.")
    fake.on(prompt="ECHO: ").answers(lambda job: job.prompt.partition("ECHO: ")[2])
    fake.on(prompt="TOOL: ").calls_tool("find_customer", {})
    fake.on(when=lambda job: job.spec.response_format is not None).answers(
        Card(name="Ada", company="Acme")
    )
    fake.on(prompt="FAILS").fails(message="this is refused", status=400)
    fake.on(prompt="REFUSED ONCE").fails().answers("at last")
    fake.on(prompt="HANGS").never_ends()
    fake.on("complex").expires()


@dataclass(frozen=True)
class Handle:
    """Either kind of handle behind one face."""

    client: Client
    handle: Any

    @property
    def id(self) -> UUID:
        job_id: UUID = self.handle.id
        return job_id

    def result(self, timeout: float = WAIT_S) -> Result:
        result: Result = self.client.run(self.handle.result(timeout))
        return result

    def events(self, last_id: str = "0") -> list[Any]:
        found = self.handle.events(last_id, WAIT_S)
        if not self.client.loop:
            return list(found)

        async def collect() -> list[Any]:
            return [event async for event in found]

        events: list[Any] = self.client.run(collect())
        return events

    def cancel(self) -> State:
        state: State = self.client.run(self.handle.cancel())
        return state


class Client:
    """Either kind of client, real or fake, behind one face, so that each case holds for all."""

    def __init__(self, client: Any, runner: asyncio.Runner | None, settings: Settings) -> None:
        self.client = client
        self.loop = runner
        self._settings = settings

    def run(self, value: Any) -> Any:
        """Return the value; await it first if this is the client for a loop."""
        if self.loop is not None and isinstance(value, Coroutine):
            return self.loop.run(value)
        return value

    def submit(self, *args: Any, **options: Any) -> Handle:
        return Handle(self, self.run(self.client.submit(*args, **options)))

    def submit_many(self, *args: Any, **options: Any) -> list[Handle]:
        handles = self.run(self.client.submit_many(*args, **options))
        return [Handle(self, handle) for handle in handles]

    def handle(self, *args: Any) -> Handle:
        return Handle(self, self.client.handle(*args))

    def retry(self, job_id: UUID) -> Handle:
        return Handle(self, self.run(self.client.retry(job_id)))

    def get(self, job_id: Any) -> Any:
        return self.run(self.client.get(job_id))

    def cancel(self, job_id: Any) -> Any:
        return self.run(self.client.cancel(job_id))

    def list_jobs(self, **filters: Any) -> Any:
        return self.run(self.client.list_jobs(**filters))

    def replies(self, channel: str, take: int, *, ack: bool, timeout: float) -> list[Any]:
        """Take some replies as the consumer `one` of the group `crm`, then go away."""
        replies = self.client.replies(channel, "crm", consumer="one", timeout=timeout)
        taken: list[Any] = []
        if self.loop is None:
            with replies:
                for reply in replies:
                    taken.append(reply)
                    if ack:
                        reply.ack()
                    if len(taken) == take:
                        break
            return taken

        async def read() -> None:
            async with replies:
                async for reply in replies:
                    taken.append(reply)
                    if ack:
                        await reply.ack()
                    if len(taken) == take:
                        break

        self.loop.run(read())
        return taken

    def submit_in_transaction(self, kind: str, prompt: str, end: str) -> Handle:
        """Submit in a transaction of the caller's; nobody sees the job before its `end`."""
        url = make_url(self._settings.database_dsn)
        if self.loop is None:
            with ExitStack() as stack:
                caller: Any
                if kind == "session":
                    caller = stack.enter_context(Session(create_engine(url, poolclass=NullPool)))
                else:
                    caller = stack.enter_context(closing(psycopg.connect(_plain(url))))
                handle = self.submit("draft", prompt, connection=caller)
                with pytest.raises(NotFound):
                    self.get(handle.id)
                getattr(caller, end)()
            return handle

        async def submit() -> Any:
            async with AsyncExitStack() as stack:
                caller: Any
                if kind == "session":
                    engine = create_async_engine(url, poolclass=NullPool)
                    caller = await stack.enter_async_context(AsyncSession(engine))
                else:
                    caller = await psycopg.AsyncConnection.connect(_plain(url))
                    stack.push_async_callback(caller.close)
                job = await self.client.submit("draft", prompt, connection=caller)
                with pytest.raises(NotFound):
                    await self.client.get(job.id)
                await getattr(caller, end)()
                return job

        return Handle(self, self.loop.run(submit()))

    def close(self) -> None:
        self.run(self.client.close())


def _plain(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture(scope="module", autouse=True)
def _fleet(module_rig: Rig) -> None:
    workers = [
        module_rig.begin_worker("anthropic", ["draft", "summary"]),
        module_rig.begin_worker("anthropic", ["summary"], Lane.BULK),
    ]
    module_rig.start_sweep()
    engine = create_engine(module_rig.settings.database_dsn, poolclass=NullPool)
    with engine.begin() as connection:
        add_account(connection, "acme")
    for worker in workers:
        module_rig.await_worker(worker)


@pytest.fixture(scope="module")
def server(module_rig: Rig) -> HttpServer:
    return start_http(module_rig, api_key=make_key(module_rig.settings, "admin"))


@contextmanager
def _client(
    rig: Rig, which: str, server: HttpServer, runner: asyncio.Runner | None
) -> Iterator[Client]:
    client: Sluice | AsyncSluice
    if which == "http":
        client = (AsyncSluice if runner else Sluice)(server.url, api_key=server.api_key)
    elif which == "fake":
        client = (AsyncFakeSluice if runner else FakeSluice)(rig.settings, accounts=["acme"])
        assert isinstance(client, FakeSluice | AsyncFakeSluice)
        script(client)
    else:
        client = (AsyncSluice if runner else Sluice)(rig.settings)
    found = Client(client, runner, rig.settings)
    try:
        yield found
    finally:
        found.close()


THREADS, LOOP = ["real-threads", "fake-threads"], ["real-loop", "fake-loop"]
HTTP = ["http-threads", "http-loop"]


@pytest.fixture(params=[*THREADS, *LOOP, *HTTP])
def client(request: pytest.FixtureRequest, rig: Rig, server: HttpServer) -> Iterator[Client]:
    which, _, kind = request.param.partition("-")
    rig.sandbox.add_fault("http_400", prompt_contains="FAILS", message="this is refused")
    rig.sandbox.add_fault("http_400", prompt_contains="REFUSED ONCE", times=1)
    rig.sandbox.add_fault("hang", prompt_contains="HANGS")
    if kind == "threads":
        with _client(rig, which, server, None) as client:
            yield client
        return
    with asyncio.Runner() as runner, _client(rig, which, server, runner) as client:
        yield client


#: Batches are for threads.
only_threads = pytest.mark.parametrize("client", THREADS, indirect=True)
#: What needs the database or Redis itself.
not_over_http = pytest.mark.parametrize("client", [*THREADS, *LOOP], indirect=True)
only_over_http = pytest.mark.parametrize("client", HTTP, indirect=True)


def test_a_job_is_answered_and_priced(client: Client) -> None:
    job = client.submit("draft", "ECHO: Dear Ada")
    result = job.result()
    assert (result.text, result.state, result.finish_reason) == ("Dear Ada", "succeeded", "stop")
    assert (result.job_id, result.use_case, result.attempts) == (job.id, "draft", 1)
    assert (result.provider, result.model) == ("anthropic-claude-haiku-5-5", "claude-haiku-5-5")
    assert result.usage.input > 0
    assert result.usage.output > 0
    assert 0 < result.cost < result.baseline_cost
    assert result.latency_s is not None
    assert client.handle(str(job.id)).result() == result


def test_a_streamed_answer_comes_in_deltas(client: Client) -> None:
    job = client.submit("draft", "Say more than one word.", stream=True)
    events = job.events()
    kinds = [event.type for event in events]
    assert kinds[0] == "started"
    assert set(kinds[1:-1]) == {"delta"}
    assert kinds[-1] == "completed"
    text = "".join(event.payload.text for event in events[1:-1])
    assert events[-1].payload.result.text == text != ""
    assert job.events(events[0].id) == events[1:]
    assert job.events(events[-1].id) == []
    with pytest.raises(InvalidJob, match="last_id"):
        job.events("nonsense")


def test_an_answer_that_is_not_streamed_comes_whole(client: Client) -> None:
    job = client.submit("draft", "ECHO: whole")
    assert [event.type for event in job.events()] == ["started", "completed"]


def test_a_tool_is_asked_for(client: Client) -> None:
    result = client.submit("draft", "TOOL: find_customer", tools=[TOOL]).result()
    assert result.finish_reason == "tool_calls"
    assert [call.name for call in result.tool_calls] == ["find_customer"]


def test_a_model_is_what_the_answer_is_read_as(client: Client) -> None:
    job = client.submit("draft", "Whose card is this?", response_format=Card)
    assert isinstance(job.result().parsed, Card)
    assert set(client.handle(job.id).result().parsed) == {"name", "company"}
    assert isinstance(client.handle(job.id, Card).result().parsed, Card)
    assert isinstance(job.events()[-1].payload.result.parsed, Card)


def test_a_failed_job_says_why(client: Client) -> None:
    job = client.submit("draft", "FAILS")
    with pytest.raises(JobFailed, match="this is refused") as failed:
        job.result()
    assert (failed.value.job_id, failed.value.state) == (str(job.id), "failed")
    view = client.get(job.id)
    assert (view.state, view.attempts, view.result.error.status) == (State.FAILED, 1, 400)
    (attempt,) = view.history
    assert (attempt.state, attempt.status) == ("failed", 400)
    assert job.events()[-1].type == "failed"


def test_an_expired_job_says_so(client: Client) -> None:
    job = client.submit("complex", "Too late.", deadline=timedelta(seconds=0.3))
    with pytest.raises(JobExpired, match="its deadline passed before it was answered"):
        job.result()
    view = client.get(job.id)
    assert (view.state, view.attempts, view.cost) == (State.EXPIRED, 0, 0)
    assert view.history == ()


def test_a_timeout_leaves_the_job_alone(client: Client) -> None:
    job = client.submit("draft", "HANGS")
    with pytest.raises(ResultTimeout, match=r"did not end within 0\.2 s; it goes on"):
        job.result(0.2)
    assert not client.get(job.id).state.terminal
    job.cancel()


def test_a_waiting_job_is_cancelled_at_once(client: Client) -> None:
    job = client.submit("complex", "Never mind.")
    assert client.get(job.id).state is State.QUEUED
    assert job.cancel() is State.CANCELLED
    assert client.cancel(str(job.id)) is State.CANCELLED
    with pytest.raises(JobCancelled, match="the job was cancelled"):
        job.result()
    assert [event.type for event in job.events()] == ["failed"]


def test_a_running_job_is_cut_off_and_paid(client: Client) -> None:
    job = client.submit("draft", "HANGS")
    with pytest.raises(ResultTimeout):
        job.result(0.2)
    eventually(lambda: client.get(job.id).history)
    assert job.cancel() is State.RUNNING
    with pytest.raises(JobCancelled, match="the job was cancelled"):
        job.result()
    view = client.get(job.id)
    assert (view.state, view.attempts) == (State.CANCELLED, 1)
    assert view.cost == view.result.cost > 0
    assert view.cancel_requested_at is not None


def test_a_job_that_ended_stays_as_it_is(client: Client) -> None:
    job = client.submit("draft", "ECHO: done")
    job.result()
    assert job.cancel() is State.SUCCEEDED
    with pytest.raises(IllegalTransition, match="only a failed, cancelled or expired job"):
        client.retry(job.id)


def test_a_failed_job_is_tried_again(client: Client) -> None:
    prompt = f"{uuid4()}: REFUSED ONCE\nECHO: at last"
    job = client.submit("draft", prompt)
    with pytest.raises(JobFailed):
        job.result()
    again = client.retry(job.id)
    assert again.id == job.id
    assert again.result().text == "at last"
    assert [event.type for event in job.events()] == ["started", "completed"]
    view = client.get(job.id)
    assert (view.state, view.attempts, len(view.history)) == (State.SUCCEEDED, 1, 2)


def test_an_idempotency_key_gives_the_same_job_or_a_conflict(client: Client) -> None:
    key = str(uuid4())
    job = client.submit("draft", "ECHO: once", idempotency_key=key)
    assert client.submit("draft", "ECHO: once", idempotency_key=key).id == job.id
    with pytest.raises(IdempotencyConflict, match="was used before with another request"):
        client.submit("draft", "ECHO: something else", idempotency_key=key)
    other = client.submit("draft", "ECHO: once", idempotency_key=key, account="acme")
    assert other.id != job.id
    first, second = client.submit_many(
        "draft", [{"prompt": "ECHO: once", "idempotency_key": key}, "ECHO: new"]
    )
    assert (first.id, second.id != job.id) == (job.id, True)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("nope", "hi"), {}),
        ((7, "hi"), {}),
        (("draft", ""), {}),
        (("draft", 7), {}),
        (("draft", "x" * 2_000_000), {}),
        (("draft", [{"role": "assistant", "content": "hi"}]), {}),
        (("draft", "hi"), {"max_tokens": 0}),
        (("draft", "hi"), {"max_tokens": 10_000_000}),
        (("draft", "hi"), {"account": "nobody"}),
        (("draft", "hi"), {"account": UUID(int=7)}),
        (("draft", "hi"), {"deadline": -1}),
        (("draft", "hi"), {"deadline": datetime(2026, 1, 1)}),  # noqa: DTZ001 - what is refused
        (("draft", "hi"), {"model": "gpt-1"}),
        (("draft", "hi"), {"lane": "express"}),
        (("draft", "hi"), {"reply_to": "not a name"}),
        (("draft", "hi"), {"temperature": 3}),
        (("draft", "hi"), {"colour": "red"}),
        (("draft", "hi"), {"metadata": {"n": 1}}),
        (("draft", "hi"), {"connection": object()}),
    ],
)
def test_what_is_refused_is_refused_in_the_same_words(
    client: Client, rig: Rig, arguments: tuple[Any, Any], options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidJob) as refused:
        client.submit(*arguments, **options)
    with pytest.raises(InvalidJob) as real:
        rig.client.submit(*arguments, **options)
    if "connection" not in options:
        assert str(refused.value) == str(real.value)
    assert refused.value.field == real.value.field


def test_a_list_is_submitted_whole_or_not_at_all(client: Client) -> None:
    jobs = client.submit_many("draft", ["ECHO: one", {"prompt": "ECHO: two", "stream": True}])
    assert [job.result().text for job in jobs] == ["one", "two"]
    reference = str(uuid4())
    with pytest.raises(InvalidJob, match=r"max_tokens.*\(job 1 of the list\)"):
        client.submit_many(
            "complex", ["fine", {"prompt": "hi", "max_tokens": -1}], request_id=reference
        )
    with pytest.raises(IdempotencyConflict, match="stands at two different jobs of the list"):
        client.submit_many(
            "complex", [{"prompt": text, "idempotency_key": reference} for text in ("a", "b")]
        )
    listed = client.list_jobs(use_case="complex", since=timedelta(minutes=5))
    assert reference not in {client.get(one.id).request_id for one in listed}
    assert client.submit_many("draft", []) == []


def test_a_job_can_be_looked_at(client: Client) -> None:
    job = client.submit(
        "complex",
        "Look at me.",
        account="acme",
        metadata={"lead": "4711"},
        request_id="r-1",
        submitted_by="ada",
        idempotency_key=str(job_key := uuid4()),
        reply_to="crm",
        max_attempts=3,
        deadline=120,
    )
    view = client.get(str(job.id))
    assert (view.id, view.state, view.use_case) == (job.id, State.QUEUED, "complex")
    assert (view.lane, view.queue, view.account) == (Lane.INTERACTIVE, "complex.anthropic", "acme")
    assert (view.attempts, view.max_attempts, view.cost, view.history) == (0, 3, 0, ())
    assert (view.metadata, view.request_id, view.submitted_by) == ({"lead": "4711"}, "r-1", "ada")
    assert (view.idempotency_key, view.reply_to, view.batch_id) == (str(job_key), "crm", None)
    assert abs((view.deadline_at - view.created_at).total_seconds() - 120) < 1
    assert (view.finished_at, view.result, view.cancel_requested_at) == (None, None, None)
    job.cancel()
    view = client.get(job.id)
    assert view.result.finished_at == view.finished_at is not None
    answered = client.submit("draft", "ECHO: hi")
    result = answered.result()
    view = client.get(answered.id)
    assert (view.result, view.cost, view.attempts) == (result, result.cost, 1)
    (attempt,) = view.history
    assert (attempt.number, attempt.state, attempt.provider) == (1, "succeeded", result.provider)
    assert attempt.cost_nano_usd == result.cost_nano_usd


def test_jobs_are_listed_newest_first(client: Client) -> None:
    since = datetime.now(UTC)
    first = client.submit("complex", "one", account="acme")
    second = client.submit("complex", "two", account="acme")
    failed = client.submit("draft", "FAILS", account="acme")
    with pytest.raises(JobFailed):
        failed.result()
    second.cancel()

    def listed(**filters: Any) -> list[UUID]:
        return [one.id for one in client.list_jobs(since=since, account="acme", **filters)]

    assert listed() == [failed.id, second.id, first.id]
    assert listed(limit=1) == [failed.id]
    assert listed(use_case="complex", state="queued") == [first.id]
    assert listed(state=[State.CANCELLED, "failed"]) == [failed.id, second.id]
    assert listed(queue="complex.anthropic", lane="interactive") == [second.id, first.id]
    assert listed(lane="bulk") == listed(batch=uuid4()) == []
    (one,) = client.list_jobs(since=since, account="acme", state="failed")
    assert (one.error_class, one.account, one.attempts) == (one.error_class, "acme", 1)
    assert "this is refused" in one.error
    assert client.list_jobs(since=timedelta(seconds=0)) == []
    with pytest.raises(InvalidJob, match="there is no account 'nobody'"):
        client.list_jobs(account="nobody")
    for filters in ({"state": "lost"}, {"colour": "red"}, {"limit": 0}):
        with pytest.raises(InvalidJob, match=next(iter(filters))):
            client.list_jobs(**filters)


@not_over_http
def test_replies_come_until_they_are_acknowledged(client: Client) -> None:
    channel = f"crm-{uuid4().hex}"
    answered = client.submit(
        "draft", "ECHO: hi", reply_to=channel, metadata={"lead": "1"}, request_id="r"
    )
    answered.result()
    (reply,) = client.replies(channel, 1, ack=False, timeout=WAIT_S)
    assert (reply.job_id, reply.result.text, reply.deliveries) == (answered.id, "hi", 1)
    assert (reply.metadata, reply.request_id, reply.idempotency_key) == ({"lead": "1"}, "r", None)
    assert reply.result.cost > 0
    (again,) = client.replies(channel, 1, ack=True, timeout=WAIT_S)
    assert (again.id, again.result, again.deliveries) == (reply.id, reply.result, 2)
    failed = client.submit("draft", "FAILS", reply_to=channel)
    with pytest.raises(JobFailed):
        failed.result()
    (second,) = client.replies(channel, 1, ack=True, timeout=WAIT_S)
    assert (second.job_id, second.result.state) == (failed.id, State.FAILED)
    assert client.replies(channel, 1, ack=True, timeout=0.5) == []
    with pytest.raises(InvalidJob, match="channel"):
        client.replies("not a name", 1, ack=True, timeout=1)


@not_over_http
@pytest.mark.parametrize("kind", ["session", "psycopg"])
def test_a_job_is_there_once_its_transaction_has_committed(client: Client, kind: str) -> None:
    job = client.submit_in_transaction(kind, "ECHO: kept", "commit")
    assert job.result().text == "kept"
    assert client.get(job.id).state is State.SUCCEEDED


@not_over_http
@pytest.mark.parametrize("kind", ["session", "psycopg"])
def test_a_job_is_never_there_if_its_transaction_is_rolled_back(client: Client, kind: str) -> None:
    job = client.submit_in_transaction(kind, "ECHO: never", "rollback")
    with pytest.raises(NotFound):
        client.get(job.id)
    with pytest.raises(NotFound, match="has not committed, or was rolled back"):
        job.result()


def test_a_full_budget_is_told_by_the_worker_and_then_at_once(client: Client, rig: Rig) -> None:
    if isinstance(client.client, FakeSluice | AsyncFakeSluice):
        for act in (
            lambda: client.client.set_budget("acme", daily=1),
            client.client.budgets,
            lambda: client.client.clear_budget("acme"),
        ):
            with pytest.raises(NotImplementedError, match="this method is not faked"):
                client.run(act())
        return
    name = f"budget-{uuid4().hex}"
    with create_engine(rig.settings.database_dsn, poolclass=NullPool).begin() as connection:
        account = add_account(connection, name)
    client.run(client.client.set_budget(name, daily=1))
    cost = client.submit("draft", "ECHO: paid", account=name).result().cost
    budget = client.run(client.client.set_budget(name, daily=cost))
    assert (budget.day.spent, budget.day.held, budget.day.left) == (cost, 0, 0)
    job = client.submit_many("draft", ["ECHO: too much"], account=name)[0]
    with pytest.raises(JobFailed, match=r"the account's daily budget of .* is full"):
        job.result()
    view = client.get(job.id)
    assert (view.result.error.error_class, view.history) == ("budget", ())
    # The sweep brings the new limit to Redis, where submitters see it.
    key = budgets_key(rig.settings.redis_prefix, account.id)
    limit = f'"day_limit":{budget.day.limit_nano_usd},'.encode()
    eventually(lambda: any(limit in copy for copy in rig.redis.hvals(key)))

    with pytest.raises(BudgetExceeded) as refused:
        client.submit("complex", "too much", account=name)
    assert (refused.value.account, refused.value.spent) == (name, cost)
    assert client.list_jobs(account=name, use_case="complex") == []


def test_what_is_not_there_is_not_found(client: Client) -> None:
    unknown = uuid4()
    actions: list[Callable[[Any], Any]] = [client.get, client.cancel, client.retry]
    for act in actions:
        with pytest.raises(NotFound, match=f"there is no job {unknown}"):
            act(unknown)
        with pytest.raises(InvalidJob, match="is not a job's id"):
            act("nonsense")
    with pytest.raises(NotFound, match=f"there is no job {unknown}"):
        client.handle(unknown).result()


def test_a_closed_client_says_so(client: Client) -> None:
    job = client.submit("draft", "ECHO: hi")
    client.close()
    client.close()
    actions: list[Callable[[], Any]] = [
        lambda: client.submit("draft", "hi"),
        lambda: client.get(job.id),
        client.list_jobs,
        job.result,
    ]
    for act in actions:
        with pytest.raises(SluiceError, match="this client is closed"):
            act()


@only_over_http
def test_what_needs_the_database_itself_is_refused_over_http(client: Client) -> None:
    sluice = client.client
    acts: list[Callable[[], Any]] = [lambda: sluice.replies("crm", "one")]
    if client.loop is None:
        acts += [
            lambda: sluice.submit_batch("summary", ["one"]),
            lambda: sluice.batch(uuid4()),
        ]
    for act in acts:
        with pytest.raises(SluiceError, match="cannot be had over HTTP"):
            act()
    with pytest.raises(InvalidJob, match="cannot be joined over HTTP"):
        client.submit("draft", "hi", connection=object())


@only_threads
def test_a_batch_is_done_and_read(client: Client) -> None:
    sluice = client.client
    key = str(uuid4())
    rows = [{"note": f"ECHO: {n}", "lead": str(n)} for n in range(3)]
    batch = sluice.submit_batch(
        "summary", rows, name="notes", template="{note}", idempotency_key=key, account="acme"
    )
    assert batch.is_new
    same = sluice.submit_batch("summary", rows, template="{note}", idempotency_key=key,
                               account="acme")  # fmt: skip
    assert (same.id, same.is_new) == (batch.id, False)
    view = batch.wait(WAIT_S)
    assert (view.name, view.account, view.use_case) == ("notes", "acme", "summary")
    assert (view.total, view.succeeded, view.ended, view.rejected) == (3, 3, 3, 0)
    assert view.cost > 0
    assert view.finished_at is not None
    results = list(sluice.batch(batch.id).results())
    assert [(one.line, one.result.text) for one in results] == [(1, "0"), (2, "1"), (3, "2")]
    assert [one.metadata for one in results] == [{"lead": str(n)} for n in range(3)]
    assert list(batch.results("failed")) == []
    listed = sluice.list_jobs(batch=batch.id)
    assert {(one.lane, one.batch_id) for one in listed} == {(Lane.BULK, batch.id)}
    assert batch.cancel() == 0
    with pytest.raises(InvalidJob, match=r"prompt: .*\(row 2\)"):
        sluice.submit_batch("summary", ["fine", ""])
    with pytest.raises(NotFound, match="there is no batch"):
        sluice.batch(uuid4()).view()


@only_threads
def test_a_batch_is_cancelled(client: Client) -> None:
    sluice = client.client
    batch = sluice.submit_batch("complex", ["one", "two"])
    with pytest.raises(InvalidJob, match="timeout"):
        batch.wait(-1)
    assert batch.cancel() == 2
    progress = batch.progress()
    assert (progress.cancelled, progress.total, progress.ended) == (2, 2, 2)
    assert progress.cancelled_at is not None


def test_the_fake_begins_with_the_catalogue_of_a_new_database(
    rig: Rig, postgres: Databases
) -> None:
    with postgres.database(template=postgres.template) as url:
        engine = create_engine(
            rig.settings.model_copy(update={"database_url": Secret(url)}).database_dsn,
            poolclass=NullPool,
        )
        with engine.connect() as connection:
            real = read(connection)
            (default,) = list_accounts(connection)
    fake, default_id = fresh_catalogue()
    assert set(fake.providers) == set(real.providers)
    assert (fake.use_cases, fake.keys) == (real.use_cases, real.keys)
    assert (default.id, default.name) == (default_id, "default")

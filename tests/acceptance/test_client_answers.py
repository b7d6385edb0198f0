"""What a back end reads of its jobs, with real workers at both wires; and its transactions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from decimal import Decimal
from enum import StrEnum
from typing import Any

import psycopg
import pytest
from pydantic import BaseModel, Field
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from sluicegate import AsyncSluice, Completed, InvalidAnswer, Sluice
from tests.harness import Rig, environment_of

WAIT_S = 60
BOTH = pytest.mark.parametrize(
    ("use_case", "provider"), [("draft", "anthropic"), ("general", "openai")]
)


@pytest.fixture(scope="module", autouse=True)
def _workers(module_rig: Rig) -> None:
    workers = [
        module_rig.begin_worker("openai", ["general"]),
        module_rig.begin_worker("anthropic", ["draft"]),
    ]
    module_rig.start_sweep()
    for worker in workers:
        module_rig.await_worker(worker)


class Mood(StrEnum):
    GOOD = "good"
    BAD = "bad"


class Topic(BaseModel):
    name: str
    weight: float = 1.0


class Note(BaseModel):
    """A note on a call."""

    summary: str = Field(max_length=200)
    mood: Mood
    topics: list[Topic]
    main: Topic = Field(description="The one that counts.")
    follow_up: str | None = None


@BOTH
def test_a_result_is_filled_whole(rig: Rig, use_case: str, provider: str) -> None:
    prompt = "TOKENS: 20\nREASONING: 5\nWrite to Ada."
    result = rig.client.submit(use_case, prompt, stream=use_case == "draft").result(WAIT_S)
    assert len(result.text) == 60
    assert result.provider is not None
    assert result.provider.startswith(provider)
    assert result.model
    assert (result.usage.output, result.usage.reasoning) == (20, 5)
    assert result.usage.input > 0
    assert result.cost == Decimal(result.cost_nano_usd) / 10**9 > 0
    assert result.baseline_cost > 0
    assert (result.finish_reason, result.attempts, result.tool_calls) == ("stop", 1, ())
    assert result.latency_s is not None
    assert rig.client.get(result.job_id).result == result


@BOTH
def test_tool_calls_are_read_whole(rig: Rig, use_case: str, provider: str) -> None:
    parameters = {"type": "object", "properties": {"name": {"type": "string"}}}
    tool = {"name": "find_contact", "description": "Find one.", "parameters": parameters}
    job = rig.client.submit(use_case, "Find Ada.", tools=[tool], tool_choice="find_contact")
    result = job.result(WAIT_S)
    (call,) = result.tool_calls
    assert (call.name, call.arguments) == ("find_contact", {"name": "confirmed"})
    assert result.finish_reason == "tool_calls"


@BOTH
def test_an_answer_comes_as_the_model_that_asked(rig: Rig, use_case: str, provider: str) -> None:
    job = rig.client.submit(use_case, "Note the call.", response_format=Note)
    topic = Topic(name="confirmed", weight=1)
    wanted = Note(
        summary="confirmed", mood=Mood.GOOD, topics=[topic], main=topic, follow_up="confirmed"
    )
    assert job.result(WAIT_S).parsed == wanted
    # Any other handle knows the model if it is told, and plain data if it is not.
    assert rig.client.handle(job.id, response_format=Note).result(WAIT_S).parsed == wanted
    assert rig.client.handle(job.id).result(WAIT_S).parsed == wanted.model_dump(mode="json")
    last = [*rig.client.handle(job.id, Note).events(timeout=WAIT_S)][-1].payload
    assert isinstance(last, Completed)
    assert last.result.parsed == wanted


def test_an_answer_in_another_shape_is_an_error_of_its_own(rig: Rig) -> None:
    """A schema as providers keep it has no limits: those the client finds."""
    note = {"summary": "x" * 201, "mood": "good", "topics": [], "main": {"name": "", "weight": 1}}
    text = json.dumps(note | {"follow_up": None})
    result = rig.client.submit("draft", f"ECHO: {text}", response_format=Note).result(WAIT_S)
    assert result.text == text
    with pytest.raises(InvalidAnswer, match=str(result.job_id)):
        result.parsed  # noqa: B018


async def test_the_same_on_a_loop(rig: Rig) -> None:
    async with AsyncSluice(rig.settings) as sluice:
        job = await sluice.submit("general", "Note the call.", response_format=Note)
        assert isinstance((await job.result(WAIT_S)).parsed, Note)
        again = sluice.handle(job.id, response_format=Note)
        payloads = [event.payload async for event in again.events(timeout=WAIT_S)]
        assert isinstance(payloads[-1], Completed)
        assert isinstance(payloads[-1].result.parsed, Note)


# In the caller's transaction


@pytest.mark.parametrize("kind", ["session", "connection", "psycopg"])
def test_a_job_runs_when_its_transaction_has_committed(rig: Rig, kind: str) -> None:
    url = rig.settings.database_url.get_secret_value()
    engine = create_engine(url, poolclass=NullPool)
    opened: Any
    if kind == "psycopg":
        opened = psycopg.connect(url.replace("postgresql+psycopg", "postgresql"))
    else:
        opened = Session(engine) if kind == "session" else engine.connect()
    with opened as connection:
        given_up = rig.client.submit("draft", "ECHO: never", connection=connection)
        connection.rollback()
        job = rig.client.submit("draft", "ECHO: committed", connection=connection)
        connection.commit()
        assert job.result(WAIT_S).text == "committed"
    assert rig.states([given_up.id]) == {}


async def test_a_job_runs_when_an_async_session_has_committed(rig: Rig) -> None:
    engine = create_async_engine(rig.settings.database_url.get_secret_value(), poolclass=NullPool)
    async with AsyncSluice(rig.settings) as sluice, AsyncSession(engine) as session:
        job = await sluice.submit("draft", "ECHO: committed", connection=session)
        await session.commit()
        assert (await job.result(WAIT_S)).text == "committed"
    await engine.dispose()


#: A listener that comes before ours dies where a process may: committed, and not published.
_DIES = """
import os, signal
from sqlalchemy import create_engine, event
from sqlalchemy.orm import Session
from sluicegate import Sluice

sluice = Sluice()
session = Session(create_engine(sluice.settings.database_url.get_secret_value()))
event.listen(session, "after_commit", lambda session: os.kill(os.getpid(), signal.SIGKILL))
print(sluice.submit("draft", "ECHO: survived", connection=session).id, flush=True)
session.commit()
"""


def test_a_process_that_dies_between_commit_and_publish_loses_no_job(rig: Rig) -> None:
    died = subprocess.run(
        [sys.executable, "-c", _DIES],
        env=environment_of(rig.settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    with Sluice(rig.settings) as sluice:
        job = sluice.get(died.stdout.strip())
        # Production looks 30 s after it was stored, this rig after 3 s: within a minute in both.
        assert sluice.handle(job.id).result(WAIT_S).text == "survived"
    # Publishing again raises the fence, as a claim does: it was not its own message that ran it.
    (row,) = rig.rows("SELECT fence FROM jobs WHERE id = %(id)s", id=job.id)
    assert row.fence == 2

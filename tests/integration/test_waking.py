"""Jobs that gates, levers and pauses hold back: put off, told why, woken, and never lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID

import pytest
import redis
from pydantic import SecretStr
from redis.exceptions import ConnectionError as RedisAway
from sqlalchemy import Engine

from sluicegate.producers.client import Sluice
from sluicegate.shared.admission.keys import changes_key
from sluicegate.shared.settings import Settings
from sluicegate.workers.sweep.loops import Sweep
from tests.command_line import Command
from tests.databases import Rows
from tests.harness import FULL
from tests.polling import eventually_async

LUNA = "openai-gpt-6-luna"
SOL = "openai-gpt-6.1-sol"


_ADD = """
INSERT INTO jobs (id, account_id, use_case, lane, queue, state, fence, max_attempts, run_at,
                  deadline_at, created_at, held_back, request_hash)
SELECT gen_random_uuid(), a.id, %(use_case)s, %(lane)s, %(queue)s, 'parked', 1, 4,
       now() + %(due_s)s * interval '1 second', now() + %(left_s)s * interval '1 second',
       now() - interval '1 minute', %(held_back)s, ''
FROM generate_series(1, %(jobs)s), accounts a WHERE a.name = %(account)s
RETURNING id
"""


@pytest.fixture
def add(rows: Rows) -> Callable[..., list[UUID]]:
    """Return a function that parks jobs."""

    def parked(jobs: int = 1, **changes: Any) -> list[UUID]:
        values: dict[str, Any] = {
            "use_case": "draft",
            "lane": "interactive",
            "queue": "draft.openai",
            "due_s": 600,
            "left_s": 3600,
            "held_back": f"{LUNA}: its breaker is open",
            "account": "default",
        }
        return [row.id for row in rows(_ADD, jobs=jobs, **(values | changes))]

    return parked


Add = Callable[..., list[UUID]]


@pytest.fixture
async def sweeps(settings: Settings) -> AsyncIterator[tuple[Sweep, Sweep]]:
    both = Sweep(settings), Sweep(settings)
    yield both
    for sweep in both:
        await sweep.close()


@pytest.fixture
def sluice(settings: Settings, command_line: Callable[[Settings], Command]) -> Command:
    return command_line(settings)


@pytest.fixture
def happen(settings: Settings, redis_client: redis.Redis, rows: Rows) -> Callable[..., str]:
    """Return a function that appends what a script would; it returns the entry's id."""

    def append(kind: str, before: str, after: str, **more: Any) -> str:
        (row,) = rows("SELECT id FROM llm_providers WHERE name = %(name)s", name=LUNA)
        fields = {
            "kind": kind,
            "provider_id": str(row.id),
            "account_id": "",
            "before": before,
            "after": after,
            "reason": "",
        } | more
        found: Any = redis_client.xadd(changes_key(settings.redis_prefix), fields)
        return found.decode() if isinstance(found, bytes) else str(found)

    return append


Happen = Callable[..., str]


def due(rows: Rows) -> set[UUID]:
    return {
        row.id for row in rows("SELECT id FROM jobs WHERE state = 'parked' AND run_at <= now()")
    }


# The recorder


async def test_what_happened_is_recorded_once_by_two_sweeps(
    settings: Settings,
    redis_client: redis.Redis,
    sweeps: tuple[Sweep, Sweep],
    happen: Happen,
    rows: Rows,
) -> None:
    number = 3000 if FULL else 1200
    ids = [happen("breaker", "closed", "open", reason=f"reason {n}") for n in range(number)]
    await asyncio.gather(*(sweep.record() for sweep in sweeps for _ in range(3)))
    kept = rows("SELECT event_id, kind, before, after, reason, at FROM gate_changes")
    assert sorted(row.event_id for row in kept) == sorted(ids)
    assert {row.reason for row in kept} == {f"reason {n}" for n in range(number)}
    assert {(row.kind, row.before, row.after) for row in kept} == {("breaker", "closed", "open")}
    assert redis_client.xlen(changes_key(settings.redis_prefix)) == 0


async def test_a_change_that_nobody_can_read_holds_up_nothing(
    settings: Settings,
    redis_client: redis.Redis,
    sweeps: tuple[Sweep, Sweep],
    happen: Happen,
    rows: Rows,
) -> None:
    happen("breaker", "closed", "open", provider_id="nonsense")
    happen("weather", "fine", "rain")
    redis_client.xadd(changes_key(settings.redis_prefix), {"what": "ever"})
    happen("breaker", "closed", "open", reason=b"a NUL \0 and \xff no text")
    await sweeps[0].record()
    (kept,) = rows("SELECT reason FROM gate_changes")
    assert kept.reason == "a NUL \ufffd and \ufffd no text"
    assert redis_client.xlen(changes_key(settings.redis_prefix)) == 0


async def test_a_suspension_is_one_alert_until_it_is_over(
    sweeps: tuple[Sweep, Sweep], happen: Happen, rows: Rows
) -> None:
    (account,) = rows("SELECT id FROM accounts WHERE name = 'default'")
    about = {"account_id": str(account.id), "reason": "401: this key is unknown"}
    happen("suspension", "active", "suspended", **about)
    happen("suspension", "active", "suspended", **about)
    await asyncio.gather(*(sweep.record() for sweep in sweeps))
    (alert,) = rows("SELECT * FROM alerts")
    assert (alert.kind, alert.account_id, alert.resolved_at) == ("suspended", account.id, None)
    assert alert.message == f"account default does without {LUNA}: 401: this key is unknown"
    happen("suspension", "active", "suspended", **about)
    await sweeps[0].record()
    assert len(rows("SELECT 1 FROM alerts")) == 1

    happen("suspension", "suspended", "active", account_id=str(account.id))
    await sweeps[0].record()
    assert not rows("SELECT 1 FROM alerts WHERE resolved_at IS NULL")
    happen("suspension", "active", "suspended", **about)
    await sweeps[0].record()
    assert len(rows("SELECT 1 FROM alerts WHERE resolved_at IS NULL")) == 1


async def test_nothing_is_lost_while_a_server_is_away(
    settings: Settings,
    redis_client: redis.Redis,
    sweeps: tuple[Sweep, Sweep],
    happen: Happen,
    rows: Rows,
) -> None:
    happen("breaker", "closed", "open")
    rows("ALTER TABLE gate_changes RENAME TO away")
    with pytest.raises(Exception, match="gate_changes"):
        await sweeps[0].record()
    assert redis_client.xlen(changes_key(settings.redis_prefix)) == 1
    rows("ALTER TABLE away RENAME TO gate_changes")

    away = SecretStr("redis://127.0.0.1:1/0")
    cut_off = Sweep(settings.model_copy(update={"redis_url": away}))
    try:
        with pytest.raises(RedisAway):
            await cut_off.record()
    finally:
        await cut_off.close()
    await sweeps[0].record()
    assert len(rows("SELECT 1 FROM gate_changes")) == 1


async def test_what_was_kept_and_not_deleted_is_kept_once(
    settings: Settings,
    redis_client: redis.Redis,
    sweeps: tuple[Sweep, Sweep],
    happen: Happen,
    rows: Rows,
) -> None:
    """A sweep may die in between: the next one reads the entry again."""
    (account,) = rows("SELECT id FROM accounts WHERE name = 'default'")
    event_id = happen("suspension", "active", "suspended", account_id=str(account.id))
    rows(
        "INSERT INTO gate_changes (event_id, kind, before, after) VALUES (%(id)s, 'suspension',"
        " 'active', 'suspended')",
        id=event_id,
    )
    await sweeps[0].record()
    assert len(rows("SELECT 1 FROM gate_changes")) == 1
    assert rows("SELECT 1 FROM alerts") == []
    assert redis_client.xlen(changes_key(settings.redis_prefix)) == 0


# The waker


async def test_a_breaker_that_closed_wakes_who_it_held_back_and_nobody_else(
    sweeps: tuple[Sweep, Sweep], happen: Happen, rows: Rows, add: Add
) -> None:
    held = add(3) + add(2, queue="draft.anthropic.bulk", lane="bulk")
    add(2, held_back=f"{SOL}: its breaker is open")
    add(2, held_back=None)
    happen("breaker", "half_open", "open")
    await sweeps[0].record()
    await sweeps[0].wake()
    assert due(rows) == set()
    happen("breaker", "half_open", "closed")
    await asyncio.gather(*(sweep.record() for sweep in sweeps))
    await asyncio.gather(*(sweep.wake() for sweep in sweeps))
    assert due(rows) == set(held)
    # As good as new: it has not stood in line, and whoever was first is first again.
    assert rows("SELECT DISTINCT run_at = created_at AS fresh FROM jobs WHERE run_at <= now()") == [
        (True,)
    ]


async def test_who_parked_a_moment_too_late_is_woken_too(
    sweeps: tuple[Sweep, Sweep], happen: Happen, rows: Rows, add: Add
) -> None:
    happen("breaker", "half_open", "closed")
    await sweeps[0].record()
    await sweeps[0].wake()
    late = add()
    await sweeps[0].wake()
    assert due(rows) == set()
    rows("UPDATE gate_changes SET at = at - interval '4 seconds'")
    await sweeps[0].wake()
    assert due(rows) == set(late)
    # After that the line is left in peace.
    add()
    await sweeps[0].wake()
    assert due(rows) == set(late)


async def test_a_sweep_that_starts_late_wakes(
    settings: Settings, sweeps: tuple[Sweep, Sweep], happen: Happen, rows: Rows, add: Add
) -> None:
    held = add()
    happen("breaker", "half_open", "closed")
    await sweeps[0].record()
    rows("UPDATE gate_changes SET at = at - interval '5 minutes'")
    await sweeps[1].wake()
    assert due(rows) == set(held)


async def test_more_than_one_statement_of_jobs_is_woken(
    sweeps: tuple[Sweep, Sweep], happen: Happen, rows: Rows, add: Add
) -> None:
    held = add(100_000 if FULL else 2500) + add(
        1700, due_s=300, held_back=f"{SOL}: it is at its limit; {LUNA}: its breaker is open"
    )
    # Whoever stands in line for a limit keeps his turn there.
    add(1500, due_s=400, held_back=f"{LUNA}: it is at its limit of requests a minute")
    happen("breaker", "open", "closed")
    await sweeps[0].record()
    await asyncio.gather(*(sweep.wake() for sweep in sweeps))
    assert due(rows) == set(held)


@pytest.mark.parametrize(
    ("arguments", "held_back"),
    [
        (("--provider", LUNA), f"{LUNA}: it is paused"),
        (("--account", "acme"), "the account is paused"),
        (("--use-case", "draft"), "the use case draft is paused"),
    ],
)
async def test_resume_wakes(
    *,
    sluice: Command,
    sweeps: tuple[Sweep, Sweep],
    rows: Rows,
    add: Add,
    arguments: tuple[str, ...],
    held_back: str,
) -> None:
    assert sluice("account", "add", "acme").code == 0
    held = add(2, held_back=held_back, account="acme")
    other = f"{SOL}: its breaker is open"
    add(2, held_back=other, use_case="summary", queue="summary.openai")
    assert sluice("pause", *arguments).code == 0
    await sweeps[0].wake()
    assert due(rows) == set()
    assert sluice("resume", *arguments).code == 0
    await sweeps[0].wake()
    assert due(rows) == set(held)


async def test_a_lever_that_is_taken_back_wakes(
    sluice: Command, sweeps: tuple[Sweep, Sweep], rows: Rows, add: Add
) -> None:
    held = add()
    assert sluice("breaker", "force-open", LUNA).code == 0
    await sweeps[0].wake()
    assert due(rows) == set()
    assert sluice("breaker", "disable", LUNA).code == 0
    await sweeps[0].wake()
    assert due(rows) == set(held)


# The stager


async def test_what_is_paused_is_not_staged(
    sluice: Command, sweeps: tuple[Sweep, Sweep], rows: Rows, add: Add
) -> None:
    assert sluice("account", "add", "acme").code == 0
    late = {"due_s": -1, "held_back": None}
    of_acme = add(3, account="acme", **late)
    of_draft = add(2, **late)
    others = add(2, use_case="summary", queue="summary.openai", **late)
    assert sluice("pause", "--use-case", "draft").code == 0
    assert sluice("pause", "--account", "acme").code == 0
    await asyncio.gather(*(sweep.stage() for sweep in sweeps))
    found = {row.id: row for row in rows("SELECT *, run_at - now() > '4 min' AS off FROM jobs")}
    assert {found[job].state for job in others} == {"queued"}
    assert {(found[job].state, found[job].off) for job in of_acme + of_draft} == {("parked", True)}
    assert {found[job].held_back for job in of_draft} == {"the use case draft is paused"}
    assert {found[job].held_back for job in of_acme} == {
        "the use case draft is paused; the account is paused"
    }

    assert sluice("resume", "--use-case", "draft").code == 0
    await sweeps[0].wake()
    await sweeps[0].stage()
    states = {row.id: (row.state, row.held_back) for row in rows("SELECT * FROM jobs")}
    assert {states[job] for job in of_draft} == {("queued", None)}
    assert {states[job] for job in of_acme} == {("parked", "the account is paused")}
    assert sluice("resume", "--account", "acme").code == 0
    await sweeps[0].wake()
    await sweeps[0].stage()
    assert rows("SELECT DISTINCT state FROM jobs") == [("queued",)]


async def test_many_paused_jobs_do_not_keep_others_waiting(
    settings: Settings, sluice: Command, rows: Rows, add: Add
) -> None:
    number = 100_000 if FULL else 3000
    assert sluice("account", "add", "acme").code == 0
    bulk = {"use_case": "summary", "lane": "bulk", "queue": "summary.anthropic.bulk"}
    add(number, account="acme", due_s=-60, held_back=None, **bulk)
    others = add(5, due_s=-1, held_back=None, **bulk)
    assert sluice("pause", "--account", "acme").code == 0
    ahead = number // 50
    sweep = Sweep(settings.model_copy(update={"stage_ahead_jobs": ahead}))
    try:
        # Ten statements a round, each of which reads no more than the broker may hold.
        for rounds in range(1, 7):
            await sweep.stage()
            put_off = rows("SELECT count(*) AS n FROM jobs WHERE held_back IS NOT NULL")[0].n
            assert put_off == min(number, 10 * ahead * rounds)
    finally:
        await sweep.close()
    queued = rows("SELECT id FROM jobs WHERE state = 'queued'")
    assert {row.id for row in queued} == set(others)


async def test_what_is_put_off_while_somebody_resumes_is_woken(
    sluice: Command, sweeps: tuple[Sweep, Sweep], engine: Engine, rows: Rows, add: Add
) -> None:
    assert sluice("pause", "--use-case", "draft").code == 0
    (job,) = add(due_s=-1, held_back=None)
    # The stager's statement is held up in its middle.
    rows(
        "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN PERFORM pg_advisory_xact_lock(7); RETURN NEW; END$$"
    )
    rows(
        "CREATE TRIGGER hold BEFORE UPDATE ON jobs FOR EACH ROW"
        " WHEN (NEW.held_back IS NOT NULL) EXECUTE FUNCTION hold()"
    )
    waits = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"

    async def resume() -> None:
        assert (await asyncio.to_thread(sluice, "resume", "--use-case", "draft")).code == 0
        await sweeps[1].wake()

    with engine.connect() as line:
        line.exec_driver_sql("SELECT pg_advisory_lock(7)")
        staging = asyncio.create_task(sweeps[0].stage())
        await eventually_async(lambda: asyncio.to_thread(rows, waits))
        resuming = asyncio.create_task(resume())
        done, _ = await asyncio.wait([resuming], timeout=1)
        assert not done
        line.exec_driver_sql("SELECT pg_advisory_unlock(7)")
        await asyncio.gather(staging, resuming)
    assert due(rows) == {job}


async def test_parked_interactive_jobs_get_in_beside_a_flood_of_fresh_ones(
    settings: Settings, rows: Rows, add: Add
) -> None:
    fresh = add(200, due_s=-1, held_back=None)
    rows("UPDATE jobs SET state = 'queued', published_at = now()")
    parked = add(50, due_s=-1, held_back=None)
    bulk = add(
        50, due_s=-1, held_back=None, queue="draft.openai.bulk", lane="bulk", use_case="draft"
    )
    rows(
        "INSERT INTO jobs SELECT (jsonb_populate_record(j, jsonb_build_object("
        "'id', gen_random_uuid(), 'queue', 'draft.openai.bulk', 'lane', 'bulk'))).*"
        " FROM jobs j WHERE state = 'queued'"
    )
    sweep = Sweep(settings.model_copy(update={"stage_ahead_jobs": 100}))
    try:
        await sweep.stage()
        staged = {row.id for row in rows("SELECT id FROM jobs WHERE fence = 2")}
        assert len(staged & set(parked)) == 5
        # The bulk lane's broker is full: nothing more goes in.
        assert not staged & set(bulk)
        assert not staged & set(fresh)
        for _ in range(9):
            await sweep.stage()
    finally:
        await sweep.close()
    assert set(parked) <= {row.id for row in rows("SELECT id FROM jobs WHERE fence = 2")}


# What people see


async def test_a_job_that_expires_says_what_held_it_back(
    sweeps: tuple[Sweep, Sweep], rows: Rows, add: Add
) -> None:
    why = f"{LUNA}: its breaker is open; {SOL}: it is at its limit"
    (held,) = add(left_s=-1, held_back=why)
    (plain,) = add(left_s=-1, held_back=None)
    await sweeps[0].expire()
    messages = {
        row.job_id: row.body["error"]["message"] for row in rows("SELECT job_id, body FROM results")
    }
    assert messages == {
        held: f"its deadline passed before it was answered; {why}",
        plain: "its deadline passed before it was answered",
    }
    assert rows("SELECT 1 FROM jobs WHERE held_back IS NOT NULL") == []


def test_job_show_says_what_holds_it_back(settings: Settings, sluice: Command, rows: Rows) -> None:
    why = f"{LUNA}: its breaker is open"
    with Sluice(settings) as client:
        job = client.submit("draft", "hello")
        held = "UPDATE jobs SET state = %(state)s, held_back = %(why)s"
        rows(held, state="parked", why=why)
        assert client.get(job.id).held_back == why
        shown = sluice("job", "show", job.id)
        assert f"held back\t{why}" in shown.out
        assert sluice("job", "show", job.id, "--json").json["held_back"] == why
        rows(held, state="queued", why=why)
        assert client.get(job.id).held_back is None
        assert "held back" not in sluice("job", "show", job.id).out


def test_retry_forgets_what_held_it_back(settings: Settings, rows: Rows) -> None:
    with Sluice(settings) as client:
        job = client.submit("draft", "hello")
        job.cancel()
        rows("UPDATE jobs SET held_back = 'x', ruled_out = ARRAY[gen_random_uuid()]")
        client.retry(job.id)
    assert rows("SELECT held_back, ruled_out, refused FROM jobs") == [(None, [], [])]

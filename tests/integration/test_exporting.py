"""Exporting an account: all of it, nobody else's, no keys, in a file of one's own."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest
import redis
from sqlalchemy import Engine

from sluicegate import Sluice
from sluicegate.producers import exporting
from sluicegate.shared import accounts
from sluicegate.shared.settings import Settings
from tests.command_line import Command
from tests.databases import Rows
from tests.stand_in import StandIn

KEY = "a-key-or-its-token"

Work = Callable[[UUID], StandIn]


@pytest.fixture
def client(settings: Settings) -> Iterator[Sluice]:
    with Sluice(settings) as client:
        yield client


@pytest.fixture
def sluice(settings: Settings, command_line: Callable[[Settings], Command]) -> Command:
    return command_line(settings)


@pytest.fixture
def work(engine: Engine, redis_client: redis.Redis, settings: Settings) -> Work:
    return lambda job_id: StandIn(
        engine=engine, client=redis_client, settings=settings, job_id=job_id
    )


_OF_EACH = (
    "UPDATE accounts SET alert_url = 'https://acme.example', alert_secret_encrypted = %(key)s",
    """
    INSERT INTO provider_keys (id, provider, account_id, api_key_encrypted)
    SELECT gen_random_uuid(), 'openai', id, %(key)s FROM accounts
    """,
    """
    INSERT INTO llm_providers (id, name, provider, model, api_key_encrypted, account_id,
        max_tokens, context_tokens, is_active)
    SELECT gen_random_uuid(), 'own of ' || name, 'openai', 'm', %(key)s, id, 9, 99, false
    FROM accounts
    """,
    """
    INSERT INTO alerts (kind, account_id, message)
    SELECT 'suspended', id, 'told ' || name FROM accounts
    """,
    """
    INSERT INTO budgets (id, account_id, time_zone, day_limit_nano_usd, day_started_at,
        day_resets_at, month_started_at, month_resets_at)
    SELECT gen_random_uuid(), id, 'UTC', 5, now(), now(), now(), now() FROM accounts
    """,
)


@pytest.fixture(autouse=True)
def _accounts(engine: Engine, rows: Rows) -> None:
    with engine.connect() as connection:
        for name in ("acme", "other"):
            accounts.add_account(connection, name)
    for statement in _OF_EACH:
        rows(statement, key=KEY)


_ATTEMPT = """
WITH attempt AS (
    INSERT INTO attempts (id, job_id, fence, number, worker_id, account_id, use_case, provider_id,
        provider, model, state, reserved_nano_usd, baseline_reserved_nano_usd, raw_usage)
    SELECT gen_random_uuid(), j.id, 1, 1, j.id, j.account_id, j.use_case, j.id, 'p', 'm',
           'succeeded', 5, 5, '{"prompt_tokens": 3}'
    FROM jobs j WHERE j.id = %(job)s RETURNING *
)
INSERT INTO cost_entries (attempt_id, job_id, account_id, use_case, provider_id, provider, model,
    kind, amount_nano_usd, baseline_nano_usd, price_version, dispatched_at)
SELECT id, job_id, account_id, use_case, provider_id, provider, model, 'actual', 1234567890123, 5,
       'v', dispatched_at FROM attempt
"""


def test_all_of_it_and_nobody_elses(
    client: Sluice, sluice: Command, work: Work, rows: Rows
) -> None:
    done = client.submit(
        "draft", "Grüße an Zoë", account="acme", metadata={"lead": "7"}, request_id="r-1"
    )
    work(done.id).answer("Sehr gern")
    rows(_ATTEMPT, job=done.id)
    waiting = client.submit("draft", "waits", account="acme")
    batch = client.submit_batch("summary", ["one"], account="acme", name="calls.csv")
    client.submit("draft", "a secret of another", account="other")

    outcome = sluice("account", "export", "acme", "--out", "acme.jsonl")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == "sluice: acme with 3 jobs is in acme.jsonl\n"
    text = Path("acme.jsonl").read_text()
    assert Path("acme.jsonl").stat().st_mode & 0o777 == 0o600
    assert KEY not in text
    assert "other" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    changes = [line for line in lines if line["type"] == "change"]
    lines = [line for line in lines if line["type"] != "change"]
    assert {change["kind"] for change in changes} >= {"account", "provider", "budget"}
    kinds = [line["type"] for line in lines]
    assert kinds == ["account", "provider", "budget", "alert", "batch", "job", "job", "job"]
    account, provider, budget, alert, of_batch, *jobs = lines
    assert (account["name"], account["alert_url"]) == ("acme", "https://acme.example")
    assert (provider["name"], alert["message"]) == ("own of acme", "told acme")
    assert (budget["day_limit_nano_usd"], of_batch["name"]) == (5, "calls.csv")
    first, second, third = jobs
    assert (first["id"], first["request_id"]) == (str(done.id), "r-1")
    assert first["request"]["messages"][0]["content"][0]["text"] == "Grüße an Zoë"
    assert first["request"]["metadata"] == {"lead": "7"}
    assert first["result"]["text"] == "Sehr gern"
    (attempt,) = first["attempts"]
    assert (attempt["model"], attempt["raw_usage"]) == ("m", {"prompt_tokens": 3})
    assert [one["amount_nano_usd"] for one in first["cost_entries"]] == [1234567890123]
    assert (second["id"], second["result"], second["attempts"]) == (str(waiting.id), None, [])
    assert third["batch_id"] == str(batch.id)

    rows("DELETE FROM job_bodies")
    streamed = sluice("account", "export", str(account["id"]))
    assert streamed.code == 0
    assert [json.loads(line).get("request") for line in streamed.out.splitlines()][-1] is None
    assert "Grüße" not in streamed.out


def test_a_file_is_there_when_it_is_complete(
    client: Sluice, sluice: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.submit("draft", "hi", account="acme")
    Path("acme.jsonl").write_text("as it was")

    def broken(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "export_account", broken)
    outcome = sluice("account", "export", "acme", "--out", "acme.jsonl")
    assert (outcome.code, outcome.err) == (
        1,
        "sluice: acme.jsonl cannot be written: No space left on device\n",
    )
    assert Path("acme.jsonl").read_text() == "as it was"
    assert [path.name for path in Path().iterdir()] == ["acme.jsonl"]
    missing = sluice("account", "export", "acme", "--out", "no/such/folder.jsonl")
    assert (
        missing.err == "sluice: no/such/folder.jsonl cannot be written: No such file or directory\n"
    )
    assert sluice("account", "export", "nobody").err == "sluice: there is no account 'nobody'\n"


def test_memory_stays_small(
    client: Sluice, settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 500_000
    client.submit_many("draft", ["x" * size] * 40, account="acme")
    monkeypatch.setattr(exporting, "_PAGE", 25)
    monkeypatch.setattr(exporting, "_JOBS", exporting._JOBS.replace("LIMIT 500", "LIMIT 25"))
    with engine.connect() as connection:
        found = accounts.find_account(connection, "acme")
    written = []
    tracemalloc.start()
    jobs = exporting.export_account(settings, found, lambda line: written.append(len(line)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert jobs == 40
    assert sum(written) > 40 * size
    assert peak < 10 * size

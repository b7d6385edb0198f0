"""Erasing an account: a canary in every place that can hold one, and none left afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine

from sluicegate import IdempotencyConflict, InvalidJob, Purged, Sluice
from sluicegate.producers import erasing
from sluicegate.producers.erasing import Erasure
from sluicegate.shared import accounts
from sluicegate.shared.alerts import alert_key
from sluicegate.shared.ids import new_id
from sluicegate.shared.jobs import Lane
from sluicegate.shared.settings import Settings
from sluicegate.workers.journal import KEY as JOURNAL_KEY
from sluicegate.workers.local.sandbox_control import SandboxControl
from tests.command_line import Command
from tests.databases import Rows
from tests.dumping import dump, dump_redis
from tests.harness import Rig, with_sandbox
from tests.polling import eventually
from tests.stand_in import StandIn

CANARY = "canary-4711"

Work = Callable[[UUID], StandIn]

_OWN_ROW = """
INSERT INTO llm_providers (id, name, provider, model, base_url, api_key_encrypted, account_id,
                           max_tokens, context_tokens, is_active)
SELECT %(id)s, %(canary)s, 'openai', %(canary)s, 'https://' || %(canary)s, %(canary)s, a.id, 9, 99,
       false
FROM accounts a WHERE a.name = %(canary)s
"""
# A call to a row of its own, which failed.
_ATTEMPT = """
WITH attempt AS (
    INSERT INTO attempts (id, job_id, fence, number, worker_id, account_id, use_case, provider_id,
        provider, model, state, reserved_nano_usd, baseline_reserved_nano_usd, error_message,
        request_id)
    SELECT %(attempt)s, j.id, 1, 1, %(attempt)s, j.account_id, j.use_case, %(own)s, %(canary)s,
           %(canary)s, %(state)s, 500, 500, %(canary)s, %(canary)s
    FROM jobs j WHERE j.id = %(job)s RETURNING *
)
INSERT INTO cost_entries (attempt_id, job_id, account_id, use_case, provider_id, provider, model,
    kind, amount_nano_usd, baseline_nano_usd, price_version, dispatched_at)
SELECT id, job_id, account_id, use_case, provider_id, provider, model, 'estimate', 500, 500, 'v',
       dispatched_at FROM attempt
"""
_OF_ITS_OWN = (
    """
    UPDATE accounts SET alert_url = 'https://' || %(canary)s, alert_secret_encrypted = %(canary)s
    WHERE name = %(canary)s
    """,
    """
    INSERT INTO provider_keys (id, provider, account_id, api_key_encrypted)
    SELECT gen_random_uuid(), 'openai', id, %(canary)s FROM accounts WHERE name = %(canary)s
    """,
    """
    INSERT INTO alerts (kind, account_id, message, post_error)
    SELECT 'suspended', id, %(canary)s, %(canary)s FROM accounts WHERE name = %(canary)s
    """,
    """
    INSERT INTO gate_changes (kind, provider_id, before, after, reason)
    VALUES ('breaker', %(own)s, 'closed', 'open', %(canary)s)
    """,
)


@pytest.fixture
def rig(settings: Settings, sandbox: SandboxControl, tmp_path: Any) -> Iterator[Rig]:
    with Rig(settings=with_sandbox(settings, sandbox), sandbox=sandbox, folder=tmp_path) as rig:
        yield rig


@pytest.fixture
def sluice(rig: Rig, command_line: Callable[[Settings], Command]) -> Command:
    return command_line(rig.settings)


@pytest.fixture
def work(rig: Rig, engine: Engine) -> Work:
    return lambda job_id: StandIn(
        engine=engine, client=rig.redis, settings=rig.settings, job_id=job_id
    )


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no client that still knows the account."""
    monkeypatch.setattr(erasing, "_CLOSED_AFTER_S", 0.0)
    monkeypatch.setattr(erasing, "_PATIENCE_S", 2.0)


@pytest.fixture
def own(engine: Engine, rows: Rows) -> UUID:
    """Return the id of the account's own provider row; it has all that an account may have."""
    with engine.connect() as connection:
        accounts.add_account(connection, CANARY)
        accounts.add_account(connection, "other")
    own = new_id()
    rows(_OWN_ROW, id=own, canary=CANARY)
    for statement in _OF_ITS_OWN:
        rows(statement, canary=CANARY, own=own)
    return own


def options(**more: Any) -> dict[str, Any]:
    return {
        "account": CANARY,
        "system": CANARY,
        "metadata": {CANARY: CANARY},
        "submitted_by": CANARY,
        "request_id": CANARY,
        **more,
    }


def costs(rows: Rows) -> list[tuple[Any, ...]]:
    return [
        tuple(row)
        for row in rows(
            "SELECT id, attempt_id, kind, amount_nano_usd, input_tokens, output_tokens, use_case"
            " FROM cost_entries ORDER BY id"
        )
    ]


def test_no_canary_is_left(rig: Rig, sluice: Command, rows: Rows, own: UUID, work: Work) -> None:
    client = rig.client
    rig.start_sweep()
    rig.start_worker("anthropic", ["draft"])
    answered = [
        client.submit("draft", CANARY, **options(idempotency_key=f"{CANARY} 1", stream=True)),
        client.submit("draft", CANARY, **options(reply_to="crm")),
    ]
    others = [
        client.submit("draft", "of another", account="other", reply_to="crm", metadata={"a": "b"})
    ]
    for handle in (*answered, *others):
        handle.result(timeout=60)
    # Answers and errors that quote what was asked.
    rows(
        "UPDATE results SET body = jsonb_set(body::jsonb, '{text}', to_jsonb(%(canary)s::text))"
        " WHERE job_id = ANY(%(ids)s)",
        canary=CANARY,
        ids=[handle.id for handle in answered],
    )
    failed = client.submit("vision", CANARY, **options())
    stand_in = work(failed.id)
    stand_in.say("delta", text=CANARY)
    said = {"error_class": "server", "message": CANARY, "request_id": CANARY}
    stand_in.end(stand_in.settle("failed", error=said, provider=CANARY, model=CANARY))
    attempt = new_id()
    rows(_ATTEMPT, attempt=attempt, own=own, canary=CANARY, job=failed.id, state="unknown")
    # An answer that came while Postgres was away: it is booked, and then it is gone.
    journaled = {
        "job_id": str(failed.id), "fence": 1, "job_state": "succeeded", "attempt_id": str(attempt),
        "attempt_state": "succeeded", "kind": "actual", "amount_nano_usd": 300,
        "error_message": CANARY, "body": {"state": "succeeded", "text": CANARY},
    }  # fmt: skip
    rig.redis.xadd(rig.settings.redis_prefix + JOURNAL_KEY, {"s": json.dumps(journaled)})
    # What waits, what runs, and what came in a file.
    waiting = client.submit("vision", CANARY, **options())
    batch = client.submit_batch("vision", [CANARY], name=CANARY, **options(idempotency_key=CANARY))
    rows(
        "UPDATE jobs SET held_back = %(canary)s WHERE batch_id = %(id)s", canary=CANARY, id=batch.id
    )
    rig.sandbox.settings(latency_ms=120_000)
    running = client.submit("draft", CANARY, **options())
    eventually(lambda: client.get(running.id).history)
    channel = alert_key(rows("SELECT id FROM accounts WHERE name = %(n)s", n=CANARY)[0].id)
    rig.redis.xadd(rig.settings.redis_prefix + channel, {"a": CANARY})
    in_channel = rig.settings.redis_prefix + "channel:crm"
    eventually(lambda: rig.redis.xlen(in_channel) == 2)
    assert dump(rig.settings.database_dsn).count(CANARY) > 30
    assert CANARY in dump_redis(rig.redis, rig.settings.redis_prefix)

    began = time.monotonic()
    erased = sluice("account", "erase", CANARY, "--yes", "--json").json
    assert time.monotonic() - began > 10  # until every client knows
    assert CANARY not in dump(rig.settings.database_dsn)
    assert CANARY not in dump_redis(rig.redis, rig.settings.redis_prefix)
    assert (erased["jobs"], erased["erased"]) == (6, 6)
    assert erased["cancelled"] == 2

    # Costs are all there, those of the call that was cut off and of the late answer too.
    (total,) = rows(
        "SELECT count(*) AS entries, sum(amount_nano_usd)::bigint AS amount,"
        " sum(amount_nano_usd) FILTER (WHERE attempt_id = %(attempt)s)::bigint AS late"
        " FROM cost_entries WHERE account_id = %(id)s",
        attempt=attempt,
        id=erased["id"],
    )
    assert (total.entries, total.late) == (5, 300)
    (jobs,) = rows(
        "SELECT sum(cost_nano_usd)::bigint AS amount FROM jobs WHERE account_id = %(id)s",
        id=erased["id"],
    )
    assert jobs.amount + 500 == total.amount  # the stand-in's own estimate is no job's
    for handle in (*answered, failed, waiting, running):
        view = client.get(handle.id)
        assert view.purged_at is not None
        assert view.account == erased["name"]
        assert view.submitted_from is None
    with pytest.raises(Purged):
        answered[0].result(timeout=10)
    assert client.get(running.id).state == client.get(waiting.id).state == "cancelled"
    assert batch.progress().cancelled == 1
    # The others keep theirs.
    assert others[0].result(timeout=10).text
    assert client.get(others[0].id).metadata == {"a": "b"}
    with client.replies("crm", "group", timeout=5) as replies:
        assert [reply.job_id for reply in replies] == [others[0].id]
    with pytest.raises(InvalidJob, match="no active account"):
        client.submit("draft", "hi", account=CANARY)
    shown = sluice("account", "show", erased["name"], "--json").json
    assert (shown["is_active"], shown["keys"], shown["providers"]) == (False, [], [])


@pytest.mark.usefixtures("_soon", "own")
def test_a_job_that_nobody_can_stop_is_a_reason_to_wait(
    rig: Rig, sluice: Command, work: Work
) -> None:
    client = rig.client
    running = client.submit("draft", CANARY, **options())
    done = client.submit("draft", CANARY, **options())
    work(done.id).answer("yes")
    work(running.id)
    outcome = sluice("account", "erase", CANARY, "--yes")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == (
        f"sluice: {CANARY} gets no new jobs, but nothing of it is erased: jobs of it still run "
        "(1), their workers were not heard of; see that the sweep runs, and erase it again\n"
    )
    assert done.result(timeout=10).text == "yes"
    # Its worker has no row, so it is dead: the sweep ends the job, and then there is no reason.
    rig.start_sweep()
    eventually(lambda: client.get(running.id).state == "cancelled")
    assert sluice("account", "erase", CANARY, "--yes", "--json").json["erased"] == 2
    assert CANARY not in dump(rig.settings.database_dsn)


@pytest.mark.usefixtures("_soon", "own")
def test_whoever_was_cut_off_begins_again(
    rig: Rig, sluice: Command, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = rig.client
    for _ in range(3):
        client.submit_many("vision", [CANARY] * 5, **options(lane=Lane.BULK))
    monkeypatch.setattr(erasing, "_NEXT", erasing._NEXT.replace("LIMIT 500", "LIMIT 4"))

    class Killed(BaseException):
        pass

    def killed_after(steps: int) -> None:
        def progress(erasure: Erasure) -> None:
            if erasure.done >= steps:
                raise Killed

        with Sluice(rig.settings) as one, one._open().engine.connect() as connection:
            eraser = erasing.Eraser(
                connection=connection,
                client=rig.redis,
                app=one._open().app,
                prefix=rig.settings.redis_prefix,
                account=CANARY,
                progress=progress,
            )
            with pytest.raises(Killed):
                eraser.run()

    killed_after(4)
    assert len(rows("SELECT 1 FROM job_bodies")) == 11
    killed_after(12)
    assert len(rows("SELECT 1 FROM job_bodies")) == 3
    erased = sluice("account", "erase", CANARY, "--yes", "--json").json
    assert (erased["jobs"], erased["erased"]) == (15, 3)
    assert CANARY not in dump(rig.settings.database_dsn)
    # By its new name it is erased already.
    again = sluice("account", "erase", erased["name"], "--yes", "--json").json
    assert again == {**erased, "erased": 0, "cancelled": 0}
    gone = sluice("account", "erase", CANARY, "--yes")
    assert (gone.code, gone.err) == (1, f"sluice: there is no account '{CANARY}'\n")


@pytest.mark.usefixtures("_soon")
def test_the_default_account_is_there_again(rig: Rig, sluice: Command, rows: Rows) -> None:
    client = rig.client
    handle = client.submit("draft", CANARY, idempotency_key="k")
    erased = sluice("account", "erase", "default", "--yes", "--json").json
    assert client.get(handle.id).account == erased["name"]
    assert CANARY not in dump(rig.settings.database_dsn)
    with Sluice(rig.settings) as fresh:
        again = fresh.submit("draft", "another", idempotency_key="k")
        assert again.id != handle.id
        assert fresh.get(again.id).account == "default"
        with pytest.raises(IdempotencyConflict):
            fresh.submit("draft", "a third", idempotency_key="k")


@pytest.mark.usefixtures("_soon", "own")
def test_it_asks_first(rig: Rig, sluice: Command) -> None:
    outcome = sluice("account", "erase", CANARY)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        f"sluice: --yes: is missing, and nobody can be asked about erasing {CANARY}\n"
    )
    rig.client.submit("draft", "hi", account=CANARY)

"""`sluice job` and `sluice queue`, as somebody at a terminal or a script sees them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from uuid import UUID, uuid4

import pytest
import redis
from sqlalchemy import Engine

from sluicegate import Sluice
from sluicegate.shared import accounts
from sluicegate.shared.settings import Settings
from tests.command_line import Command, Outcome
from tests.databases import Rows
from tests.stand_in import StandIn


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
def client(settings: Settings) -> Iterator[Sluice]:
    with Sluice(settings) as client:
        yield client


@pytest.fixture
def stand_in(
    engine: Engine, redis_client: redis.Redis, settings: Settings
) -> Callable[[UUID], StandIn]:
    return lambda job_id: StandIn(
        engine=engine, client=redis_client, settings=settings, job_id=job_id
    )


_FAILED = {"error_class": "auth", "message": "no key\tthat\nworks"}


def lines(outcome: Outcome) -> list[list[str]]:
    return [line.split("\t") for line in outcome.out.splitlines()]


def test_show_says_all_that_is_known(
    sluice: Command, client: Sluice, stand_in: Callable[[UUID], StandIn]
) -> None:
    job_id = client.submit(
        "draft", "hi", metadata={"lead": "4711"}, reply_to="crm-eu", request_id="r-7"
    ).id
    stand_in(job_id)
    assert sluice("job", "cancel", job_id, "--no-wait").code == 0
    shown = dict(lines(sluice("job", "show", job_id)))
    assert (shown["state"], shown["reply to"], shown["request id"]) == ("running", "crm-eu", "r-7")
    assert shown["metadata lead"] == "4711"
    assert shown["cancel asked"]
    view = json.loads(sluice("job", "show", job_id, "--json").out)
    assert (view["reply_to"], view["metadata"]) == ("crm-eu", {"lead": "4711"})
    assert view["cancel_requested_at"] is not None


def test_list_filters_and_prints(
    sluice: Command, client: Sluice, engine: Engine, stand_in: Callable[[UUID], StandIn]
) -> None:
    with engine.connect() as connection:
        accounts.add_account(connection, "acme")
    failed = client.submit("draft", "hi", account="acme").id
    stand_in(failed).settle("failed", error=_FAILED)
    queued = client.submit("summary", "hi").id
    head, first, second = lines(sluice("job", "list"))
    assert head == ["job", "state", "queue", "account", "attempts", "cost", "age", "error"]
    assert first[:5] == [str(queued), "queued", "summary.anthropic", "default", "0 of 5"]
    assert (second[0], second[1], second[7]) == (str(failed), "failed", "no key that works")
    for filters in (
        ("--state", "failed", "--state", "expired"),
        ("--account", "acme"),
        ("--use-case", "draft", "--since", "1h"),
        ("--queue", "draft.anthropic", "--lane", "interactive", "--limit", 1),
    ):
        outcome = sluice("job", "list", "--json", *filters)
        (found,) = json.loads(outcome.out)["jobs"]
        assert (found["id"], found["error"]) == (str(failed), _FAILED["message"])
    assert lines(sluice("job", "list", "--batch", uuid4())) == [head]


def test_cancel_says_what_became_of_each(
    sluice: Command, client: Sluice, stand_in: Callable[[UUID], StandIn]
) -> None:
    waiting, over = client.submit("draft", "hi").id, client.submit("draft", "hi").id
    stand_in(over).settle()
    outcome = sluice("job", "cancel", waiting)
    assert outcome == (0, f"{waiting}\tcancelled\n", "")
    missing = uuid4()
    outcome = sluice("job", "cancel", waiting, over, missing, "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["jobs"] == [
        {"id": str(waiting), "state": "cancelled"},
        {"id": str(over), "state": "succeeded"},
        {"id": str(missing), "state": None},
    ]
    assert outcome.err.splitlines() == [
        f"sluice: there is no job {missing}",
        f"sluice: job {over} was over before: it succeeded",
    ]


def test_cancel_waits_for_the_worker(
    sluice: Command, client: Sluice, engine: Engine, stand_in: Callable[[UUID], StandIn]
) -> None:
    job_id = client.submit("draft", "hi").id
    worker = stand_in(job_id)
    assert sluice("job", "cancel", job_id, "--no-wait").out == f"{job_id}\trunning\n"
    reason = {"error_class": "cancelled", "message": "the job was cancelled"}
    worker.end(worker.settle("cancelled", error=reason))
    # It had ended by the time the command looked.
    assert sluice("job", "cancel", job_id) == (0, f"{job_id}\tcancelled\n", "")


def test_cancel_waits_no_longer_than_it_says(
    sluice: Command,
    client: Sluice,
    stand_in: Callable[[UUID], StandIn],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sluicegate.producers.job_commands._WAIT_S", 0.2)
    job_id = client.submit("draft", "hi").id
    stand_in(job_id)
    outcome = sluice("job", "cancel", job_id)
    assert (outcome.code, outcome.out) == (1, f"{job_id}\trunning\n")
    assert "still runs" in outcome.err


def test_retry_takes_ids_and_refuses_what_did_not_go_wrong(
    sluice: Command, client: Sluice, stand_in: Callable[[UUID], StandIn]
) -> None:
    failed, queued = client.submit("draft", "hi").id, client.submit("draft", "hi").id
    stand_in(failed).settle("failed", error=_FAILED)
    assert sluice("job", "retry", failed) == (0, f"{failed}\tqueued\n", "")
    outcome = sluice("job", "retry", queued)
    assert (outcome.code, outcome.out) == (1, f"{queued}\tqueued\n")
    assert f"job {queued} is queued; only a failed" in outcome.err
    done, unknown = client.submit("draft", "hi").id, uuid4()
    stand_in(done).answer("done")
    outcome = sluice("job", "retry", done, unknown)
    assert (outcome.code, lines(outcome)) == (
        1,
        [[str(done), "succeeded"], [str(unknown), "not there"]],
    )


def test_retry_of_a_choice_asks_first(
    sluice: Command,
    client: Sluice,
    stand_in: Callable[[UUID], StandIn],
    rows: Rows,
) -> None:
    ids = [client.submit("draft", "hi").id for _ in range(3)]
    for job_id in ids[:2]:
        stand_in(job_id).settle("failed", error=_FAILED)
    outcome = sluice("job", "retry", "--state", "failed", "--since", "1h")
    assert (outcome.code, outcome.out) == (2, "")
    assert "--yes" in outcome.err
    assert rows("SELECT count(*) FROM jobs WHERE state = 'failed'") == [(2,)]
    outcome = sluice("job", "retry", "--since", "1h", "--yes")
    assert outcome.code == 0
    assert sorted(line[0] for line in lines(outcome)) == sorted(map(str, ids[:2]))
    assert rows("SELECT DISTINCT state FROM jobs") == [("queued",)]
    outcome = sluice("job", "retry", "--state", "expired", "--yes")
    assert outcome == (0, "", "sluice: no job meets these options\n")


def test_cancel_of_a_choice_takes_what_is_not_over(
    sluice: Command, client: Sluice, rows: Rows
) -> None:
    client.submit_many("draft", ["a", "b"], lane="bulk")
    client.submit("draft", "c")
    assert sluice("job", "cancel", "--lane", "bulk", "-y").code == 0
    assert rows("SELECT lane, state FROM jobs ORDER BY lane, state") == [
        ("bulk", "cancelled"),
        ("bulk", "cancelled"),
        ("interactive", "queued"),
    ]


def test_events_are_printed_as_they_come(
    sluice: Command, client: Sluice, stand_in: Callable[[UUID], StandIn]
) -> None:
    job_id = client.submit("draft", "hi", stream=True).id
    stand_in(job_id).answer("Dear\n", "Ada", cost_nano_usd=5_000)
    outcome = sluice("job", "events", job_id)
    assert outcome.code == 0, outcome.err
    assert lines(outcome) == [
        ["1-1", "started", "attempt 1 at test-model"],
        ["1-2", "delta", r'"Dear\n"'],
        ["1-3", "delta", '"Ada"'],
        ["1-18446744073709551615", "completed", "8 characters for $0.000005"],
    ]
    printed = sluice("job", "events", job_id, "--last-id", "1-2", "--json").out.splitlines()
    delta, completed = map(json.loads, printed)
    assert (delta["id"], delta["type"], delta["text"]) == ("1-3", "delta", "Ada")
    assert completed["result"]["text"] == "Dear\nAda"


def test_events_of_a_job_that_failed_and_of_one_that_goes_on(
    sluice: Command, client: Sluice
) -> None:
    job_id = client.submit("draft", "hi").id
    outcome = sluice("job", "events", job_id, "--timeout", 0)
    assert outcome.code == 1
    assert "did not end within 0 s" in outcome.err
    client.cancel(job_id)
    outcome = sluice("job", "events", job_id)
    assert outcome.code == 0
    assert lines(outcome)[-1][1:] == ["failed", "cancelled: the job was cancelled"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("job", "list", "--since", "yesterday"), "--since: 'yesterday'"),
        (("job", "list", "--since", "2026-11-22T10:00"), "time zone"),
        (("job", "list", "--state", "broken"), "--state"),
        (("job", "list", "--limit", "0"), "--limit: must be"),
        (("job", "list", "--batch", "7"), "batch"),
        (("job", "cancel"), "name jobs"),
        (("job", "cancel", "7"), "job_id"),
        (("job", "retry", str(uuid4()), "--state", "failed"), "give one of both"),
        (("job", "events", str(uuid4()), "--last-id", "x"), "--last-id: must be"),
        (("queue", "show"), "show"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    sluice: Command, arguments: tuple[str, ...], said: str
) -> None:
    outcome = sluice(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert said in outcome.err
    assert outcome.err.startswith("sluice: ")
    assert outcome.err.count("\n") == 1


def test_what_is_not_there_is_code_1(sluice: Command) -> None:
    for arguments in (
        ("job", "cancel", uuid4()),
        ("job", "retry", uuid4()),
        ("job", "events", uuid4()),
    ):
        outcome = sluice(*arguments)
        assert outcome.code == 1, arguments
        assert "there is no" in outcome.err
        assert outcome.err.count("\n") == 1


def test_queues_show_what_waits_and_who_serves_it(
    sluice: Command,
    client: Sluice,
    rows: Rows,
    stand_in: Callable[[UUID], StandIn],
) -> None:
    ids = [client.submit("draft", "hi").id for _ in range(3)]
    stand_in(ids[0])
    client.submit_many("summary", ["a", "b"], lane="bulk")
    rows("UPDATE jobs SET run_at = now() - interval '90 s' WHERE state = 'parked'")
    for name, ago, draining in (("w1", "0 s", False), ("w2", "0 s", True), ("w3", "1 h", False)):
        rows(
            "INSERT INTO workers (id, name, pool, lane, queues, seen_at, draining)"
            " VALUES (gen_random_uuid(), %(name)s, 'anthropic', 'interactive',"
            " '{draft.anthropic,voice.anthropic}', now() - %(ago)s::interval, %(draining)s)",
            name=name,
            ago=ago,
            draining=draining,
        )
    outcome = sluice("queue", "list", "--json")
    draft, summary, voice = json.loads(outcome.out)["queues"]
    assert draft.pop("oldest_s") >= 0
    assert draft == {
        "queue": "draft.anthropic",
        "lane": "interactive",
        "pool": "anthropic",
        "depth": 3,
        "queued": 2,
        "parked": 0,
        "running": 1,
        "consumers": 1,
    }
    assert (summary["queue"], summary["lane"]) == ("summary.anthropic.bulk", "bulk")
    assert (summary["depth"], summary["parked"], summary["consumers"]) == (0, 2, 0)
    assert summary["oldest_s"] >= 90
    assert (voice["queue"], voice["oldest_s"], voice["consumers"]) == ("voice.anthropic", None, 1)
    assert outcome.err == (
        "sluice: nobody serves summary.anthropic.bulk; "
        "start `sluice worker anthropic --lane bulk`\n"
    )
    printed = lines(sluice("queue", "list"))
    assert printed[0] == [
        *("queue", "lane", "pool", "depth", "queued", "parked", "running", "oldest"),
        "consumers",
    ]
    assert printed[2][7] == "1.5 m"
    assert len(lines(sluice("queue", "list", "--all"))) > len(printed)


def test_a_queue_whose_messages_nobody_knows_is_shown(
    sluice: Command, redis_client: redis.Redis, settings: Settings
) -> None:
    redis_client.lpush(settings.redis_prefix + "voice.openai", "a message")
    (found,) = json.loads(sluice("queue", "list", "--json").out)["queues"]
    assert (found["queue"], found["depth"], found["queued"]) == ("voice.openai", 1, 0)


def test_somebody_at_a_terminal_is_asked_and_shown_a_table(
    variables: dict[str, str], client: Sluice, rows: Rows
) -> None:
    client.submit("draft", "hi")

    def at_terminal(answer: bytes) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        argv = [sys.executable, "-m", "sluicegate.cli", "job", "cancel", "--since", "1h"]
        with subprocess.Popen(
            argv, env=variables, stdin=theirs, stdout=theirs, stderr=theirs
        ) as process:
            os.close(theirs)
            os.write(ours, answer)
            shown = b""
            try:
                while chunk := os.read(ours, 4096):
                    shown += chunk
            except OSError:  # what Linux says at the end of a terminal
                pass
            os.close(ours)
        return process.returncode, shown.decode()

    code, shown = at_terminal(b"n\n")
    assert code == 1
    assert "Cancel 1 job?" in shown
    assert rows("SELECT state FROM jobs") == [("queued",)]
    code, shown = at_terminal(b"y\n")
    assert code == 0
    assert "cancelled" in shown
    assert rows("SELECT state FROM jobs") == [("cancelled",)]

"""`sluice breaker`, `pause` and `resume`, as an operator or a script sees them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis
import redis.asyncio
from pydantic import SecretStr
from sqlalchemy import Engine

from sluicegate.producers.doctor import examine
from sluicegate.shared.admission.gate import Ask, Gate, Outcome, Reason, Report, Verdict
from sluicegate.shared.catalogue import VERSION_KEY, Catalogue, Provider, read
from sluicegate.shared.jobs import Lane
from sluicegate.shared.settings import Settings
from sluicegate.workers.sweep.loops import Sweep
from tests.command_line import Command

LUNA = "openai-gpt-6-luna"

NOWHERE = SecretStr("redis://127.0.0.1:1/0")


@pytest.fixture
def sluice(settings: Settings, command_line: Callable[[Settings], Command]) -> Command:
    return command_line(settings)


@pytest.fixture
def catalogue(engine: Engine) -> Callable[[], Catalogue]:
    """Return a function that reads the catalogue as a worker does."""

    def once() -> Catalogue:
        with engine.connect() as line:
            return read(line)

    return once


Read = Callable[[], Catalogue]


def row(catalogue: Catalogue, name: str = LUNA) -> Provider:
    return next(one for one in catalogue.providers if one.name == name)


def account_id(engine: Engine, name: str) -> UUID:
    with engine.connect() as line:
        found = line.exec_driver_sql("SELECT id FROM accounts WHERE name = %(n)s", {"n": name})
        return UUID(str(found.scalar_one()))


class Caller:
    """Calls for a provider row as workers do, with nobody behind it."""

    def __init__(self, gate: Gate, account: UUID) -> None:
        self._gate = gate
        self._account = account

    async def admit(self, provider: Provider) -> tuple[UUID, Verdict]:
        attempt_id = uuid4()
        (verdict,) = await self._gate.admit(
            [
                Ask(
                    attempt_id=attempt_id,
                    provider=provider,
                    account_id=self._account,
                    lane=Lane.INTERACTIVE,
                    input_tokens=10,
                    output_tokens=10,
                )
            ]
        )
        return attempt_id, verdict

    async def call(self, provider: Provider, outcome: Outcome, **more: Any) -> None:
        attempt_id, verdict = await self.admit(provider)
        assert verdict.reason is None
        report = Report(
            attempt_id=attempt_id,
            provider=provider,
            account_id=self._account,
            lane=Lane.INTERACTIVE,
            generation=verdict.generation,
            is_probe=verdict.is_probe,
            outcome=outcome,
            reserved_input_tokens=10,
            reserved_output_tokens=10,
            **more,
        )
        await self._gate.report([report])


@pytest.fixture
def caller(async_redis: redis.asyncio.Redis, settings: Settings, engine: Engine) -> Caller:
    return Caller(Gate(async_redis, settings), account_id(engine, "default"))


@pytest.fixture
async def sweep(settings: Settings) -> AsyncIterator[Sweep]:
    sweep = Sweep(settings)
    yield sweep
    await sweep.close()


def shown(sluice: Command, name: str = LUNA) -> dict[str, Any]:
    (found,) = (
        one for one in sluice("breaker", "list", "--json").json["breakers"] if one["name"] == name
    )
    return dict(found)


def trail(sluice: Command, *arguments: str) -> list[tuple[str, str, str]]:
    changes = sluice("breaker", "log", "--json", *arguments).json["changes"]
    return [(one["kind"], one["before"], one["after"]) for one in changes]


# Pauses


@pytest.mark.parametrize(
    ("arguments", "kind", "name"),
    [
        (("--provider", LUNA), "provider", LUNA),
        (("--account", "default"), "account", "default"),
        (("--use-case", "draft"), "use_case", "draft"),
    ],
)
def test_pause_and_resume(
    *,
    sluice: Command,
    catalogue: Read,
    redis_client: redis.Redis,
    settings: Settings,
    engine: Engine,
    arguments: tuple[str, str],
    kind: str,
    name: str,
) -> None:
    def paused() -> bool:
        found = catalogue()
        pauses = found.pauses
        return {
            "provider": row(found).id in pauses.providers,
            "account": account_id(engine, "default") in pauses.accounts,
            "use_case": "draft" in pauses.use_cases,
        }[kind]

    word = kind.replace("_", " ")
    assert sluice("pause", *arguments) == (0, f"{word}\t{name}\tpaused\n", "")
    assert paused()
    token = redis_client.get(settings.redis_prefix + VERSION_KEY)
    assert token is not None
    again = sluice("pause", *arguments)
    assert again.code == 0
    assert again.err == f"sluice: {word} {name} was paused already\n"
    (listed,) = sluice("pause", "--json").json["paused"]
    assert (listed["kind"], listed["name"], listed["account"]) == (kind, name, None)
    assert sluice("resume").out.splitlines()[1].startswith(f"{word}\t{name}\t")

    assert sluice("resume", *arguments, "--json").json == {
        "kind": kind,
        "name": name,
        "account": None,
        "state": "running",
        "changed": True,
    }
    assert not paused()
    assert redis_client.get(settings.redis_prefix + VERSION_KEY) != token
    assert sluice("resume", *arguments, "--json").json["changed"] is False
    assert sluice("resume", "--json").json == {"paused": []}
    assert trail(sluice) == [("pause", "paused", "running"), ("pause", "running", "paused")]


def test_an_accounts_own_row_is_paused_by_itself(sluice: Command, catalogue: Read) -> None:
    assert sluice("account", "add", "acme").code == 0
    own = (LUNA, "--pool", "openai", "--model", "gpt-4o", "--account", "acme")
    assert sluice("provider", "add", *own).code == 0
    everybodys, of_acme = sorted(
        (one for one in catalogue().providers if one.name == LUNA),
        key=lambda one: one.account_id is not None,
    )
    outcome = sluice("pause", "--provider", LUNA)
    assert "account acme has a row openai-gpt-6-luna of its own" in outcome.err
    assert catalogue().pauses.providers == {everybodys.id}
    assert sluice("resume", "--provider", LUNA).code == 0
    assert sluice("pause", "--provider", LUNA, "--of", "acme").out == (
        f"provider\t{LUNA} (of acme)\tpaused\n"
    )
    assert catalogue().pauses.providers == {of_acme.id}
    assert shown_of(sluice, "acme")["state"] == "paused"
    assert shown_of(sluice, None)["state"] == "closed"
    assert sluice("pause").out.splitlines()[1].startswith(f"provider\t{LUNA} (of acme)\t")
    assert sluice("breaker", "force-open", LUNA, "--of", "acme").code == 0
    levers = {one.id: one.breaker for one in catalogue().providers if one.name == LUNA}
    assert levers == {everybodys.id: "auto", of_acme.id: "forced_open"}


def shown_of(sluice: Command, account: str | None) -> dict[str, Any]:
    (found,) = (
        one
        for one in sluice("breaker", "list", "--json").json["breakers"]
        if (one["name"], one["account"]) == (LUNA, account)
    )
    return dict(found)


@pytest.mark.parametrize("command", ["pause", "resume"])
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--provider", "nope"), 1, "there is no provider 'nope'; there are anthropic-"),
        (("--account", "nope"), 1, "there is no account 'nope'"),
        (("--use-case", "nope"), 1, "there is no use case 'nope'; there are complex"),
        (("--use-case", "draft", "--account", "default"), 2, "name one of --provider"),
        (("--of", "default"), 2, "of: stands with --provider alone"),
        (("--provider", LUNA, "--of", "nope"), 2, "there is no account 'nope'"),
        (("--provider", LUNA, "--of", "default"), 1, "there is no provider"),
    ],
)
def test_what_is_not_there_cannot_be_paused(
    sluice: Command, command: str, arguments: tuple[str, ...], code: int, said: str
) -> None:
    outcome = sluice(command, *arguments)
    assert (outcome.code, outcome.out) == (code, "")
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert trail(sluice) == []


def test_levers_and_pauses_work_without_redis(
    settings: Settings, command_line: Callable[[Settings], Command], catalogue: Read
) -> None:
    sluice = command_line(settings.model_copy(update={"redis_url": NOWHERE}))
    for arguments in (("pause", "--provider", LUNA), ("breaker", "force-open", LUNA)):
        outcome = sluice(*arguments)
        assert outcome.code == 0
        assert "Redis did not answer, so running processes see the change within" in outcome.err
    found = catalogue()
    assert row(found).id in found.pauses.providers
    assert row(found).breaker == "forced_open"
    for needs_redis in (("list",), ("reset", LUNA)):
        outcome = sluice("breaker", *needs_redis)
        assert (outcome.code, outcome.out) == (1, "")
        assert "check SLUICE_REDIS_URL" in outcome.err
    assert row(catalogue()).breaker == "auto"


# Breakers


def test_all_active_providers_are_listed(sluice: Command) -> None:
    assert sluice("provider", "disable", "openai-gpt4o", "--force").code == 0
    head, *lines = sluice("breaker", "list").out.splitlines()
    assert head.split("\t") == [
        *("provider", "state", "since", "until", "window", "in flight", "limits"),
        *("at most now", "rests for", "suspended"),
    ]
    assert len(lines) == 7
    assert {line.split("\t")[1] for line in lines} == {"closed"}
    assert not any(line.startswith("openai-gpt4o\t") for line in lines)


async def test_levers(sluice: Command, catalogue: Read, caller: Caller) -> None:
    outcome = sluice("breaker", "force-open", LUNA)
    assert (outcome.code, outcome.out) == (0, f"{LUNA}\tforced open\n")
    assert f"sluice breaker reset {LUNA}" in outcome.err
    assert row(catalogue()).breaker == "forced_open"
    assert "was forced open already" in sluice("breaker", "force-open", LUNA).err
    gate = shown(sluice)
    assert (gate["state"], gate["breaker"], gate["lever"]) == (
        "forced_open",
        "closed",
        gate["state"],
    )
    assert gate["since"] is not None
    _, verdict = await caller.admit(row(catalogue()))
    assert verdict.reason is Reason.BREAKER

    assert sluice("breaker", "disable", LUNA, "--json").json == {
        "name": LUNA,
        "account": None,
        "lever": "disabled",
        "changed": True,
    }
    for _ in range(10):
        await caller.call(row(catalogue()), Outcome.FAILED)
    assert shown(sluice)["state"] == "disabled"

    assert sluice("breaker", "reset", LUNA, "--json").json == {
        "name": LUNA,
        "account": None,
        "changed": True,
        "lifted": 0,
    }
    assert row(catalogue()).breaker == "auto"
    assert shown(sluice)["state"] == "closed"
    assert trail(sluice, LUNA) == [
        ("lever", "disabled", "auto"),
        ("lever", "forced_open", "disabled"),
        ("lever", "auto", "forced_open"),
    ]
    assert trail(sluice, "openai-gpt4o") == []
    assert trail(sluice, "--limit", "1") == [("lever", "disabled", "auto")]


async def test_a_breaker_that_opened_is_shown_and_reset(
    sluice: Command, catalogue: Read, caller: Caller, sweep: Sweep
) -> None:
    limits = ("--requests-per-minute", "6000", "--tokens-per-minute", "900000")
    assert sluice("provider", "set", LUNA, *limits, "--max-concurrent", "8").code == 0
    await caller.call(row(catalogue()), Outcome.SUCCEEDED)
    await caller.call(row(catalogue()), Outcome.FAILED)
    closed = shown(sluice)
    assert (closed["calls"], closed["failures"], closed["streak"]) == (2, 1, 1)
    for _ in range(4):
        await caller.call(row(catalogue()), Outcome.FAILED, message="500: it broke")
    await sweep.record()

    opened = shown(sluice)
    assert (opened["state"], opened["requests_per_minute"]) == ("open", 6000)
    assert 0 < opened["half_open_in_s"] <= 6
    assert opened["since"] is not None
    line = next(
        one.split("\t")
        for one in sluice("breaker", "list").out.splitlines()
        if one.startswith(f"{LUNA}\t")
    )
    assert line[1] == "open"
    assert line[2].endswith(" s")
    assert line[3].endswith(" s")
    assert line[6] == "6,000 requests/min, 900,000 tokens/min, 8 calls"
    assert trail(sluice, LUNA) == [("breaker", "closed", "open")]

    assert (
        sluice("breaker", "reset", LUNA).out
        == f"{LUNA}\treset\t0 suspended accounts let in again\n"
    )
    assert shown(sluice)["state"] == "closed"
    await caller.call(row(catalogue()), Outcome.SUCCEEDED)
    await sweep.record()
    assert trail(sluice, LUNA) == [
        ("breaker", "open", "closed"),
        ("lever", "auto", "auto"),
        ("breaker", "closed", "open"),
    ]
    reasons = [one["reason"] for one in sluice("breaker", "log", LUNA, "--json").json["changes"]]
    assert reasons[0] == "reset by command"


async def test_rests_and_calls_in_flight_are_shown(
    sluice: Command, catalogue: Read, caller: Caller
) -> None:
    await caller.admit(row(catalogue()))
    await caller.call(row(catalogue()), Outcome.THROTTLED, cooldown_s=30)
    gate = shown(sluice)
    assert (gate["state"], gate["in_flight"]) == ("closed", 1)
    assert 25 < gate["cooldown_left_s"] <= 30
    assert sluice("breaker", "reset", LUNA).code == 0
    assert shown(sluice)["cooldown_left_s"] == 0


async def test_suspended_accounts_are_shown_and_let_in_again(
    *,
    sluice: Command,
    catalogue: Read,
    engine: Engine,
    async_redis: redis.asyncio.Redis,
    settings: Settings,
    sweep: Sweep,
) -> None:
    callers = {}
    for name in ("acme", "umbra"):
        assert sluice("account", "add", name).code == 0
        callers[name] = Caller(Gate(async_redis, settings), account_id(engine, name))
        await callers[name].call(row(catalogue()), Outcome.REFUSED, message="401: unknown key")
    await sweep.record()
    assert {one["account"] for one in shown(sluice)["suspended"]} == {"acme", "umbra"}
    (line,) = (one for one in sluice("breaker", "list").out.splitlines() if LUNA in one)
    assert "acme (" in line
    assert "umbra (" in line
    gates = [one for one in examine(settings) if one.subject == "gates"]
    assert {one.found for one in gates} == {
        f"account {name} does without {LUNA}: 401: unknown key" for name in callers
    }

    only_acme = sluice("breaker", "reset", LUNA, "--account", "acme")
    assert only_acme.out == f"{LUNA}\tacme may use it\t1 suspended accounts let in again\n"
    assert [one["account"] for one in shown(sluice)["suspended"]] == ["umbra"]
    _, verdict = await callers["acme"].admit(row(catalogue()))
    assert verdict.reason is None
    _, verdict = await callers["umbra"].admit(row(catalogue()))
    assert verdict.reason is Reason.SUSPENDED
    assert [one.found for one in examine(settings) if one.subject == "gates"] == [
        f"account umbra does without {LUNA}: 401: unknown key"
    ]
    assert sluice("breaker", "reset", LUNA, "--json").json["lifted"] == 1
    await sweep.record()
    changes = sluice("breaker", "log", LUNA, "--json").json["changes"]
    assert [(one["account"], one["after"]) for one in changes if one["kind"] == "suspension"] == [
        ("umbra", "active"),
        ("acme", "active"),
        ("umbra", "suspended"),
        ("acme", "suspended"),
    ]


@pytest.mark.parametrize("command", ["force-open", "disable", "reset", "log"])
def test_a_provider_that_is_not_there(sluice: Command, command: str) -> None:
    outcome = sluice("breaker", command, "nope")
    assert (outcome.code, outcome.out) == (1, "")
    assert "there is no provider 'nope'; there are anthropic-" in outcome.err


# What was forgotten


def test_the_doctor_finds_what_was_left_paused_or_forced(
    sluice: Command, settings: Settings, engine: Engine
) -> None:
    def found() -> list[str]:
        return [one.found for one in examine(settings) if one.subject == "gates"]

    well = ["nobody is suspended, nothing is left paused or forced"]
    assert sluice("pause", "--use-case", "draft").code == 0
    assert sluice("breaker", "force-open", LUNA).code == 0
    assert found() == well
    with engine.connect() as line:
        line.exec_driver_sql("UPDATE pauses SET created_at = now() - interval '2 days'")
        line.exec_driver_sql("UPDATE gate_changes SET at = now() - interval '2 days'")
    pause, lever = found()
    assert pause.startswith("use case draft has been paused since 2")
    assert lever.startswith(f"the breaker of {LUNA} has been forced open since 2")
    assert sluice("resume", "--use-case", "draft").code == 0
    assert sluice("breaker", "reset", LUNA).code == 0
    assert found() == well

"""The audit: whatever operators change is noted, in whose name, and nobody can take it away."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import ProgrammingError

from sluicegate.producers.client import Sluice
from sluicegate.shared.accounts import add_account
from sluicegate.shared.api_keys import create_key, revoke_key
from sluicegate.shared.audit import KINDS, Actor, AuditEntry, read_audit, sign
from sluicegate.shared.gate_changes import set_pause
from sluicegate.shared.ids import new_id
from sluicegate.shared.provider_keys import set_key
from sluicegate.shared.secrets import new_key
from sluicegate.shared.settings import Settings
from tests.command_line import Command
from tests.databases import Rows

LUNA = "openai-gpt-6-luna"
Entries = Callable[..., list[AuditEntry]]


@pytest.fixture
def sluice(settings: Settings, command_line: Callable[[Settings], Command]) -> Command:
    with_keys = settings.model_copy(update={"encryption_keys": new_key()})
    return command_line(with_keys)


@pytest.fixture
def entries(engine: Engine) -> Entries:
    def read(**filters: Any) -> list[AuditEntry]:
        with engine.connect() as connection:
            return read_audit(connection, **({"limit": 100} | filters))

    return read


def told(entry: AuditEntry) -> tuple[Any, ...]:
    return entry.action, entry.kind, entry.subject, entry.before, entry.after


def test_every_command_that_changes_something_is_there(
    sluice: Command, entries: Entries, rows: Rows
) -> None:
    key_given = ("provider", "set", LUNA, "--key-stdin")
    made = sluice("apikey", "create", "crm", "--account", "default", "--json").json
    for words in (
        ("account", "add", "acme"),
        ("account", "set", "acme", "--inactive"),
        ("provider", "set", LUNA, "--priority", "7"),
        ("provider", "disable", "openai-gpt4o-mini"),
        ("breaker", "force-open", LUNA),
        ("breaker", "reset", LUNA),
        ("pause", "--account", "acme"),
        ("resume", "--account", "acme"),
        ("usecase", "add", "triage"),
        ("budget", "set", "default", "--daily", "5"),
        ("budget", "set", "default", "--daily", "6"),
        ("budget", "clear", "default"),
        ("apikey", "revoke", "crm"),
    ):
        assert sluice(*words).code == 0, words
    assert sluice(*key_given, stdin="sk-very-secret").code == 0
    assert sluice("secrets", "set", "openai", stdin="sk-very-secret").code == 0
    found = entries()[::-1]
    assert {entry.actor.partition(":")[0] for entry in found} == {"cli"}
    seen = [(entry.action, entry.kind, entry.subject) for entry in found]
    acme = str(rows("SELECT id FROM accounts WHERE name = 'acme'")[0].id)
    assert seen == [
        ("add", "api_key", "crm"),
        ("add", "account", "acme"),
        ("change", "account", "acme"),
        ("change", "provider", LUNA),
        ("change", "provider", "openai-gpt4o-mini"),
        ("change", "provider", LUNA),
        ("change", "provider", LUNA),
        ("add", "pause", acme),
        ("remove", "pause", acme),
        ("add", "use_case", "triage"),
        ("add", "budget", ""),
        ("change", "budget", ""),
        ("remove", "budget", ""),
        ("change", "api_key", "crm"),
        ("change", "provider", LUNA),
        ("add", "provider_key", "openai"),
    ]
    assert set(KINDS) - {kind for _, kind, _ in seen} == {"price_list"}
    by_subject = {(entry.action, entry.kind): entry for entry in found}
    assert told(found[3])[3:] == ({"priority": 100}, {"priority": 7})
    assert told(found[5])[3:] == ({"breaker": "auto"}, {"breaker": "forced_open"})
    assert by_subject["change", "budget"].after == {"day_limit_nano_usd": 6_000_000_000}
    assert by_subject["change", "budget"].account == "default"
    assert by_subject["add", "pause"].account == "acme"
    # Secrets are not there, in no form; that they changed is.
    ((dump,),) = rows("SELECT string_agg(a::text, '') FROM audit_entries a")
    ((stored, hash_),) = rows(
        "SELECT (SELECT api_key_encrypted FROM llm_providers WHERE name = %(luna)s),"
        " (SELECT token_hash FROM api_keys)",
        luna=LUNA,
    )
    for secret in ("sk-very-secret", stored, made["key"], bytes(hash_).hex()):
        assert secret not in dump
    assert found[-2].after == {"api_key_encrypted": "***"}


def test_a_hand_at_psql_is_noted_as_well(rows: Rows, entries: Entries) -> None:
    rows("UPDATE llm_providers SET base_url = 'https://evil.example' WHERE name = %(n)s", n=LUNA)
    (entry,) = entries()
    assert entry.actor.startswith("db:")
    assert told(entry)[3:] == ({"base_url": None}, {"base_url": "https://evil.example"})
    rows("UPDATE llm_providers SET base_url = base_url, updated_at = now()")
    assert len(entries()) == 1  # nothing was changed


def test_where_alerts_are_posted_is_as_secret_as_their_secret(rows: Rows, entries: Entries) -> None:
    # Such addresses open what they lead to: whoever has one can post there.
    rows("UPDATE accounts SET alert_url = 'https://hooks.example/T0/secret' WHERE name = 'default'")
    rows("UPDATE accounts SET alert_url = 'https://hooks.example/T0/other' WHERE name = 'default'")
    rows("UPDATE accounts SET alert_url = NULL WHERE name = 'default'")
    seen = [(entry.before, entry.after) for entry in entries()[::-1]]
    assert seen == [
        ({"alert_url": None}, {"alert_url": "***"}),
        ({"alert_url": "***"}, {"alert_url": "***"}),
        ({"alert_url": "***"}, {"alert_url": None}),
    ]


def test_a_price_list_is_noted_without_itself(rows: Rows, entries: Entries) -> None:
    rows("INSERT INTO price_lists (version, data) VALUES ('v1', '{\"a\": 1}')")
    assert told(entries()[0]) == ("add", "price_list", "v1", None, {"version": "v1"} | stamp(rows))


def stamp(rows: Rows) -> dict[str, Any]:
    ((at,),) = rows("SELECT to_jsonb(adopted_at) FROM price_lists")
    return {"adopted_at": at}


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM audit_entries",
        "UPDATE audit_entries SET actor = 'nobody'",
        "UPDATE audit_entries SET before = NULL, after = NULL, subject = 'erased'",
        "TRUNCATE audit_entries",
    ],
)
def test_nothing_is_taken_away(engine: Engine, entries: Entries, statement: str) -> None:
    with engine.connect() as connection:
        add_account(connection, "acme")
        before = entries()
        with pytest.raises(ProgrammingError, match="the audit can be added to, and nothing else"):
            connection.execute(text(statement))
    assert entries() == before


def test_what_was_rolled_back_did_not_happen(engine: Engine, entries: Entries) -> None:
    with engine.connect() as connection:
        connection.execution_options(isolation_level="READ COMMITTED")
        transaction = connection.begin()
        add_account(connection, "acme")
        transaction.rollback()
    assert entries() == []


def test_who_it_was_ends_with_his_transaction(engine: Engine, entries: Entries) -> None:
    with engine.connect() as connection:
        connection.execution_options(isolation_level="READ COMMITTED")
        for name in ("one", "two"):
            with connection.begin():
                if name == "one":
                    sign(connection, Actor(name="key:1", request_id="r1"))
                add_account(connection, name)
    two, one = entries()
    assert (one.actor, one.request_id) == ("key:1", "r1")
    assert (two.actor.partition(":")[0], two.request_id) == ("db", None)


def test_spending_is_no_change_of_a_budget(
    settings: Settings, engine: Engine, entries: Entries, rows: Rows
) -> None:
    with Sluice(settings) as client:
        client.set_budget("default", daily=5)
    before = len(entries())
    rows(
        "UPDATE budgets SET day_spent_nano_usd = 7, day_held_nano_usd = 1, version = version + 1,"
        " day_started_at = now(), month_spent_nano_usd = 7"
    )
    assert len(entries()) == before


def test_what_is_asked_for_is_listed(sluice: Command, engine: Engine, rows: Rows) -> None:
    with engine.connect() as connection:
        connection.execution_options(isolation_level="READ COMMITTED")
        with connection.begin():
            sign(connection, Actor(name="key:1"))
            acme = add_account(connection, "acme")
            set_pause(connection, "account", acme.id, paused=True)
            set_key(connection, "openai", acme.id, "token")
            made, _ = create_key(connection, "crm", role="user", account="acme", created_by="x")
        with connection.begin():
            sign(connection, Actor(name="jwt:ann", request_id="r2"))
            revoke_key(connection, made.id)
            add_account(connection, "other")
    rows("SELECT 1")

    def listed(*words: object) -> list[Any]:
        found: list[Any] = sluice("audit", "list", "--json", *words).json["changes"]
        return found

    assert len(listed()) == 6
    assert [one["number"] for one in listed("--limit", 2)] == [6, 5]
    assert [one["subject"] for one in listed("--who", "jwt:ann")] == ["other", "crm"]
    assert {one["kind"] for one in listed("--what", "api_key")} == {"api_key"}
    assert len(listed("--what", "crm")) == len(listed("--what", made.id)) == 2
    assert {one["account"] for one in listed("--account", "acme")} == {"acme"}
    assert len(listed("--account", acme.id)) == 5
    assert len(listed("--since", "1h")) == 6
    later = datetime.now(UTC) + timedelta(hours=1)
    assert listed("--since", later.isoformat()) == []
    assert listed("--who", "jwt:ann")[1]["request_id"] == "r2"
    plain = sluice("audit", "list").out
    assert "revoked_at none -> 20" in plain
    assert sluice("audit", "list", "--account", "nobody").code == 2
    assert sluice("audit", "list", "--since", "soon").code == 2


def test_an_erased_account_leaves_when_and_what_kind(
    sluice: Command, engine: Engine, entries: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sluicegate.producers import erasing

    monkeypatch.setattr(erasing, "_CLOSED_AFTER_S", 0.0)

    def work(connection: Connection) -> UUID:
        sign(connection, Actor(name="jwt:ann"))
        acme = add_account(connection, "acme")
        create_key(connection, "of acme", role="user", account="acme", created_by="jwt:ann")
        return acme.id

    with engine.connect() as connection:
        connection.execution_options(isolation_level="READ COMMITTED")
        with connection.begin():
            acme = work(connection)
    sluice("account", "erase", "acme", "--yes")
    left = entries(account_id=acme)
    assert [(one.action, one.kind) for one in left[-2:]] == [("add", "api_key"), ("add", "account")]
    for one in left:
        assert (one.subject, one.before, one.after) == ("erased", None, None)
        assert "ann" not in one.actor
    assert ("remove", "api_key") in [(one.action, one.kind) for one in left]
    assert "(erased)" in sluice("audit", "list").out


def test_a_row_with_everything_is_noted(engine: Engine, entries: Entries) -> None:
    # Kinds of values that JSON has no word for.
    with engine.connect() as connection:
        connection.execute(
            text(
                "INSERT INTO llm_providers (id, name, provider, model, max_tokens, context_tokens,"
                " use_case, retires_at, price_override) VALUES (:id, 'x', 'openai', 'm', 1, 1,"
                " '{draft}', '2027-01-14', '{\"input\": 0.5}')"
            ),
            {"id": new_id()},
        )
    after = entries()[0].after
    assert after is not None
    assert after["use_case"] == ["draft"]
    assert after["price_override"] == {"input": 0.5}
    assert after["retires_at"].startswith("2027-01-1")

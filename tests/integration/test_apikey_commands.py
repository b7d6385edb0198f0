"""`sluice apikey`: keys are made, shown once, listed and revoked."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sluicegate.shared.settings import Settings
from tests.command_line import Command
from tests.databases import Rows


@pytest.fixture
def sluice(settings: Settings, command_line: Callable[[Settings], Command]) -> Command:
    return command_line(settings)


def test_a_key_is_shown_once_and_listed_without_itself(sluice: Command) -> None:
    made = sluice("apikey", "create", "crm", "--account", "default", "--role", "owner")
    key = made.out.strip()
    assert key.startswith("sk-sluice-")
    assert "the key of crm, owner of default; it is not shown again" in made.err
    (listed,) = sluice("apikey", "list", "--json").json["keys"]
    assert (listed["name"], listed["role"], listed["account"]) == ("crm", "owner", "default")
    assert (listed["state"], listed["last_used_at"]) == ("active", None)
    assert listed["created_by"].startswith("cli:")
    assert key.startswith(listed["hint"])
    for shown in (sluice("apikey", "list"), sluice("apikey", "list", "--json")):
        assert key not in shown.out + shown.err


def test_a_service_key_has_no_account(sluice: Command) -> None:
    made = sluice("apikey", "create", "back end", "--service", "--json").json
    assert (made["account"], made["role"]) == (None, "user")
    admin = sluice("apikey", "create", "me", "--role", "admin", "--json").json
    assert admin["account"] is None
    assert [line.split("\t")[3] for line in sluice("apikey", "list").out.splitlines()[1:]] == [
        "any",
        "any",
    ]


def test_revoking_by_name_or_id(sluice: Command, rows: Rows) -> None:
    first, second = (
        sluice("apikey", "create", "crm", "--service", "--json").json["id"] for _ in range(2)
    )
    both = sluice("apikey", "revoke", "crm")
    assert both.code == 2
    assert first in both.err
    assert second in both.err
    assert sluice("apikey", "revoke", first, "--json").json["state"] == "revoked"
    assert "is revoked" in sluice("apikey", "revoke", "crm").err
    ((times,),) = rows("SELECT array_agg(revoked_at) FROM api_keys")
    assert None not in times
    # Again changes nothing.
    assert sluice("apikey", "revoke", first).code == 0
    assert rows("SELECT array_agg(revoked_at) FROM api_keys") == [(times,)]
    unknown = sluice("apikey", "revoke", "nobody")
    assert (unknown.code, "sluice apikey list" in unknown.err) == (1, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("crm",), "either --account or"),
        (("crm", "--account", "default", "--service"), "--service"),
        (("crm", "--role", "admin", "--account", "default", "--service"), "has none"),
        (("crm", "--account", "nobody"), "there is no account 'nobody'"),
        (("crm", "--service", "--expires", "soon"), "--expires: 'soon' is not a date"),
        (("crm", "--service", "--expires", "2020-01-01"), "in the past"),
        (("", "--service"), "name: must be 1 to 128 characters"),
        (("a\nb", "--service"), "name: must be 1 to 128 characters"),
    ],
)
def test_what_cannot_be_is_refused(sluice: Command, words: tuple[str, ...], said: str) -> None:
    refused = sluice("apikey", "create", *words)
    assert refused.code == 2, refused
    assert said in refused.err
    assert "Traceback" not in refused.err
    assert sluice("apikey", "list", "--json").json["keys"] == []

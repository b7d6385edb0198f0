"""Administration over HTTP: what the commands do, in the caller's name, and noted in the audit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from sqlalchemy import Engine

from sluicegate.shared.accounts import add_account
from sluicegate.shared.secrets import Keyring, new_key
from sluicegate.shared.settings import Settings
from tests.databases import Rows
from tests.http_calling import bearing, calling
from tests.http_calling import new_key as new_api_key

LUNA = "openai-gpt-6-luna"
QWEN: dict[str, Any] = {
    "name": "qwen",
    "pool": "openai",
    "model": "qwen3",
    "baseUrl": "http://127.0.0.1:8000/v1",
    "useCases": ["draft"],
    "contextTokens": 32_768,
    "prices": {"input": 0, "output": 0.5},
}


class Caller:
    """Calls with a key, and expects what it is told to."""

    def __init__(self, client: httpx2.AsyncClient, key: str) -> None:
        self._client = client
        self._headers = bearing(key) | {"X-Request-Id": "request-7"}

    async def __call__(
        self, method: str, path: str, body: Any = None, *, status: int = 200
    ) -> dict[str, Any]:
        answer = await self._client.request(method, path, json=body, headers=self._headers)
        assert answer.status_code == status, answer.text
        said: dict[str, Any] = answer.json()
        return said if answer.is_success else said["error"]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"encryption_keys": new_key()})


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[httpx2.AsyncClient]:
    async with calling(settings) as client:
        yield client


@pytest.fixture
def admin(client: httpx2.AsyncClient, engine: Engine) -> Caller:
    return Caller(client, new_api_key(engine, role="admin", account=None)[1])


@pytest.fixture
def owner(client: httpx2.AsyncClient, engine: Engine) -> Caller:
    with engine.connect() as connection:
        add_account(connection, "acme")
    return Caller(client, new_api_key(engine, role="owner", account="acme")[1])


async def test_a_provider_is_added_changed_and_taken_out_of_use(
    admin: Caller, settings: Settings, rows: Rows
) -> None:
    added = await admin("POST", "/api/providers", QWEN | {"key": "sk-of-qwen"}, status=201)
    assert (added["name"], added["useCases"], added["isActive"]) == ("qwen", ["draft"], True)
    assert (added["inputUsdPerMillion"], added["outputUsdPerMillion"]) == (0.0, 0.5)
    assert (added["key"], added["maxTokens"]) == ("row", 4096)
    ((stored,),) = rows("SELECT api_key_encrypted FROM llm_providers WHERE name = 'qwen'")
    assert Keyring.of(settings).decrypt(stored).get_secret_value() == "sk-of-qwen"
    assert await admin("GET", "/api/providers/qwen") == added
    changed = await admin(
        "PATCH",
        "/api/providers/qwen",
        {"priority": 5, "key": None, "useCases": ["draft", "summary"], "requestsPerMinute": 60},
    )
    expected = {"priority": 5, "key": None, "useCases": ["draft", "summary"]}
    assert changed == added | expected | {"requestsPerMinute": 60}
    assert (await admin("PATCH", "/api/providers/qwen", {"requestsPerMinute": None}))[
        "requestsPerMinute"
    ] is None
    # What every provider has stays.
    nulls = ("model", "isDefault", "maxTokens", "contextTokens", "priority", "isActive")
    assert await admin("PATCH", "/api/providers/qwen", dict.fromkeys(nulls)) == (
        changed | {"requestsPerMinute": None}
    )
    assert (await admin("DELETE", "/api/providers/qwen"))["isActive"] is False
    assert (await admin("PATCH", "/api/providers/qwen", {"isActive": True}))["isActive"] is True
    listed = (await admin("GET", "/api/providers"))["providers"]
    assert "qwen" in {one["name"] for one in listed}
    # In whose name, and for which request.
    noted = (await admin("GET", "/api/audit?what=qwen"))["changes"]
    assert [one["action"] for one in noted] == ["change"] * 4 + ["add"]
    ((key_id,),) = rows("SELECT id FROM api_keys WHERE role = 'admin'")
    assert {(one["actor"], one["requestId"]) for one in noted} == {(f"key:{key_id}", "request-7")}
    assert "sk-of-qwen" not in str(noted)
    assert noted[-1]["after"]["api_key_encrypted"] == "***"


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 400, "model"),
        (QWEN | {"pool": "other"}, 400, "pool"),
        (QWEN | {"useCases": ["unheard-of"]}, 400, "useCases"),
        (QWEN | {"baseUrl": "ftp://x"}, 400, "baseUrl"),
        (QWEN | {"baseUrl": "https://a:b@c/v1"}, 400, "baseUrl"),
        (QWEN | {"contextTokens": 10, "maxTokens": 20}, 400, "maxTokens"),
        (QWEN | {"prices": None}, 400, "prices"),
        (QWEN | {"prices": {"input": -1, "output": 1}}, 400, "prices.input"),
        (QWEN | {"account": "nobody"}, 400, "account"),
        (QWEN | {"successor": "nobody"}, 400, "successor"),
        (QWEN | {"name": "ü"}, 400, "name"),
        (QWEN | {"name": LUNA}, 400, "name"),
        (QWEN | {"key": "two\nlines"}, 400, "key"),
        (QWEN | {"unheardOf": 1}, 400, "unheardOf"),
        ({k: v for k, v in QWEN.items() if k != "contextTokens"}, 400, "contextTokens"),
    ],
)
async def test_a_provider_that_cannot_be_is_refused_by_field(
    admin: Caller, body: dict[str, Any], status: int, field: str
) -> None:
    error = await admin("POST", "/api/providers", body, status=status)
    assert error["field"] == field
    assert error["message"].startswith(f"{field}: ")


async def test_a_price_alone_keeps_the_rates_of_before(admin: Caller) -> None:
    await admin("POST", "/api/providers", QWEN, status=201)
    prices = {"input": 1, "output": 2, "cacheRead": 0.1}
    await admin("PATCH", "/api/providers/qwen", {"prices": prices})
    changed = await admin("PATCH", "/api/providers/qwen", {"prices": {"input": 3, "output": 4}})
    assert changed["priceOverride"] == {"input": 3000, "output": 4000, "cache_read": 100}


async def test_the_last_provider_of_a_use_case_stays(admin: Caller) -> None:
    for one in (await admin("GET", "/api/providers"))["providers"]:
        if "voice" in one["useCases"] + one["failover"] and one["catalogue"] == "current":
            last = one["name"]
            answer = await admin("DELETE", f"/api/providers/{last}?force=false", status=200)
            assert answer["isActive"] is False
            break
    names = [one["name"] for one in (await admin("GET", "/api/providers"))["providers"]]
    error: dict[str, Any] = {}
    for name in names:
        # Somebody is the last one of something.
        answered = await admin._client.request(
            "DELETE", f"/api/providers/{name}", headers=admin._headers
        )
        if answered.status_code == 409:
            error = answered.json()["error"]
            break
    assert error["code"] == "conflict"
    assert "no provider would be left" in error["message"]
    assert (await admin("DELETE", f"/api/providers/{name}?force=true"))["isActive"] is False


async def test_without_an_encryption_key_no_key_is_stored(
    settings: Settings, engine: Engine
) -> None:
    async with calling(settings.model_copy(update={"encryption_keys": None})) as client:
        admin = Caller(client, new_api_key(engine, role="admin", account=None)[1])
        error = await admin("POST", "/api/providers", QWEN | {"key": "sk-x"}, status=409)
        assert "SLUICE_ENCRYPTION_KEYS" in error["message"]
        assert "sk-x" not in str(error)


async def test_names_that_no_row_can_have_are_not_found(admin: Caller) -> None:
    for name in ("%00", "%F0%9F%92%A9", "a" * 3000, "%27%3B--"):
        for path in (f"/api/providers/{name}", f"/api/accounts/{name}"):
            answer = await admin._client.get(path, headers=admin._headers)
            assert answer.status_code in (400, 404), answer.text
        assert (await admin("DELETE", f"/api/keys/{name}", status=404))["code"] == "not_found"


async def test_accounts(admin: Caller, rows: Rows) -> None:
    added = await admin("POST", "/api/accounts", {"name": "acme"}, status=201)
    assert added == {"id": added["id"], "name": "acme", "timeZone": "UTC", "isActive": True}
    error = await admin("POST", "/api/accounts", {"name": "acme"}, status=400)
    assert error["field"] == "account"
    changed = await admin(
        "PATCH", f"/api/accounts/{added['id']}", {"timeZone": "Europe/Berlin", "isActive": False}
    )
    assert changed == added | {"timeZone": "Europe/Berlin", "isActive": False}
    error = await admin("PATCH", "/api/accounts/acme", {"timeZone": "Mars"}, status=400)
    assert error["field"] == "timeZone"
    assert (await admin("GET", "/api/accounts/nobody", status=404))["code"] == "not_found"
    assert changed in (await admin("GET", "/api/accounts"))["accounts"]


async def test_breakers_and_pauses(admin: Caller, rows: Rows) -> None:
    pulled = await admin("POST", f"/api/breakers/{LUNA}/force-open")
    assert pulled == {"name": LUNA, "account": None, "lever": "forced_open", "changed": True}
    gates = {one["name"]: one for one in (await admin("GET", "/api/breakers"))["breakers"]}
    assert gates[LUNA]["state"] == "forced_open"
    assert (await admin("POST", f"/api/breakers/{LUNA}/disable"))["lever"] == "disabled"
    reset = await admin("POST", f"/api/breakers/{LUNA}/reset")
    assert (reset["lever"], reset["changed"], reset["lifted"]) == ("auto", True, 0)
    error = await admin("POST", "/api/breakers/nobody/reset", status=404)
    assert "there is no provider 'nobody'" in error["message"]

    about = {"kind": "use_case", "name": "draft"}
    paused = await admin("POST", "/api/pause", about)
    assert paused == about | {"account": None, "state": "paused", "changed": True}
    assert (await admin("POST", "/api/pause", about))["changed"] is False
    (listed,) = (await admin("GET", "/api/pauses"))["paused"]
    assert (listed["kind"], listed["name"]) == ("use_case", "draft")
    assert (await admin("POST", "/api/resume", about))["state"] == "running"
    assert (await admin("GET", "/api/pauses"))["paused"] == []
    noted = [
        (one["kind"], one["action"]) for one in (await admin("GET", "/api/audit"))["changes"][:4]
    ]
    assert noted == [("pause", "remove"), ("pause", "add")] + [("provider", "change")] * 2


async def test_an_owner_keeps_the_keys_of_his_account(
    owner: Caller, admin: Caller, client: httpx2.AsyncClient, engine: Engine, rows: Rows
) -> None:
    made = await owner("POST", "/api/keys", {"name": "crm", "role": "owner"}, status=201)
    assert (made["account"], made["role"], made["state"]) == ("acme", "owner", "active")
    # It opens.
    again = Caller(client, made["key"])
    listed = (await again("GET", "/api/keys"))["keys"]
    assert {one["account"] for one in listed} == {"acme"}
    assert made["key"] not in str(listed)
    for body, field in (
        ({"name": "x", "role": "admin"}, "role"),
        ({"name": "x", "isService": True}, "isService"),
    ):
        assert (await owner("POST", "/api/keys", body, status=403))["field"] == field
    said = {
        name: await owner("POST", "/api/keys", {"name": "x", "account": name}, status=404)
        for name in ("default", "not-there")
    }
    assert said["default"]["message"].replace("default", "") == (
        said["not-there"]["message"].replace("not-there", "")
    )
    # He revokes his own, and no other.
    other, _ = new_api_key(engine, account="default")
    assert (await owner("DELETE", f"/api/keys/{other.id}", status=404))["code"] == "not_found"
    assert (await owner("DELETE", f"/api/keys/{made['id']}"))["state"] == "revoked"
    # What he has done is his to read; what others have done is not.
    changes = (await owner("GET", "/api/audit"))["changes"]
    assert {one["account"] for one in changes} == {"acme"}
    assert changes[0]["kind"] == "api_key"
    assert len((await admin("GET", "/api/audit"))["changes"]) > len(changes)
    assert {one["account"] for one in (await admin("GET", "/api/keys"))["keys"]} >= {
        "acme",
        "default",
        None,
    }


async def test_an_owner_revokes_no_key_of_an_admin(
    owner: Caller, admin: Caller, engine: Engine
) -> None:
    theirs, _ = new_api_key(engine, role="admin", account="acme")
    for path in (f"/api/keys/{theirs.id}", f"/api/keys/{str(theirs.id).upper()}"):
        error = await owner("DELETE", path, status=403)
        assert "cannot revoke a key of admin" in error["message"]
    states = {one["id"]: one["state"] for one in (await owner("GET", "/api/keys"))["keys"]}
    assert states[str(theirs.id)] == "active"
    # By its id alone.
    assert (await owner("DELETE", f"/api/keys/{theirs.name}", status=404))["code"] == "not_found"
    # One of his own role he does, and an admin any.
    equal, _ = new_api_key(engine, role="owner", account="acme")
    assert (await owner("DELETE", f"/api/keys/{equal.id}"))["state"] == "revoked"
    assert (await admin("DELETE", f"/api/keys/{theirs.id}"))["state"] == "revoked"


async def test_an_admin_makes_keys_for_anybody(admin: Caller, owner: Caller) -> None:
    service = await admin(
        "POST", "/api/keys", {"name": "crm", "isService": True, "role": "owner"}, status=201
    )
    assert service["account"] is None
    own = await admin("POST", "/api/keys", {"name": "x", "account": "acme"}, status=201)
    assert own["account"] == "acme"
    until = "2040-01-01T00:00:00Z"
    made = await admin("POST", "/api/keys", {"name": "x", "expiresAt": until}, status=201)
    assert (made["account"], made["expiresAt"]) == ("default", until)
    for name in ("Ana's phone \u2014 \u00a0\U0001fae9", "x" * 128):
        assert (await admin("POST", "/api/keys", {"name": name}, status=201))["name"] == name
    for name in ("", "a\nb", "\x1b[31m", "\x9b31m", "\u202egnp.exe", "x" * 129):
        refused = await admin("POST", "/api/keys", {"name": name}, status=400)
        assert refused["field"] == "name", name
    past = {"name": "x", "expiresAt": "2020-01-01T00:00:00Z"}
    assert (await admin("POST", "/api/keys", past, status=400))["field"] == "expiresAt"


async def test_the_audit_in_pages(admin: Caller) -> None:
    for name in ("a", "b", "c"):
        await admin("POST", "/api/accounts", {"name": name}, status=201)
    first = (await admin("GET", "/api/audit?what=account&limit=2"))["changes"]
    rest = (await admin("GET", f"/api/audit?what=account&below={first[-1]['number']}"))["changes"]
    assert [one["subject"] for one in first + rest] == ["c", "b", "a"]
    assert (await admin("GET", "/api/audit?limit=0", status=400))["field"] == "limit"
    assert (await admin("GET", "/api/audit?=%00", status=400))["field"] == "query"
    assert (await admin("GET", "/api/audit?since=2040-01-01T00:00:00Z"))["changes"] == []


async def test_a_budget_is_set_in_the_name_of_who_set_it(
    admin: Caller, owner: Caller, rows: Rows
) -> None:
    await owner("PUT", "/api/budget", {"daily": 5})
    ((key_id,),) = rows("SELECT id FROM api_keys WHERE role = 'owner'")
    (noted,) = (await owner("GET", "/api/audit?what=budget"))["changes"]
    assert (noted["actor"], noted["requestId"]) == (f"key:{key_id}", "request-7")
    assert (noted["account"], noted["after"]["day_limit_nano_usd"]) == ("acme", 5_000_000_000)

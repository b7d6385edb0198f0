"""Who is let in: API keys, tokens, service keys, and the sandbox, as an HTTP client sees it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from sqlalchemy import Engine

from sluicegate.producers.http.callers import Rule
from sluicegate.producers.http.routes import Route, Visit, json_response
from sluicegate.producers.http.strangers import AT_ONCE
from sluicegate.shared.accounts import add_account, set_account
from sluicegate.shared.api_keys import hash_of, revoke_key
from sluicegate.shared.secrets import Secret
from sluicegate.shared.settings import Settings
from tests.databases import Rows
from tests.http_calling import bearing, calling, new_key
from tests.polling import eventually_async

SECRET: Final = "a secret that is long enough for HS256"


async def _who(visit: Visit) -> Any:
    caller = visit.known
    return json_response(
        {"subject": caller.subject, "role": caller.role, "account": caller.account}
    )


WHO: Final = Route(
    method="GET", path="/who", rule=Rule.USER, handler=_who, summary="Say who is calling"
)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"jwt_secret": Secret(SECRET), "api_key_ttl_s": 0.2})


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[httpx2.AsyncClient]:
    async with calling(settings, routes=[WHO]) as client:
        yield client


@pytest.fixture
def acme(engine: Engine) -> str:
    with engine.connect() as connection:
        return str(add_account(connection, "acme").id)


def refusal(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["message"]


def token(**claims: object) -> str:
    given = {"sub": "ann", "exp": datetime.now(UTC) + timedelta(minutes=5), **claims}
    return jwt.encode(given, SECRET, algorithm="HS256")


async def test_a_key_opens_for_its_account(client: httpx2.AsyncClient, engine: Engine) -> None:
    made, key = new_key(engine, role="owner")
    expected = {"subject": f"key:{made.id}", "role": "owner", "account": "default"}
    assert (await client.get("/who", headers=bearing(key))).json() == expected
    # As Anthropic's SDKs send it, and with a scheme written otherwise.
    assert (await client.get("/who", headers={"x-api-key": key})).json() == expected
    lower = {"Authorization": f"bearer  {key} "}
    assert (await client.get("/who", headers=lower)).json() == expected


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "no credentials"),
        ({"Authorization": "Basic YTpi"}, "must be `Bearer`"),
        ({"Authorization": "Bearer"}, "no credentials"),
        ({"Authorization": "Bearer sk-sluice-" + "x" * 43}, "not known"),
        ({"Authorization": "Bearer sk-sluice-"}, "not known"),
        ({"Authorization": "Bearer sk-proj-of-somebody-else"}, "neither an API key nor a token"),
        ({"Authorization": "Bearer a.b.c"}, "neither an API key nor a token"),
        ({"x-api-key": "\u00e9"}, "neither an API key nor a token"),
    ],
)
async def test_bad_credentials_are_refused_in_a_sentence(
    client: httpx2.AsyncClient, headers: dict[str, str], words: str
) -> None:
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    answer = await client.get("/who", headers=sent)
    status, message = refusal(answer)
    assert (status, answer.headers["www-authenticate"].split()[0]) == (401, "Bearer")
    assert words in message


async def test_a_flood_of_wrong_keys_is_not_felt_by_those_let_in(
    settings: Settings, engine: Engine
) -> None:
    _, key = new_key(engine)
    # Its row is read anew with each request.
    forgetful = settings.model_copy(update={"api_key_ttl_s": 1e-6})
    async with calling(forgetful, routes=[WHO]) as client:

        async def get(token: str) -> httpx2.Response:
            return await client.get("/who", headers=bearing(token))

        assert (await get(key)).is_success
        wrong = [f"sk-sluice-{n:043d}" for n in range(10 * AT_ONCE)]
        flood = asyncio.gather(*(get(token) for token in wrong))
        while not flood.done():
            assert (await get(key)).is_success
        answers = await flood
        assert {answer.status_code for answer in answers} == {401, 429}
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.headers["retry-after"] for answer in refused} == {"1"}
        assert "keys that are not known" in refusal(refused[0])[1]
        assert (await get(key)).is_success


async def test_what_is_not_written_as_a_key_is_not_looked_up(settings: Settings) -> None:
    # There is no database to ask.
    away = settings.model_copy(
        update={"database_url": Secret("postgresql+psycopg://x@127.0.0.1:1/x")}
    )
    async with calling(away, routes=[WHO]) as client:
        for end in ("", "x", "x" * 42, "x" * 44, "!" * 43, "x" * 100_000):
            answer = await client.get("/who", headers=bearing("sk-sluice-" + end))
            assert answer.status_code == 401, end


async def test_only_the_hash_is_stored(engine: Engine, rows: Rows) -> None:
    made, key = new_key(engine)
    ((row,),) = rows("SELECT k FROM api_keys k")
    assert key.removeprefix(made.hint) not in str(row)
    ((stored,),) = rows("SELECT token_hash FROM api_keys")
    assert bytes(stored) == hash_of(key)
    # 256 bits, and no two alike.
    assert len(key) == len("sk-sluice-") + 43
    assert new_key(engine)[1] != key


async def test_a_revoked_key_is_out_within_its_time(
    client: httpx2.AsyncClient, engine: Engine
) -> None:
    made, key = new_key(engine)
    assert (await client.get("/who", headers=bearing(key))).is_success
    with engine.connect() as connection:
        assert revoke_key(connection, made.id).state() == "revoked"

    async def is_out() -> bool:
        return (await client.get("/who", headers=bearing(key))).status_code == 401

    await eventually_async(is_out, 5)
    assert "was revoked" in refusal(await client.get("/who", headers=bearing(key)))[1]


async def test_a_key_expires(client: httpx2.AsyncClient, engine: Engine, rows: Rows) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=60)
    _, key = new_key(engine, expires_at=soon)
    assert (await client.get("/who", headers=bearing(key))).is_success
    rows("UPDATE api_keys SET expires_at = now() - interval '1 s'")

    async def is_out() -> bool:
        return (await client.get("/who", headers=bearing(key))).status_code == 401

    await eventually_async(is_out, 5)
    assert "has expired" in refusal(await client.get("/who", headers=bearing(key)))[1]


async def test_its_use_is_written_down_and_not_again_within_a_minute(
    settings: Settings, engine: Engine, rows: Rows
) -> None:
    _, key = new_key(engine)
    # Its row is read anew with each request.
    forgetful = settings.model_copy(update={"api_key_ttl_s": 1e-6})
    async with calling(forgetful, routes=[WHO]) as client:

        async def used() -> Any:
            assert (await client.get("/who", headers=bearing(key))).is_success
            ((at,),) = rows("SELECT last_used_at FROM api_keys")
            return at

        first = await eventually_async(used, 5)
        for _ in range(20):
            assert await used() == first
        rows("UPDATE api_keys SET last_used_at = now() - interval '2 min'")
        before = rows("SELECT count(*) FROM audit_entries")[0][0]

        async def used_again() -> bool:
            at = await used()
            return bool(at > first)

        await eventually_async(used_again, 5)
    # Using a key changes nothing that anybody has to know of.
    assert rows("SELECT count(*) FROM audit_entries")[0][0] == before


async def test_a_service_key_names_its_account(
    client: httpx2.AsyncClient, engine: Engine, acme: str
) -> None:
    _, key = new_key(engine, account=None)
    status, message = refusal(await client.get("/who", headers=bearing(key)))
    assert (status, message.partition(":")[0]) == (400, "X-Sluice-Account")
    for named in ("acme", acme):
        answer = await client.get("/who", headers=bearing(key, account=named))
        assert answer.json()["account"] == "acme"
    for named in ("nobody", "../x", "", "a" * 500):
        answer = await client.get("/who", headers=bearing(key, account=named))
        assert answer.status_code in (400, 403), named


async def test_others_act_for_their_own_account_alone(
    client: httpx2.AsyncClient, engine: Engine, acme: str
) -> None:
    for headers in (bearing(new_key(engine, role="owner")[1]), bearing(token(account="default"))):
        own = await client.get("/who", headers=headers | {"X-Sluice-Account": "default"})
        assert own.json()["account"] == "default"
        # Nothing tells an account that is there from one that is not.
        said = [
            refusal(await client.get("/who", headers=headers | {"X-Sluice-Account": named}))
            for named in ("acme", acme, "not-there")
        ]
        assert said[0][0] == 403
        assert said[0] == said[1] == said[2]


async def test_an_admin_acts_for_any_account(
    client: httpx2.AsyncClient, engine: Engine, acme: str
) -> None:
    for key in (new_key(engine, role="admin", account=a)[1] for a in (None, "default")):
        answer = await client.get("/who", headers=bearing(key))
        assert answer.json()["account"] == "default"
        answer = await client.get("/who", headers=bearing(key, account=acme))
        assert answer.json()["account"] == "acme"


async def test_an_account_that_is_not_active_is_refused(
    client: httpx2.AsyncClient, engine: Engine, acme: str
) -> None:
    _, key = new_key(engine, account="acme")
    _, service = new_key(engine, account=None)
    with engine.connect() as connection:
        set_account(connection, acme, is_active=False)
    for headers in (
        bearing(key),
        bearing(service, account="acme"),
        bearing(token(account="acme")),
    ):
        status, message = refusal(await client.get("/who", headers=headers))
        assert status == 403
        assert "not active" in message


async def test_a_token_opens_for_the_account_it_names(
    client: httpx2.AsyncClient, acme: str
) -> None:
    for named in ("acme", acme):
        answer = await client.get("/who", headers=bearing(token(account=named, role="owner")))
        assert answer.json() == {"subject": "jwt:ann", "role": "owner", "account": "acme"}
    assert (await client.get("/who", headers=bearing(token(account="acme")))).json()["role"] == (
        "user"
    )
    for claims, words in (
        ({}, "its claim names none"),
        ({"account": "not-there"}, "is not known here"),
        ({"account": "nul\x00"}, "is not known here"),
        ({"account": 7}, "must be text"),
        ({"account": "acme", "role": "root"}, "none of user, owner, admin"),
    ):
        status, message = refusal(await client.get("/who", headers=bearing(token(**claims))))
        assert status == 403, claims
        assert words in message


async def test_tokens_of_supabase(settings: Settings, acme: str) -> None:
    supabase = settings.model_copy(
        update={
            "jwt_audience": "authenticated",
            "jwt_issuer": "https://project.supabase.co/auth/v1",
            "jwt_account_claim": "app_metadata.account",
            "jwt_role_claim": "app_metadata.role",
            "jwt_mfa_roles": "owner,admin",
        }
    )
    claims: dict[str, Any] = {
        "aud": "authenticated",
        "iss": "https://project.supabase.co/auth/v1",
        "role": "authenticated",
        "aal": "aal1",
        "app_metadata": {"account": "acme", "provider": "email"},
    }
    owner = claims | {"app_metadata": {"account": "acme", "role": "owner"}}
    async with calling(supabase, routes=[WHO]) as client:

        async def get(**given: Any) -> httpx2.Response:
            return await client.get("/who", headers=bearing(token(**given)))

        assert (await get(**claims)).json()["role"] == "user"
        weak = await get(**owner)
        assert (weak.status_code, weak.json()["error"]["code"]) == (403, "mfa_required")
        assert (await get(**owner | {"aal": "aal2"})).json()["role"] == "owner"
        assert (await get(**claims | {"aud": "anon"})).status_code == 401
        assert (await get(**claims | {"iss": "https://evil.example"})).status_code == 401


async def test_the_sandbox_asks_nobody_on_this_machine(settings: Settings, acme: str) -> None:
    async with calling(settings, is_sandbox=True, routes=[WHO]) as client:
        assert (await client.get("/who")).json() == {
            "subject": "sandbox",
            "role": "owner",
            "account": "default",
        }
        # SDKs want a key, whatever it is; and what was given out is looked at all the same.
        for headers in (bearing("anything"), {"x-api-key": "sk-ant-x"}):
            assert (await client.get("/who", headers=headers)).is_success
        named = await client.get("/who", headers={"X-Sluice-Account": "acme"})
        assert named.json()["account"] == "acme"
        for given in (bearing("sk-sluice-x"), bearing("a.b.c")):
            assert (await client.get("/who", headers=given)).status_code == 401
        # A page of the web that is open here.
        for page in ({"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"}):
            assert (await client.get("/who", headers=page)).status_code == 401
    async with calling(settings, is_sandbox=True, routes=[WHO], address="10.1.2.3") as client:
        assert (await client.get("/who")).status_code == 401


async def test_without_the_sandbox_nobody_is_let_in(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/who")).status_code == 401


async def test_a_database_that_is_away_is_no_wrong_key(settings: Settings, engine: Engine) -> None:
    _, key = new_key(engine)
    away = settings.model_copy(
        update={"database_url": Secret("postgresql+psycopg://x@127.0.0.1:1/x")}
    )
    async with calling(away, routes=[WHO]) as client:
        answer = await client.get("/who", headers=bearing(key))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


@pytest.fixture
def idp() -> Iterator[tuple[str, dict[str, tuple[int, bytes]], list[str]]]:
    """Return the URL of a server, what it answers by path, and the paths that were asked."""
    pages: dict[str, tuple[int, bytes]] = {}
    asked: list[str] = []

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, content = pages[self.path]
            self.send_response(status)
            self.send_header("Location", "/jwks.json")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", pages, asked
        server.shutdown()
        thread.join()


async def test_keys_of_tokens_come_from_a_url(
    settings: Settings, acme: str, idp: tuple[str, dict[str, tuple[int, bytes]], list[str]]
) -> None:
    url, pages, asked = idp
    key = ec.generate_private_key(ec.SECP256R1())
    public = {**ECAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": "k"}
    pages["/jwks.json"] = (200, json.dumps({"keys": [public]}).encode())
    pages["/moved"] = (302, b"")
    pages["/broken"] = (500, b"")
    now = datetime.now(UTC)
    claims = {"sub": "ann", "account": acme, "exp": now + timedelta(minutes=5)}
    bearer = bearing(jwt.encode(claims, key, algorithm="ES256", headers={"kid": "k"}))
    by_url = settings.model_copy(update={"jwt_jwks": f"{url}/jwks.json", "jwt_secret": None})
    async with calling(by_url, routes=[WHO]) as client:
        answers = await asyncio.gather(*(client.get("/who", headers=bearer) for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}
        # Made-up ids have it read once more, and not again for a while.
        other = jwt.encode(claims, key, algorithm="ES256", headers={"kid": "x"})
        for _ in range(5):
            assert (await client.get("/who", headers=bearing(other))).status_code == 401
    assert asked == ["/jwks.json"]
    # A redirect could lead anywhere, so it is not followed.
    for path in ("/moved", "/broken"):
        elsewhere = by_url.model_copy(update={"jwt_jwks": url + path})
        async with calling(elsewhere, routes=[WHO]) as client:
            assert (await client.get("/who", headers=bearer)).status_code == 503
    assert asked == ["/jwks.json", "/moved", "/broken"]

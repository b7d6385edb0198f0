"""Every route by every role: let in if its rule says so. And nobody sees what is another's."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import httpx2
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from sluicegate.producers.client import Sluice
from sluicegate.producers.http.app import ROUTES
from sluicegate.producers.http.callers import Role, Rule
from sluicegate.producers.http.routes import Route
from sluicegate.shared.accounts import add_account, set_account
from sluicegate.shared.api_keys import create_key, revoke_key
from sluicegate.shared.ids import new_id
from sluicegate.shared.settings import Settings
from tests.harness import FULL
from tests.http_calling import bearing, calling, new_key

#: Who comes, and the role that he has here; None: he is not let in anywhere.
CALLERS: Final[dict[str, Role | None]] = {
    "nobody": None,
    "revoked": None,
    "expired": None,
    "unknown": None,
    "inactive": None,
    "user": Role.USER,
    "owner": Role.OWNER,
    "admin": Role.ADMIN,
}
_PARAMETER: Final = re.compile(r"\{(\w+)\}")
_REFUSALS: Final = (401, 403)
#: Written down once more, as the code's own order of roles is what is looked at.
_MAY: Final[dict[Rule, tuple[Role | None, ...]]] = {
    Rule.USER: (Role.USER, Role.OWNER, Role.ADMIN),
    Rule.OWNER: (Role.OWNER, Role.ADMIN),
    Rule.ADMIN: (Role.ADMIN,),
}


def path_of(route: Route, value: str) -> str:
    return _PARAMETER.sub(value, route.path)


@pytest.fixture
def keys(engine: Engine) -> dict[str, dict[str, str]]:
    """Return the headers of each caller."""
    with engine.connect() as connection:
        add_account(connection, "asleep")
    made = {
        name: new_key(engine, role=role.value) for name, role in CALLERS.items() if role is not None
    }
    revoked, _ = made["revoked"] = new_key(engine, role="admin")
    expired, _ = made["expired"] = new_key(engine, role="admin")
    made["inactive"] = new_key(engine, role="admin", account="asleep")
    with engine.connect() as connection:
        set_account(connection, "asleep", is_active=False)
        revoke_key(connection, revoked.id)
        connection.exec_driver_sql(
            "UPDATE api_keys SET expires_at = now() WHERE id = %(id)s", {"id": expired.id}
        )
    found = {name: bearing(token) for name, (_, token) in made.items()}
    return found | {"nobody": {}, "unknown": bearing("sk-sluice-" + "A" * 43)}


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[httpx2.AsyncClient]:
    async with calling(settings) as client:
        yield client


async def ask(
    client: httpx2.AsyncClient, route: Route, value: str, headers: dict[str, str]
) -> tuple[int, bytes]:
    """Return how a route answers, of what may go on for ever the beginning."""
    sent = b"{}" if route.method in ("POST", "PUT", "PATCH") else None
    path = path_of(route, value)
    async with asyncio.timeout(60):
        async with client.stream(route.method, path, headers=headers, content=sent) as answer:
            body = b"" if route.is_stream and answer.is_success else await answer.aread()
            return answer.status_code, body


def is_let_in(rule: Rule, role: Role | None) -> bool:
    return rule is Rule.ANYONE or role in _MAY[rule]


async def test_whoever_the_rule_allows_is_let_in_and_nobody_else(
    client: httpx2.AsyncClient, keys: dict[str, dict[str, str]]
) -> None:
    wrong = []
    for route in ROUTES:
        for name, role in CALLERS.items():
            if route.rule is Rule.ANYONE and role is None and name != "nobody":
                continue  # whether bad credentials are looked at is the route's affair
            status, body = await ask(client, route, str(new_id()), keys[name])
            if is_let_in(route.rule, role):
                right = status not in _REFUSALS and status < 500
            else:
                right = status == (403 if role is not None or name == "inactive" else 401)
            if not right:
                wrong.append((route.method, route.path, name, status, body[:200]))
    assert wrong == []


def test_each_route_has_one_rule() -> None:
    named = [(route.method, route.path) for route in ROUTES]
    assert len(set(named)) == len(named)
    anyone = {route.path for route in ROUTES if route.rule is Rule.ANYONE}
    assert anyone <= {"/health/live", "/health/ready", "/openapi.json", "/docs"}


# Other accounts


@dataclass(frozen=True)
class Two:
    """Two accounts: what the other one has, and who looks."""

    client: httpx2.AsyncClient
    loop: asyncio.AbstractEventLoop
    #: By name: each of the looker's account, without a right to see any of these.
    lookers: dict[str, dict[str, str]]
    theirs: tuple[UUID, ...]

    def ask(
        self, route: Route, value: str, headers: dict[str, str], query: str = ""
    ) -> tuple[int, str]:
        one = Route(**{**_fields(route), "path": path_of(route, value) + query})
        status, body = self.loop.run_until_complete(ask(self.client, one, value, headers))
        # What is asked for comes back in sentences, and each request has an id of its own.
        said = re.sub(r'"requestId":"[^"]*"|"request_id":"[^"]*"', "", body.decode())
        return status, said.replace(value, "<id>")


def _fields(route: Route) -> dict[str, Any]:
    return {name: getattr(route, name) for name in Route.__slots__}


@pytest.fixture
def two(settings: Settings, engine: Engine) -> Iterator[Two]:
    """Return two accounts, one of which has a job, a batch, and a key, and an owner who looks."""
    with engine.connect() as connection:
        theirs = add_account(connection, "theirs").id
        add_account(connection, "ours")
        key, _ = create_key(connection, "k", role="owner", account="theirs", created_by="t")
    with Sluice(settings) as sluice:
        job = sluice.submit("draft", "secret of theirs", account="theirs", submitted_by="ann").id
        batch = sluice.submit_batch("draft", ["secret of theirs"], account="theirs").id
        # Of the same account as a looker, and another's all the same.
        colleague = sluice.submit("draft", "of a colleague", account="ours", submitted_by="bob").id
    lookers = {
        role: bearing(new_key(engine, role=role, account="ours")[1])
        for role in ("user", "owner")  # type: ignore[arg-type,unused-ignore]
    }
    fast = settings.model_copy(update={"http_rate_per_s": 1e6, "http_rate_burst": 1_000_000})
    loop = asyncio.new_event_loop()
    called = calling(fast)
    client = loop.run_until_complete(called.__aenter__())
    try:
        yield Two(client, loop, lookers, (job, batch, key.id, theirs, colleague))
    finally:
        loop.run_until_complete(called.__aexit__(None, None, None))
        with suppress(RuntimeError):
            loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


#: Routes that take an id, or a name, of something.
WITH_ID: Final = tuple(
    route for route in ROUTES if _PARAMETER.search(route.path) and route.rule is not Rule.ADMIN
)
#: Every parameter by which something of an account may be named.
QUERIES: Final = ("account", "batch", "job", "id", "jobId", "who", "what")


def test_there_are_routes_to_try() -> None:
    assert any(route.path.startswith("/api/keys/") for route in WITH_ID)


def test_what_is_anothers_is_as_if_it_were_not(two: Two) -> None:
    job, batch, key, theirs, colleague = two.theirs

    @hypothesis_settings(
        max_examples=500 if FULL else 100,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(
        route=st.sampled_from(WITH_ID),
        looker=st.sampled_from(sorted(two.lookers)),
        wanted=st.sampled_from((job, batch, key, theirs)),
        spelled=st.sampled_from((str, lambda one: str(one).upper(), lambda one: one.hex)),
    )
    def look(route: Route, looker: str, wanted: UUID, spelled: Any) -> None:
        headers = two.lookers[looker]
        seen = two.ask(route, spelled(wanted), headers)
        unknown = two.ask(route, spelled(new_id()), headers)
        assert _same(seen) == _same(unknown), (route.method, route.path)
        assert "theirs" not in seen[1]

    look()
    # A user does not see what others of his account do; its owner does.
    for route in WITH_ID:
        if route.method == "GET" and "job" in route.path:
            seen = two.ask(route, str(colleague), two.lookers["user"])
            assert _same(seen) == _same(two.ask(route, str(new_id()), two.lookers["user"])), (
                route.path
            )


def test_naming_another_account_shows_nothing(two: Two) -> None:
    job, batch, _, theirs, _ = two.theirs
    # What is there, and what is not, of the same form.
    pairs = [("theirs", "no-one"), *((str(one), str(new_id())) for one in (theirs, job, batch))]
    for route in ROUTES:
        if route.method != "GET" or route.rule in (Rule.ADMIN, Rule.ANYONE) or route.is_stream:
            continue
        for looker, headers in two.lookers.items():
            for query in QUERIES:
                for name, unheard_of in pairs:
                    where = (looker, route.path, query, name)
                    known, unknown = (
                        _same(two.ask(route, str(new_id()), headers, f"?{query}={one}"))
                        for one in (name, unheard_of)
                    )
                    assert known[0] < 500, where
                    assert known[0] == unknown[0], where
                    assert known[1].replace(name, "?") == unknown[1].replace(unheard_of, "?"), where


def _same(answer: tuple[int, str]) -> tuple[int, str]:
    """Leave out of an answer what differs each time: ids and moments."""
    status, body = answer
    body = re.sub(r"[0-9a-fA-F]{8}-?([0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}", "<id>", body)
    return status, re.sub(r"\d{4}-\d\d-\d\dT[0-9:.+Z]+", "<moment>", body)

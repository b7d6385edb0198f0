"""The application itself: readiness, errors that are ours, paths that are not there, documents."""

from __future__ import annotations

import logging
import re

import pytest
from pydantic import SecretStr
from starlette.responses import Response

from sluicegate.producers.http import openapi
from sluicegate.producers.http.app import ROUTES
from sluicegate.producers.http.callers import Rule
from sluicegate.producers.http.docs_page import page
from sluicegate.producers.http.routes import Route, Visit
from sluicegate.shared.settings import Settings
from tests.http_calling import calling

AWAY = {
    "redis_url": SecretStr("redis://127.0.0.1:1/0"),
    "database_url": SecretStr("postgresql+psycopg://sluice@127.0.0.1:1/sluice"),
}


async def test_it_is_ready(settings: Settings) -> None:
    async with calling(settings) as client:
        assert (await client.get("/health/ready")).json() == {"status": "ready"}


@pytest.mark.parametrize("away", sorted(AWAY))
async def test_it_is_not_ready_without_its_servers(settings: Settings, away: str) -> None:
    async with calling(settings.model_copy(update={away: AWAY[away]})) as client:
        answer = await client.get("/health/ready")
        assert answer.status_code == 503
        assert f"check SLUICE_{away.upper()}" in answer.json()["error"]["message"]
        assert int(answer.headers["Retry-After"]) > 0
        assert (await client.get("/health/live")).status_code == 200


async def test_it_is_not_ready_on_an_old_schema(settings: Settings, empty_database: str) -> None:
    old = settings.model_copy(update={"database_url": SecretStr(empty_database)})
    async with calling(old) as client:
        answer = await client.get("/health/ready")
        assert answer.status_code == 503
        assert "sluice db upgrade" in answer.json()["error"]["message"]


async def test_a_defect_tells_nobody_what_it_was_about(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(visit: Visit) -> Response:
        raise ValueError((await visit.body()).decode())

    route = Route(method="POST", path="/broken", rule=Rule.ANYONE, handler=broken, summary="")
    caplog.set_level(logging.DEBUG)
    async with calling(settings, routes=[route]) as client:
        answer = await client.post("/broken", content="a canary")
    assert answer.status_code == 500
    assert answer.json()["error"]["requestId"] == answer.headers["X-Request-Id"]
    logged = [record.getMessage() for record in caplog.records]
    assert any("a defect of ours, ValueError" in line and "in broken" in line for line in logged)
    assert "canary" not in answer.text + "".join(logged)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/api/nothing", 404),
        ("GET", "/api/llm/", 404),
        ("GET", "/v1/nothing", 404),
        ("DELETE", "/v1/models", 405),
        ("GET", "/api/llm", 405),
        ("TRACE", "/api/llm", 405),
        ("PATCH", "/api/llm/jobs/1", 405),
    ],
)
async def test_what_there_is_not(settings: Settings, method: str, path: str, status: int) -> None:
    async with calling(settings) as client:
        answer = await client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    if status == 405:
        allowed = set(answer.headers["Allow"].split(", ")) - {"HEAD"}
        assert allowed == {one.method for one in ROUTES if re.fullmatch(_pattern(one.path), path)}


def _pattern(path: str) -> str:
    return re.sub(r"\{\w+(:path)?\}", "[^/]+", path)


async def test_what_postgres_cannot_take_is_told_as_such(settings: Settings) -> None:
    async with calling(settings, is_sandbox=True) as client:
        answer = await client.get("/api/usage", params={"from": "\0"})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "from")


def test_the_document_tells_of_every_route_and_what_it_needs() -> None:
    document = openapi.document(ROUTES)
    for route in ROUTES:
        operation = document["paths"][route.path.replace(":path}", "}")][route.method.lower()]
        assert ("security" in operation) == (route.rule is not Rule.ANYONE)
        assert set(map(str, route.answers)) <= set(operation["responses"])
        assert ("requestBody" in operation) == (route.body is not None)
        headers = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "header"}
        assert headers == {one.name for one in route.headers} | (
            set() if route.rule is Rule.ANYONE else {"X-Sluice-Account"}
        )
    ids = [one["operationId"] for path in document["paths"].values() for one in path.values()]
    assert len(ids) == len(set(ids))


def test_the_page_needs_nothing_from_elsewhere() -> None:
    document = openapi.document(ROUTES)
    document["info"]["title"] = "<script>alert(1)</script>"
    text = page(document)
    assert "<script" not in text
    assert not re.search(r"(src|href)='(https?:)?//", text)
    assert all(f"id='{name}'" in text for name in document["components"]["schemas"])

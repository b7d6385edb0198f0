"""The OpenAPI document, written from the table of routes, and a page that shows it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import orjson
from pydantic import TypeAdapter
from starlette.responses import HTMLResponse, Response

from sluicegate.producers.http.callers import Rule
from sluicegate.producers.http.docs_page import page
from sluicegate.producers.http.identity import ACCOUNT_HEADER
from sluicegate.producers.http.routes import JSON, SSE, Answer, Door, Header, Route, Visit

_REF: Final = "#/components/schemas/{model}"
#: What every text in a query is.
_NO_NUL: Final = r"^[^\x00]*$"
_PARAMETER: Final = re.compile(r"\{(\w+)(?::path)?\}")
_ACCOUNT: Final = Header(
    name=ACCOUNT_HEADER,
    description="The account that the request is for, by name or id: service keys name one, admins "
    "may; with the keys of an account it is that one's own, or left out.",
    pattern=r"^[^\x00-\x1f\x7f]+$",
)

#: What may go wrong, by status; which of them a route has is told by what it takes.
_PROBLEMS: Final[Mapping[int, str]] = {
    400: "A field, a parameter or a header has a value that cannot be.",
    401: "No credentials, or none that are good.",
    402: "The account's budget is full.",
    403: "The caller's role does not allow this.",
    404: "There is nothing with this id that the caller may read.",
    408: "The body did not come in time.",
    409: "It is at odds with what was done before.",
    410: "The answer is not kept any more.",
    413: "The body is too long.",
    422: "The provider will not answer this request, whenever it is sent.",
    429: "Too many requests, or too much work waits already: come back after `Retry-After`.",
    500: "A defect of this server.",
    502: "No provider has answered.",
    503: "Postgres or Redis is away, or this process is full: come back after `Retry-After`.",
    504: "The job's deadline has passed.",
}
_WITH_BODY: Final = (400, 402, 404, 408, 409, 410, 413, 422, 502, 504)
_WITH_ID: Final = (400, 404, 409, 410)


def routes(table: Sequence[Route]) -> tuple[Route, ...]:
    """Return the routes that tell of those in the table, and of themselves."""
    cached: dict[str, bytes] = {}

    def written(name: str) -> bytes:
        # At the first request: most processes of a test never have one.
        if not cached:
            told = document((*table, *own))
            cached["json"] = orjson.dumps(told)
            cached["html"] = page(told).encode()
        return cached[name]

    async def as_json(visit: Visit) -> Response:
        del visit
        return Response(written("json"), media_type=JSON)

    async def as_html(visit: Visit) -> Response:
        del visit
        # A page without scripts, files or addresses of anybody else's.
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        return HTMLResponse(written("html"), headers={"Content-Security-Policy": policy})

    own = (
        Route(
            method="GET",
            path="/openapi.json",
            rule=Rule.ANYONE,
            handler=as_json,
            summary="This document",
            tag="document",
            answers={200: Answer(description="OpenAPI 3.1.", model=dict[str, Any])},
        ),
        Route(
            method="GET",
            path="/docs",
            rule=Rule.ANYONE,
            handler=as_html,
            summary="This document, for people",
            tag="document",
            answers={200: Answer(description="A page.", media=("text/html",))},
        ),
    )
    return own


def document(table: Iterable[Route]) -> dict[str, Any]:
    """Write the document."""
    every = list(table)
    schemas = _Schemas(every)
    paths: dict[str, dict[str, Any]] = {}
    for route in every:
        paths.setdefault(_PARAMETER.sub(r"{\1}", route.path), {})[route.method.lower()] = (
            _operation(route, schemas)
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sluicegate",
            "version": version("sluicegate"),
            "description": "A durable fleet for LLM jobs: a job that was accepted is never lost.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas.definitions,
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key (`sk-sluice-…`) or a JSON Web Token.",
                }
            },
        },
    }


class _Schemas:
    """The schemas of all that routes take and answer, each told once."""

    def __init__(self, table: Iterable[Route]) -> None:
        models: dict[tuple[Any, Any], None] = {}
        for route in table:
            models |= dict.fromkeys((one, "validation") for one in (route.body, route.query))
            told = [route.door.error_model]
            for answer in route.answers.values():
                told += [answer.model, answer.event]
            models |= dict.fromkeys((one, "serialization") for one in told)
        self._found, rest = TypeAdapter.json_schemas(
            [(model, mode, TypeAdapter(model)) for model, mode in models if model is not None],
            ref_template=_REF,
        )
        self.definitions: dict[str, Any] = rest.get("$defs", {})

    def taken(self, model: Any) -> dict[str, Any]:
        return dict(self._found[model, "validation"])

    def told(self, model: Any) -> dict[str, Any]:
        return dict(self._found[model, "serialization"])

    def fields(self, model: Any) -> tuple[dict[str, Any], frozenset[str]]:
        """Return the properties of a model, and which of them are required."""
        schema = self.taken(model)
        if "$ref" in schema:
            schema = self.definitions[schema["$ref"].rpartition("/")[2]]
        return schema.get("properties", {}), frozenset(schema.get("required", ()))


def _operation(route: Route, schemas: _Schemas) -> dict[str, Any]:
    names = _PARAMETER.findall(route.path)
    name = re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_")
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": route.summary,
        "tags": [route.tag],
        "responses": {
            str(status): _answer(answer, schemas) for status, answer in route.answers.items()
        },
    }
    if description := route.handler.__doc__:
        operation["description"] = "\n".join(line.strip() for line in description.splitlines())
    if parameters := [*_path_parameters(names), *_query(route, schemas), *_headers(route)]:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": schemas.taken(route.body)}},
        }
    if route.is_stream:
        operation["x-stream"] = True
    statuses = {429, 500, 503}
    if route.rule is not Rule.ANYONE:
        operation["security"] = [{"key": []}]
        operation["x-role"] = route.rule.value
        statuses |= {401, 403}
        # The header that names an account, and an account or a use case that is not there.
        statuses |= {400, 404}
    if route.query is not None or route.headers:
        statuses.add(400)
    if names:
        statuses |= set(_WITH_ID)
    if route.body is not None:
        statuses |= set(_WITH_BODY)
    for status in sorted(statuses - set(route.answers)):
        operation["responses"][str(status)] = _problem(status, route.door, schemas)
    return operation


def _path_parameters(names: Iterable[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string"} | ({"format": "uuid"} if name.endswith("id") else {}),
        }
        for name in names
    ]


def _query(route: Route, schemas: _Schemas) -> list[dict[str, Any]]:
    if route.query is None:
        return []
    properties, required = schemas.fields(route.query)
    return [
        {
            "name": name,
            "in": "query",
            "required": name in required,
            "schema": _parameter(schema),
        }
        for name, schema in properties.items()
    ]


def _parameter(schema: Mapping[str, Any]) -> dict[str, Any]:
    told = _without_null(schema)
    if told.get("type") == "string" and not told.keys() & {"pattern", "enum", "format", "const"}:
        told["pattern"] = _NO_NUL
    return told


def _without_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a parameter, which is left out where a body would say null."""
    kinds = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    kept = {name: value for name, value in schema.items() if name not in ("anyOf", "default")}
    if schema.get("default") is not None:
        kept["default"] = schema["default"]
    if not kinds:
        return kept
    return kept | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def _headers(route: Route) -> list[dict[str, Any]]:
    return [
        {
            "name": header.name,
            "in": "header",
            "required": False,
            "description": header.description,
            "schema": {"type": "string", "pattern": header.pattern},
        }
        for header in (*route.headers, *([] if route.rule is Rule.ANYONE else [_ACCOUNT]))
    ]


def _answer(answer: Answer, schemas: _Schemas) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if answer.model is not None:
        content[JSON] = {"schema": schemas.told(answer.model)}
    for media in answer.media:
        schema = _event(answer, schemas) if media == SSE else {"type": "string"}
        content[media] = {"schema": schema}
    told: dict[str, Any] = {"description": answer.description}
    return told | {"content": content} if content else told


def _event(answer: Answer, schemas: _Schemas) -> dict[str, Any]:
    """Return the schema of each event; before OpenAPI 3.2 there is no other place to tell of it."""
    text = {"type": "string"}
    data: dict[str, Any] = text
    if answer.event is not None:
        told = schemas.told(answer.event)
        data = {**text, "contentMediaType": JSON, "contentSchema": told}
    return {"type": "object", "properties": {"id": text, "event": text, "data": data}}


def _problem(status: int, door: Door, schemas: _Schemas) -> dict[str, Any]:
    model = door.error_model
    schema = {"type": "object"} if model is None else schemas.told(model)
    return {"description": _PROBLEMS[status], "content": {JSON: {"schema": schema}}}

"""`GET /v1/models`: what `model` can name, for pickers; in Anthropic's shape if its client asks."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from sluicegate.producers.http.callers import Rule
from sluicegate.producers.http.chat import OPENAI
from sluicegate.producers.http.compatible import AUTO, USE_CASE_PREFIX
from sluicegate.producers.http.messages import ANTHROPIC
from sluicegate.producers.http.problems import Problem
from sluicegate.producers.http.routes import Answer, Route, Visit, json_response
from sluicegate.shared.catalogue import AsyncCatalogueCache, Catalogue
from sluicegate.shared.database import DATABASE_ERRORS, explain
from sluicegate.shared.routing import in_reach

_OURS: Final = "sluicegate"


class Named(NamedTuple):
    """One thing that `model` can name."""

    id: str
    #: Whose it is: ours for use cases, a pool's name for models.
    owner: str
    words: str


class Models(BaseModel):
    """A list of models: OpenAI's or Anthropic's."""

    model_config = ConfigDict(extra="allow")

    data: list[dict[str, Any]]


async def list_models(visit: Visit) -> Response:
    """List everything that `model` can name."""
    named = await _named(visit)
    if not _is_anthropic(visit):
        return json_response({"object": "list", "data": [_openai(one) for one in named]})
    data = [_anthropic(one) for one in named]
    first_id, last_id = data[0]["id"], data[-1]["id"]
    page = {"data": data, "has_more": False, "first_id": first_id, "last_id": last_id}
    return json_response(page)


async def show_model(visit: Visit) -> Response:
    """Describe one of them."""
    wanted = visit.request.path_params["model"]
    found = [one for one in await _named(visit) if one.id == wanted]
    if found:
        return json_response((_anthropic if _is_anthropic(visit) else _openai)(found[0]))
    problem = Problem(
        404,
        "model_not_found",
        f"model: there is no model {wanted!r}; GET /v1/models lists those there are",
        field="model",
    )
    if not _is_anthropic(visit):
        raise problem
    return json_response(ANTHROPIC.error(problem, visit.request_id), 404)


def _is_anthropic(visit: Visit) -> bool:
    return "anthropic-version" in visit.request.headers


async def _named(visit: Visit) -> list[Named]:
    """Read the catalogue as it is now: a picker asks once in a while."""
    settings, services = visit.settings, visit.services
    cache = AsyncCatalogueCache(prefix=settings.redis_prefix, ttl_s=settings.catalogue_ttl_s)
    try:
        catalogue = await cache.get(services.engine, services.redis)
    except DATABASE_ERRORS as error:
        raise explain(error) from error
    return list(dict.fromkeys(_names(catalogue, visit)))


def _names(catalogue: Catalogue, visit: Visit) -> Iterator[Named]:
    yield Named(USE_CASE_PREFIX + AUTO, _OURS, "The use case that a request looks like")
    for one in sorted(catalogue.use_cases.values(), key=lambda one: one.name):
        if one.is_active:
            yield Named(USE_CASE_PREFIX + one.name, _OURS, one.description or one.name)
    rows = in_reach(
        catalogue.providers,
        visit.known.account_id,
        visit.settings.catalogue,
        datetime.now(UTC),
    )
    for row in sorted(rows, key=lambda row: row.name):
        yield Named(row.name, row.provider, row.model)
    for model, pool in sorted({(row.model, row.provider) for row in rows}):
        yield Named(model, pool, model)


def _openai(one: Named) -> dict[str, Any]:
    return {"id": one.id, "object": "model", "created": 0, "owned_by": one.owner}


def _anthropic(one: Named) -> dict[str, Any]:
    return {
        "type": "model",
        "id": one.id,
        "display_name": one.words,
        "created_at": "1970-01-01T00:00:00Z",  # which stands for: not known
        "lifecycle": "active",
    }


ROUTES: Final = (
    Route(
        method="GET",
        path="/v1/models",
        rule=Rule.USER,
        handler=list_models,
        summary="What `model` can name: use cases, catalogue names and models",
        door=OPENAI,
        tag="compatible",
        answers={200: Answer(description="All of them.", model=Models)},
    ),
    Route(
        method="GET",
        path="/v1/models/{model:path}",
        rule=Rule.USER,
        handler=show_model,
        summary="One thing that `model` can name",
        door=OPENAI,
        tag="compatible",
        answers={200: Answer(description="It is there.", model=dict[str, Any])},
    ),
)

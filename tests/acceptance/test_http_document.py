"""The server does what its OpenAPI document says, whatever is sent: schemathesis looks for more."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from schemathesis.config import SchemathesisConfig
from schemathesis.generation import GenerationMode

from sluicegate.producers.http import openapi
from sluicegate.producers.http.app import ROUTES
from tests.harness import FULL, Rig
from tests.http_servers import HttpServer, start_http

EXAMPLES = 300 if FULL else 6
USE_CASES = ["draft", "summary", "general", "complex", "vision", "voice"]

#: What a request that the document allows may be answered with.
ALLOWED = ["2xx", "401", "402", "403", "404", "409", "410", "422", "429"]
#: These have rules that no JSON schema can tell: a model has to be there, a conversation to end
#: with the user, a result to follow its tool call, a day to be in the calendar.
WITH_RULES = [
    *("POST /api/llm", "POST /api/jobs", "POST /api/jobs/many"),
    *("POST /v1/chat/completions", "POST /v1/messages"),
    *("PUT /api/budget", "PUT /api/budgets", "GET /api/usage", "GET /api/jobs", "POST /api/keys"),
]


@pytest.fixture(scope="module")
def server(module_rig: Rig) -> HttpServer:
    for pool in ("openai", "anthropic"):
        module_rig.begin_worker(pool, USE_CASES)
    limits: dict[str, Any] = {"http_rate_per_s": 100_000.0, "http_rate_burst": 100_000}
    return start_http(module_rig, **limits)


CONFIG = SchemathesisConfig.from_dict(
    {
        # The key that is sent is a good one; that it is asked for is a check of its own.
        "generation": {"with-security-parameters": False},
        "checks": {"positive_data_acceptance": {"expected-statuses": ALLOWED}},
        "operations": [
            {
                "include-name": name,
                "checks": {"positive_data_acceptance": {"expected-statuses": [*ALLOWED, "400"]}},
            }
            for name in WITH_RULES
        ],
    }
)
DOCUMENT = openapi.document((*ROUTES, *openapi.routes(ROUTES)))
FOUND: list[Any] = list(
    schemathesis.openapi.from_dict(DOCUMENT, config=CONFIG).get_all_operations()
)
OPERATIONS = {found.ok().label: found.ok() for found in FOUND}


def _can_be_wrong(operation: Any) -> bool:
    """Whether anything can be sent that the document does not allow."""
    schemas = [one.definition["schema"] for one in operation.iter_parameters()]
    return bool(operation.body) or any(schema != {"type": "string"} for schema in schemas)


CASES = [
    (name, mode)
    for name, operation in sorted(OPERATIONS.items())
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or _can_be_wrong(operation)
]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_whatever_is_sent(server: HttpServer, rig: Rig, name: str, mode: GenerationMode) -> None:
    operation = OPERATIONS[name]
    cases = operation.as_strategy(generation_mode=mode)

    @given(case=cases)
    @hypothesis_settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck)
    )
    def send(case: Any) -> None:
        case.call_and_validate(base_url=server.url, headers=server.headers, timeout=60)

    send()

"""The OpenAPI document, as schemathesis reads it: what is sent, and what is checked of answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import schemathesis
from hypothesis import HealthCheck, Phase, given, reject
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from schemathesis.core.errors import InvalidSchema
from schemathesis.generation import GenerationMode

from sluicegate.producers.http import openapi
from sluicegate.producers.http.app import ROUTES
from sluicegate.producers.http.identity import ACCOUNT_HEADER

#: What a request that the document allows may be answered with; with 400 only for these fields.
ALLOWED: Final = ["2xx", "400", "401", "402", "403", "404", "409", "410", "422", "429"]
#: Of the jobs of the Python client; `messages` is what `prompt` is read as.
_OF_JOBS: Final = (
    *("prompt", "messages", "tools", "tool_choice", "response_format"),
    *("use_case", "model", "fallbacks", "max_tokens"),
    *("account", "submitted_by", "reply_to", "request_id"),
)
#: Fields that have rules beyond their schema, by operation: what they name has to be there, a
#: conversation to end with the user, a tool's result to follow its call, a moment to be to come.
RULES: Final[Mapping[str, Collection[str]]] = {
    "POST /api/llm": (
        *("messages", "images", "tools", "toolChoice", "responseFormat"),
        *("useCase", "model", "fallbacks", "maxTokens", "deadline"),
    ),
    "POST /api/jobs": _OF_JOBS,
    # Their fields are named without the number of the job.
    "POST /api/jobs/many": (*_OF_JOBS, "max_attempts"),
    "GET /api/jobs": ("account",),
    "POST /v1/chat/completions": (
        *("messages", "tools", "tool_choice", "response_format"),
        *("n", "modalities", "fallbacks", "max_tokens", "max_completion_tokens"),
    ),
    "POST /v1/messages": (
        *("messages", "system", "tools", "tool_choice", "output_config"),
        *("fallbacks", "max_tokens"),
    ),
    "GET /api/usage": ("from", "to"),
    "PUT /api/budget": ("daily", "monthly", "limit"),
    "PUT /api/budgets": ("limit", "daily", "monthly"),
    "POST /api/keys": ("account", "expiresAt"),
    "POST /api/accounts": ("account", "timeZone"),
    "PATCH /api/accounts/{name}": ("account", "timeZone"),
    "POST /api/providers": (
        *("name", "account", "contextTokens", "maxTokens", "baseUrl", "key"),
        *("useCases", "failover", "successor", "prices"),
    ),
    "PATCH /api/providers/{name}": (
        *("account", "contextTokens", "maxTokens", "baseUrl", "key"),
        *("useCases", "failover", "successor", "prices"),
    ),
    "GET /api/providers/{name}": ("account",),
    "DELETE /api/providers/{name}": ("account",),
    "POST /api/breakers/{name}/force-open": ("account",),
    "POST /api/breakers/{name}/disable": ("account",),
    "POST /api/breakers/{name}/reset": ("account",),
    "POST /api/pause": ("account",),
    "POST /api/resume": ("account",),
}

_CONFIG: Final = SchemathesisConfig.from_dict(
    {
        # The key that is sent is a good one; that it is asked for is a check of its own.
        "generation": {"with-security-parameters": False},
        "checks": {"positive_data_acceptance": {"expected-statuses": ALLOWED}},
    }
)
DOCUMENT: Final = openapi.document((*ROUTES, *openapi.routes(ROUTES)))
for _operation in (one for path in DOCUMENT["paths"].values() for one in path.values()):
    # With any account but the key's own every request would end there, and find out nothing more.
    _operation["parameters"] = [
        one for one in _operation.get("parameters", ()) if one["name"] != ACCOUNT_HEADER
    ]
_FOUND: Final[list[Any]] = list(
    schemathesis.openapi.from_dict(DOCUMENT, config=_CONFIG).get_all_operations()
)
OPERATIONS: Final[Mapping[str, Any]] = {found.ok().label: found.ok() for found in _FOUND}


def cases(names: Collection[str]) -> list[tuple[str, GenerationMode]]:
    """Return what to send to these operations: what the document allows, and what it does not."""
    return [
        (name, mode)
        for name in sorted(names)
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE or _can_be_wrong(OPERATIONS[name])
    ]


def _can_be_wrong(operation: Any) -> bool:
    schemas = [one.definition["schema"] for one in operation.iter_parameters()]
    return bool(operation.body) or any(schema != {"type": "string"} for schema in schemas)


#: Longer than a request waits for its job.
_TIMEOUT_S: Final = 90.0


def send(
    name: str,
    mode: GenerationMode,
    *,
    url: str,
    headers: Mapping[str, str],
    examples: int,
    known: Callable[[Any, st.DataObject], None] | None = None,
) -> None:
    """Send so many examples to an operation, and check the answers.

    known: puts what is there into a case that the document allows, in place of what was made up;
    then one of them has to succeed.
    """
    statuses: set[int] = set()

    @given(case=_cases(name, mode), data=st.data())
    @hypothesis_settings(
        max_examples=examples,
        deadline=None,
        # What a failure has in common with others takes minutes to explain, and was never read.
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    def one(case: Any, data: st.DataObject) -> None:
        if known is not None and mode is GenerationMode.POSITIVE:
            known(case, data)
        response = case.call(base_url=url, headers=dict(headers), timeout=_TIMEOUT_S)
        case.validate_response(response, headers=dict(headers))
        statuses.add(response.status_code)
        if response.status_code == 400:
            said = f"{response.text}\n{case.as_curl_command()}"
            blamed = _blamed(response.json()["error"])
            assert blamed, said
            if mode is GenerationMode.POSITIVE:
                head = blamed.partition(".")[0]
                assert head in RULES.get(name, ()) or _is_whole(case, blamed), said

    one()
    if known is not None and mode is GenerationMode.POSITIVE:
        assert any(status < 300 for status in statuses), statuses


@st.composite
def _cases(draw: st.DrawFn, name: str, mode: GenerationMode) -> Any:
    try:
        return draw(OPERATIONS[name].as_strategy(generation_mode=mode))
    except InvalidSchema:
        # Of a schema that it has mutated itself, one time in thousands: that is no example.
        # https://github.com/schemathesis/schemathesis/pull/4440
        reject()


def often(data: st.DataObject) -> bool:
    """Whether this time, three times in four."""
    return data.draw(st.sampled_from([True, True, True, False]))


def fill(
    given: dict[str, Any], values: Mapping[str, Sequence[object]], data: st.DataObject
) -> None:
    """Give fields that are given one of these values each."""
    for name in [name for name in given if name in values]:
        given[name] = data.draw(st.sampled_from(values[name]))


def _blamed(error: Mapping[str, Any]) -> str | None:
    """Return the field that an error names, in the words of any protocol."""
    named = error.get("field") or error.get("param") or error.get("details", {}).get("field")
    return None if named is None else str(named)


def _is_whole(case: Any, field: str) -> bool:
    """Whether this is 1.0 or such, which is a whole number to a schema, and none to us."""
    value = case.body
    for step in field.split("."):
        match value:
            case dict() if step in value:
                value = value[step]
            case list() if step.isdigit() and int(step) < len(value):
                value = value[int(step)]
            case _:
                return False
    return isinstance(value, float) and value.is_integer()

"""The server does what its OpenAPI document says, whatever is sent: schemathesis looks for more."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from tests.documented import OPERATIONS, cases, fill, often, send
from tests.doors import PNG
from tests.harness import FULL, Rig
from tests.http_servers import HttpServer, start_http
from tests.polling import eventually

pytestmark = pytest.mark.timeout(1800 if FULL else 180)

EXAMPLES = 300 if FULL else 6
USE_CASES = ["draft", "summary", "general", "complex", "vision", "voice"]


CITY: Any = {"type": "object", "properties": {"city": {"type": "string"}}}
CHAT_TOOL = {"type": "function", "function": {"name": "find", "parameters": CITY}}
CHAT_CALL = {"id": "a", "type": "function", "function": {"name": "find", "arguments": "{}"}}
HELLO: Any = {"role": "user", "content": "Hello."}
#: Values that are good, for fields whose schema says little of what they have to be.
GOOD: dict[str, dict[str, list[Any]]] = {
    "POST /api/llm": {
        "messages": [[HELLO], [{"role": "system", "content": "Be short."}, HELLO]],
        "tools": [{"find": {"parameters": CITY}}],
        "toolChoice": [None],
        "responseFormat": [None, {"schema": CITY}],
        "images": [[PNG]],
        "useCase": [None, "vision"],
        "model": [None],
        "fallbacks": [None],
        "deadline": [60],
        "wait": [0, 60],
    },
    "POST /v1/chat/completions": {
        "model": ["sluice/general", "sluice/auto"],
        "messages": [
            [HELLO],
            [
                HELLO,
                {"role": "assistant", "tool_calls": [CHAT_CALL]},
                {"role": "tool", "tool_call_id": "a", "content": "Oslo"},
            ],
        ],
        "tools": [[CHAT_TOOL]],
        "tool_choice": [None],
        "response_format": [None, {"type": "json_object"}],
        "fallbacks": [None],
        "max_tokens": [99],
        "max_completion_tokens": [99],
        "n": [1],
        "modalities": [["text"]],
    },
    "POST /v1/messages": {
        "model": ["sluice/draft", "sluice/auto"],
        "messages": [
            [HELLO],
            [
                HELLO,
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "a", "name": "find", "input": {}}],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]},
            ],
        ],
        "system": ["Be short.", [{"type": "text", "text": "Be short."}]],
        "tools": [[{"name": "find", "input_schema": CITY}]],
        "tool_choice": [None],
        "output_config": [{"format": {"type": "json_schema", "schema": CITY}}],
        "fallbacks": [None],
        "max_tokens": [99],
    },
}


@pytest.fixture(scope="module")
def server(module_rig: Rig) -> HttpServer:
    workers = [module_rig.begin_worker(pool, USE_CASES) for pool in ("openai", "anthropic")]
    module_rig.start_sweep()
    limits: dict[str, Any] = {"http_rate_per_s": 100_000.0, "http_rate_burst": 100_000}
    server = start_http(module_rig, **limits)
    for worker in workers:
        module_rig.await_worker(worker)
    return server


def _make_spendable(server: HttpServer, rig: Rig) -> None:
    """Take away what other tests have made of the budgets, and wait until jobs are taken."""
    for budget in rig.client.budgets():
        rig.client.clear_budget(budget.account, budget.use_case)

    def takes() -> bool:
        asked = {"prompt": "Hello.", "wait": 0}
        answer = httpx2.post(f"{server.url}/api/llm", headers=server.headers, json=asked)
        return answer.is_success

    eventually(takes, 30)


@pytest.mark.parametrize(("name", "mode"), cases(OPERATIONS))
def test_whatever_is_sent(server: HttpServer, rig: Rig, name: str, mode: GenerationMode) -> None:
    if name in GOOD and mode is GenerationMode.POSITIVE:
        _make_spendable(server, rig)

    def fill_in(case: Any, data: st.DataObject) -> None:
        if often(data):
            fill(case.body, GOOD[name], data)
        if "deadline" in case.body:
            # One that passes first ends in the 504 that it asks for.
            case.body["deadline"] = 60

    send(
        name,
        mode,
        url=server.url,
        headers=server.headers,
        examples=EXAMPLES,
        known=fill_in if name in GOOD else None,
    )

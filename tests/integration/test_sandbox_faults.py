"""Every fault of the sandbox provider, as the official SDKs see it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletion

from sluicegate.workers.local.sandbox_calls import DECLINES
from sluicegate.workers.local.sandbox_control import SandboxControl
from sluicegate.workers.local.sandbox_faults import Fault
from sluicegate.workers.local.sandbox_prices import Usage, bill_nano_usd
from tests.sandbox_clients import (
    ANTHROPIC_MODEL,
    DEADLINE_S,
    IMPATIENT_S,
    OPENAI_MODEL,
    PROMPT,
    Clients,
    ask_claude,
    ask_gpt,
    cleaned,
    clients_of,
    only_call,
    post,
    serving,
)


@pytest.fixture(scope="module")
def server() -> Iterator[SandboxControl]:
    with serving() as control:
        yield control


@pytest.fixture
def sandbox(server: SandboxControl) -> SandboxControl:
    return cleaned(server)


@pytest.fixture
async def clients(sandbox: SandboxControl) -> AsyncIterator[Clients]:
    async with clients_of(sandbox) as both:
        yield both


WHOLE = (3, 20)
HALF_TEXT_CHARS = 40
ARGS: dict[Fault, dict[str, Any]] = {
    Fault.SLOW_FIRST_TOKEN: {"first_token_ms": 150},
    Fault.SLOW_DRIP: {"tokens_per_s": 100},
    Fault.ANSWER_TEXT: {"text": "a\x00b\ud800c"},
}
#: What each refusal is at OpenAI (class, code) and at Anthropic (class, type).
REFUSALS: dict[Fault, tuple[str, str | None, str, str]] = {
    Fault.HTTP_400: ("BadRequestError", None, "BadRequestError", "invalid_request_error"),
    Fault.HTTP_401: (
        *("AuthenticationError", "invalid_api_key"),
        *("AuthenticationError", "authentication_error"),
    ),
    Fault.HTTP_402: ("APIStatusError", None, "PaymentRequiredError", "billing_error"),
    Fault.HTTP_403: (
        *("PermissionDeniedError", "unsupported_country_region_territory"),
        *("PermissionDeniedError", "permission_error"),
    ),
    Fault.HTTP_404: ("NotFoundError", "model_not_found", "NotFoundError", "not_found_error"),
    Fault.HTTP_413: ("APIStatusError", None, "ContentTooLargeError", "request_too_large"),
    Fault.HTTP_429: ("RateLimitError", "rate_limit_exceeded", "RateLimitError", "rate_limit_error"),
    Fault.HTTP_500: ("InternalServerError", None, "InternalServerError", "api_error"),
    Fault.HTTP_503: ("InternalServerError", None, "ServiceUnavailableError", "api_error"),
    Fault.HTTP_529: ("InternalServerError", None, "OverloadedError", "overloaded_error"),
    Fault.QUOTA_429: (
        *("RateLimitError", "insufficient_quota"),
        *("EnforcedSpendLimitReachedError", "rate_limit_error"),
    ),
    Fault.CONTEXT_TOO_LONG: (
        *("BadRequestError", "context_length_exceeded"),
        *("BadRequestError", "invalid_request_error"),
    ),
    Fault.CONTENT_POLICY: (
        *("BadRequestError", "content_policy_violation"),
        *("BadRequestError", "invalid_request_error"),
    ),
}


@asynccontextmanager
async def struck(sandbox: SandboxControl, fault: Fault) -> AsyncIterator[None]:
    sandbox.add_fault(fault, times=1, **ARGS.get(fault, {}))
    yield
    assert sandbox.faults()[0]["fired"] == 1


both_wires = pytest.mark.parametrize("wire", ["openai", "anthropic"])
streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@streamed_or_not
@both_wires
@pytest.mark.parametrize("fault", REFUSALS)
async def test_refusals(
    fault: Fault,
    wire: str,
    stream: bool,
    clients: Clients,
    sandbox: SandboxControl,
) -> None:
    async with struck(sandbox, fault):
        seen = await clients.ask(wire, stream=stream)
    openai_class, code, anthropic_class, kind = REFUSALS[fault]
    call = only_call(sandbox)
    if wire == "openai":
        assert type(seen.error).__name__ == openai_class
        assert isinstance(seen.error, openai.APIStatusError)
        assert seen.error.code == code
    else:
        assert type(seen.error).__name__ == anthropic_class
        assert isinstance(seen.error, anthropic.APIStatusError)
        assert seen.error.type == kind
    assert seen.error.status_code == call["status"]
    assert seen.error.request_id == call["request_id"]
    assert (call["fault"], call["billed_nano_usd"], call["usage"]) == (fault, 0, None)


@dataclass(frozen=True, kw_only=True)
class Broken:
    """What a fault leaves behind. An SDK that raises nothing has noticed nothing."""

    #: What the SDKs raise: OpenAI's and Anthropic's.
    raises: tuple[type[Exception] | None, type[Exception] | None] = (None, None)
    #: Tokens billed; None is not billed.
    output: int | None = 20
    chars: int | None = None
    gone: bool = False


_TIMEOUT = (openai.APITimeoutError, anthropic.APITimeoutError)
_CONNECTION = (openai.APIConnectionError, anthropic.APIConnectionError)
_GARBLED = (json.JSONDecodeError, json.JSONDecodeError)
BROKEN: dict[tuple[Fault, bool], Broken] = {
    (Fault.HANG, False): Broken(raises=_TIMEOUT, output=None, gone=True),
    (Fault.HANG, True): Broken(raises=_TIMEOUT, output=None, gone=True),
    (Fault.RESET_BEFORE_HEADERS, False): Broken(raises=_CONNECTION, output=None),
    (Fault.RESET_BEFORE_HEADERS, True): Broken(raises=_CONNECTION, output=None),
    (Fault.RESET_AFTER_HEADERS, False): Broken(raises=_CONNECTION),
    (Fault.RESET_AFTER_HEADERS, True): Broken(
        raises=(openai.APIConnectionError, httpx2.ReadError), output=0, chars=0
    ),
    (Fault.STALL, False): Broken(raises=_TIMEOUT, gone=True),
    (Fault.STALL, True): Broken(
        raises=(openai.APITimeoutError, httpx2.ReadTimeout),
        output=10,
        chars=HALF_TEXT_CHARS,
        gone=True,
    ),
    (Fault.CUT_STREAM, False): Broken(raises=_CONNECTION),
    (Fault.CUT_STREAM, True): Broken(
        raises=(openai.APIConnectionError, httpx2.ReadError),
        output=10,
        chars=HALF_TEXT_CHARS,
    ),
    (Fault.TRUNCATED_STREAM, False): Broken(raises=_GARBLED),
    (Fault.TRUNCATED_STREAM, True): Broken(output=10, chars=HALF_TEXT_CHARS),
    (Fault.ERROR_EVENT, False): Broken(output=None, chars=0),
    (Fault.ERROR_EVENT, True): Broken(
        raises=(openai.APIError, anthropic.APIStatusError),
        output=10,
        chars=HALF_TEXT_CHARS,
    ),
    (Fault.MALFORMED_CHUNK, False): Broken(raises=_GARBLED),
    (Fault.GARBAGE_BODY, False): Broken(chars=0),
    (Fault.GARBAGE_BODY, True): Broken(chars=0),
}


@both_wires
@pytest.mark.parametrize(("fault", "stream"), BROKEN)
async def test_broken_answers(
    fault: Fault,
    stream: bool,
    wire: str,
    clients: Clients,
    sandbox: SandboxControl,
) -> None:
    expected = BROKEN[fault, stream]
    timeout_s = IMPATIENT_S if expected.gone else DEADLINE_S
    async with struck(sandbox, fault):
        seen = await clients.ask(wire, stream=stream, timeout_s=timeout_s)
    error = expected.raises[wire == "anthropic"]
    assert type(seen.error) is (error or type(None))
    if expected.chars is not None:
        assert len(seen.text) == expected.chars
    assert seen.stop is None
    call = only_call(sandbox)
    model = OPENAI_MODEL if wire == "openai" else ANTHROPIC_MODEL
    usage = None if expected.output is None else Usage(input=3, output=expected.output)
    assert call["billed_nano_usd"] == (0 if usage is None else bill_nano_usd(model, usage))
    assert (call["usage"] or {}).get("output") == expected.output
    assert call["client_gone"] is expected.gone
    assert call["fault"] == fault


async def test_error_events_name_the_error(clients: Clients, sandbox: SandboxControl) -> None:
    async with struck(sandbox, Fault.ERROR_EVENT):
        seen = await ask_claude(clients.claude, PROMPT, stream=True)
    assert isinstance(seen.error, anthropic.APIStatusError)
    assert (seen.error.status_code, seen.error.type) == (200, "overloaded_error")
    sandbox.reset()
    async with struck(sandbox, Fault.ERROR_EVENT):
        seen = await ask_gpt(clients.gpt, PROMPT, stream=False)
    assert isinstance(seen.body, ChatCompletion)
    assert (seen.body.model_extra or {})["error"]["type"] == "server_error"


@both_wires
async def test_a_malformed_chunk_stops_the_reader(
    wire: str,
    clients: Clients,
    sandbox: SandboxControl,
) -> None:
    async with struck(sandbox, Fault.MALFORMED_CHUNK):
        seen = await clients.ask(wire, stream=True)
    assert type(seen.error) is json.JSONDecodeError
    assert 0 < len(seen.text) < 80
    # How much the reader's leaving saves depends on when it leaves.
    assert 9 <= only_call(sandbox)["usage"]["output"] <= 20


@streamed_or_not
@both_wires
async def test_a_missing_terminal(
    wire: str,
    stream: bool,
    clients: Clients,
    sandbox: SandboxControl,
) -> None:
    async with struck(sandbox, Fault.MISSING_TERMINAL):
        seen = await clients.ask(wire, stream=stream)
    assert (seen.error, len(seen.text), seen.usage) == (None, 80, WHOLE)
    stop = "stop" if wire == "openai" else "end_turn"
    assert seen.stop == (stop if stream else None)
    if wire == "anthropic" and stream:
        assert seen.last_event == "message_delta"
    assert only_call(sandbox)["usage"]["output"] == 20


@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("then", ["hold", "close"])
@both_wires
async def test_a_missing_terminal_and_a_connection_that_does_not_end(
    then: str, usage: bool, wire: str, clients: Clients, sandbox: SandboxControl
) -> None:
    sandbox.add_fault("missing_terminal", then=then, usage=usage)
    seen = await clients.ask(wire, stream=True, timeout_s=IMPATIENT_S)
    late = (openai.APITimeoutError, httpx2.ReadTimeout)
    broken = (openai.APIConnectionError, httpx2.RemoteProtocolError)
    assert type(seen.error) is (late if then == "hold" else broken)[wire == "anthropic"]
    assert len(seen.text) == 80
    assert seen.stop == ("stop" if wire == "openai" else "end_turn")
    assert seen.usage == (WHOLE if usage else None)
    call = only_call(sandbox)
    assert call["usage"]["output"] == 20
    assert call["client_gone"] is (then == "hold")


def test_a_missing_terminal_at_openai_is_done(sandbox: SandboxControl) -> None:
    request = {"model": OPENAI_MODEL, "messages": [{"role": "user", "content": PROMPT}]}
    whole = post(sandbox, "/v1/chat/completions", request | {"stream": True})
    assert whole.endswith(b"data: [DONE]\n\n")
    sandbox.add_fault("missing_terminal")
    assert b"[DONE]" not in post(sandbox, "/v1/chat/completions", request | {"stream": True})


@streamed_or_not
@both_wires
@pytest.mark.parametrize("fault", [Fault.SLOW_FIRST_TOKEN, Fault.SLOW_DRIP])
async def test_slow_answers_come_whole(
    fault: Fault,
    wire: str,
    stream: bool,
    clients: Clients,
    sandbox: SandboxControl,
) -> None:
    async with struck(sandbox, fault):
        seen = await clients.ask(wire, stream=stream)
    assert (seen.error, len(seen.text), seen.usage) == (None, 80, WHOLE)
    call = only_call(sandbox)
    assert call["finished_at"] - call["started_at"] >= 0.14


@streamed_or_not
@both_wires
async def test_a_filtered_answer(
    wire: str,
    stream: bool,
    clients: Clients,
    sandbox: SandboxControl,
) -> None:
    async with struck(sandbox, Fault.CONTENT_FILTER):
        seen = await clients.ask(wire, stream=stream)
    stop = "content_filter" if wire == "openai" else "refusal"
    assert (seen.error, seen.stop, len(seen.text)) == (None, stop, HALF_TEXT_CHARS)
    assert seen.usage == (3, 10)
    assert only_call(sandbox)["usage"]["output"] == 10


@streamed_or_not
async def test_a_refusal(stream: bool, clients: Clients, sandbox: SandboxControl) -> None:
    sandbox.add_fault("refusal")
    seen = await ask_claude(clients.claude, PROMPT, stream=stream)
    assert (seen.error, seen.stop, seen.text) == (None, "refusal", DECLINES)
    request: dict[str, Any] = {"model": OPENAI_MODEL, "stream": stream}
    answer = await clients.gpt.chat.completions.create(
        messages=[{"role": "user", "content": PROMPT}], **request
    )
    if stream:
        choices = [chunk.choices[0] async for chunk in answer if chunk.choices]
        assert "".join(choice.delta.refusal or "" for choice in choices) == DECLINES
        assert "".join(choice.delta.content or "" for choice in choices) == ""
        assert choices[-1].finish_reason == "stop"
    else:
        (choice,) = answer.choices
        assert (choice.message.content, choice.message.refusal) == (None, DECLINES)
        assert choice.finish_reason == "stop"


@streamed_or_not
@both_wires
async def test_an_answer_of_any_text(
    wire: str,
    stream: bool,
    clients: Clients,
    sandbox: SandboxControl,
) -> None:
    async with struck(sandbox, Fault.ANSWER_TEXT):
        seen = await clients.ask(wire, stream=stream)
    assert (seen.error, seen.text, seen.usage) == (None, "a\x00b\ud800c", (3, 2))
    sandbox.add_fault("answer_text", text="a\x00b\ud800c")
    messages = {"messages": [{"role": "user", "content": PROMPT}], "stream": stream}
    path = "/v1/chat/completions" if wire == "openai" else "/v1/messages"
    raw = post(sandbox, path, messages | {"model": "sandbox-any", "max_tokens": 50})
    assert b"\\u0000" in raw
    assert b"\\ud800" in raw


@streamed_or_not
@both_wires
async def test_an_answer_without_usage(
    wire: str,
    stream: bool,
    clients: Clients,
    sandbox: SandboxControl,
) -> None:
    async with struck(sandbox, Fault.NO_USAGE):
        seen = await clients.ask(wire, stream=stream)
    assert (seen.error, len(seen.text), seen.usage) == (None, 80, None)
    assert only_call(sandbox)["usage"]["output"] == 20


def test_every_fault_is_tested_here() -> None:
    wholesome = {
        *(Fault.MISSING_TERMINAL, Fault.SLOW_FIRST_TOKEN, Fault.SLOW_DRIP),
        *(Fault.CONTENT_FILTER, Fault.REFUSAL, Fault.ANSWER_TEXT, Fault.NO_USAGE, Fault.BAD_JSON),
    }
    assert {fault for fault, _ in BROKEN} | REFUSALS.keys() | wholesome == set(Fault)


@pytest.mark.parametrize(
    ("args", "headers"),
    [
        ({}, {}),
        ({"retry_after_s": 2}, {"retry-after": "2"}),
        ({"retry_after_s": 0.5, "retry_after_ms": 500}, {"retry-after-ms": "500"}),
    ],
)
@both_wires
async def test_retry_after(
    args: dict[str, Any],
    headers: dict[str, str],
    wire: str,
    clients: Clients,
    sandbox: SandboxControl,
) -> None:
    sandbox.add_fault("http_429", message="Slow down.", **args)
    seen = await clients.ask(wire, stream=False)
    assert isinstance(seen.error, openai.RateLimitError | anthropic.RateLimitError)
    got = seen.error.response.headers
    assert ("retry-after" in got) is ("retry_after_s" in args)
    assert headers.items() <= dict(got).items()
    assert "Slow down." in str(seen.error)


async def test_faults_by_model_name_and_by_rule(clients: Clients, sandbox: SandboxControl) -> None:
    seen = await ask_gpt(clients.gpt, "hello", stream=False, model="sandbox-http_503")
    assert isinstance(seen.error, openai.InternalServerError)
    seen = await ask_claude(clients.claude, "ECHO: hi", stream=True, model="sandbox-fine")
    assert seen.text == "hi"
    rule = sandbox.add_fault("http_500", prompt_contains="note 7", every_nth=2, billed=True)
    errors = [
        (await ask_gpt(clients.gpt, "note 7", stream=False)).error is not None for _ in range(4)
    ]
    assert errors == [False, True, False, True]
    assert (await ask_gpt(clients.gpt, "note 8", stream=False)).error is None
    assert [call["usage"] is None for call in sandbox.calls()] == [True] + [False] * 6
    sandbox.remove_fault(rule)
    assert sandbox.faults() == []

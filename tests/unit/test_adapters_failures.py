"""How every failure of a provider is classified, and what is said of it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import aiohttp
import httpx2
import pytest
from aiohttp.client_reqrep import ConnectionKey

from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.jobs import build_spec
from sluicegate.shared.secrets import Secret
from sluicegate.workers.providers.base import Adapters, ProviderError
from sluicegate.workers.providers.failures import (
    Fault,
    fault_of_error,
    fault_of_exception,
    fault_of_status,
    retry_after_s,
    sentence,
)

E = ErrorClass
NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
SPEC = build_spec("draft", "Write to Frau Keller about the renewal of contract 4711-B, please.")


def gpt_error(
    message: str = "No.",
    *,
    type: str | None = None,  # noqa: A002 - the wire's word
    code: str | None = None,
) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": None, "code": code}}


def claude_error(type: str, message: str = "No.", code: str | None = None) -> dict[str, Any]:  # noqa: A002 - the wire's word
    details = {"error_code": code} if code else None
    return {"type": "error", "error": {"type": type, "message": message, "details": details}}


@pytest.mark.parametrize(
    ("status", "body", "error_class"),
    [
        (400, gpt_error(code="content_policy_violation"), E.CONTENT_FILTER),
        (400, gpt_error("The prompt triggered our content management policy."), E.CONTENT_FILTER),
        (
            400,
            gpt_error(
                "Your prompt was flagged as potentially violating our usage policy.",
                code="invalid_prompt",
            ),
            E.CONTENT_FILTER,
        ),
        (400, gpt_error(code="invalid_prompt"), E.BAD_REQUEST),
        (400, gpt_error(code="string_above_max_length"), E.CONTEXT_TOO_LONG),
        (400, gpt_error(type="exceed_context_size_error"), E.CONTEXT_TOO_LONG),
        (
            400,
            claude_error(
                "invalid_request_error",
                "You have reached your specified API usage limits. You will regain access on …",
            ),
            E.QUOTA,
        ),
        (429, gpt_error(type="insufficient_quota", code="credit_balance_exhausted"), E.QUOTA),
        (429, gpt_error(code="organization_spend_limit_exceeded"), E.QUOTA),
        (429, gpt_error(code="organization_usage_limit_exceeded"), E.QUOTA),
        (429, gpt_error(code="project_spend_limit_exceeded"), E.QUOTA),
        (
            429,
            claude_error("rate_limit_error", code="linked_organization_spend_limit_reached"),
            E.QUOTA,
        ),
        (301, None, E.NOT_FOUND),
        (400, gpt_error(type="invalid_request_error"), E.BAD_REQUEST),
        (400, claude_error("invalid_request_error"), E.BAD_REQUEST),
        (400, gpt_error(code="context_length_exceeded"), E.CONTEXT_TOO_LONG),
        (400, gpt_error("This model's maximum context length is 8192 tokens."), E.CONTEXT_TOO_LONG),
        (
            400,
            claude_error("invalid_request_error", "prompt is too long: 300000 tokens > 200000"),
            E.CONTEXT_TOO_LONG,
        ),
        (400, gpt_error(code="content_filter"), E.CONTENT_FILTER),
        (
            400,
            claude_error("invalid_request_error", "Output blocked by content filtering policy"),
            E.CONTENT_FILTER,
        ),
        (
            400,
            claude_error("invalid_request_error", "Your credit balance is too low to access …"),
            E.QUOTA,
        ),
        (401, gpt_error(code="invalid_api_key"), E.AUTH),
        (401, claude_error("authentication_error"), E.AUTH),
        (402, gpt_error(), E.QUOTA),
        (402, claude_error("billing_error"), E.QUOTA),
        (403, claude_error("permission_error"), E.AUTH),
        (403, gpt_error(code="model_not_found"), E.NOT_FOUND),
        (404, claude_error("not_found_error"), E.NOT_FOUND),
        (404, gpt_error(code="model_not_found"), E.NOT_FOUND),
        (404, None, E.NOT_FOUND),
        (405, None, E.NOT_FOUND),
        (408, None, E.TIMEOUT),
        (409, claude_error("conflict_error"), E.SERVER),
        (413, claude_error("invalid_request_error"), E.CONTEXT_TOO_LONG),
        (413, None, E.CONTEXT_TOO_LONG),
        (418, None, E.BAD_REQUEST),
        (422, gpt_error(), E.BAD_REQUEST),
        (425, None, E.BAD_REQUEST),
        (429, gpt_error(code="rate_limit_exceeded"), E.RATE_LIMITED),
        (429, claude_error("rate_limit_error"), E.RATE_LIMITED),
        (429, claude_error("rate_limit_error", code="ramp_limit_exceeded"), E.RATE_LIMITED),
        (429, None, E.RATE_LIMITED),
        (429, gpt_error(type="insufficient_quota", code="insufficient_quota"), E.QUOTA),
        (429, gpt_error(type="insufficient_quota"), E.QUOTA),
        (429, claude_error("rate_limit_error", code="enforced_spend_limit_reached"), E.QUOTA),
        (429, claude_error("rate_limit_error", code="contract_spend_limit_reached"), E.QUOTA),
        (
            429,
            gpt_error(
                "Request too large for gpt-x on tokens per min (TPM): Limit 3, Requested 4.",
                code="rate_limit_exceeded",
            ),
            E.CONTEXT_TOO_LONG,
        ),
        (500, gpt_error(type="server_error"), E.SERVER),
        (500, claude_error("api_error"), E.SERVER),
        (500, gpt_error(code="insufficient_quota"), E.SERVER),
        (502, None, E.SERVER),
        (503, gpt_error(), E.OVERLOADED),
        (504, claude_error("timeout_error"), E.SERVER),
        (520, None, E.SERVER),
        (529, claude_error("overloaded_error"), E.OVERLOADED),
    ],
)
def test_statuses(status: int, body: dict[str, Any] | None, error_class: ErrorClass) -> None:
    data = b"<html>" if body is None else json.dumps(body).encode()
    fault = fault_of_status(
        "the openai provider", status, httpx2.Headers({"x-request-id": "req_7"}), data
    )
    assert fault.error_class is error_class
    assert fault.sent
    assert (fault.status, fault.request_id) == (status, "req_7")
    assert sentence(fault, SPEC, Secret("k")).startswith(f"The openai provider answered {status}")


@pytest.mark.parametrize(
    ("error", "error_class"),
    [
        (claude_error("overloaded_error")["error"], E.OVERLOADED),
        (claude_error("rate_limit_error")["error"], E.OVERLOADED),
        (
            claude_error("rate_limit_error", code="enforced_spend_limit_reached")["error"],
            E.QUOTA,
        ),
        (gpt_error(code="rate_limit_exceeded")["error"], E.OVERLOADED),
        (gpt_error(code="insufficient_quota")["error"], E.QUOTA),
        (gpt_error(code="context_length_exceeded")["error"], E.CONTEXT_TOO_LONG),
        (gpt_error(code="content_filter")["error"], E.CONTENT_FILTER),
        (claude_error("billing_error")["error"], E.QUOTA),
        (claude_error("api_error")["error"], E.STREAM_BROKEN),
        ({"code": 500, "type": ["x"]}, E.STREAM_BROKEN),
        ({}, E.STREAM_BROKEN),
    ],
)
def test_error_events(error: dict[str, Any], error_class: ErrorClass) -> None:
    fault = fault_of_error("the openai provider", error, otherwise=E.STREAM_BROKEN)
    assert (fault.error_class, fault.status, fault.sent) == (error_class, 200, True)


_KEY = ConnectionKey("api.example.com", 443, True, True, None, None, None)


def _raised(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "error_class", "sent"),
    [
        (
            aiohttp.ClientConnectorError(_KEY, OSError(111, "Connection refused")),
            E.CONNECT,
            False,
        ),
        (aiohttp.ClientConnectorDNSError(_KEY, OSError(-2, "Name not known")), E.CONNECT, False),
        (aiohttp.ClientConnectorSSLError(_KEY, OSError(1, "bad record")), E.CONNECT, False),
        (aiohttp.ConnectionTimeoutError("Connection timeout"), E.CONNECT, False),
        # What the SDKs' transport makes of a server that hangs up: a connect timeout.
        (
            _raised(httpx2.ConnectTimeout("x"), aiohttp.ServerDisconnectedError()),
            E.CONNECT,
            True,
        ),
        (_raised(httpx2.ConnectTimeout("x"), aiohttp.ClientOSError(104, "reset")), E.CONNECT, True),
        (aiohttp.SocketTimeoutError("x"), E.TIMEOUT, True),
        (aiohttp.InvalidURL("x"), E.NOT_FOUND, False),
        (httpx2.UnsupportedProtocol("x"), E.NOT_FOUND, False),
        (httpx2.DecodingError("x"), E.GARBAGE, True),
        (httpx2.RemoteProtocolError("x"), E.CONNECT, True),
        (OSError(24, "Too many open files"), E.CONNECT, True),
    ],
)
def test_connections(error: Exception, error_class: ErrorClass, sent: bool) -> None:
    for found in (error, _raised(RuntimeError("the SDK's own"), error)):
        fault = fault_of_exception("openai", found, answering=False)
        assert (fault.error_class, fault.sent) == (error_class, sent)


def test_a_connection_that_breaks_in_an_answer_is_a_broken_stream() -> None:
    for error in (httpx2.ReadError("x"), aiohttp.ClientPayloadError("x"), ConnectionResetError()):
        fault = fault_of_exception("openai", error, answering=True)
        assert (fault.error_class, fault.sent) == (E.STREAM_BROKEN, True)


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "3"}, 0.25),
        ({"retry-after": "Sun, 22 Nov 2026 12:00:30 GMT"}, 30),
        ({"retry-after": "Sun, 22 Nov 2026 11:00:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": f"Sun, 22 Nov {'9' * 30} 12:00:30 GMT"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], wait_s: float | None) -> None:
    assert retry_after_s(headers, now=NOW) == wait_s


def said(words: str | None, key: str = "not-in-there") -> str:
    return sentence(
        Fault(E.BAD_REQUEST, "the openai provider answered 400", words=words), SPEC, Secret(key)
    )


def test_the_message_is_one_sentence() -> None:
    assert said("Bad field `x`. See https://example.com/errors.") == (
        "The openai provider answered 400: Bad field `x`."
    )
    assert said(None) == "The openai provider answered 400 (bad request)."
    assert said("two\nlines\x00 and \ud800 more").count("\n") == 0
    assert len(said("long " * 200)) < 350


def test_the_reason_of_a_filter_is_told_whole() -> None:
    words = "I'm sorry. I cannot help with that.  Ask me something else."
    fault = Fault(E.CONTENT_FILTER, "the openai provider filtered the answer", words=words)
    assert sentence(fault, SPEC, Secret("k")) == (
        "The openai provider filtered the answer: "
        "I'm sorry. I cannot help with that. Ask me something else."
    )


def test_the_message_holds_no_key() -> None:
    key = "secret-key-0123456789"
    assert key not in said(f"Incorrect API key provided: {key}.", key)
    assert said("Incorrect API key provided: sk-proj-ab12****wxyz.") == (
        "The openai provider answered 400: Incorrect API key provided: [key]."
    )


@pytest.mark.parametrize(
    "words",
    [
        "messages.0.content: 'Write to Frau Keller about the renewal' is not allowed",
        "invalid: about the renewal  of\ncontract 4711-B, please.",
    ],
)
def test_the_message_holds_no_piece_of_the_prompt(words: str) -> None:
    assert (
        said(words)
        == "The openai provider answered 400, in words that repeat the request (bad request)."
    )


def test_a_short_prompt_is_not_repeated_either() -> None:
    spec = build_spec("draft", "4711-B Keller")
    fault = Fault(
        E.BAD_REQUEST, "the openai provider answered 400", words="cannot read '4711-B Keller'"
    )
    assert "Keller" not in sentence(fault, spec, Secret(""))


@pytest.mark.parametrize(
    ("provider", "variable"), [("openai", "OPENAI_API_KEY"), ("anthropic", "ANTHROPIC_API_KEY")]
)
@pytest.mark.parametrize("key", [None, "", "  ", "ke\ny", "schlüssel"])
async def test_a_key_that_cannot_be_used(provider: Any, variable: str, key: str | None) -> None:
    adapters = Adapters(max_connections=1)
    with pytest.raises(ProviderError, match=variable) as caught:
        adapters.get(provider, None, None if key is None else Secret(key))
    assert caught.value.error_class is E.AUTH
    assert not caught.value.sent
    assert not (key and key.strip() and key in str(caught.value))


@pytest.mark.parametrize("url", ["api.example.com/v1", "ftp://x", "https://", "http://[x", ""])
async def test_a_base_url_that_is_none(url: str) -> None:
    adapters = Adapters(max_connections=1)
    with pytest.raises(ProviderError, match="base_url") as caught:
        adapters.get("openai", url, Secret("a-key"))
    assert caught.value.error_class is E.NOT_FOUND
    assert not caught.value.sent

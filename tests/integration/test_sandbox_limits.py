"""Limits that the sandbox provider enforces, as the official SDKs and our adapters meet them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anthropic
import openai
import pytest

from sluicegate.workers.local.sandbox_control import SandboxControl, SandboxControlError
from tests.sandbox_clients import (
    ANTHROPIC_MODEL,
    OPENAI_MODEL,
    Clients,
    ask_claude,
    ask_gpt,
    cleaned,
    clients_of,
    only_call,
    serving,
)

both_wires = pytest.mark.parametrize("wire", ["openai", "anthropic"])
streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
MODELS = {"openai": OPENAI_MODEL, "anthropic": ANTHROPIC_MODEL}


@pytest.fixture(scope="module")
def server() -> Iterator[SandboxControl]:
    with serving() as control:
        yield control


@pytest.fixture
def sandbox(server: SandboxControl) -> SandboxControl:
    server.clear_limits()
    return cleaned(server)


@pytest.fixture
async def clients(sandbox: SandboxControl) -> AsyncIterator[Clients]:
    async with clients_of(sandbox) as both:
        yield both


def refused(error: Exception | None) -> Any:
    assert isinstance(error, openai.RateLimitError | anthropic.RateLimitError)
    return error


@streamed_or_not
@both_wires
async def test_requests_above_the_limit_are_429(
    wire: str, stream: bool, clients: Clients, sandbox: SandboxControl
) -> None:
    sandbox.limit(MODELS[wire], requests_per_minute=3)
    answers = [await clients.ask(wire, stream=stream) for _ in range(5)]
    assert [seen.error is None for seen in answers] == [True] * 3 + [False] * 2
    error = refused(answers[-1].error)
    headers = error.response.headers
    assert 55 <= int(headers["retry-after"]) <= 60
    if wire == "openai":
        assert error.code == "rate_limit_exceeded"
        assert "requests per min (RPM): Limit 3, Used 3, Requested 1" in error.message
        assert headers["x-ratelimit-limit-requests"] == "3"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert headers["x-ratelimit-reset-requests"] in ("1m0s", *_near_a_minute())
        assert 0 < int(headers["retry-after-ms"]) <= int(headers["retry-after"]) * 1000
    else:
        assert error.type == "rate_limit_error"
        assert headers["anthropic-ratelimit-requests-limit"] == "3"
        assert headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert headers["anthropic-ratelimit-input-tokens-remaining"] == "9999000"
    bill = sandbox.bill()
    assert (bill["calls"], bill["billed_calls"], bill["limited_calls"]) == (5, 3, 2)
    assert [call["limited_by"] for call in sandbox.calls()] == [None] * 3 + ["requests"] * 2
    (counted,) = bill["limits"]
    assert counted["refused"] == {"requests": 2}
    assert counted["total"]["requests"] == counted["peak"]["requests"] == 3


def _near_a_minute() -> Iterator[str]:
    return (f"{milliseconds / 1000:g}s" for milliseconds in range(50_000, 60_000))


async def test_what_is_left_goes_down(clients: Clients, sandbox: SandboxControl) -> None:
    sandbox.limit(requests_per_minute=5, tokens_per_minute=1_000)
    left = []
    for _ in range(3):
        raw = await clients.gpt.chat.completions.with_raw_response.create(
            model=OPENAI_MODEL, messages=[{"role": "user", "content": "INPUT: 100\nTOKENS: 50"}]
        )
        names = ("x-ratelimit-remaining-requests", "x-ratelimit-remaining-tokens")
        left.append(tuple(int(raw.headers[name]) for name in names))
    assert left == [(4, 850), (3, 700), (2, 550)]


@pytest.mark.parametrize(
    "case",
    [
        ({"tokens_per_minute": 450}, 3, "tokens"),
        ({"input_tokens_per_minute": 450}, 4, "input_tokens"),
        ({"output_tokens_per_minute": 99}, 1, "output_tokens"),
        ({"tokens_per_minute": 450, "input_tokens_per_minute": 200}, 2, "input_tokens"),
    ],
)
@both_wires
async def test_tokens_count_prompt_and_answer(
    case: tuple[dict[str, int], int, str], wire: str, clients: Clients, sandbox: SandboxControl
) -> None:
    limits, fits, short = case
    sandbox.limit(MODELS[wire], **limits)
    prompt = "INPUT: 100\nTOKENS: 50"
    for number in range(fits + 1):
        if wire == "openai":
            seen = await ask_gpt(clients.gpt, prompt, stream=False)
        else:
            seen = await ask_claude(clients.claude, prompt, stream=False)
        assert (seen.error is None) is (number < fits)
    assert int(refused(seen.error).response.headers["retry-after"]) > 50
    (counted,) = sandbox.limits()
    assert counted["refused"] == {short: 1}
    assert counted["peak"]["tokens"] == counted["total"]["tokens"] == 150 * fits
    assert counted["peak"]["input_tokens"] == 100 * fits


async def test_a_call_above_the_whole_limit_is_told_so(
    clients: Clients, sandbox: SandboxControl
) -> None:
    sandbox.limit(OPENAI_MODEL, tokens_per_minute=20)
    error = refused((await ask_gpt(clients.gpt, "TOKENS: 20", stream=False)).error)
    assert error.message.count("Request too large for") == 1
    assert "retry-after" not in error.response.headers


@both_wires
async def test_who_waits_as_told_is_let_in(
    wire: str, clients: Clients, sandbox: SandboxControl
) -> None:
    sandbox.limit(MODELS[wire], requests_per_minute=2, limit_window_s=1.5)
    started = time.monotonic()
    calls = 0
    while calls < 6:
        seen = await clients.ask(wire, stream=False)
        if seen.error is None:
            calls += 1
        else:
            await asyncio.sleep(int(refused(seen.error).response.headers["retry-after"]))
    assert time.monotonic() - started >= 3
    (counted,) = sandbox.limits()
    assert counted["peak"]["requests"] == 2
    assert counted["total"]["requests"] == 6
    # Told to wait until there is room, nobody asks twice in vain.
    assert counted["refused"]["requests"] <= 2


@streamed_or_not
@both_wires
async def test_calls_at_once(
    wire: str, stream: bool, clients: Clients, sandbox: SandboxControl
) -> None:
    sandbox.settings(latency_ms=600, first_token_ms=600)
    sandbox.limit(MODELS[wire], max_concurrent=3)
    for _ in range(2):  # the places are given back
        seen = await asyncio.gather(*(clients.ask(wire, stream=stream) for _ in range(5)))
        errors = [answer.error for answer in seen if answer.error is not None]
        assert len(errors) == 2
        assert "concurrent" in str(refused(errors[0]))
        assert "retry-after" not in refused(errors[0]).response.headers
    (counted,) = sandbox.limits()
    assert (counted["peak"]["concurrent"], counted["concurrent"]) == (3, 0)


@pytest.mark.parametrize("fault", ["cut_stream", "reset_after_headers", "malformed_chunk", "stall"])
@both_wires
async def test_a_call_that_breaks_gives_its_place_back(
    wire: str, fault: str, clients: Clients, sandbox: SandboxControl
) -> None:
    sandbox.limit(MODELS[wire], max_concurrent=1)
    sandbox.add_fault(fault, times=1)
    assert (await clients.ask(wire, stream=True, timeout_s=2)).error is not None
    only_call(sandbox)  # it has seen that the client left
    assert (await clients.ask(wire, stream=True)).error is None
    (counted,) = sandbox.limits()
    assert counted["concurrent"] == 0
    assert counted["refused"] == {}


@both_wires
async def test_what_a_fault_turns_away_does_not_count(
    wire: str, clients: Clients, sandbox: SandboxControl
) -> None:
    sandbox.limit(MODELS[wire], requests_per_minute=1)
    for fault in ("http_500", "http_429", "reset_before_headers"):
        sandbox.add_fault(fault, times=1)
        assert (await clients.ask(wire, stream=False)).error is not None
    assert (await clients.ask(wire, stream=False)).error is None
    refused((await clients.ask(wire, stream=False)).error)
    assert sandbox.bill()["limited_calls"] == 1


async def test_a_model_of_its_own_and_all_the_others(
    clients: Clients, sandbox: SandboxControl
) -> None:
    sandbox.limit(OPENAI_MODEL, requests_per_minute=2)
    sandbox.limit(requests_per_minute=1)
    for model, fits in ((OPENAI_MODEL, 2), ("sandbox-a", 1), ("sandbox-b", 0)):
        for number in range(3):
            seen = await ask_gpt(clients.gpt, "ECHO: hi", stream=False, model=model)
            assert (seen.error is None) is (number < fits)
    assert [one["limits"]["model"] for one in sandbox.limits()] == [OPENAI_MODEL, None]
    sandbox.reset()  # limits stay, counts go
    assert (await ask_gpt(clients.gpt, "ECHO: hi", stream=False, model="sandbox-b")).error is None
    sandbox.limit(requests_per_minute=None)  # lifted, and still counted
    assert (await ask_gpt(clients.gpt, "ECHO: hi", stream=False, model="sandbox-b")).error is None
    assert sandbox.limits()[1]["total"]["requests"] == 2
    sandbox.clear_limits()
    assert sandbox.limits() == sandbox.bill()["limits"] == []
    with pytest.raises(SandboxControlError, match="requests_per_minute"):
        sandbox.limit(requests_per_minute=0)


@pytest.mark.parametrize("fault", ["http_503", "http_529", "reset_before_headers"])
async def test_a_model_that_is_down_until_it_is_up_again(
    fault: str, clients: Clients, sandbox: SandboxControl
) -> None:
    rule = sandbox.down(OPENAI_MODEL, fault)
    for _ in range(3):
        assert (await clients.ask("openai", stream=True)).error is not None
        assert (await clients.ask("anthropic", stream=True)).error is None
    sandbox.remove_fault(rule)
    assert (await clients.ask("openai", stream=True)).error is None
    assert [call["fault"] for call in sandbox.calls() if call["fault"]] == [fault] * 3

"""The sandbox provider's answers and bills, as the official SDKs see them."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256
from typing import Any

import anthropic
import openai
import pytest

from sluicegate.workers.local.sandbox_control import SandboxControl
from sluicegate.workers.local.sandbox_prices import PRICES, Usage, bill_nano_usd
from tests.sandbox_clients import (
    ANTHROPIC_MODEL,
    DEADLINE_S,
    OPENAI_MODEL,
    Clients,
    ask_claude,
    ask_gpt,
    cleaned,
    clients_of,
    connected,
    only_call,
    raw_request,
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


async def test_answers_depend_on_the_prompt_alone(
    clients: Clients, sandbox: SandboxControl
) -> None:
    prompt = "Draft a follow-up about the meeting."
    first = await ask_gpt(clients.gpt, prompt, stream=False)
    assert first.error is None
    assert first.usage is not None
    assert first.usage == (-(-len(prompt) // 4), -(-len(first.text) // 4))
    assert 40 <= first.usage[1] <= 120
    streamed = await ask_gpt(clients.gpt, prompt, stream=True)
    assert (streamed.text, streamed.stop, streamed.usage) == (first.text, "stop", first.usage)
    for stream in (False, True):
        other = await ask_claude(clients.claude, prompt, stream=stream)
        assert (other.text, other.stop, other.usage) == (first.text, "end_turn", first.usage)
    assert (await ask_gpt(clients.gpt, prompt + "!", stream=False)).text != first.text

    calls = sandbox.calls()
    assert [call["wire"] for call in calls] == ["openai"] * 2 + ["anthropic"] * 2 + ["openai"]
    assert [call["stream"] for call in calls] == [False, True, False, True, False]
    assert calls[0]["prompt_sha256"] == sha256(prompt.encode()).hexdigest()
    assert calls[0]["prompt_tail"] == prompt
    assert sum(call["billed_nano_usd"] for call in calls) == sandbox.bill()["billed_nano_usd"]


@pytest.mark.parametrize("stream", [False, True])
async def test_limits_end_an_answer(clients: Clients, stream: bool) -> None:
    seen = await ask_gpt(clients.gpt, "TOKENS: 501", stream=stream)
    assert (seen.stop, seen.usage) == ("length", (3, 500))
    seen = await ask_claude(clients.claude, "TOKENS: 501", stream=stream)
    assert (seen.stop, seen.usage) == ("max_tokens", (3, 500))


async def test_ids_and_rate_headers(clients: Clients, sandbox: SandboxControl) -> None:
    sandbox.settings(headers={"x-ratelimit-remaining-requests": "3", "X-Extra": "yes"})
    raw = await clients.gpt.chat.completions.with_raw_response.create(
        model=OPENAI_MODEL, messages=[{"role": "user", "content": "hello"}]
    )
    assert raw.headers["x-ratelimit-remaining-requests"] == "3"
    assert raw.headers["x-ratelimit-limit-tokens"] == "30000000"
    assert raw.headers["x-extra"] == "yes"
    assert raw.request_id == sandbox.calls()[0]["request_id"]

    raw = await clients.claude.messages.with_raw_response.create(
        model=ANTHROPIC_MODEL, max_tokens=9, messages=[{"role": "user", "content": "hello"}]
    )
    assert raw.headers["request-id"] == sandbox.calls()[1]["request_id"]
    assert int(raw.headers["anthropic-ratelimit-input-tokens-remaining"]) > 0
    assert raw.headers["anthropic-ratelimit-requests-reset"].endswith("Z")


async def test_system_turns_and_images_are_counted(clients: Clients) -> None:
    png = base64.b64encode(b"\x89PNG").decode()
    tokens = -(-len("\n".join(["Be brief.", "What is this?", "A sign.", "And this?"])) // 4)
    answer = await clients.gpt.chat.completions.create(
        model="gpt-4o",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is this?"},
            {"role": "assistant", "content": "A sign."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "And this?"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
                ],
            },
        ],
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == tokens + 1_000
    message = await clients.claude.messages.create(
        model=ANTHROPIC_MODEL,
        max_tokens=500,
        system=[{"type": "text", "text": "Be brief."}],
        messages=[
            {"role": "user", "content": "What is this?"},
            {"role": "assistant", "content": [{"type": "text", "text": "A sign."}]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "And this?"},
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": png},
                    },
                ],
            },
        ],
    )
    assert message.usage.input_tokens == tokens + 1_000
    assert message.content[0].type == "text"
    assert message.content[0].text == answer.choices[0].message.content


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"stage": {"enum": ["won", "lost"]}, "note": {"type": "string"}},
    "additionalProperties": False,
}
FITTED = {"stage": "won", "note": "confirmed"}


async def test_tools_at_openai(clients: Clients) -> None:
    tool = {"type": "function", "function": {"name": "set_stage", "parameters": SCHEMA}}
    request: dict[str, Any] = {"model": OPENAI_MODEL, "tools": [tool]}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "TOOL: set_stage"}]
    whole = await clients.gpt.chat.completions.create(messages=messages, **request)
    assert whole.choices[0].finish_reason == "tool_calls"
    (call,) = whole.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("set_stage", FITTED)

    name = arguments = ""
    stream = await clients.gpt.chat.completions.create(messages=messages, stream=True, **request)
    async for chunk in stream:
        for part in chunk.choices[0].delta.tool_calls or []:
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert (name, json.loads(arguments)) == ("set_stage", FITTED)
    assert chunk.choices[0].finish_reason == "tool_calls"

    messages += [whole.choices[0].message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "done"}]
    messages += [{"role": "user", "content": "ECHO: thanks"}]
    after = await clients.gpt.chat.completions.create(messages=messages, **request)
    assert after.choices[0].message.content == "thanks"
    forced = await clients.gpt.chat.completions.create(
        messages=[{"role": "user", "content": "hello"}], tool_choice="required", **request
    )
    assert forced.choices[0].finish_reason == "tool_calls"


async def test_tools_at_anthropic(clients: Clients) -> None:
    tool = {"name": "set_stage", "input_schema": SCHEMA}
    request: dict[str, Any] = {"model": ANTHROPIC_MODEL, "max_tokens": 500, "tools": [tool]}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "TOOL: set_stage"}]
    whole = await clients.claude.messages.create(messages=messages, **request)
    assert whole.stop_reason == "tool_use"
    (block,) = whole.content
    assert block.type == "tool_use"
    assert (block.name, block.input) == ("set_stage", FITTED)

    async with clients.claude.messages.stream(messages=messages, **request) as stream:
        final = await stream.get_final_message()
    assert final.stop_reason == "tool_use"
    assert final.content[0].type == "tool_use"
    assert final.content[0].input == FITTED
    assert final.usage.output_tokens == whole.usage.output_tokens

    result = {"type": "tool_result", "tool_use_id": block.id, "content": "done"}
    text = {"type": "text", "text": "ECHO: thanks"}
    messages += [{"role": "assistant", "content": [block.model_dump(exclude_none=True)]}]
    messages += [{"role": "user", "content": [result, text]}]
    after = await clients.claude.messages.create(messages=messages, **request)
    assert after.content[0].type == "text"
    assert after.content[0].text == "thanks"


async def test_several_tools_at_once(clients: Clients) -> None:
    names = ["set_stage", "add_note"]
    prompt = "TOOL: set_stage, add_note"
    request: dict[str, Any] = {
        "model": OPENAI_MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "tools": [
            {"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in names
        ],
    }
    whole = await clients.gpt.chat.completions.create(**request)
    calls = whole.choices[0].message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        (name, FITTED) for name in names
    ]
    async with clients.gpt.chat.completions.stream(**request) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.tool_calls[1].function.arguments == json.dumps(
        FITTED, separators=(",", ":")
    )
    one = await clients.gpt.chat.completions.create(**request, parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls) == 1

    request = {
        "model": ANTHROPIC_MODEL,
        "max_tokens": 500,
        "messages": [{"role": "user", "content": prompt}],
        "tools": [{"name": name, "input_schema": SCHEMA} for name in names],
    }
    message = await clients.claude.messages.create(**request)
    assert [(block.name, block.input) for block in message.content] == [(n, FITTED) for n in names]
    assert len({block.id for block in message.content}) == 2
    async with clients.claude.messages.stream(**request) as events:
        final = await events.get_final_message()
    assert [block.input for block in final.content] == [FITTED, FITTED]
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = await clients.claude.messages.create(**request, tool_choice=choice)
    assert [block.name for block in message.content] == names[:1]


GPT_REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("gpt-6-luna", {"temperature": 0.5}),
    ("gpt-6-luna", {"top_p": 0.5}),
    ("gpt-6-luna", {"stop": ["END"]}),
    ("gpt-4o-mini", {"reasoning_effort": "low"}),
    ("gpt-6-luna", {"parallel_tool_calls": True}),
    ("gpt-6-luna", {"tool_choice": "auto"}),
    (
        "gpt-6-luna",
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
            }
        },
    ),
    ("gpt-6-luna", {"messages": [{"role": "tool", "tool_call_id": "c1", "content": "x"}]}),
]
CLAUDE_REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("claude-haiku-5-5", {"extra_body": {"temperature": 1}}),
    ("claude-haiku-5-5", {"stop_sequences": ["\n"]}),
    ("claude-haiku-4-5", {"output_config": {"effort": "low"}}),
    ("claude-haiku-5-5", {"tools": [{"name": "x", "input_schema": {"properties": {}}}]}),
    (
        "claude-haiku-5-5",
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
    ),
    ("claude-haiku-5-5", {"messages": [{"role": "user", "content": " "}]}),
    (
        "claude-haiku-5-5",
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "c1", "name": "x", "input": {}}],
                },
                {"role": "user", "content": "well?"},
            ]
        },
    ),
]


@pytest.mark.parametrize(("model", "more"), GPT_REFUSED, ids=str)
async def test_what_openai_would_refuse(clients: Clients, model: str, more: dict[str, Any]) -> None:
    hello: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
    with pytest.raises(openai.BadRequestError):
        await clients.gpt.chat.completions.create(model=model, **(hello | more))


@pytest.mark.parametrize(("model", "more"), CLAUDE_REFUSED, ids=str)
async def test_what_anthropic_would_refuse(
    clients: Clients, model: str, more: dict[str, Any]
) -> None:
    hello: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
    with pytest.raises(anthropic.BadRequestError):
        await clients.claude.messages.create(model=model, max_tokens=50, **(hello | more))


async def test_json_schemas(clients: Clients) -> None:
    answer = await clients.gpt.chat.completions.create(
        model=OPENAI_MODEL,
        messages=[{"role": "user", "content": "hello"}],
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    )
    assert json.loads(answer.choices[0].message.content or "") == FITTED
    message = await clients.claude.messages.create(
        model=ANTHROPIC_MODEL,
        max_tokens=500,
        messages=[{"role": "user", "content": "hello"}],
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
    )
    assert message.content[0].type == "text"
    assert json.loads(message.content[0].text) == FITTED


# money


async def test_usage_classes_are_reported_and_billed(
    clients: Clients, sandbox: SandboxControl
) -> None:
    prompt = "INPUT: 150000\nCACHED: 40000\nCACHE_WRITE: 300\nTOKENS: 50\nREASONING: 20"
    answer = await clients.gpt.chat.completions.create(
        model="gpt-6.1-sol", messages=[{"role": "user", "content": prompt}]
    )
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.completion_tokens_details is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        *(150_000, 50),
        150_050,
    )
    assert usage.prompt_tokens_details.cached_tokens == 40_000
    assert usage.prompt_tokens_details.cache_write_tokens == 300
    assert usage.completion_tokens_details.reasoning_tokens == 20
    billed = 109_700 * 2_000 + 40_000 * 100 + 300 * 2_500 + 50 * 10_000
    assert sandbox.calls()[0]["billed_nano_usd"] == billed

    message = await clients.claude.messages.create(
        model=ANTHROPIC_MODEL,
        max_tokens=500,
        messages=[{"role": "user", "content": f"{prompt}\nCACHE_WRITE_1H: 700"}],
    )
    assert message.usage.input_tokens == 109_000
    assert message.usage.cache_read_input_tokens == 40_000
    assert message.usage.cache_creation_input_tokens == 1_000
    assert message.usage.cache_creation is not None
    assert message.usage.cache_creation.ephemeral_1h_input_tokens == 700
    assert message.usage.output_tokens_details is not None
    assert message.usage.output_tokens_details.thinking_tokens == 20
    # above 100,000 prompt tokens this model is five times dearer
    above = 5 * (109_000 * 100 + 40_000 * 10 + 300 * 125 + 700 * 200 + 50 * 500)
    assert sandbox.calls()[1]["billed_nano_usd"] == above
    bill = sandbox.bill()
    assert (bill["calls"], bill["billed_calls"], bill["in_flight"]) == (2, 2, 0)
    assert bill["billed_nano_usd"] == billed + above
    assert bill["by_model"]["gpt-6.1-sol"]["billed_nano_usd"] == billed


async def test_unknown_models_are_not_found_and_cost_nothing(
    clients: Clients, sandbox: SandboxControl
) -> None:
    for model in ("gpt-9", ANTHROPIC_MODEL):
        seen = await ask_gpt(clients.gpt, "hello", stream=False, model=model)
        assert isinstance(seen.error, openai.NotFoundError)
        assert seen.error.code == "model_not_found"
    for model in ("claude-9", OPENAI_MODEL):
        seen = await ask_claude(clients.claude, "hello", stream=True, model=model)
        assert isinstance(seen.error, anthropic.NotFoundError)
        assert seen.error.type == "not_found_error"
    assert [call["status"] for call in sandbox.calls()] == [404] * 4
    assert sandbox.bill()["billed_calls"] == 0


async def test_models_are_listed(clients: Clients) -> None:
    listed = [model.id async for model in clients.gpt.models.list()]
    listed += [model.id async for model in clients.claude.models.list()]
    assert sorted(listed) == sorted(PRICES)
    assert (await clients.gpt.models.retrieve("gpt-4o")).id == "gpt-4o"
    with pytest.raises(anthropic.NotFoundError):
        await clients.claude.models.retrieve("claude-9")


def test_a_whole_answer_is_billed_although_the_client_left(sandbox: SandboxControl) -> None:
    sandbox.settings(latency_ms=1_000)
    with connected(sandbox) as connection:
        connection.sendall(raw_request("TOKENS: 30"))
        sandbox.wait_for_calls(1, DEADLINE_S)
    call = only_call(sandbox)
    assert call["client_gone"]
    assert call["billed_nano_usd"] == bill_nano_usd(OPENAI_MODEL, Usage(input=3, output=30))


async def test_a_stream_is_billed_up_to_where_the_client_left(
    clients: Clients, sandbox: SandboxControl
) -> None:
    sandbox.settings(tokens_per_s=50)
    stream = await clients.claude.messages.create(
        model=ANTHROPIC_MODEL,
        max_tokens=500,
        messages=[{"role": "user", "content": "TOKENS: 400"}],
        stream=True,
    )
    async with stream:
        async for event in stream:
            if event.type == "content_block_delta":
                break
    call = only_call(sandbox)
    assert call["client_gone"]
    assert 1 <= call["usage"]["output"] < 400
    assert call["billed_nano_usd"] == bill_nano_usd(ANTHROPIC_MODEL, Usage(**call["usage"]))

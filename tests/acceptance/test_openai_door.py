"""`/v1/chat/completions` and `/v1/models`, through OpenAI's own SDK, with real workers."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID, uuid4

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from sluicegate.workers.local.sandbox_faults import Fault
from tests.command_line import Command
from tests.doors import PDF, PNG, ask_at_once, key_without_money, open_doors
from tests.harness import Rig
from tests.http_servers import HttpServer, start_http

FIND: Any = {
    "type": "function",
    "function": {
        "name": "find_contact",
        "description": "Find one.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}
#: A use case of each pool.
BOTH = pytest.mark.parametrize("model", ["sluice/draft", "sluice/general"])


@pytest.fixture(scope="module")
def server(module_rig: Rig) -> HttpServer:
    return open_doors(module_rig)


@pytest.fixture
def client(server: HttpServer, rig: Rig) -> Any:
    with OpenAI(base_url=f"{server.url}/v1", api_key=server.api_key, max_retries=0) as client:
        yield client


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def ours(answer: Any) -> Any:
    return answer.sluicegate


# Chat


@BOTH
def test_a_chat_is_answered(client: OpenAI, rig: Rig, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=user("ECHO: Hello Ada"))
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello Ada")
    assert (choice.finish_reason, answer.object) == ("stop", "chat.completion")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    told = ours(answer)
    assert answer.id == f"chatcmpl-{told['jobId']}"
    job = rig.client.get(told["jobId"])
    assert job.result is not None
    assert (job.use_case, job.result.model) == (model.removeprefix("sluice/"), answer.model)
    assert told["provider"] == job.result.provider
    assert (told["attempts"], told["warnings"]) == (1, [])
    assert told["costUsd"] == pytest.approx(float(job.cost))
    assert told["baselineUsd"] > 0


def test_every_part_of_a_conversation_arrives(client: OpenAI, rig: Rig) -> None:
    client.chat.completions.create(
        model="sluice/general",
        messages=[
            {"role": "system", "content": "Be short."},
            {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "user", "content": "First."},
            {"role": "assistant", "content": "Second."},
            {"role": "user", "content": [{"type": "text", "text": "Third."}]},
        ],
        max_tokens=77,
        user="somebody",
        metadata={"deal": "d-1"},
    )
    (call,) = rig.sandbox.calls()
    assert call["prompt_tail"].endswith("Third.")
    (row,) = rig.rows("SELECT id FROM jobs ORDER BY created_at DESC LIMIT 1")
    assert rig.client.get(row.id).metadata == {"deal": "d-1"}


def test_a_model_may_be_named_in_four_ways(client: OpenAI, rig: Rig) -> None:
    listed = {one.id for one in client.models.list()}
    first = client.chat.completions.create(model="sluice/general", messages=user("Hello."))
    row = ours(first)["provider"]
    provider_model = next(one for one in rig.sandbox.calls())["model"]
    for model in ("sluice/auto", "sluice/general", row, provider_model):
        assert model in listed
        assert client.models.retrieve(model).id == model
        answer = client.chat.completions.create(model=model, messages=user("Hello."))
        if model != "sluice/auto":
            assert ours(answer)["provider"] == row


def test_fallbacks_are_tried_in_their_order(client: OpenAI, rig: Rig) -> None:
    rig.sandbox.add_fault(Fault.HTTP_503, wire="anthropic")
    rows = rig.rows("SELECT name, provider FROM llm_providers WHERE catalogue = 'current'")
    one = next(row.name for row in rows if row.provider == "anthropic")
    other = next(row.name for row in rows if row.provider == "openai")
    answer = client.chat.completions.create(
        model=one, messages=user("Hello."), extra_body={"fallbacks": [other]}
    )
    assert ours(answer)["provider"] == other
    assert ours(answer)["attempts"] > 1


# Streams


@BOTH
def test_a_stream_is_the_answer_in_pieces(client: OpenAI, rig: Rig, model: str) -> None:
    rig.sandbox.settings(tokens_per_s=200)
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=user("TOKENS: 60\nWrite to Ada."),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *said, last = chunks
    assert (last.choices, last.usage is not None) == ([], True)
    pieces = [chunk.choices[0].delta.content for chunk in said if chunk.choices[0].delta.content]
    text = "".join(pieces)
    assert len(text) == 240
    assert len(pieces) > 1
    assert said[0].choices[0].delta.role == "assistant"
    assert said[-1].choices[0].finish_reason == "stop"
    assert ours(said[-1])["attempts"] == 1
    assert len({chunk.id for chunk in chunks}) == 1
    whole = client.chat.completions.create(model=model, messages=user("TOKENS: 60\nWrite to Ada."))
    assert whole.choices[0].message.content == text


def test_a_stream_in_one_piece(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="sluice/general",
            messages=user("TOKENS: 60\nWrite to Ada."),
            stream=True,
            extra_headers={"X-Sluice-Stream": "whole"},
        )
    )
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert [len(text) for text in texts] == [240]


def test_a_stream_that_starts_again_with_the_same_answer_goes_on(client: OpenAI, rig: Rig) -> None:
    # The sandbox answers the same prompt with the same text, so only the first half is sent twice.
    rig.sandbox.add_fault(Fault.CUT_STREAM, times=1)
    rig.sandbox.settings(tokens_per_s=200)
    prompt = "TOKENS: 60\nWrite to Grace."
    chunks = list(
        client.chat.completions.create(model="sluice/general", messages=user(prompt), stream=True)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert ours(chunks[-1])["attempts"] == 2
    whole = client.chat.completions.create(model="sluice/general", messages=user(prompt))
    assert text == whole.choices[0].message.content


def test_a_stream_that_starts_again_with_another_answer_ends_in_an_error(
    client: OpenAI, rig: Rig
) -> None:
    rig.sandbox.add_fault(Fault.CUT_STREAM, times=1)
    rig.sandbox.add_fault(Fault.ANSWER_TEXT, text_json="Something else altogether.")
    rig.sandbox.settings(tokens_per_s=200)
    said: list[str] = []
    stream = client.chat.completions.create(
        model="sluice/general", messages=user("TOKENS: 60\nWrite."), stream=True
    )
    with pytest.raises(openai.APIError) as caught:
        said.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert any(said)
    assert "Something" not in "".join(said)
    assert caught.value.code == "restarted"
    assert isinstance(caught.value.body, dict)
    job_id = caught.value.body["jobId"]
    assert rig.client.handle(job_id).result(60).text == "Something else altogether."


def test_a_stream_that_fails_at_once_is_refused_by_its_status(client: OpenAI, rig: Rig) -> None:
    rig.sandbox.add_fault(Fault.HTTP_400)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="sluice/general", messages=user("Hello."), stream=True)
    assert caught.value.response.headers["x-sluice-job-id"]


async def test_a_client_that_leaves_cancels_nothing(server: HttpServer, rig: Rig) -> None:
    rig.sandbox.settings(tokens_per_s=50)
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.api_key) as client:
        stream: AsyncIterator[Any] = await client.chat.completions.create(
            model="sluice/general", messages=user("TOKENS: 40\nWrite."), stream=True
        )
        job_id = UUID((await anext(stream)).id.removeprefix("chatcmpl-"))
    result = rig.client.handle(job_id).result(60)
    assert (len(result.text), result.attempts) == (160, 1)
    assert [call["client_gone"] for call in rig.sandbox.calls()] == [False]


def test_a_server_that_stops_ends_its_streams_in_an_error(server: HttpServer, rig: Rig) -> None:
    rig.sandbox.settings(tokens_per_s=20)
    stopping = start_http(rig, api_key=server.api_key)
    with OpenAI(base_url=f"{stopping.url}/v1", api_key=server.api_key, max_retries=0) as client:
        stream = client.chat.completions.create(
            model="sluice/general", messages=user("TOKENS: 60\nWrite."), stream=True
        )
        first = next(iter(stream))
        stopping.service.signal(signal.SIGTERM)
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert caught.value.code == "stopping"
    assert stopping.service.wait(20) == 0
    result = rig.client.handle(first.id.removeprefix("chatcmpl-")).result(60)
    assert (len(result.text), result.attempts) == (240, 1)


# Tools


@BOTH
@pytest.mark.parametrize("streamed", [False, True])
def test_tools_make_their_round(client: OpenAI, model: str, *, streamed: bool) -> None:
    messages: list[Any] = user("TOOL: find_contact\nFind Ada.")
    if streamed:
        with client.chat.completions.stream(model=model, messages=messages, tools=[FIND]) as said:
            first: Any = said.get_final_completion()
    else:
        first = client.chat.completions.create(model=model, messages=messages, tools=[FIND])
    (choice,) = first.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.function.name == "find_contact"
    assert json.loads(call.function.arguments) == {"name": "confirmed"}
    messages += [
        choice.message.model_dump(include={"role", "content", "tool_calls"}),
        {"role": "tool", "tool_call_id": call.id, "content": "Ada, ada@example.com"},
        {"role": "user", "content": "ECHO: Found her."},
    ]
    second = client.chat.completions.create(model=model, messages=messages, tools=[FIND])
    assert second.choices[0].message.content == "Found her."


@BOTH
def test_several_tools_are_called_at_once_unless_that_is_not_wanted(
    client: OpenAI, model: str
) -> None:
    other = FIND | {"function": FIND["function"] | {"name": "find_company"}}
    asked: Any = {
        "model": model,
        "messages": user("TOOL: find_contact, find_company\nFind both."),
        "tools": [FIND, other],
    }
    with client.chat.completions.stream(**asked) as said:
        streamed = said.get_final_completion().choices[0].message.tool_calls or []
    whole = client.chat.completions.create(**asked).choices[0].message.tool_calls or []
    for calls in (streamed, whole):
        told = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
        assert told == [(name, {"name": "confirmed"}) for name in ("find_contact", "find_company")]
        assert len({call.id for call in calls}) == 2
    one = client.chat.completions.create(**asked, parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls or []) == 1


def test_a_tool_can_be_forced(client: OpenAI) -> None:
    forced: Any = {"type": "function", "function": {"name": "find_contact"}}
    answer = client.chat.completions.create(
        model="sluice/general", messages=user("Find Ada."), tools=[FIND], tool_choice=forced
    )
    calls = answer.choices[0].message.tool_calls or []
    assert calls is not None
    assert [call.type for call in calls] == ["function"]


# JSON


class Note(BaseModel):
    summary: str
    urgent: bool


@BOTH
def test_an_answer_fits_its_schema(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model, messages=user("Note the call."), response_format=Note
    )
    assert answer.choices[0].message.parsed == Note(summary="confirmed", urgent=True)


@BOTH
def test_an_answer_is_an_object(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=user('ECHO: {"note": "as JSON"}'),
        response_format={"type": "json_object"},
    )
    assert json.loads(answer.choices[0].message.content or "") == {"note": "as JSON"}


# Attachments


def test_images_and_files_reach_a_model_that_sees(client: OpenAI, rig: Rig) -> None:
    content: Any = [
        {"type": "text", "text": "ECHO: seen"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}},
        {
            "type": "file",
            "file": {
                "file_data": f"data:application/pdf;base64,{PDF}",
                "filename": "offer.pdf",
            },
        },
    ]
    answer = client.chat.completions.create(
        model="sluice/vision", messages=[{"role": "user", "content": content}]
    )
    assert answer.choices[0].message.content == "seen"
    (call,) = rig.sandbox.calls()
    assert call["usage"]["input"] > 2 * 1000 + 2000


# Errors


def test_what_is_wrong_is_named(client: OpenAI) -> None:
    def refused(place: str, **body: Any) -> None:
        asked = {"model": "sluice/general", "messages": user("Hello."), **body}
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/chat/completions", body=asked, cast_to=object)
        assert caught.value.param == place
        assert caught.value.type == "invalid_request_error"
        assert str(caught.value.body["message"]).startswith(f"{place}: ")  # type: ignore[index]

    refused("messages", messages=[])
    refused("messages.0.role", messages=[{"content": "Hello."}])
    refused("messages.0.content", messages=user(""))
    refused("messages", messages=[*user("Hello."), {"role": "assistant", "content": "Yes"}])
    http_url = {"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}
    refused(
        "messages.0.content.0.image_url.url", messages=[{"role": "user", "content": [http_url]}]
    )
    refused("messages.1.tool_call_id", messages=[*user("Hi"), {"role": "tool", "content": "x"}])
    refused("max_tokens", max_tokens=0)
    refused("temperature", temperature=3)
    refused("n", n=2)
    refused("logprobs", logprobs=True)
    refused("functions", functions=[{"name": "f"}])
    refused("tools.0.function.name", tools=[{"type": "function", "function": {}}])
    refused("tool_choice", tool_choice="sometimes")
    refused("response_format.type", response_format={"type": "yaml"})
    refused("stream", stream="yes")


def test_what_is_left_out_is_said(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="sluice/general",
        messages=user("Hello."),
        seed=7,
        reasoning_effort="minimal",
        extra_body={"mirostat": 2},
        user="somebody",
        store=False,
    )
    warnings = ours(answer)["warnings"]
    assert warnings[:3] == [
        "seed is not taken here and was left out",
        "mirostat is not known here and was left out",
        "reasoning_effort minimal is taken as low",
    ]


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    for model in ("sluice/nothing", "gpt-99"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model=model, messages=user("Hello."))
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-99")


def test_a_wrong_key_is_said_to_be_one(server: HttpServer) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="sk-sluice-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.chat.completions.create(model="sluice/general", messages=user("Hello."))
        assert (caught.value.type, caught.value.code) == ("authentication_error", "invalid_api_key")


def test_a_full_budget_is_not_tried_again(
    client: OpenAI, rig: Rig, command_line: Callable[[Any], Command]
) -> None:
    poor = client.with_options(
        api_key=key_without_money(rig, command_line, "poor"), max_retries=2, timeout=30
    )
    with pytest.raises(openai.APIStatusError) as caught:
        poor.chat.completions.create(model="sluice/general", messages=user("Hello."))
    error = caught.value
    assert (error.status_code, error.code) == (402, "insufficient_quota")
    assert error.response.request.headers["x-stainless-retry-count"] == "0"


def test_a_key_stands_for_one_request(client: OpenAI, rig: Rig) -> None:
    key = {"Idempotency-Key": str(uuid4())}

    def ask(text: str) -> Any:
        return client.chat.completions.create(
            model="sluice/general", messages=user(text), extra_headers=key
        )

    assert ask("Hello.") == ask("Hello.")
    assert len(rig.sandbox.calls()) == 1
    with pytest.raises(openai.ConflictError) as caught:
        ask("Good evening.")
    assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_same_key_at_once_is_one_job(
    server: HttpServer, rig: Rig, *, streamed: bool
) -> None:
    rig.sandbox.settings(latency_ms=300, tokens_per_s=200)
    body = {
        "model": "sluice/general",
        "messages": user("TOKENS: 60\nOnce only."),
        "stream": streamed,
    }
    other = {**body, "messages": user("Something else.")}
    answers, refused = await ask_at_once(server, "/v1/chat/completions", body, other)
    assert {answer.status_code for answer in answers} == {200}, answers[0].text
    assert len(rig.sandbox.calls()) == 1
    (job_id,) = {answer.headers["x-sluice-job-id"] for answer in answers}
    text = rig.client.handle(job_id).result(60).text
    assert len(text) == 240
    if streamed:
        for answer in answers:
            assert _told(answer.text) == _told(answers[0].text)
        assert _told(answers[0].text)["text"] == text
    else:
        (content,) = {answer.content for answer in answers}
        assert json.loads(content)["choices"][0]["message"]["content"] == text
    assert refused.status_code == 409
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "idempotency_conflict")
    assert set(error) == {"message", "type", "param", "code"}
    assert refused.headers["x-should-retry"] == "false"


def _told(stream: str) -> dict[str, Any]:
    """Return what a stream tells, however it is cut into chunks, and whenever it was begun."""
    *events, done = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
    chunks = [json.loads(event) for event in events if not event.startswith(":")]
    assert done == "[DONE]"
    return {
        "id": {chunk["id"] for chunk in chunks},
        "model": {chunk["model"] for chunk in chunks},
        "text": "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks),
        "finish": chunks[-1]["choices"][0]["finish_reason"],
        "ours": chunks[-1]["sluicegate"],
    }


def test_a_wait_that_is_over_tells_the_job(client: OpenAI, rig: Rig) -> None:
    rig.sandbox.settings(latency_ms=3000)
    with pytest.raises(openai.APIStatusError) as caught:
        # Were this repeated, it would be paid for again.
        client.with_options(timeout=2, max_retries=2).chat.completions.create(
            model="sluice/general", messages=user("ECHO: late")
        )
    assert (caught.value.status_code, caught.value.code) == (406, "still_running")
    job_id = caught.value.response.headers["x-sluice-job-id"]
    assert rig.client.handle(job_id).result(60).text == "late"
    assert len(rig.sandbox.calls()) == 1


def test_a_provider_that_fails_is_not_asked_again_by_the_client(client: OpenAI, rig: Rig) -> None:
    rig.sandbox.add_fault(Fault.CONTEXT_TOO_LONG)
    with pytest.raises(openai.BadRequestError) as caught:
        client.with_options(max_retries=2).chat.completions.create(
            model="sluice/general", messages=user("Hello.")
        )
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.response.headers["x-should-retry"] == "false"

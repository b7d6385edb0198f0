"""`/v1/messages` and `/v1/models`, through Anthropic's own SDK, with real workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel

from sluicegate.workers.local.sandbox_faults import Fault
from tests.command_line import Command
from tests.doors import PDF, PNG, ask_at_once, key_without_money, open_doors
from tests.harness import Rig
from tests.http_servers import HttpServer

FIND: Any = {
    "name": "find_contact",
    "description": "Find one.",
    "input_schema": {"type": "object", "properties": {"name": {"type": "string"}}},
}
#: A use case of each pool.
BOTH = pytest.mark.parametrize("model", ["sluice/draft", "sluice/general"])


@pytest.fixture(scope="module")
def server(module_rig: Rig) -> HttpServer:
    return open_doors(module_rig)


@pytest.fixture
def client(server: HttpServer, rig: Rig) -> Any:
    with Anthropic(base_url=server.url, api_key=server.api_key, max_retries=0) as client:
        yield client


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def ours(answer: Any) -> Any:
    return answer.sluicegate


def text_of(answer: Any) -> str:
    return "".join(block.text for block in answer.content if block.type == "text")


# Messages


@BOTH
def test_a_message_is_answered(client: Anthropic, rig: Rig, model: str) -> None:
    answer = client.messages.create(
        model=model, max_tokens=100, messages=user("CACHED: 3\nECHO: Hello Ada")
    )
    assert (answer.type, answer.role, text_of(answer)) == ("message", "assistant", "Hello Ada")
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    told = ours(answer)
    assert answer.id == f"msg_{told['jobId']}"
    job = rig.client.get(told["jobId"])
    assert job.result is not None
    assert (told["provider"], answer.model) == (job.result.provider, job.result.model)
    usage = job.result.usage
    assert usage.cache_read == 3
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (usage.input, usage.output)
    assert answer.usage.cache_read_input_tokens == 3
    assert answer._request_id


def test_every_part_of_a_conversation_arrives(client: Anthropic, rig: Rig) -> None:
    answer = client.messages.create(
        model="sluice/vision",
        max_tokens=77,
        system=[{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": "First."},
            {"role": "assistant", "content": [{"type": "text", "text": "Second."}]},
            {
                "role": "user",
                "content": [
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": PNG},
                    },
                    {"type": "image", "source": {"type": "url", "url": "https://example.com/a"}},
                    {
                        "type": "document",
                        "title": "offer.pdf",
                        "source": {"type": "base64", "media_type": "application/pdf", "data": PDF},
                    },
                    {
                        "type": "document",
                        "source": {"type": "text", "media_type": "text/plain", "data": "A note."},
                    },
                    {"type": "text", "text": "ECHO: seen"},
                ],
            },
        ],
        metadata={"user_id": "somebody"},
        stop_sequences=["###"],
    )
    assert text_of(answer) == "seen"
    (call,) = rig.sandbox.calls()
    assert call["usage"]["input"] > 2 * 1000 + 2000


# Streams


@BOTH
def test_a_stream_is_the_answer_in_pieces(client: Anthropic, rig: Rig, model: str) -> None:
    rig.sandbox.settings(tokens_per_s=200)
    asked = user("TOKENS: 60\nWrite to Ada.")
    with client.messages.stream(model=model, max_tokens=100, messages=asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    whole = client.messages.create(model=model, max_tokens=100, messages=asked)
    assert text_of(final) == text_of(whole)
    assert len(text_of(whole)) == 240
    assert (final.stop_reason, final.model) == ("end_turn", whole.model)
    assert final.usage.input_tokens == whole.usage.input_tokens > 0
    assert final.usage.output_tokens == 60
    assert (kinds[0], kinds[1], kinds[-1]) == (
        "message_start",
        "content_block_start",
        "message_stop",
    )
    assert kinds.count("content_block_delta") > 1


def test_a_stream_that_starts_again_with_the_same_answer_goes_on(
    client: Anthropic, rig: Rig
) -> None:
    rig.sandbox.add_fault(Fault.CUT_STREAM, times=1)
    rig.sandbox.settings(tokens_per_s=200)
    asked = user("TOKENS: 60\nWrite to Grace.")
    with client.messages.stream(model="sluice/draft", max_tokens=100, messages=asked) as stream:
        final = stream.get_final_message()
    whole = client.messages.create(model="sluice/draft", max_tokens=100, messages=asked)
    assert text_of(final) == text_of(whole)
    assert rig.client.get(final.id.removeprefix("msg_")).attempts == 2


def test_a_stream_that_starts_again_with_another_answer_ends_in_an_error(
    client: Anthropic, rig: Rig
) -> None:
    rig.sandbox.add_fault(Fault.CUT_STREAM, times=1)
    rig.sandbox.add_fault(Fault.ANSWER_TEXT, text="Something else altogether.")
    rig.sandbox.settings(tokens_per_s=200)
    said: list[str] = []
    with (
        client.messages.stream(
            model="sluice/draft", max_tokens=100, messages=user("TOKENS: 60\nWrite.")
        ) as stream,
        pytest.raises(anthropic.APIStatusError) as caught,
    ):
        said.extend(stream.text_stream)
    assert any(said)
    assert "Something" not in "".join(said)
    assert isinstance(caught.value.body, dict)
    details = caught.value.body["error"]["details"]
    assert details["error_code"] == "restarted"
    assert rig.client.handle(details["jobId"]).result(60).text == "Something else altogether."


async def test_a_client_that_leaves_cancels_nothing(server: HttpServer, rig: Rig) -> None:
    rig.sandbox.settings(tokens_per_s=50)
    async with AsyncAnthropic(base_url=server.url, api_key=server.api_key) as client:
        stream = await client.messages.create(
            model="sluice/draft", max_tokens=100, messages=user("TOKENS: 40\nWrite."), stream=True
        )
        begun: Any = await anext(aiter(stream))
        await stream.close()
    result = rig.client.handle(UUID(begun.message.id.removeprefix("msg_"))).result(60)
    assert (len(result.text), result.attempts) == (160, 1)
    assert [call["client_gone"] for call in rig.sandbox.calls()] == [False]


# Tools


@BOTH
@pytest.mark.parametrize("streamed", [False, True])
def test_tools_make_their_round(client: Anthropic, model: str, *, streamed: bool) -> None:
    messages: list[Any] = user("TOOL: find_contact\nFind Ada.")
    asked: dict[str, Any] = {"model": model, "max_tokens": 200, "tools": [FIND]}
    first: Any
    if streamed:
        with client.messages.stream(messages=messages, **asked) as stream:
            first = stream.get_final_message()
    else:
        first = client.messages.create(messages=messages, **asked)
    assert first.stop_reason == "tool_use"
    (call,) = [block for block in first.content if block.type == "tool_use"]
    assert (call.name, call.input) == ("find_contact", {"name": "confirmed"})
    result = {
        "type": "tool_result",
        "tool_use_id": call.id,
        "content": [{"type": "text", "text": "Ada, ada@example.com"}],
    }
    messages += [
        {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "ECHO: Found her."}]},
    ]
    second = client.messages.create(messages=messages, **asked)
    assert text_of(second) == "Found her."


@BOTH
def test_several_tools_are_called_at_once_unless_that_is_not_wanted(
    client: Anthropic, model: str
) -> None:
    asked: dict[str, Any] = {
        "model": model,
        "max_tokens": 200,
        "messages": user("TOOL: find_contact, find_company\nFind both."),
        "tools": [FIND, FIND | {"name": "find_company"}],
    }

    def calls_of(answer: Any) -> list[Any]:
        return [block for block in answer.content if block.type == "tool_use"]

    with client.messages.stream(**asked) as stream:
        streamed = calls_of(stream.get_final_message())
    for calls in (streamed, calls_of(client.messages.create(**asked))):
        told = [(call.name, call.input) for call in calls]
        assert told == [(name, {"name": "confirmed"}) for name in ("find_contact", "find_company")]
        assert len({call.id for call in calls}) == 2
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(calls_of(client.messages.create(**asked, tool_choice=choice))) == 1


@pytest.mark.parametrize(
    "choice", [{"type": "any"}, {"type": "tool", "name": "find_contact"}, {"type": "auto"}]
)
def test_a_tool_can_be_forced(client: Anthropic, choice: Any) -> None:
    answer = client.messages.create(
        model="sluice/draft",
        max_tokens=200,
        messages=user("Find Ada."),
        tools=[FIND],
        tool_choice=choice | {"disable_parallel_tool_use": True},
    )
    calls = [block for block in answer.content if block.type == "tool_use"]
    assert len(calls) == (choice["type"] != "auto")


# JSON


class Note(BaseModel):
    summary: str
    urgent: bool


@BOTH
def test_an_answer_fits_its_schema(client: Anthropic, model: str) -> None:
    answer = client.messages.parse(
        model=model, max_tokens=200, messages=user("Note the call."), output_format=Note
    )
    assert answer.parsed_output == Note(summary="confirmed", urgent=True)


# Models


def test_models_are_listed_as_anthropics_are(client: Anthropic) -> None:
    listed = client.models.list()
    ids = [one.id for one in listed]
    assert "sluice/draft" in ids
    assert ids == sorted(set(ids), key=ids.index)
    shown = client.models.retrieve("sluice/draft")
    assert (shown.id, shown.type) == ("sluice/draft", "model")
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.models.retrieve("claude-nothing")
    assert caught.value.type == "not_found_error"


# Errors


def test_what_is_wrong_is_named(client: Anthropic) -> None:
    def refused(place: str, **body: Any) -> None:
        asked = {"model": "sluice/draft", "max_tokens": 9, "messages": user("Hello."), **body}
        with pytest.raises(anthropic.BadRequestError) as caught:
            client.post("/v1/messages", body=asked, cast_to=object)
        assert caught.value.type == "invalid_request_error"
        assert str(caught.value.api_message).startswith(f"{place}: ")
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["error"]["details"]["field"] == place

    refused("messages", messages=[])
    refused("messages.0.role", messages=[{"role": "system", "content": "Hello."}])
    refused("messages.0.content", messages=user(""))
    refused("messages", messages=[*user("Hello."), {"role": "assistant", "content": "Yes"}])
    refused("max_tokens", max_tokens=0)
    refused("temperature", temperature=2)
    refused("container", container="c")
    refused("tools.0.type", tools=[{"type": "web_search_20250305", "name": "web_search"}])
    refused("tools.0.input_schema", tools=[{"name": "f"}])
    refused("tool_choice.type", tool_choice={"type": "sometimes"})
    refused("output_config.format.type", output_config={"format": {"type": "yaml"}})
    image = {"type": "image", "source": {"type": "url", "url": "http://example.com/a.png"}}
    refused("messages.0.content.0.source.url", messages=[{"role": "user", "content": [image]}])
    loose = {"type": "tool_result", "tool_use_id": "t", "content": "x"}
    refused("messages.0.content", messages=[{"role": "user", "content": [loose]}])


def test_what_is_left_out_is_said(client: Anthropic) -> None:
    answer = client.messages.create(
        model="sluice/draft",
        max_tokens=2048,
        messages=user("Hello."),
        thinking={"type": "enabled", "budget_tokens": 1024},
        extra_body={"top_k": 3},
        service_tier="auto",
    )
    assert ours(answer)["warnings"] == [
        "top_k is not taken here and was left out",
        "thinking is not taken here and was left out; use output_config.effort",
    ]


def test_errors_are_of_their_types(client: Anthropic, rig: Rig) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="claude-nothing", max_tokens=9, messages=user("Hello."))
    assert missing.value.error_code == "model_not_found"
    rig.sandbox.add_fault(Fault.CONTEXT_TOO_LONG)
    with pytest.raises(anthropic.BadRequestError) as long:
        # What a job's attempts did not bring, another job's would not either.
        client.with_options(max_retries=2).messages.create(
            model="sluice/draft", max_tokens=9, messages=user("Hello.")
        )
    assert long.value.error_code == "context_too_long"
    assert long.value.response.headers["x-sluice-job-id"]


def test_a_wrong_key_is_said_to_be_one(server: HttpServer) -> None:
    with Anthropic(base_url=server.url, api_key="sk-sluice-wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client.messages.create(model="sluice/draft", max_tokens=9, messages=user("Hello."))
        assert caught.value.type == "authentication_error"


def test_a_full_budget_is_not_tried_again(
    client: Anthropic, rig: Rig, command_line: Callable[[Any], Command]
) -> None:
    poor = client.with_options(
        api_key=key_without_money(rig, command_line, "poor"), max_retries=2, timeout=30
    )
    with pytest.raises(anthropic.PaymentRequiredError) as caught:
        poor.messages.create(model="sluice/draft", max_tokens=9, messages=user("Hello."))
    assert caught.value.type == "billing_error"
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"


def test_a_key_stands_for_one_request(client: Anthropic, rig: Rig) -> None:
    key = {"Idempotency-Key": str(uuid4())}

    def ask(text: str) -> Any:
        return client.messages.create(
            model="sluice/draft", max_tokens=99, messages=user(text), extra_headers=key
        )

    assert ask("Hello.") == ask("Hello.")
    assert len(rig.sandbox.calls()) == 1
    with pytest.raises(anthropic.ConflictError):
        ask("Good evening.")


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_same_key_at_once_is_one_job(
    server: HttpServer, rig: Rig, *, streamed: bool
) -> None:
    rig.sandbox.settings(latency_ms=300, tokens_per_s=200)
    body = {
        "model": "sluice/draft",
        "max_tokens": 99,
        "messages": user("TOKENS: 60\nOnce only."),
        "stream": streamed,
    }
    other = {**body, "messages": user("Something else.")}
    answers, refused = await ask_at_once(server, "/v1/messages", body, other)
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
        assert json.loads(content)["content"][0]["text"] == text
    assert refused.status_code == 409
    told = refused.json()
    assert set(told) == {"type", "error", "request_id"}
    assert (told["type"], told["error"]["type"]) == ("error", "conflict_error")
    assert told["error"]["details"]["error_code"] == "idempotency_conflict"
    assert told["request_id"] == refused.headers["request-id"]
    assert refused.headers["x-should-retry"] == "false"


def _told(stream: str) -> dict[str, Any]:
    """Return what a stream tells, however it is cut into events."""
    blocks = [block for block in stream.split("\n\n") if block.startswith("event: ")]
    events = [json.loads(block.partition("\ndata: ")[2]) for block in blocks]
    deltas = [one["delta"] for one in events if one["type"] == "content_block_delta"]
    rest = ("ping", "content_block_delta")
    return {
        "text": "".join(delta["text"] for delta in deltas),
        "around": [one for one in events if one["type"] not in rest],
    }


def test_a_wait_that_is_over_tells_the_job(client: Anthropic, rig: Rig) -> None:
    rig.sandbox.settings(latency_ms=3000)
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.with_options(timeout=2, max_retries=2).messages.create(
            model="sluice/draft", max_tokens=9, messages=user("ECHO: late")
        )
    assert caught.value.status_code == 406
    job_id = caught.value.response.headers["x-sluice-job-id"]
    assert rig.client.handle(job_id).result(60).text == "late"
    assert len(rig.sandbox.calls()) == 1

"""Foreign requests in our words: OpenAI's chat completions and Anthropic's messages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sluicegate.producers.http import chat_shapes, messages_shapes
from sluicegate.producers.http.compatible import Asked, addressed
from sluicegate.producers.http.problems import Problem
from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.jobs import build_spec
from sluicegate.shared.messages import (
    FilePart,
    ImagePart,
    Message,
    TextPart,
    ToolCallPart,
    ToolResultPart,
)

HELLO = {"role": "user", "content": "Hello"}
PNG = "iVBORw0KGgoAAAAN"


def chat(**body: Any) -> Asked:
    given = {"model": "sluice/draft", "messages": [HELLO], **body}
    return chat_shapes.asked_of(chat_shapes.ChatRequest.model_validate(given))


def anthropic(**body: Any) -> Asked:
    given = {"model": "sluice/draft", "messages": [HELLO], **body}
    return messages_shapes.asked_of(messages_shapes.MessagesRequest.model_validate(given))


DOORS = pytest.mark.parametrize("read", [chat, anthropic])
Read = Callable[..., Asked]


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("sluice/auto", (None, None)),
        ("sluice/draft", ("draft", None)),
        ("openai-gpt4o-mini", (None, "openai-gpt4o-mini")),
        ("gpt-4o-mini", (None, "gpt-4o-mini")),
    ],
)
def test_a_model_names_a_use_case_or_a_model(model: str, wanted: tuple[str, str]) -> None:
    assert addressed(model) == wanted


@DOORS
def test_the_least_request(read: Read) -> None:
    asked = read()
    assert (asked.use_case, asked.warnings) == ("draft", [])
    assert asked.messages == [Message.user("Hello")]
    assert asked.options == {"model": None, "stream": False}


@DOORS
def test_what_is_called_as_we_call_it(read: Read) -> None:
    asked = read(temperature=0.5, top_p=0.9, fallbacks=["gpt-4o"], stream=True, max_tokens=7)
    assert asked.options == {
        "model": None,
        "stream": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "fallbacks": ["gpt-4o"],
        "max_tokens": 7,
    }


def test_a_chat_with_tools() -> None:
    calls = [
        {"id": name, "type": "function", "function": {"name": name, "arguments": '{"a": 1}'}}
        for name in ("one", "two")
    ]
    asked = chat(
        messages=[
            {"role": "system", "content": "Be kind."},
            HELLO,
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "one", "content": "1"},
            {"role": "tool", "tool_call_id": "two", "content": [{"type": "text", "text": "2"}]},
            {"role": "user", "content": "Go on."},
        ],
        tools=[{"type": "function", "function": {"name": "one", "description": None}}],
        tool_choice={"type": "function", "function": {"name": "one"}},
        parallel_tool_calls=False,
    )
    assert asked.options["system"] == "Be kind."
    assert asked.options["tool_choice"] == "one"
    assert asked.options["parallel_tool_calls"] is False
    assert [message.content for message in asked.messages] == [
        (TextPart(text="Hello"),),
        (
            ToolCallPart(id="one", name="one", arguments={"a": 1}),
            ToolCallPart(id="two", name="two", arguments={"a": 1}),
        ),
        (
            ToolResultPart(tool_call_id="one", content="1"),
            ToolResultPart(tool_call_id="two", content="2"),
        ),
        (TextPart(text="Go on."),),
    ]
    # The results of one turn are one message of ours.
    assert asked.places == [1, 2, 3, 5]


def test_messages_with_tools() -> None:
    asked = anthropic(
        system=[{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}],
        messages=[
            HELLO,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "…", "signature": "s"},
                    {"type": "tool_use", "id": "one", "name": "one", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "one", "is_error": True},
                    {"type": "text", "text": "Go on."},
                ],
            },
        ],
        tools=[{"name": "one", "input_schema": {"type": "object"}}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        output_config={"effort": "max"},
    )
    assert asked.options["system"] == "Be\n\nkind."
    assert asked.options["tool_choice"] == "required"
    assert asked.options["parallel_tool_calls"] is False
    assert asked.options["effort"] == "high"
    assert [message.content for message in asked.messages[1:]] == [
        (ToolCallPart(id="one", name="one", arguments={"a": 1}),),
        (
            ToolResultPart(tool_call_id="one", content="", is_error=True),
            TextPart(text="Go on."),
        ),
    ]
    assert asked.warnings == [
        "output_config.effort max is taken as high",
        "messages.1.content.0: thinking is not taken here and was left out",
    ]


def test_attachments() -> None:
    url = f"data:image/jpg;base64,{PNG}"
    asked = chat(
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "image_url", "image_url": "https://example.com/a.png"},
                    {"type": "file", "file": {"file_data": PNG}},
                ],
            }
        ]
    )
    assert asked.messages[0].content == (
        ImagePart(data=PNG, media_type="image/jpeg"),
        ImagePart(url="https://example.com/a.png"),
        FilePart(data=PNG),
    )


@pytest.mark.parametrize(
    ("read", "place", "body"),
    [
        (chat, "messages.0.content.0.type", {"messages": [{
            "role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}),
        (chat, "messages.0.content.0.image_url.url", {"messages": [{
            "role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.png"}}]}]}),
        (chat, "messages.0.content.0.file.file_id", {"messages": [{
            "role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]}),
        (chat, "messages.1.tool_calls.0.function.arguments", {"messages": [HELLO, {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[1]"}}]}]}),
        (chat, "tools.0.type", {"tools": [{"type": "custom", "custom": {"name": "f"}}]}),
        (chat, "tool_choice.type", {"tool_choice": {"type": "allowed_tools"}}),
        (chat, "response_format.json_schema.schema", {"response_format": {
            "type": "json_schema", "json_schema": {"name": "n"}}}),
        (chat, "modalities", {"modalities": ["text", "audio"]}),
        (anthropic, "messages.0.content.0.source.type", {"messages": [{
            "role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]}),
        (anthropic, "messages.0.content.0.content.0.type", {"messages": [{
            "role": "user", "content": [{
                "type": "tool_result", "tool_use_id": "1", "content": [{"type": "image"}]}]}]}),
        (anthropic, "mcp_servers", {"mcp_servers": [{"url": "https://example.com"}]}),
        (anthropic, "prefill", {"prefill": "{"}),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_its_place(
    read: Read, place: str, body: dict[str, Any]
) -> None:
    with pytest.raises(Problem) as caught:
        read(**body)
    assert (caught.value.status, caught.value.field) == (400, place)
    assert caught.value.message.startswith(f"{place}: ")


@DOORS
def test_an_empty_assistant_turn_is_no_turn(read: Read) -> None:
    asked = read(messages=[HELLO, {"role": "assistant", "content": ""}, HELLO])
    assert [message.role for message in asked.messages] == ["user", "user"]


@pytest.mark.parametrize("format_", [{"type": "text"}, None])
def test_plain_text_is_no_format(format_: Any) -> None:
    assert chat(response_format=format_).options.get("response_format") is None


_words = st.sampled_from(
    ["user", "assistant", "tool", "system", "text", "image_url", "image", "file", "document",
     "tool_use", "tool_result", "function", "json_schema", "base64", "url", "", "data:x,y", "auto"]
)  # fmt: skip
_names = st.sampled_from(
    ["role", "content", "type", "text", "image_url", "url", "source", "data", "media_type", "file",
     "file_data", "tool_calls", "function", "name", "arguments", "id", "tool_call_id", "input",
     "tool_use_id", "input_schema", "schema", "json_schema", "parameters", "refusal"]
)  # fmt: skip
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | _words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=4),
    max_leaves=12,
)


@given(
    st.sampled_from([chat, anthropic]),
    st.dictionaries(
        st.sampled_from(
            ["messages", "tools", "tool_choice", "response_format", "output_config", "system",
             "stop", "thinking", "seed", "n", "user", "else"]
        ),
        _json,
    ),
)  # fmt: skip
def test_whatever_comes_is_a_job_or_a_problem(read: Read, body: dict[str, Any]) -> None:
    said = _said_of(read, body)
    if isinstance(said, Problem):
        assert said.status == 400
        assert said.message.startswith(f"{said.field}: ")
    elif said is not None:
        assert len(said.messages) == len(said.places) > 0
        with suppress(InvalidJob):
            build_spec("draft", said.messages, **said.options)


def _said_of(read: Read, body: dict[str, Any]) -> Asked | Problem | None:
    try:
        return read(**body)
    except ValidationError:
        return None  # `Visit.read` words these
    except Problem as problem:
        return problem

"""What is sent to the providers, as literals."""

from __future__ import annotations

from typing import Any

import pytest

from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.jobs import JobSpec, build_spec
from sluicegate.shared.messages import (
    FilePart,
    ImagePart,
    Message,
    Part,
    ResponseFormat,
    TextPart,
    Tool,
    ToolCallPart,
    ToolResultPart,
)
from sluicegate.workers.providers import anthropic, openai
from sluicegate.workers.providers.base import Call, Deadlines
from sluicegate.workers.providers.failures import Fault

DEADLINES = Deadlines(connect_s=1, first_token_s=1, response_s=1, idle_s=1, total_s=1)
WEATHER = Tool(
    name="weather",
    description="Tells the weather.",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}},
)


def call_for(spec: JobSpec, *, stream: bool = False) -> Call:
    return Call(spec=spec, model="some-model", max_tokens=300, stream=stream, deadlines=DEADLINES)


def gpt(spec: JobSpec, *, stream: bool = False) -> dict[str, Any]:
    return openai.build_request(call_for(spec, stream=stream))


def claude(spec: JobSpec, *, stream: bool = False) -> dict[str, Any]:
    return anthropic.build_request(call_for(spec, stream=stream))


def turns(*messages: tuple[str, tuple[Part, ...]]) -> JobSpec:
    return build_spec("draft", [Message(role=role, content=parts) for role, parts in messages])


def test_the_smallest_request() -> None:
    spec = build_spec("draft", "Hello", metadata={"crm_id": "secret-42"})
    assert gpt(spec) == {
        "model": "some-model",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_completion_tokens": 300,
    }
    assert claude(spec) == {
        "model": "some-model",
        "max_tokens": 300,
        "messages": [{"role": "user", "content": "Hello"}],
    }


def test_system_and_several_turns() -> None:
    spec = build_spec(
        "draft",
        [
            Message.user("What is this?"),
            Message(role="assistant", content=(TextPart(text="A sign."),)),
            Message.user("And this?"),
        ],
        system="Be brief.",
    )
    conversation = [
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": "A sign."},
        {"role": "user", "content": "And this?"},
    ]
    assert gpt(spec)["messages"] == [{"role": "system", "content": "Be brief."}, *conversation]
    assert claude(spec)["messages"] == conversation
    assert claude(spec)["system"] == "Be brief."


def test_streaming() -> None:
    spec = build_spec("draft", "Hello")
    assert gpt(spec, stream=True)["stream"] is True
    assert gpt(spec, stream=True)["stream_options"] == {"include_usage": True}
    assert claude(spec, stream=True)["stream"] is True
    assert not {"stream", "stream_options"} & {*gpt(spec), *claude(spec)}


def test_images_and_files() -> None:
    spec = turns(
        (
            "user",
            (
                TextPart(text="Look:"),
                ImagePart(url="https://example.com/a.png"),
                ImagePart(data="aGk=", media_type="image/jpeg"),
                FilePart(data="cGRm", filename="offer.pdf"),
            ),
        )
    )
    assert gpt(spec)["messages"][0]["content"] == [
        {"type": "text", "text": "Look:"},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,aGk="}},
        {
            "type": "file",
            "file": {"filename": "offer.pdf", "file_data": "data:application/pdf;base64,cGRm"},
        },
    ]
    assert claude(spec)["messages"][0]["content"] == [
        {"type": "text", "text": "Look:"},
        {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/jpeg", "data": "aGk="},
        },
        {
            "type": "document",
            "source": {"type": "base64", "media_type": "application/pdf", "data": "cGRm"},
            "title": "offer.pdf",
        },
    ]


def test_tool_calls_and_their_results() -> None:
    spec = turns(
        ("user", (TextPart(text="Weather?"),)),
        (
            "assistant",
            (
                TextPart(text="Let me look."),
                ToolCallPart(id="c1", name="weather", arguments={"city": "Bern"}),
                ToolCallPart(id="c2", name="weather", arguments={}),
            ),
        ),
        (
            "user",
            (
                TextPart(text="And be quick."),
                ToolResultPart(tool_call_id="c1", content="sunny"),
                ToolResultPart(tool_call_id="c2", content="no city", is_error=True),
            ),
        ),
    )
    assert gpt(spec)["messages"][1:] == [
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city":"Bern"}'},
                },
                {
                    "id": "c2",
                    "type": "function",
                    "function": {"name": "weather", "arguments": "{}"},
                },
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": "no city"},
        {"role": "user", "content": "And be quick."},
    ]
    assert claude(spec)["messages"][1:] == [
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Bern"}},
                {"type": "tool_use", "id": "c2", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": "sunny"},
                {
                    "type": "tool_result",
                    "tool_use_id": "c2",
                    "content": "no city",
                    "is_error": True,
                },
                {"type": "text", "text": "And be quick."},
            ],
        },
    ]


def test_a_tool_call_without_words() -> None:
    spec = turns(
        ("user", (TextPart(text="Weather?"),)),
        ("assistant", (ToolCallPart(id="c1", name="weather", arguments={}),)),
        ("user", (ToolResultPart(tool_call_id="c1", content="sunny"),)),
    )
    assert gpt(spec)["messages"][1]["content"] is None
    assert [message["role"] for message in gpt(spec)["messages"]] == ["user", "assistant", "tool"]


@pytest.mark.parametrize(
    ("choice", "for_gpt", "for_claude"),
    [
        ("auto", None, None),
        ("none", "none", {"type": "none"}),
        ("required", "required", {"type": "any"}),
        (
            "weather",
            {"type": "function", "function": {"name": "weather"}},
            {"type": "tool", "name": "weather"},
        ),
    ],
)
def test_tools_and_their_choice(choice: str, for_gpt: object, for_claude: object) -> None:
    spec = build_spec("draft", "Weather?", tools=(WEATHER, Tool(name="now")), tool_choice=choice)
    plain = {"type": "object", "properties": {}}
    assert gpt(spec)["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "Tells the weather.",
                "parameters": WEATHER.parameters,
            },
        },
        {"type": "function", "function": {"name": "now", "parameters": plain}},
    ]
    assert claude(spec)["tools"] == [
        {
            "name": "weather",
            "description": "Tells the weather.",
            "input_schema": WEATHER.parameters,
        },
        {"name": "now", "input_schema": plain},
    ]
    assert gpt(spec).get("tool_choice") == for_gpt
    assert claude(spec).get("tool_choice") == for_claude


def test_a_choice_without_tools_is_not_sent() -> None:
    spec = build_spec("draft", "Hello", tool_choice="none")
    assert "tool_choice" not in gpt(spec)
    assert "tool_choice" not in claude(spec)


def test_response_format_and_effort() -> None:
    schema = {"type": "object", "properties": {"mood": {"type": "string", "maxLength": 9}}}
    spec = build_spec(
        "draft",
        "Mood?",
        response_format=ResponseFormat(name="mood", json_schema=schema),
        effort="low",
    )
    strict = {
        "type": "object",
        "properties": {"mood": {"type": "string", "description": "{maxLength: 9}"}},
        "required": ["mood"],
        "additionalProperties": False,
    }
    assert gpt(spec)["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "mood", "schema": strict, "strict": True},
    }
    assert gpt(spec)["reasoning_effort"] == "low"
    assert claude(spec)["output_config"] == {
        "format": {"type": "json_schema", "schema": strict},
        "effort": "low",
    }


def test_a_schema_that_cannot_be_strict_is_a_hint_or_asked_for_in_words() -> None:
    """Anthropic's API refuses it; OpenAI's does where it is to be strict."""
    schema = {"type": "object", "additionalProperties": {"type": "string"}}
    asked = ResponseFormat(json_schema=schema)
    spec = build_spec("draft", "Moods?", system="Be brief.", response_format=asked)
    assert gpt(spec)["response_format"]["json_schema"] == {
        "name": "answer",
        "schema": schema,
        "strict": False,
    }
    assert "output_config" not in claude(spec)
    system = claude(spec)["system"]
    assert system.startswith("Be brief.\n\nAnswer with JSON alone")
    assert system.endswith('{"type":"object","additionalProperties":{"type":"string"}}')


def test_parallel_tool_calls() -> None:
    for wanted in (True, False):
        spec = build_spec("draft", "Hi", tools=(WEATHER,), parallel_tool_calls=wanted)
        assert gpt(spec)["parallel_tool_calls"] is wanted
    assert "tool_choice" not in gpt(spec)
    assert claude(spec)["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": True}
    forced = spec.model_copy(update={"tool_choice": "required"})
    assert claude(forced)["tool_choice"] == {"type": "any", "disable_parallel_tool_use": True}
    never = spec.model_copy(update={"tool_choice": "none"})
    assert claude(never)["tool_choice"] == {"type": "none"}


def test_sampling_and_stop() -> None:
    spec = build_spec("draft", "Hi", temperature=0.5, top_p=0.9, stop=("END",))
    assert {name: gpt(spec)[name] for name in ("temperature", "top_p", "stop")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ("END",),
    }
    assert claude(spec)["stop_sequences"] == ("END",)
    assert not {"temperature", "top_p"} & claude(spec).keys()


def test_results_in_several_messages_follow_the_calls_that_they_answer() -> None:
    """Clients of OpenAI's wire send a message for each result, and may say something between."""
    spec = turns(
        ("user", (TextPart(text="Weather?"),)),
        (
            "assistant",
            (
                TextPart(text=" \n"),
                ToolCallPart(id="c1", name="weather", arguments={}),
                ToolCallPart(id="functions.weather:1", name="weather", arguments={}),
            ),
        ),
        ("user", (ToolResultPart(tool_call_id="c1", content="sunny"), TextPart(text="Well?"))),
        ("user", (ToolResultPart(tool_call_id="functions.weather:1", content="wet"),)),
    )
    calls = gpt(spec)["messages"][1]["tool_calls"]
    assert [message["role"] for message in gpt(spec)["messages"][2:]] == ["tool", "tool", "user"]
    assert [message.get("tool_call_id") for message in gpt(spec)["messages"][2:4]] == [
        call["id"] for call in calls
    ]
    _, said, answered = claude(spec)["messages"]
    # An id that Anthropic would refuse is another, and the same, in call and result.
    assert [part["id"] for part in said["content"]] == [call["id"] for call in calls]
    assert calls[0]["id"] == "c1"
    assert calls[1]["id"].replace("_", "").isalnum()
    assert [part["type"] for part in answered["content"]] == ["tool_result"] * 2 + ["text"]


def test_tool_parameters_without_a_type_are_an_object() -> None:
    spec = build_spec("draft", "Hi", tools=(Tool(name="now", parameters={}),))
    plain = {"type": "object", "properties": {}}
    assert gpt(spec)["tools"][0]["function"]["parameters"] == plain
    assert claude(spec)["tools"][0]["input_schema"] == plain


_LAST = ("user", (TextPart(text="And?"),))


@pytest.mark.parametrize(
    "messages",
    [
        (("assistant", (ImagePart(data="aGk="),)), _LAST),
        (("assistant", (ToolResultPart(tool_call_id="c1", content="sunny"),)), _LAST),
        (("user", (ToolCallPart(id="c1", name="weather", arguments={}),)),),
    ],
)
@pytest.mark.parametrize("build", [gpt, claude])
def test_what_no_wire_can_say_is_refused_before_it_is_sent(build: Any, messages: Any) -> None:
    said = [Message(role=role, content=parts) for role, parts in messages]
    with pytest.raises(Fault) as caught:
        build(JobSpec(use_case="draft", messages=tuple(said)))
    assert caught.value.error_class is ErrorClass.BAD_REQUEST
    assert not caught.value.sent

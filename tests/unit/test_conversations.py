"""What providers would refuse of messages and tools is refused before a job is stored."""

from __future__ import annotations

from typing import Any

import pytest

from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.jobs import build_spec

PNG, JPEG = "iVBORw0KGgo=", "/9j/AAAA"


def said(text: str = "hi", role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def turn(*parts: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def call(call_id: str, name: str = "find") -> dict[str, Any]:
    return {"type": "tool_call", "id": call_id, "name": name, "arguments": {}}


def result(call_id: str) -> dict[str, Any]:
    return {"type": "tool_result", "tool_call_id": call_id, "content": "found"}


ASKED = turn(call("c1"), call("c2"), role="assistant")


@pytest.mark.parametrize(
    "messages",
    [
        [said()],
        [said(), said(role="assistant"), said()],
        [said(), ASKED, turn(result("c2"), result("c1"))],
        [said(), ASKED, turn(result("c2")), turn(result("c1")), said()],
        [said(), ASKED, turn(result("c1"), result("c2")), said(role="assistant"), said()],
        [turn({"type": "text", "text": " "}, {"type": "image", "data": PNG})],
        [turn({"type": "image", "data": JPEG, "media_type": "image/jpeg"})],
        [turn({"type": "image", "data": "AAAA", "media_type": "image/gif"})],
    ],
)
def test_what_both_take(messages: list[dict[str, Any]]) -> None:
    build_spec("draft", messages)  # type: ignore[arg-type]  # as the client passes it on


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([said(role="assistant")], "messages: must end with a message of the user"),
        ([said(" \n")], "messages.0.content: must hold more than blanks"),
        ([said(), ASKED, said()], "messages: lack the result of tool call c1"),
        ([said(), ASKED, turn(result("c1"))], "messages: lack the result of tool call c2"),
        (
            [said(), ASKED, said(role="assistant"), said()],
            "messages.2.content: comes before the result of tool call c1",
        ),
        (
            [said(), turn(result("c1"))],
            "messages.1.content: no tool call c1 waits for a result there",
        ),
        (
            [said(), ASKED, turn(result("c1"), result("c1"), result("c2"))],
            "messages.2.content: no tool call c1 waits for a result there",
        ),
        (
            [said(), ASKED, turn(result("c1"), result("c2")), ASKED, said()],
            "messages.3.content: c1 is the id of an earlier tool call",
        ),
        ([turn(call("c1"))], "messages.0.content: a message of the user holds no tool_call"),
        (
            [turn({"type": "image", "data": PNG}, role="assistant"), said()],
            "messages.0.content: a message of the assistant holds no image",
        ),
        (
            [turn({"type": "image", "data": JPEG})],
            "messages.0.content.data: is image/jpeg, and media_type says image/png",
        ),
        (
            [turn({"type": "file", "data": "AAA"})],
            "messages.0.content.data: must be base64 with its padding",
        ),
    ],
)
def test_what_one_of_them_refuses(messages: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        build_spec("draft", messages)  # type: ignore[arg-type]  # as above
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tools": [{"name": "a"}, {"name": "a"}]}, "tools.0.name: a is the name of another tool"),
        (
            {"tools": [{"name": "a", "parameters": {"type": "array"}}]},
            "tools.0.parameters: must be a JSON schema of the type object",
        ),
        (
            {"tools": [{"name": "a"}, {"name": "b", "parameters": {"anyOf": []}}]},
            "tools.1.parameters: must have no anyOf at the top",
        ),
        (
            {"tools": [{"name": "a", "parameters": {"properties": {"b": {"type": "text"}}}}]},
            "tools.0.parameters: is no JSON schema: properties.b.type is not valid",
        ),
        ({"tool_choice": "required"}, "tool_choice: needs tools; leave it out, or give some"),
        (
            {"tools": [{"name": "a"}], "tool_choice": "b"},
            "tool_choice: names no tool of this job: b",
        ),
    ],
)
def test_tools_that_one_of_them_refuses(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        build_spec("draft", "hi", **options)
    assert str(refused.value).startswith(sentence)


def test_a_choice_of_nothing_needs_no_tools() -> None:
    for choice in ("auto", "none"):
        build_spec("draft", "hi", tool_choice=choice)

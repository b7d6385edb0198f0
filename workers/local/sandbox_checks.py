"""What the real providers refuse with a 400, and so the sandbox provider does, too.

Only what a request of ours could get wrong: parameters that a model does not take, tool calls
without results, schemas that cannot be kept strictly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sluicegate.workers.local.sandbox_faults import Fault
from sluicegate.workers.local.sandbox_prices import SANDBOX_PREFIX

Json = dict[str, Any]

_REASONING = re.compile(r"gpt-[5-9]|o\d")
_WITHOUT_EFFORT = re.compile(r"claude-.*-4-5|gpt-4")
_CALL_ID = re.compile(r"[a-zA-Z0-9_-]+")


class RefusedError(Exception):
    """The request cannot be served; `fault` names the error of the wire that says so."""

    def __init__(self, fault: Fault, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.fault = fault
        self.message = message
        self.param = param


def refuse(message: str, param: str) -> RefusedError:
    """Make the 400 for a parameter."""
    return RefusedError(Fault.HTTP_400, message, param)


def check_chat(body: Json, model: str, messages: list[Json]) -> None:
    """Raise RefusedError where OpenAI's chat completions would say 400."""
    reasons = _REASONING.match(model) is not None
    for name in ("temperature", "top_p"):
        if reasons and body.get(name) not in (None, 1):
            said = f"Unsupported value: '{name}' does not support {body[name]} with this model."
            raise refuse(said, name)
    if reasons and body.get("stop") is not None:
        raise refuse("Unsupported parameter: 'stop' is not supported with this model.", "stop")
    if _WITHOUT_EFFORT.match(model) and "reasoning_effort" in body:
        raise refuse("Unrecognized request argument supplied: reasoning_effort", "reasoning_effort")
    for name in ("parallel_tool_calls", "tool_choice"):
        if name in body and not body.get("tools"):
            raise refuse(f"'{name}' is only allowed when 'tools' are specified.", name)
    wanted = body.get("response_format")
    named = wanted.get("json_schema") if isinstance(wanted, dict) else None
    if isinstance(named, dict) and named.get("strict"):
        _check_strict(named.get("schema"), "response_format", all_required=True)
    _check_chat_calls(messages)


def check_messages(body: Json, model: str, messages: list[Json]) -> None:
    """Raise RefusedError where Anthropic's messages would say 400."""
    for name in ("temperature", "top_p", "top_k"):
        if name in body:
            raise refuse(f"{name}: Extra inputs are not permitted", name)
    last_role = messages[-1].get("role")
    if last_role == "assistant" and not model.startswith(SANDBOX_PREFIX):
        raise refuse(
            "This model does not support assistant message prefill. The conversation must end"
            " with a user message.",
            "messages",
        )
    for stop in _list(body.get("stop_sequences")):
        if not str(stop).strip():
            raise refuse(
                "stop_sequences: each stop sequence must contain non-whitespace", "stop_sequences"
            )
    for tool in _objects(body.get("tools")):
        schema = tool.get("input_schema")
        if not (isinstance(schema, dict) and schema.get("type") == "object"):
            raise refuse("tools.0.input_schema.type: Field required", "tools")
    if body.get("tool_choice") is not None and not body.get("tools"):
        raise refuse("tool_choice: may only be specified while providing tools", "tool_choice")
    if isinstance(output := body.get("output_config"), dict):
        _check_output(output, model)
    _check_blocks(messages)


def _check_output(output: Json, model: str) -> None:
    if _WITHOUT_EFFORT.match(model) and "effort" in output:
        raise refuse("This model does not support the effort parameter.", "output_config")
    if isinstance(output.get("format"), dict):
        schema = output["format"].get("schema")
        _check_strict(schema, "output_config.format.schema", all_required=False)


def _check_strict(schema: object, where: str, *, all_required: bool) -> None:
    for part in _parts(schema):
        if part.get("type") == "object" or "properties" in part:
            if part.get("additionalProperties") is not False:
                raise refuse(
                    f"{where}: 'additionalProperties' is required to be supplied and to be false",
                    where,
                )
            if all_required and {*(part.get("properties") or ())} - {*_list(part.get("required"))}:
                raise refuse(f"{where}: 'required' must include every key in properties", where)


def _parts(schema: object) -> Iterator[Json]:
    """Walk over the schemas inside a schema."""
    if not isinstance(schema, dict):
        return
    yield schema
    for name in ("properties", "$defs"):
        inner = schema.get(name)
        for part in inner.values() if isinstance(inner, dict) else ():
            yield from _parts(part)
    yield from _parts(schema.get("items"))
    for name in ("anyOf", "oneOf", "allOf"):
        for part in _list(schema.get(name)):
            yield from _parts(part)


def _check_chat_calls(messages: list[Json]) -> None:
    waiting: list[object] = []
    for message in messages:
        if message.get("role") == "tool":
            if message.get("tool_call_id") not in waiting:
                raise refuse(
                    "messages with role 'tool' must be a response to a preceding message with"
                    " 'tool_calls'.",
                    "messages",
                )
            waiting.remove(message.get("tool_call_id"))
            continue
        if waiting:
            raise _unanswered(waiting)
        waiting = [call.get("id") for call in _objects(message.get("tool_calls"))]
    if waiting:
        raise _unanswered(waiting)


def _unanswered(waiting: list[object]) -> RefusedError:
    return refuse(
        "An assistant message with 'tool_calls' must be followed by tool messages responding to"
        f" each 'tool_call_id'. These did not have response messages: {waiting}",
        "messages",
    )


def _check_blocks(messages: list[Json]) -> None:
    waiting: set[str] = set()
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        blocks = _objects(content)
        results = {str(b.get("tool_use_id")) for b in blocks if b.get("type") == "tool_result"}
        if results != waiting:
            raise refuse(
                "messages: `tool_use` ids and the `tool_result` blocks immediately after are not"
                " the same",
                "messages",
            )
        for block in blocks:
            if block.get("type") == "text" and not str(block.get("text")).strip():
                raise refuse(
                    "messages: text content blocks must contain non-whitespace text", "messages"
                )
        waiting = {str(block.get("id")) for block in blocks if block.get("type") == "tool_use"}
        if not all(_CALL_ID.fullmatch(call_id) for call_id in waiting):
            raise refuse("messages: tool_use.id should match '^[a-zA-Z0-9_-]+$'", "messages")
    if waiting:
        raise refuse("messages: `tool_use` ids were found without `tool_result`", "messages")


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _objects(value: object) -> list[Json]:
    return [one for one in _list(value) if isinstance(one, dict)]

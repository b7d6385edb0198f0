"""Events of a reply channel: ids that Redis orders as we do, payloads that read back."""

from __future__ import annotations

from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sluicegate.shared.events import (
    Completed,
    Delta,
    EventType,
    Failed,
    Reset,
    Started,
    decode,
    event_id,
    id_key,
    reply_key,
    terminal_event,
    terminal_id,
)
from sluicegate.shared.jobs import Result, State

RESULT = Result(
    job_id=UUID(int=7), state=State.SUCCEEDED, use_case="draft", text="Hé\x00", attempts=2
)
FENCES = st.integers(0, 2**63 - 1)
NUMBERS = st.integers(1, 2**63 - 1)


def test_names() -> None:
    assert reply_key(UUID(int=7)) == "reply:00000000-0000-0000-0000-000000000007"
    assert reply_key(str(UUID(int=7))) == reply_key(UUID(int=7))
    assert event_id(3, 1) == "3-1"
    assert terminal_id(3) == "3-18446744073709551615"


@given(fence=FENCES, later=FENCES, n=NUMBERS, m=NUMBERS)
def test_ids_are_ordered_by_fence_then_number(fence: int, later: int, n: int, m: int) -> None:
    assert (id_key(event_id(fence, n)) < id_key(event_id(later, m))) == ((fence, n) < (later, m))
    # Nothing of a fence follows its end, and every later fence does.
    assert id_key(event_id(fence, n)) < id_key(terminal_id(fence))
    assert id_key(terminal_id(fence)) < id_key(event_id(fence + 1, 1))
    assert id_key("0") < id_key(event_id(fence, n))


@pytest.mark.parametrize(
    ("payload", "read"),
    [
        ({"type": "started", "model": "gpt-4o", "attempt": 2}, Started(model="gpt-4o", attempt=2)),
        ({"type": "delta", "text": "a\x00ü"}, Delta(text="a\x00ü")),
        ({"type": "reset", "model": "m", "attempt": 3}, Reset(model="m", attempt=3)),
        ({"type": "completed", "result": RESULT.model_dump(mode="json")}, Completed(result=RESULT)),
        ({"type": "failed", "result": RESULT.model_dump(mode="json")}, Failed(result=RESULT)),
    ],
)
def test_plain_data_becomes_a_payload(payload: dict[str, object], read: object) -> None:
    event = decode("4-2", orjson.dumps(payload))
    assert event.id == "4-2"
    assert event.payload == read
    assert event.type == payload["type"]
    assert event.terminal == (payload["type"] in ("completed", "failed"))
    assert decode("4-2", orjson.dumps(payload).decode()) == event


def test_fragments_of_a_tool_call() -> None:
    plain = {
        "type": "delta",
        "tool_calls": [{"index": 0, "id": "1", "name": "t", "arguments": '{"'}],
    }
    event = decode("1-1", orjson.dumps(plain))
    assert isinstance(event.payload, Delta)
    assert event.payload.tool_calls[0].arguments == '{"'


def test_every_kind_can_be_read() -> None:
    kinds = {kind.value for kind in EventType}
    assert kinds == {
        model.model_fields["type"].default for model in (Started, Delta, Reset, Completed, Failed)
    }


@pytest.mark.parametrize("data", [b"", b"{}", b'{"type":"gone"}', b'{"type":"delta","more":1}'])
def test_what_is_no_event_is_refused(data: bytes) -> None:
    with pytest.raises(ValidationError):
        decode("1-1", data)


@pytest.mark.parametrize("state", [State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED])
def test_the_terminal_event_follows_from_the_result(state: State) -> None:
    result = RESULT.model_copy(update={"state": state})
    event = terminal_event(5, result)
    assert event == terminal_event(5, result)
    assert event.id == terminal_id(5)
    assert event.terminal
    assert event.type == ("completed" if state is State.SUCCEEDED else "failed")
    # A worker writes the same bytes that a reader makes from Postgres.
    plain = {"type": event.type, "result": result.model_dump(mode="json")}
    assert decode(event.id, orjson.dumps(plain)) == event

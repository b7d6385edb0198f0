"""What a reader that cannot take anything back gets over several attempts at one answer."""

from __future__ import annotations

from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluicegate.producers.http.splicing import Diverged, Splice
from sluicegate.shared.events import Delta, ToolCallDelta
from sluicegate.shared.jobs import Result, State
from sluicegate.shared.messages import ToolCallPart

JOB = UUID(int=1)


def result_of(text: str, *calls: ToolCallPart, finish_reason: str = "stop") -> Result:
    return Result(
        job_id=JOB,
        state=State.SUCCEEDED,
        use_case="draft",
        text=text,
        tool_calls=calls,
        finish_reason=finish_reason,
    )


class Reader:
    """Puts together what it is sent, as an SDK does."""

    def __init__(self) -> None:
        self.text = ""
        self.calls: dict[int, list[str]] = {}

    def take(self, delta: Delta | None) -> None:
        if delta is None:
            return
        self.text += delta.text
        for piece in delta.tool_calls:
            if piece.id is not None:
                assert piece.index not in self.calls
                assert piece.name is not None
                self.calls[piece.index] = [piece.name, ""]
            self.calls[piece.index][1] += piece.arguments

    def holds(self, result: Result) -> bool:
        calls = [(name, orjson.loads(written or "{}")) for name, written in self.calls.values()]
        wanted = [(call.name, call.arguments) for call in result.tool_calls]
        return (self.text, calls) == (result.text, wanted)


def call(number: int, **arguments: str) -> ToolCallPart:
    return ToolCallPart(id=f"call_{number}", name=f"tool_{number}", arguments={**arguments})


def fragments(index: int, call: ToolCallPart, attempt: int, sizes: list[int]) -> list[Delta]:
    """Cut a call into the pieces in which a provider sends it; every attempt has other ids."""
    name = ToolCallDelta(index=index, id=f"{call.id}_{attempt}", name=call.name)
    written = orjson.dumps(call.arguments).decode()
    pieces = [ToolCallDelta(index=index, arguments=piece) for piece in cut(written, sizes)]
    return [Delta(tool_calls=(one,)) for one in (name, *pieces)]


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, place = [], 0
    for size in sizes:
        pieces.append(text[place : place + size])
        place += size
    return [piece for piece in (*pieces, text[place:]) if piece]


sizes = st.lists(st.integers(1, 4), max_size=6)
#: Few letters, so that answers are often the same for a while.
texts = st.text(alphabet="ab", max_size=8)
calls = st.lists(st.builds(call, st.integers(0, 1), a=texts), max_size=2)


@st.composite
def attempts(draw: st.DrawFn) -> list[tuple[list[Delta], Result]]:
    """Draw attempts: what each says until it breaks off, and what would have been its answer."""
    same = draw(st.booleans())
    answer = draw(texts), draw(calls)
    said = []
    for number in range(draw(st.integers(1, 4))):
        text, asked = answer if same else (draw(texts), draw(calls))
        deltas = [Delta(text=piece) for piece in cut(text, draw(sizes))]
        for index, one in enumerate(asked):
            deltas += fragments(index, one, number, draw(sizes))
        said.append((deltas, result_of(text, *asked)))
    return said


@given(attempts(), st.data())
def test_what_was_sent_is_one_answer_or_an_error(
    said: list[tuple[list[Delta], Result]], data: st.DataObject
) -> None:
    reader, splice = Reader(), Splice()
    first_text = "".join(delta.text for delta in said[0][0])
    same = all(result.text == said[0][1].text for _, result in said)
    same &= all(result.tool_calls == said[0][1].tool_calls for _, result in said)
    *broken, (deltas, result) = said
    try:
        for early, _ in broken:
            splice.restart()
            for delta in early[: data.draw(st.integers(0, len(early)))]:
                reader.take(splice.add(delta))
        splice.restart()
        # Deltas may be lost at the end: the terminal event has the whole answer.
        for delta in deltas[: data.draw(st.integers(0, len(deltas)))]:
            before = reader.text
            reader.take(splice.add(delta))
            assert reader.text.startswith(before)
        reader.take(splice.finish(result))
    except Diverged:
        assert not same
        # What came before the error is from one answer, too.
        assert any(other.text.startswith(reader.text) for _, other in said)
    else:
        assert reader.holds(result)
    if not broken:
        assert reader.text == first_text


def test_text_is_held_back_until_it_has_passed_what_was_sent() -> None:
    splice = Splice()
    assert splice.add(Delta(text="Dear Ada")) == Delta(text="Dear Ada")
    splice.restart()
    assert splice.add(Delta(text="Dear")) is None
    assert splice.add(Delta(text=" Ada, thank")) == Delta(text=", thank")
    assert splice.finish(result_of("Dear Ada, thanks")) == Delta(text="s")


@pytest.mark.parametrize("other", ["Dear Bob", "Dear", "", "dear Ada"])
def test_another_answer_is_never_appended(other: str) -> None:
    splice = Splice()
    splice.add(Delta(text="Dear Ada"))
    splice.restart()

    def say() -> None:
        if not splice.add(Delta(text=other)):
            splice.finish(result_of(other))

    with pytest.raises(Diverged):
        say()


def test_a_tool_call_waits_for_the_text_before_it() -> None:
    splice, one = Splice(), call(1, name="Ada")
    splice.add(Delta(text="Let me look."))
    splice.restart()
    assert [splice.add(delta) for delta in fragments(0, one, 2, [])] == [None, None]
    with pytest.raises(Diverged):
        splice.finish(result_of("", one))


def test_a_reader_keeps_the_id_that_a_call_had_first() -> None:
    splice, one = Splice(), call(1, name="Ada")
    first = [splice.add(delta) for delta in fragments(0, one, 1, [5])[:2]]
    assert first[0] == Delta(tool_calls=(ToolCallDelta(index=0, id="call_1_1", name="tool_1"),))
    splice.restart()
    again = [splice.add(delta) for delta in fragments(0, one, 2, [5])]
    assert again[:2] == [None, None]
    assert again[2] == Delta(tool_calls=(ToolCallDelta(index=0, arguments='e":"Ada"}'),))
    assert splice.finish(result_of("", one)) is None


def test_another_tool_is_another_answer() -> None:
    splice = Splice()
    splice.add(fragments(0, call(1), 1, [])[0])
    splice.restart()
    with pytest.raises(Diverged):
        splice.add(fragments(0, call(2), 2, [])[0])


def test_arguments_are_the_same_by_meaning() -> None:
    splice, one = Splice(), call(1, name="Ada")
    spaced = ToolCallDelta(index=0, id="c", name="tool_1", arguments='{ "name" : "Ada" }')
    assert splice.add(Delta(tool_calls=(spaced,))) == Delta(tool_calls=(spaced,))
    assert splice.finish(result_of("", one)) is None


def test_a_call_that_the_token_limit_cut_is_no_other_answer() -> None:
    splice = Splice()
    for delta in fragments(0, call(1, name="Ada"), 1, [5])[:2]:
        splice.add(delta)
    assert splice.finish(result_of("", finish_reason="length")) is None
    with pytest.raises(Diverged):
        splice.finish(result_of("", finish_reason="stop"))


def test_an_answer_without_deltas_comes_whole() -> None:
    one = call(1, name="Ada")
    wanted = ToolCallDelta(index=0, id="call_1", name="tool_1", arguments='{"name":"Ada"}')
    assert Splice().finish(result_of("Hello", one)) == Delta(text="Hello", tool_calls=(wanted,))

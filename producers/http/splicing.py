"""Streams that cannot take back what they said: what a reader gets over several attempts. Pure.

A native stream says `reset`: discard what you have. A foreign one (`/v1/…`, plain text) cannot. So
the answer of a new attempt is held back until it has passed everything that was sent before. If it
is the same so far, the reader gets what follows and never knows; if it is not, `Diverged` ends the
stream. Nothing is ever put together from two answers.

Ids of tool calls only tie a result to its call, and every attempt has others: the reader keeps the
one that it was given first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import orjson

from sluicegate.shared.events import Delta, ToolCallDelta
from sluicegate.shared.jobs import Result
from sluicegate.shared.messages import ToolCallPart


class Diverged(Exception):
    """A new attempt answers otherwise than what was sent already."""


class _Track:
    """One text that grows: the answer's, or the arguments of one tool call."""

    __slots__ = ("_place", "fresh", "sent")

    def __init__(self) -> None:
        #: What the reader has.
        self.sent = ""
        #: What this attempt has said beyond that.
        self.fresh = ""
        #: How much of what the reader has this attempt has said again.
        self._place = 0

    @property
    def caught_up(self) -> bool:
        return self._place == len(self.sent)

    def restart(self) -> None:
        self.fresh = ""
        self._place = 0

    def add(self, piece: str) -> None:
        again = piece[: len(self.sent) - self._place]
        if not self.sent.startswith(again, self._place):
            raise Diverged
        self._place += len(again)
        self.fresh += piece[len(again) :]

    def take(self) -> str:
        """Return what the reader gets now."""
        fresh, self.fresh = self.fresh, ""
        self.sent += fresh
        self._place = len(self.sent)
        return fresh

    def complete(self, whole: str) -> None:
        """Have it said to its end, whatever pieces were lost on the way."""
        if not whole.startswith(self.sent):
            raise Diverged
        self._place = len(self.sent)
        self.fresh = whole[len(self.sent) :]


class _Call:
    """One tool call."""

    __slots__ = ("arguments", "given", "id", "name")

    def __init__(self) -> None:
        self.arguments = _Track()
        self.id: str | None = None
        self.name: str | None = None
        #: Whether the reader has id and name.
        self.given = False

    def add(self, fragment: ToolCallDelta) -> None:
        if self.given and fragment.name is not None and fragment.name != self.name:
            raise Diverged
        if not self.given:
            self.id = fragment.id or self.id
            self.name = fragment.name or self.name
        self.arguments.add(fragment.arguments)

    def complete(self, call: ToolCallPart) -> None:
        """See `_Track.complete`; the arguments are known by their meaning, not by their spaces."""
        self.add(ToolCallDelta(index=0, id=call.id, name=call.name))
        track = self.arguments
        said = track.sent + track.fresh
        if track.caught_up and said and _same(said, call.arguments):
            return
        compact = orjson.dumps(call.arguments).decode()
        spaced = json.dumps(call.arguments, ensure_ascii=False)
        track.complete(compact if compact.startswith(track.sent) else spaced)

    def take(self, index: int) -> ToolCallDelta | None:
        if not self.given and (self.id is None or self.name is None):
            return None  # a call has to begin with both
        first, self.given = not self.given, True
        piece = self.arguments.take()
        if not (first or piece):
            return None
        return ToolCallDelta(
            index=index,
            id=self.id if first else None,
            name=self.name if first else None,
            arguments=piece,
        )


class Splice:
    """What one reader was sent of one answer.

    All but `restart` raise `Diverged`; after that nothing of the answer may be sent any more.
    """

    def __init__(self) -> None:
        self._text = _Track()
        self._calls: dict[int, _Call] = {}

    def restart(self) -> None:
        """Begin with a new attempt, which says everything again."""
        self._text.restart()
        self._calls = {index: call for index, call in self._calls.items() if call.given}
        for call in self._calls.values():
            call.arguments.restart()

    def add(self, delta: Delta) -> Delta | None:
        """Take more of the answer; return what is to be sent now, None if that is nothing."""
        self._text.add(delta.text)
        for fragment in delta.tool_calls:
            self._calls.setdefault(fragment.index, _Call()).add(fragment)
        return self._take() if self._caught_up() else None

    def finish(self, result: Result) -> Delta | None:
        """Hold the whole answer against what was sent; return the rest, None if that is nothing."""
        self._text.complete(result.text)
        for index, whole in enumerate(result.tool_calls):
            self._calls.setdefault(index, _Call()).complete(whole)
        for index, call in self._calls.items():
            # A call that the token limit has cut is not in the result.
            cut = result.finish_reason == "length" and call.arguments.caught_up
            if index >= len(result.tool_calls) and call.given and not cut:
                raise Diverged
        return self._take()

    def _caught_up(self) -> bool:
        given = (call for call in self._calls.values() if call.given)
        return self._text.caught_up and all(call.arguments.caught_up for call in given)

    def _take(self) -> Delta | None:
        text = self._text.take()
        calls = [call.take(index) for index, call in self._calls.items()]
        fragments = tuple(fragment for fragment in calls if fragment is not None)
        return Delta(text=text, tool_calls=fragments) if text or fragments else None


def _same(said: str, arguments: Mapping[str, object]) -> bool:
    try:
        return bool(orjson.loads(said) == arguments)
    except orjson.JSONDecodeError:
        return False

"""An answer while it is being read, whole or in pieces: what both wire formats have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from pydantic import ValidationError

from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.messages import ToolCallPart, Usage
from sluicegate.workers.providers.base import Partial, ToolCallFragment
from sluicegate.workers.providers.decoding import load_json
from sluicegate.workers.providers.failures import Fault
from sluicegate.workers.providers.sse import ServerSentEvent

#: How an answer may end that is none: the words stand for wire values in `Reading.FINISH`.
FILTERED = "content_filter"
CONTEXT_FULL = "context_full"


class _ToolCall:
    __slots__ = ("arguments", "id", "index", "name")

    def __init__(self, index: int) -> None:
        self.index = index
        self.id = ""
        self.name = ""
        self.arguments: list[str] = []


class Fresh(NamedTuple):
    """What has come since the last look."""

    text: str
    tool_calls: tuple[ToolCallFragment, ...]


class Reading(ABC):
    """Collects one answer. A wire's subclass knows the JSON; wrong shapes may raise anything.

    `whole` takes a body, `event` one event of a stream; then `conclude` judges the result.
    """

    #: How messages call it.
    provider: ClassVar[str]
    #: The wire's finish reasons in our words; others are passed through.
    FINISH: ClassVar[Mapping[str, str]]

    def __init__(self) -> None:
        #: The first piece of an answer has come.
        self.began = False
        #: The stream's last event has come.
        self.ended = False
        self.model: str | None = None
        self.service_tier: str | None = None
        self.raw_usage: dict[str, Any] | None = None
        #: `raw_usage` is the final count.
        self.usage_is_final = False
        #: The wire's finish reason, and what the provider says of it.
        self.stop: str | None = None
        self.stop_words: str | None = None
        self._text: list[str] = []
        self._tool_calls: dict[int, _ToolCall] = {}
        self._fresh_text: list[str] = []
        self._fresh_calls: list[ToolCallFragment] = []

    @abstractmethod
    def whole(self, body: dict[str, Any]) -> None:
        """Take a whole answer."""

    @abstractmethod
    def event(self, event: ServerSentEvent) -> None:
        """Take an event. Raises Fault when it is an error, ValueError when it is no JSON."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether everything that marks a finished answer has come."""

    @abstractmethod
    def usage(self) -> Usage | None:
        """Return `raw_usage` in disjoint classes, None without a usable one."""

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._text)

    def partial(self) -> Partial:
        """Return what has come, for a call that failed."""
        return Partial(
            text=self.text,
            usage=self.usage(),
            raw_usage=self.raw_usage,
            exact=self.usage_is_final,
            model=self.model,
            service_tier=self.service_tier,
        )

    def fresh(self) -> Fresh | None:
        """Return what has come since the last look, None if that is nothing."""
        if not (self._fresh_text or self._fresh_calls):
            return None
        fresh = Fresh("".join(self._fresh_text), tuple(self._fresh_calls))
        self._fresh_text.clear()
        self._fresh_calls.clear()
        return fresh

    def conclude(self) -> tuple[str, tuple[ToolCallPart, ...]]:
        """Return finish reason and tool calls of an answer. Raises Fault if it is none.

        An answer cut at its token limit keeps its text and loses a tool call that was cut, too.
        """
        # A filter and a full context are the provider's last word, with an end marker or without.
        finish = None if self.stop is None else self.FINISH.get(self.stop, self.stop)
        if finish == FILTERED:
            raise Fault(
                ErrorClass.CONTENT_FILTER,
                f"{self.provider} filtered the answer",
                words=self.stop_words,
            )
        if finish == CONTEXT_FULL:
            raise Fault(
                ErrorClass.CONTEXT_TOO_LONG, f"the context of the model at {self.provider} is full"
            )
        if finish is None or not self.complete:
            raise Fault(
                ErrorClass.TRUNCATED, f"the answer of {self.provider} ended without its end marker"
            )
        calls = []
        for call in self._tool_calls.values():
            try:
                arguments = load_json("".join(call.arguments) or "{}")
                calls.append(ToolCallPart(id=call.id, name=call.name, arguments=arguments))
            except (ValueError, ValidationError):
                if finish != "length":
                    raise Fault(
                        ErrorClass.GARBAGE, f"{self.provider} sent a tool call that cannot be read"
                    ) from None
        # OpenAI ends a call of a tool that was forced by name with `stop`.
        return "tool_calls" if calls and finish == "stop" else finish, tuple(calls)

    def add_text(self, text: object) -> None:
        """Take a piece of text. Raises TypeError when it is none."""
        if not isinstance(text, str):
            raise TypeError("text")
        self.began = True
        self._text.append(text)
        self._fresh_text.append(text)

    def add_tool_call(
        self, number: int, *, call_id: object = "", name: object = "", arguments: object = ""
    ) -> None:
        """Take a piece of the tool call that the provider gives this number.

        Fragments number the calls from 0: Anthropic's numbers count the answer's text, too.
        Raises TypeError when a piece is no text.
        """
        if not (isinstance(call_id, str) and isinstance(name, str) and isinstance(arguments, str)):
            raise TypeError("tool call")
        call = self._tool_calls.get(number)
        if call is None:
            call = self._tool_calls[number] = _ToolCall(len(self._tool_calls))
        fragment = ToolCallFragment(index=call.index)
        if call_id and not call.id:
            call.id = fragment["id"] = call_id
        if name and not call.name:
            call.name = fragment["name"] = name
        if arguments:
            call.arguments.append(arguments)
            fragment["arguments"] = arguments
        self.began = True
        self._fresh_calls.append(fragment)

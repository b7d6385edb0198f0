"""What a fake's jobs come to: rules, each with outcomes that are used up in turn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Self

from pydantic import BaseModel

from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.messages import ToolCallPart

if TYPE_CHECKING:
    from sluicegate.testing.job import FakeJob

#: What an answer may be given as: text; a pydantic model, mapping or list, which become JSON; or a
#: function of the job that returns one of these.
Content = str | BaseModel | Mapping[str, Any] | Sequence[Any]
Written = Content | Callable[["FakeJob"], Content]


class ScriptError(AssertionError):
    """The test does not say what becomes of a job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The job succeeds."""

    written: Written
    #: The pieces that a streamed answer comes in; None: word by word.
    deltas: tuple[str, ...] | None = None
    tool_calls: tuple[ToolCallPart, ...] = ()
    finish_reason: str = "stop"

    def text(self, job: FakeJob) -> str:
        """Return the text for this job."""
        content = self.written(job) if callable(self.written) else self.written
        if isinstance(content, str):
            return content
        if isinstance(content, BaseModel):
            return content.model_dump_json()
        return json.dumps(content, ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The job fails."""

    error_class: ErrorClass
    message: str
    #: HTTP status.
    status: int | None


@dataclass(frozen=True, slots=True)
class Expiry:
    """The job's deadline passes before it is answered."""


@dataclass(frozen=True, slots=True)
class Silence:
    """The job is begun, says these deltas, and never ends."""

    deltas: tuple[str, ...] = ()


Outcome = Answer | Failure | Expiry | Silence

_WORD: Final = re.compile(r"\s*\S+\s*|\s+")


def words(text: str) -> Iterator[str]:
    """Split a text as it is streamed where nobody says how."""
    return (match[0] for match in _WORD.finditer(text))


class Rule:
    """Says what becomes of the jobs that it fits; made by `on`.

    Several outcomes are used in turn, one a job, and a `retry` is a new turn; the last one stays:
    `fake.on("summary").fails(ErrorClass.OVERLOADED).answers("A short call.")`.
    """

    def __init__(
        self,
        use_case: str | None,
        prompt: str | re.Pattern[str] | None,
        when: Callable[[FakeJob], bool] | None,
    ) -> None:
        self._use_case = use_case
        self._prompt = prompt
        self._when = when
        self._outcomes: list[Outcome] = []
        self._used = 0
        self._numbers = count(1)

    def answers(self, answer: Written) -> Self:
        """Answer with this text; with JSON, if it is a pydantic model, a mapping or a list.

        A function is called with the job and returns one of these.
        """
        return self._add(Answer(written=answer))

    def streams(self, *deltas: str) -> Self:
        """Answer with this text; where the job is streamed, in exactly these pieces."""
        return self._add(Answer(written="".join(deltas), deltas=deltas))

    def calls_tool(self, name: str, arguments: Mapping[str, Any] | None = None) -> Self:
        """Answer by asking for a tool of the job."""
        call = ToolCallPart(
            id=f"call_{next(self._numbers)}", name=name, arguments=dict(arguments or {})
        )
        return self._add(Answer(written="", tool_calls=(call,), finish_reason="tool_calls"))

    def fails(
        self,
        error_class: ErrorClass = ErrorClass.SERVER,
        message: str = "the provider could not answer",
        *,
        status: int | None = None,
    ) -> Self:
        """End the job as failed: `result` raises `JobFailed` with this message."""
        return self._add(Failure(error_class=error_class, message=message, status=status))

    def expires(self) -> Self:
        """End the job as expired: `result` raises `JobExpired`."""
        return self._add(Expiry())

    def never_ends(self, *deltas: str) -> Self:
        """Begin the job, say these deltas if it is streamed, and no more.

        Whoever waits with a timeout gets `ResultTimeout` at once. The job can be cancelled.
        """
        return self._add(Silence(deltas))

    def fits(self, job: FakeJob) -> bool:
        """Whether this rule decides about the job."""
        if self._use_case not in (None, job.use_case):
            return False
        if isinstance(self._prompt, str) and self._prompt not in job.prompt:
            return False
        if isinstance(self._prompt, re.Pattern) and not self._prompt.search(job.prompt):
            return False
        return self._when is None or self._when(job)

    def take(self) -> Outcome:
        """Return the next outcome."""
        if not self._outcomes:
            raise ScriptError(
                "a rule was made with on(...) and not told what happens; add .answers(...), "
                ".fails(...), .expires() or .never_ends()"
            )
        outcome = self._outcomes[min(self._used, len(self._outcomes) - 1)]
        self._used += 1
        return outcome

    def _add(self, outcome: Outcome) -> Self:
        self._outcomes.append(outcome)
        return self


class Script:
    """All rules of a fake; the newest that fits a job decides.

    strict: a job that no rule fits is a `ScriptError`; otherwise it is answered with its prompt.
    """

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._rules: list[Rule] = []

    def add(self, rule: Rule) -> Rule:
        """Put a rule before all others."""
        self._rules.insert(0, rule)
        return rule

    def check(self, job: FakeJob) -> None:
        """Raise `ScriptError` if the job is one that the test should have foreseen."""
        if self._rule(job) is not None:
            return
        if self._strict:
            raise ScriptError(_unscripted(job, "no answer is scripted for it"))

    def take(self, job: FakeJob) -> Outcome:
        """Return what becomes of a job."""
        rule = self._rule(job)
        if rule is not None:
            return rule.take()
        if job.spec.response_format is not None:
            raise ScriptError(_unscripted(job, "it wants JSON, and an echo of its prompt is none"))
        return Answer(written=job.prompt)

    def _rule(self, job: FakeJob) -> Rule | None:
        return next((rule for rule in self._rules if rule.fits(job)), None)


def _unscripted(job: FakeJob, why: str) -> str:
    return (
        f"a job of {job.use_case!r} was submitted, {job.prompt[:60]!r}, and {why}; "
        f"add fake.on({job.use_case!r}).answers(...)"
    )

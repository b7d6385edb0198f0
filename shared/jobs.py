"""The job: what is asked for, the states it passes through, and the result."""

from __future__ import annotations

import hashlib
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, Literal, Self, TypeVar
from uuid import UUID

import orjson
from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
)

from sluicegate.shared.answers import read_answer, read_json
from sluicegate.shared.conversations import check_conversation, check_tools
from sluicegate.shared.errors import ErrorClass, IllegalTransition, InvalidJob, Purged
from sluicegate.shared.messages import (
    MAX_ATTACHMENT_BYTES,
    MAX_REQUEST_BYTES,
    FilePart,
    Frozen,
    ImagePart,
    Message,
    NonEmpty,
    ResponseFormat,
    Tool,
    ToolCallPart,
    Usage,
    attachment_bytes,
)
from sluicegate.shared.refusals import refusal
from sluicegate.shared.schemas import check_schema

Answer = TypeVar("Answer", bound=BaseModel)

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
UseCaseName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
IdempotencyKey = Annotated[str, StringConstraints(min_length=1, max_length=255)]


class Lane(StrEnum):
    """Interactive: somebody waits. Bulk: cheap and steady matters more than soon."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


class State(StrEnum):
    """Where a job is. The last four are terminal."""

    QUEUED = "queued"
    RUNNING = "running"
    PARKED = "parked"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        """Whether the job is over."""
        return self in TERMINAL


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED})

#: Every edge there is. The edges out of terminal states are for `job retry` alone.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.PARKED, State.CANCELLED, State.EXPIRED}),
    State.RUNNING: TERMINAL | {State.QUEUED, State.PARKED},
    State.PARKED: frozenset({State.QUEUED, State.CANCELLED, State.EXPIRED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset({State.QUEUED}),
    State.CANCELLED: frozenset({State.QUEUED}),
    State.EXPIRED: frozenset({State.QUEUED}),
}


def check_transition(old: State, new: State) -> None:
    """Raise `IllegalTransition` unless a job may move from `old` to `new`."""
    if new not in TRANSITIONS[old]:
        raise IllegalTransition(f"a job cannot move from {old} to {new}")


class AttemptState(StrEnum):
    """Where a paid call is. `unknown` is booked at its whole reservation until corrected."""

    DISPATCHING = "dispatching"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    VOID = "void"  # the call certainly never left
    UNKNOWN = "unknown"
    CORRECTED = "corrected"


class JobSpec(Frozen):
    """What a producer asks for; stored as it was given and never changed."""

    version: Literal[1] = 1
    use_case: UseCaseName
    #: The caller named none, and this one was chosen by what the job asks for.
    use_case_detected: Annotated[bool, Field(strict=True)] = False
    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=1000)]
    system: str | None = None
    #: Longest answer in tokens; None takes the use case's default.
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)] | None = None
    #: A catalogue name or a provider's model id; None lets routing choose.
    model: ModelName | None = None
    #: Models to try after `model`, in this order; without one, after those that are meant for the
    #: use case, and before those that only stand in.
    fallbacks: Annotated[tuple[ModelName, ...], Field(max_length=8)] = ()
    tools: Annotated[tuple[Tool, ...], Field(max_length=128)] = ()
    #: `auto`, `none`, `required`, or the name of one tool.
    tool_choice: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] = "auto"
    #: Whether the model may ask for several tools at once; None leaves it to the model.
    parallel_tool_calls: Annotated[bool, Field(strict=True)] | None = None
    response_format: ResponseFormat | None = None
    effort: Literal["low", "medium", "high"] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, strict=True)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    #: Texts that end the answer where they would stand.
    stop: Annotated[tuple[NonEmpty, ...], Field(max_length=4)] = ()
    stream: Annotated[bool, Field(strict=True)] = False
    metadata: Annotated[dict[str, str], Field(max_length=32)] = Field(default_factory=dict)

    @property
    def needs_vision(self) -> bool:
        """Whether a part can only be read by a model that sees."""
        return any(
            isinstance(part, ImagePart | FilePart)
            for message in self.messages
            for part in message.content
        )

    def dump(self) -> bytes:
        """Canonical JSON: the same spec always gives the same bytes.

        Fields left at their default are absent, so that a later version, which knows more fields,
        gives the same bytes for the same request.
        """
        given = {
            name
            for name, default in _defaults().items()
            if name == "version" or getattr(self, name) != default
        }
        return orjson.dumps(
            self.model_dump(mode="json", include=given, exclude_none=True),
            option=orjson.OPT_SORT_KEYS,
        )

    @staticmethod
    def digest(dumped: bytes) -> bytes:
        """Hash that tells whether two requests are the same (SHA-256, 32 bytes)."""
        return hashlib.sha256(dumped).digest()


@cache
def _defaults() -> dict[str, object]:
    return {
        name: field.get_default(call_default_factory=True)
        for name, field in JobSpec.model_fields.items()
    }


def build_spec(
    use_case: str,
    prompt: str | list[Message] | tuple[Message, ...],
    **fields: Any,
) -> JobSpec:
    """Build a spec from a prompt or messages; raise `InvalidJob` that names the field."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InvalidJob("prompt", "must not be empty")
        messages: Any = ({"role": "user", "content": [{"type": "text", "text": prompt}]},)
    else:
        messages = prompt
    try:
        spec = JobSpec(use_case=use_case, messages=messages, **fields)
    except ValidationError as error:
        raise refusal(error) from None
    _check_size(spec)
    check_conversation(spec.messages)
    check_tools(spec.tools, spec.tool_choice)
    if spec.response_format is not None:
        check_schema(spec.response_format.json_schema, "response_format.json_schema")
    return spec


def _check_size(spec: JobSpec) -> None:
    attachments = attachment_bytes(spec.messages)
    if attachments > MAX_ATTACHMENT_BYTES:
        raise InvalidJob(
            "messages",
            f"images and files take {attachments:,} bytes; {MAX_ATTACHMENT_BYTES:,} are allowed",
        )
    try:
        text_bytes = len(spec.dump()) - attachments
    except (ValueError, orjson.JSONEncodeError) as error:
        # A lone surrogate, an integer beyond 64 bits, an object; what is nested too deep.
        raise InvalidJob("job", f"holds a value that JSON cannot carry: {error}") from None
    if text_bytes > MAX_REQUEST_BYTES:
        raise InvalidJob("prompt", f"takes {text_bytes:,} bytes; {MAX_REQUEST_BYTES:,} are allowed")


def dollars(nano_usd: int) -> Decimal:
    """Return an amount in US dollars, exact."""
    return Decimal(nano_usd).scaleb(-9)


class JobError(Frozen):
    """Why a job ended without an answer, readable by a person."""

    error_class: ErrorClass
    message: str
    provider: str | None = None
    status: int | None = None
    request_id: str | None = None


class Result(Frozen):
    """How a job ended: the answer, or the error, and what it cost over all attempts."""

    version: Literal[1] = 1
    job_id: UUID
    state: State
    use_case: str
    text: str = ""
    tool_calls: tuple[ToolCallPart, ...] = ()
    finish_reason: str | None = None
    #: The catalogue name of the provider row that answered, and the model it named.
    provider: str | None = None
    model: str | None = None
    usage: Usage = Usage()
    cost_nano_usd: int = 0
    #: The same tokens at the baseline model's price.
    baseline_nano_usd: int = 0
    attempts: int = 0
    #: What was not done quite as asked, a sentence each: a use case that was detected, a parameter
    #: that the model does not take.
    warnings: tuple[str, ...] = ()
    error: JobError | None = None
    created_at: datetime | None = None
    finished_at: datetime | None = None
    #: When text, tool calls and the error's message were removed; they are empty since.
    purged_at: datetime | None = None
    _answer_type: type[BaseModel] | None = PrivateAttr(None)

    @property
    def parsed(self) -> Any:
        """The answer as the model that was given as `response_format`, or as plain JSON data.

        Raises `InvalidAnswer` if the text does not fit; with a schema that is rare. Raises `Purged`
        if it is not kept any more.
        """
        if self._answer_type is not None:
            return self.parse_as(self._answer_type)
        self.check_kept()
        return read_json(self.text, job_id=self.job_id, cut=self._cut)

    def parse_as(self, model: type[Answer]) -> Answer:
        """Read the answer as this pydantic model; raise `InvalidAnswer` or `Purged`."""
        self.check_kept()
        return read_answer(self.text, model, job_id=self.job_id, cut=self._cut)

    def check_kept(self) -> None:
        """Raise `Purged` if the answer is not kept any more."""
        if self.purged_at is not None:
            raise Purged(
                f"the answer of job {self.job_id}, which {self.state}, was purged at "
                f"{self.purged_at:%Y-%m-%d %H:%M} UTC; its state and its cost are kept",
                job_id=str(self.job_id),
            )

    def expecting(self, model: type[BaseModel] | None) -> Self:
        """Return this result with `parsed` an instance of `model`."""
        copy = self.model_copy()
        copy._answer_type = model  # noqa: SLF001 - a copy of this one
        return copy

    @property
    def _cut(self) -> bool:
        return self.finish_reason == "length"

    @property
    def cost(self) -> Decimal:
        """What all its calls cost, in US dollars, exact."""
        return dollars(self.cost_nano_usd)

    @property
    def baseline_cost(self) -> Decimal:
        """What the same tokens would have cost at the baseline model, in US dollars, exact."""
        return dollars(self.baseline_nano_usd)

    @property
    def latency_s(self) -> float | None:
        """Seconds from submit to the end, queueing included."""
        if self.created_at is None or self.finished_at is None:
            return None
        return (self.finished_at - self.created_at).total_seconds()

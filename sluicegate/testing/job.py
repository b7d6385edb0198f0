"""A job in the memory of a fake, and what a caller may see of it."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sluicegate.producers.listing import JobSummary
from sluicegate.producers.submission import Draft
from sluicegate.producers.views import AttemptView, JobView
from sluicegate.shared.catalogue import Provider
from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.events import (
    Completed,
    Delta,
    Event,
    Failed,
    Reset,
    Started,
    event_id,
    terminal_event,
)
from sluicegate.shared.jobs import AttemptState, JobError, JobSpec, Lane, Result, State
from sluicegate.shared.messages import TextPart, Usage


@dataclass(eq=False, kw_only=True, repr=False)
class FakeJob:
    """A job that was submitted to a fake."""

    #: The options of `submit` as the caller gave them, those left out absent.
    options: Mapping[str, Any]
    #: The account's name.
    account: str
    draft: Draft
    #: The request as it would be stored.
    spec: JobSpec
    #: Whether the transaction that it was submitted in has committed, or there was none.
    committed: bool = True
    state: State
    #: How it ended, or None until it has.
    result: Result | None = None
    #: Paid calls so far.
    attempts: int = 0
    cost_nano_usd: int = 0
    fence: int = 0
    events: list[Event] = field(default_factory=list)
    history: list[AttemptView] = field(default_factory=list)
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    run_at: datetime = field(init=False)
    deadline_at: datetime = field(init=False)
    #: Since when its running call was to be cancelled.
    cancel_requested_at: datetime | None = None
    batch_id: UUID | None = None
    #: Its line in the batch, from 1.
    batch_line: int | None = None

    def __post_init__(self) -> None:
        self.run_at = self.created_at
        self.deadline_at = self.created_at + timedelta(seconds=self.draft.deadline_s)

    def __repr__(self) -> str:
        return f"FakeJob({self.use_case!r}, {self.prompt!r}, {self.state})"

    @property
    def id(self) -> UUID:
        """The job's id."""
        return self.draft.id

    @property
    def use_case(self) -> str:
        """The use case it was submitted for."""
        return self.spec.use_case

    @property
    def prompt(self) -> str:
        """The text of the last message, which is the user's."""
        return "\n".join(
            part.text for part in self.spec.messages[-1].content if isinstance(part, TextPart)
        )

    @property
    def system(self) -> str | None:
        """The standing instructions."""
        return self.spec.system

    @property
    def metadata(self) -> dict[str, str]:
        """What the caller keeps with the job."""
        return self.spec.metadata

    @property
    def lane(self) -> Lane:
        """The lane it waits in."""
        return self.draft.lane

    @property
    def idempotency_key(self) -> str | None:
        """The key it was submitted with."""
        return self.draft.idempotency_key

    @property
    def reply_to(self) -> str | None:
        """The shared channel that its result goes to."""
        return self.draft.reply_to

    @property
    def waits(self) -> bool:
        """Whether nobody has begun it yet."""
        return self.state in (State.QUEUED, State.PARKED)

    def say(self, payload: Started | Delta | Reset | Completed | Failed) -> None:
        """Append an event."""
        self.events.append(Event(event_id(self.fence, len(self.events) + 1), payload))

    def begin(self, row: Provider) -> None:
        """Let a worker have it, which calls this provider."""
        self.state = State.RUNNING
        self.fence += 1
        self.attempts += 1
        if self.lane is Lane.INTERACTIVE:
            self.say(Started(model=row.model, attempt=self.attempts))
        self.history.append(
            AttemptView(
                number=self.attempts,
                provider=row.name,
                model=row.model,
                state=AttemptState.DISPATCHING,
                error_class=None,
                error_message=None,
                status=None,
                request_id=None,
                dispatched_at=datetime.now(UTC),
                ended_at=None,
                first_token_ms=None,
                duration_ms=None,
                cost_nano_usd=None,
            )
        )

    def book(
        self, state: AttemptState, cost_nano_usd: int | None, error: JobError | None = None
    ) -> None:
        """Book the attempt that is under way."""
        self.cost_nano_usd += cost_nano_usd or 0
        ended = {
            "state": state,
            "request_id": f"req_{self.id.hex}_{self.fence}",
            "ended_at": datetime.now(UTC),
            "duration_ms": 0,
            "cost_nano_usd": cost_nano_usd,
        }
        if error is not None:
            ended |= {
                "error_class": error.error_class,
                "error_message": error.message,
                "status": error.status,
            }
        self.history[-1] = self.history[-1].model_copy(update=ended)

    def end(self, state: State, **values: Any) -> None:
        """End it with a result of these values, and tell its readers."""
        self.result = Result(
            job_id=self.id,
            state=state,
            use_case=self.use_case,
            cost_nano_usd=self.cost_nano_usd,
            attempts=self.attempts,
            created_at=self.created_at,
            finished_at=datetime.now(UTC),
            **values,
        )
        self.state = state
        self.events.append(terminal_event(self.fence, self.result))

    def end_waiting(self, state: State, error_class: ErrorClass, message: str) -> None:
        """End it without an answer, while no worker has it."""
        self.fence += 1
        self.end(state, error=JobError(error_class=error_class, message=message))

    def reopen(self, deadline_s: float) -> None:
        """Queue it again, as `retry` does."""
        self.state = State.QUEUED
        self.fence += 1
        self.attempts = 0
        self.result = None
        self.cancel_requested_at = None
        self.events.clear()
        self.run_at = datetime.now(UTC)
        self.deadline_at = self.run_at + timedelta(seconds=deadline_s)

    def view(self) -> JobView:
        """Return what `get` shows of it."""
        return JobView(
            id=self.id,
            state=self.state,
            use_case=self.use_case,
            lane=self.lane,
            queue=self.draft.queue,
            account=self.account,
            account_id=self.draft.account_id,
            attempts=self.attempts,
            max_attempts=self.draft.max_attempts,
            cost_nano_usd=self.cost_nano_usd,
            created_at=self.created_at,
            run_at=self.run_at,
            deadline_at=self.deadline_at,
            held_back=None,
            finished_at=self.result and self.result.finished_at,
            purged_at=None,
            idempotency_key=self.idempotency_key,
            request_id=self.draft.request_id,
            submitted_by=self.draft.submitted_by,
            submitted_from=socket.gethostname(),
            reply_to=self.reply_to,
            batch_id=self.batch_id,
            batch_line=self.batch_line,
            cancel_requested_at=self.cancel_requested_at,
            metadata=self.metadata,
            history=tuple(self.history),
            result=self.result,
        )

    def summary(self) -> JobSummary:
        """Return what `list_jobs` shows of it."""
        error = self.result.error if self.result else None
        shown = self.view().model_dump(include=set(JobSummary.model_fields))
        return JobSummary(
            **shown, error_class=error and error.error_class, error=error and error.message
        )


def plausible_usage(prompt_tokens: int, answer: str) -> Usage:
    """Return the tokens that a call like this may take, four characters each in the answer."""
    return Usage(input=prompt_tokens, output=max(1, -(-len(answer) // 4)))

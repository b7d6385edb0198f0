"""Submission: a request is checked whole before anything is stored. No I/O here.

Both clients run what this module decides: `read_request` checks how a job is to be handled, `Desk`
what it asks for, by catalogue and accounts. What comes out is a `Draft`.
"""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated, Any, Final, Literal, NamedTuple, TypedDict
from uuid import UUID

from pydantic import BaseModel, Field, StringConstraints, ValidationError
from sqlalchemy import Row

from sluicegate.shared.accounts import DEFAULT_ACCOUNT, name_or_id
from sluicegate.shared.answers import answer_type_of, response_format_of
from sluicegate.shared.bodies import Bodies
from sluicegate.shared.catalogue import Catalogue
from sluicegate.shared.errors import IdempotencyConflict, InvalidJob
from sluicegate.shared.events import ChannelName
from sluicegate.shared.ids import new_id
from sluicegate.shared.jobs import JobSpec, Lane, State, build_spec
from sluicegate.shared.messages import (
    LARGE_BYTES,
    Frozen,
    Message,
    ResponseFormat,
    Tool,
    attachment_bytes,
)
from sluicegate.shared.queues import queue_name
from sluicegate.shared.refusals import refusal
from sluicegate.shared.routing import check_models, detect_use_case, needs_of, route
from sluicegate.shared.settings import Settings

#: Thirty days.
MAX_DEADLINE_S: Final = 30 * 86_400
#: Jobs that one `submit_many` takes: all of them are held in memory while they are checked.
MAX_JOBS: Final = 100_000

_ACCOUNTS_KEPT = 10_000
#: How long a client goes on with an account that is not active any more.
ACCOUNTS_KEPT_S: Final = 10.0

Prompt = str | Sequence[Message | Mapping[str, Any]]


class JobOptions(TypedDict, total=False):
    """What `submit` takes beside use case and prompt.

    system: standing instructions. max_tokens: longest answer. stream: send deltas as they come.
    model: a catalogue name or model id instead of routing's choice. fallbacks: up to 8 more, tried
    after it in this order; without `model`, after the rows that are meant for the use case.
    tools, tool_choice, parallel_tool_calls, effort, temperature, top_p, stop: as the models
    understand them; what the one that answers does not take is left out, and `result.warnings` says
    so. response_format: a pydantic model, which `result.parsed` is then an
    instance of, or a JSON schema. metadata: up to 32 strings, kept.

    account: name or id. lane: `interactive` or `bulk`. deadline: in seconds, as a `timedelta`, or
    the moment itself; after it the job is expired. max_attempts: paid calls at most.
    idempotency_key: the same key and request give the same job. reply_to: the shared channel that
    the result goes to, for `replies`. request_id: the caller's own, kept with the job.
    submitted_by: who asks, if not the OS user.
    """

    system: str | None
    max_tokens: int | None
    stream: bool
    model: str | None
    fallbacks: Sequence[str]
    tools: Sequence[Tool | Mapping[str, Any]]
    tool_choice: str
    parallel_tool_calls: bool | None
    response_format: type[BaseModel] | ResponseFormat | Mapping[str, Any] | None
    effort: Literal["low", "medium", "high"] | None
    temperature: float | None
    top_p: float | None
    stop: str | Sequence[str]
    metadata: Mapping[str, str]
    account: str | UUID
    lane: Lane | Literal["interactive", "bulk"]
    deadline: float | timedelta | datetime | None
    max_attempts: int | None
    idempotency_key: str | None
    reply_to: str | None
    request_id: str | None
    submitted_by: str | None


#: No NUL, which Postgres' text cannot hold, and no lone surrogate, which UTF-8 cannot.
_Label = Annotated[
    str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")
]


class _Terms(Frozen):
    """How a job is to be handled: the part of the options that is not the request."""

    account: _Label = DEFAULT_ACCOUNT
    lane: Lane = Lane.INTERACTIVE
    #: In seconds from now.
    deadline: Annotated[float, Field(gt=0, le=MAX_DEADLINE_S, allow_inf_nan=False)] | None = None
    max_attempts: Annotated[int, Field(ge=1, le=20)] | None = None
    idempotency_key: _Label | None = None
    reply_to: ChannelName | None = None
    request_id: _Label | None = None
    submitted_by: _Label | None = None


_TERMS = frozenset(_Terms.model_fields)
_FIELDS = frozenset(JobOptions.__annotations__) - _TERMS


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A job that has been checked and not yet stored. Its id stays the same in every repeat."""

    id: UUID
    account_id: UUID
    use_case: str
    lane: Lane
    queue: str
    state: State
    max_attempts: int
    deadline_s: float
    idempotency_key: str | None
    request_hash: bytes
    request: bytes
    submitted_by: str
    request_id: str | None
    reply_to: str | None


FIND_ACCOUNTS: Final = """
SELECT name, id FROM accounts WHERE is_active AND name = ANY(%(names)s)
UNION ALL
SELECT id::text, id FROM accounts WHERE is_active AND id = ANY(%(ids)s::uuid[])
"""


class Request(NamedTuple):
    """One submission as the caller wrote it, its handling checked, its content not yet."""

    use_case: object
    prompt: object
    fields: dict[str, Any]
    terms: _Terms
    #: The model that its answer is to be read as.
    answer_type: type[BaseModel] | None = None

    @property
    def is_large(self) -> bool:
        """Whether checking it would hold up an event loop."""
        if isinstance(self.prompt, str) or not isinstance(self.prompt, Sequence):
            return False
        return sum(map(_data_bytes, self.prompt)) > LARGE_BYTES


def _data_bytes(message: object) -> int:
    """Return how long the images and files of a message are, as far as it is one."""
    if isinstance(message, Message):
        return attachment_bytes([message])
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str) or not isinstance(content, Sequence):
        return 0
    found = (
        part.get("data") if isinstance(part, Mapping) else getattr(part, "data", None)
        for part in content
    )
    return sum(len(data) for data in found if isinstance(data, str))


def read_request(use_case: object, prompt: object, options: Mapping[str, Any]) -> Request:
    """Check how a job is to be handled, and that its options are known; raise `InvalidJob`."""
    unknown = options.keys() - _TERMS - _FIELDS
    if unknown:
        known = ", ".join(sorted(_TERMS | _FIELDS))
        name = min(map(str, unknown)) or '""'
        raise InvalidJob(name, f"is not an option of a job; there are {known}")
    given = {name: options[name] for name in _TERMS & options.keys()}
    if "deadline" in given:
        given["deadline"] = _seconds_left(given["deadline"])
    with suppress(ValueError, AttributeError, TypeError):
        if "account" in given:
            given["account"] = str(UUID(str(given["account"])))
    try:
        terms = _Terms(**given)
    except ValidationError as error:
        raise refusal(error) from None
    fields = {name: options[name] for name in _FIELDS & options.keys()}
    if isinstance(fields.get("stop"), str):
        fields["stop"] = (fields["stop"],)
    response_format = fields.get("response_format")
    answer_type = answer_type_of(response_format)
    if answer_type is not None:
        fields["response_format"] = response_format_of(answer_type)
    elif not isinstance(response_format, ResponseFormat | Mapping | None):
        raise InvalidJob(
            "response_format",
            "must be a pydantic model class, or a ResponseFormat or a mapping with name and "
            "json_schema",
        )
    return Request(use_case, prompt, fields, terms, answer_type)


def _seconds_left(deadline: object) -> object:
    """Bring the ways to write a deadline to one: seconds from now."""
    if isinstance(deadline, timedelta):
        return deadline.total_seconds()
    if isinstance(deadline, datetime):
        if deadline.tzinfo is None:
            raise InvalidJob("deadline", "is a time without a time zone; give it one")
        return (deadline - datetime.now(UTC)).total_seconds()
    return deadline


def read_requests(
    use_case: str | None, items: Iterable[Prompt | Mapping[str, Any]], common: Mapping[str, Any]
) -> list[Request]:
    """Bring the items of `submit_many` into the shape of single submissions; as `read_request`."""
    if isinstance(items, str | bytes | Mapping):
        raise InvalidJob("jobs", "must be a list of prompts, or of options with a prompt each")
    requests: list[Request] = []
    for n, item in enumerate(items):
        if n == MAX_JOBS:
            raise InvalidJob("jobs", f"are more than {MAX_JOBS:,}; submit them in parts")
        options = {**common, **item} if isinstance(item, Mapping) else dict(common)
        prompt = options.pop("prompt", None) if isinstance(item, Mapping) else item
        with _named(n):
            requests.append(read_request(options.pop("use_case", use_case), prompt, options))
    return requests


@contextmanager
def _named(n: int) -> Iterator[None]:
    """Say which job of a list is refused."""
    try:
        yield
    except InvalidJob as error:
        raise InvalidJob(error.field, f"{error.problem} (job {n} of the list)") from None


class AccountBook:
    """Ids of active accounts, remembered for a short while."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, tuple[UUID, float]] = {}

    def known(self, requests: Iterable[Request]) -> tuple[dict[str, UUID], list[str]]:
        """Return the ids of the accounts that these name, and the names to look up."""
        ids: dict[str, UUID] = {}
        unknown: list[str] = []
        now = self._clock()
        for name in {request.terms.account for request in requests}:
            account_id, until = self._known.get(name, (None, 0.0))
            if account_id is None or until < now:
                unknown.append(name)
            else:
                ids[name] = account_id
        return ids, unknown

    def learn(self, rows: Iterable[Row[Any]]) -> dict[str, UUID]:
        """Remember and return what `FIND_ACCOUNTS` found."""
        found = {row.name: row.id for row in rows}
        if len(self._known) + len(found) > _ACCOUNTS_KEPT:
            self._known.clear()
        until = self._clock() + ACCOUNTS_KEPT_S
        self._known.update((name, (account_id, until)) for name, account_id in found.items())
        return found


def account_parameters(names: Iterable[str]) -> dict[str, Any]:
    """Parameters of `FIND_ACCOUNTS`: an account may be called by its name or its id."""
    called = [name_or_id(name) for name in names]
    return {
        "names": [one for one in called if isinstance(one, str)],
        "ids": [one for one in called if isinstance(one, UUID)],
    }


class Desk:
    """Checks requests by one reading of settings, catalogue, accounts and clock.

    accounts: the active ones that the requests name, by what they call them.
    """

    def __init__(
        self, *, settings: Settings, catalogue: Catalogue, accounts: Mapping[str, UUID]
    ) -> None:
        self._settings = settings
        self._catalogue = catalogue
        self._accounts = accounts
        self._bodies = Bodies.of(settings)
        self._now = datetime.now(UTC)

    def draft(self, request: Request) -> Draft:
        """Check one request; raise `InvalidJob` that names the field which is refused."""
        terms = request.terms
        asked = _build(request)
        spec = self._with_use_case(asked)
        account_id = self._accounts.get(terms.account)
        if account_id is None:
            raise InvalidJob("account", f"there is no active account {terms.account!r}")
        use_case = self._catalogue.use_cases.get(spec.use_case)
        if use_case is not None and not use_case.is_active:
            known = self._catalogue.open_use_cases
            raise InvalidJob("use_case", f"{use_case.name!r} is disabled; there are {known}")
        needs = needs_of(spec)
        mode = self._settings.catalogue
        check_models(needs, self._catalogue, account_id=account_id, mode=mode, now=self._now)
        candidates = route(
            needs,
            self._catalogue,
            account_id=account_id,
            mode=mode,
            now=self._now,
            first_token_ms={},
        )
        bulk = terms.lane is Lane.BULK
        settings = self._settings
        default_s = settings.bulk_deadline_s if bulk else settings.interactive_deadline_s
        content = spec.dump()
        return Draft(
            id=new_id(),
            account_id=account_id,
            use_case=spec.use_case,
            lane=terms.lane,
            queue=queue_name(spec.use_case, candidates[0].provider, terms.lane),
            # Bulk waits in Postgres: the sweep brings it to the broker a few minutes ahead.
            state=State.PARKED if bulk else State.QUEUED,
            max_attempts=terms.max_attempts or settings.max_attempts,
            deadline_s=terms.deadline or default_s,
            idempotency_key=terms.idempotency_key,
            # Of what was asked: the same request may be taken for another use case later.
            request_hash=JobSpec.digest(content if spec is asked else asked.dump()),
            request=self._bodies.seal_request(content, spec.metadata),
            submitted_by=terms.submitted_by or _os_user(),
            request_id=terms.request_id,
            reply_to=terms.reply_to,
        )

    def _with_use_case(self, spec: JobSpec) -> JobSpec:
        """Choose the use case where the caller named none: one that takes jobs."""
        if not spec.use_case_detected:
            return spec
        use_case = self._catalogue.use_cases.get(detect_use_case(spec))
        if use_case is None or not use_case.is_active:
            return spec
        return spec.model_copy(update={"use_case": use_case.name})

    def draft_all(self, requests: Iterable[Request]) -> list[Draft]:
        """Check all before any is stored; raise as `draft`, or `IdempotencyConflict`."""
        drafts = []
        hashes: dict[tuple[UUID, str], bytes] = {}
        for n, request in enumerate(requests):
            with _named(n):
                draft = self.draft(request)
            if draft.idempotency_key is not None:
                key = draft.account_id, draft.idempotency_key
                if hashes.setdefault(key, draft.request_hash) != draft.request_hash:
                    raise IdempotencyConflict(
                        f"idempotency key {draft.idempotency_key!r} stands at two different jobs "
                        "of the list; give each its own"
                    )
            drafts.append(draft)
        return drafts


def use_case_of(prompt: object, options: Mapping[str, Any]) -> str:
    """Return what a job that names no use case is taken for; raise `InvalidJob`."""
    return detect_use_case(_build(read_request(None, prompt, options)))


def _build(request: Request) -> JobSpec:
    use_case, prompt = request.use_case, request.prompt
    fields = request.fields
    if use_case is None:
        # Until it is detected, by what the whole request asks for.
        use_case, fields = "general", {**fields, "use_case_detected": True}
    if not isinstance(use_case, str):
        raise InvalidJob("use_case", "must be the name of a use case, such as draft")
    messages: str | list[Any]
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise InvalidJob("prompt", "holds a lone surrogate, which is not text") from None
        messages = prompt
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        messages = [_message(message) for message in prompt]
    else:
        raise InvalidJob("prompt", "must be text or a list of messages")
    return build_spec(use_case, messages, **fields)


def _message(message: object) -> object:
    """Let a message's content be plain text, as both providers do."""
    if isinstance(message, Mapping) and isinstance(message.get("content"), str):
        return {**message, "content": [{"type": "text", "text": message["content"]}]}
    return message


def parse_job_id(job_id: UUID | str) -> UUID:
    """Return the id; raise `InvalidJob` if it is not a UUID."""
    if isinstance(job_id, UUID):
        return job_id
    try:
        return UUID(job_id)
    except (ValueError, AttributeError, TypeError):
        raise InvalidJob(
            "job_id", f"{job_id!r} is not a job's id, which is a UUID such as {new_id()}"
        ) from None


@cache
def _os_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in its user list
        return str(os.getuid())

"""Which provider rows may serve a job, in order. Pure: no server, no clock of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal
from uuid import UUID

from sluicegate.shared.catalogue import Catalogue, Provider, UseCase
from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.jobs import JobSpec
from sluicegate.shared.messages import FilePart, ImagePart, TextPart, ToolCallPart, ToolResultPart
from sluicegate.shared.pricing import estimate_prompt_tokens

#: From here on a prompt is long: some 30 pages. An e-mail thread or an hour's call stays below, and
#: what is above is a pile of documents, in which cheap models lose the thread.
LONG_PROMPT_TOKENS: Final = 16_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a job asks of a model."""

    use_case: str
    capabilities: frozenset[str]
    prompt_tokens: int
    #: The longest answer the caller asked for; None leaves it to the use case.
    max_tokens: int | None
    model: str | None
    #: Models to try after it, in this order.
    fallbacks: tuple[str, ...] = ()


def detect_use_case(spec: JobSpec) -> str:
    """Return the use case of a job whose caller named none, by what it asks for.

    Images and files are `vision`; tools, or a prompt of `LONG_PROMPT_TOKENS`, are `complex`; all
    else is `general`.
    """
    if spec.needs_vision:
        return "vision"
    if spec.tools or needs_of(spec).prompt_tokens >= LONG_PROMPT_TOKENS:
        return "complex"
    return "general"


def detection_said(spec: JobSpec) -> tuple[str, ...]:
    """Say that the use case was detected, for the result; nothing where the caller named it."""
    if not spec.use_case_detected:
        return ()
    return (f"no use case was named, and the job was taken for {spec.use_case}",)


def needs_of(spec: JobSpec) -> Needs:
    """Read a job's needs from its spec."""
    characters = len(spec.system or "")
    attachments = 0
    for message in spec.messages:
        for part in message.content:
            match part:
                case TextPart():
                    characters += len(part.text)
                case ToolResultPart():
                    characters += len(part.content)
                case ToolCallPart():
                    characters += len(str(part.arguments))
                case ImagePart() | FilePart():
                    attachments += 1
    for tool in spec.tools:
        characters += len(tool.description) + len(str(tool.parameters))
    wanted = {
        "vision": spec.needs_vision,
        "tools": bool(spec.tools),
        "json_schema": spec.response_format is not None,
    }
    return Needs(
        use_case=spec.use_case,
        capabilities=frozenset(name for name, wants in wanted.items() if wants),
        prompt_tokens=estimate_prompt_tokens(
            characters=characters, messages=len(spec.messages), attachments=attachments
        ),
        max_tokens=spec.max_tokens,
        model=spec.model,
        fallbacks=spec.fallbacks,
    )


def answer_tokens(needs: Needs, use_case: UseCase, provider: Provider) -> int:
    """Return the `max_tokens` that a call to this provider is made with."""
    return needs.max_tokens or min(use_case.max_tokens, provider.max_tokens)


def route(
    needs: Needs,
    catalogue: Catalogue,
    *,
    account_id: UUID,
    mode: Literal["current", "original"],
    now: datetime,
    first_token_ms: Mapping[UUID, float],
) -> tuple[Provider, ...]:
    """Return the candidates in the order in which they are to be tried, at least one.

    With a `model` they are that and its fallbacks, in their order. With fallbacks alone these come
    after the rows that are meant for the use case, and before those that only stand in.
    A fallback that is not, or no longer, in use is passed over; `check_models` refuses it.

    `mode` is the setting `catalogue`; `first_token_ms` is what is known of each row's latency.
    Raises `InvalidJob` that names the field which rules every row out.
    """
    use_case = catalogue.use_cases.get(needs.use_case)
    if use_case is None:
        raise InvalidJob(
            "use_case", f"{needs.use_case!r} is not known; there are {catalogue.open_use_cases}"
        )
    rows = in_reach(catalogue.providers, account_id, mode, now)
    rows = _serving(rows, needs)
    rows = _able(rows, needs)

    def order(row: Provider) -> tuple[float, ...]:
        preference = 0.0
        if use_case.prefer == "cheapest":
            preference = row.card.reserve_nano_usd(
                needs.prompt_tokens, answer_tokens(needs, use_case, row)
            )
        elif use_case.prefer == "fastest":
            preference = first_token_ms.get(row.id, 0.0)
        return (
            _place(row, needs),
            row.account_id is None,
            mode == "original" and row.catalogue == "current",
            _tier(row, needs.use_case),
            row.priority,
            preference,
        )

    return tuple(sorted(rows, key=lambda row: (*order(row), row.name)))


def in_reach(
    rows: Sequence[Provider], account_id: UUID, mode: str, now: datetime
) -> list[Provider]:
    """Leave the rows of this account and of everybody, without retired and replaced ones."""
    mine = {row.name for row in rows if row.account_id == account_id}
    return [
        row
        for row in rows
        if row.account_id in (account_id, None)
        and not (row.account_id is None and row.name in mine)
        and (row.catalogue != "original" or mode == "original")
        and (row.retires_at is None or row.retires_at > now)
    ]


def _tier(row: Provider, use_case: str) -> int:
    """0: meant for it. 1: stands in for those. 2: takes what nobody claims."""
    if use_case in row.use_case:
        return 0
    return 1 if use_case in row.failover else 2


def check_models(
    needs: Needs,
    catalogue: Catalogue,
    *,
    account_id: UUID,
    mode: Literal["current", "original"],
    now: datetime,
) -> None:
    """Raise `InvalidJob` for a model or a fallback that is not in use here."""
    named = {"model": (needs.model,) if needs.model else (), "fallbacks": needs.fallbacks}
    if not any(named.values()):
        return
    rows = in_reach(catalogue.providers, account_id, mode, now)
    for field, names in named.items():
        for name in names:
            if not any(name in (row.name, row.model) for row in rows):
                raise _not_in_use(field, name, rows)


def _not_in_use(field: str, name: str, rows: Sequence[Provider]) -> InvalidJob:
    known = ", ".join(sorted({row.name for row in rows}))
    return InvalidJob(field, f"{name!r} is not in use here; there are {known}")


def _place(row: Provider, needs: Needs) -> int:
    """Return the place among the models that the caller named; 0 without any."""
    if needs.model is None and (not needs.fallbacks or needs.use_case in row.use_case):
        return 0
    for place, name in enumerate((needs.model, *needs.fallbacks)):
        if name in (row.name, row.model):
            return place
    return len(needs.fallbacks) + 1


def _serving(rows: list[Provider], needs: Needs) -> list[Provider]:
    chosen = {needs.model, *needs.fallbacks} - {None}
    named = [row for row in rows if {row.name, row.model} & chosen]
    if needs.model is not None:
        if not named:
            raise _not_in_use("model", needs.model, rows)
        return named
    serving = [row for row in rows if _tier(row, needs.use_case) < 2]
    serving = serving or [row for row in rows if row.is_default]
    serving += [row for row in named if row not in serving]
    if not serving:
        raise InvalidJob("use_case", f"no active provider serves {needs.use_case!r}")
    return serving


def _able(rows: list[Provider], needs: Needs) -> list[Provider]:
    able = [row for row in rows if needs.capabilities <= row.capabilities]
    if not able:
        wanted = ", ".join(sorted(needs.capabilities))
        raise InvalidJob("messages", f"no provider for {needs.use_case!r} can do {wanted}")
    if needs.max_tokens is not None:
        limit = max(row.max_tokens for row in able)
        able = [row for row in able if needs.max_tokens <= row.max_tokens]
        if not able:
            raise InvalidJob(
                "max_tokens",
                f"{needs.max_tokens} is above the model's limit; 1 to {limit} is allowed",
            )
    room = max(row.context_tokens for row in able)
    able = [row for row in able if needs.prompt_tokens <= row.context_tokens]
    if not able:
        raise InvalidJob(
            "prompt", f"is about {needs.prompt_tokens:,} tokens; the models take up to {room:,}"
        )
    return able

"""What every change of the catalogue goes through: its fields, and what routing would lose.

A change works on a connection whose transaction is the caller's: a refusal raises, and the caller
rolls back. Afterwards `catalogue.announce` tells the processes that run.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, NoReturn, Self
from uuid import UUID

from pydantic import Field, StringConstraints, ValidationError
from sqlalchemy import Connection, func, select

from sluicegate.shared.catalogue import Catalogue, Provider
from sluicegate.shared.errors import InvalidJob, SettingsError, UnknownPrice
from sluicegate.shared.jobs import Lane
from sluicegate.shared.messages import Frozen
from sluicegate.shared.queues import queue_name
from sluicegate.shared.refusals import first_errors
from sluicegate.shared.routing import Needs, route
from sluicegate.shared.tables import jobs

Mode = Literal["current", "original"]

#: What a column of type integer holds, from one.
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
#: Text on one line.
Line = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=1000)]

#: An account that owns nothing: whose routing is that of everybody.
NOBODY: Final = UUID(int=0)

#: States of jobs that have a call before them.
WAITING: Final = ("queued", "parked")


class BadField(SettingsError):
    """A field has a value that it cannot have."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


def refuse(field: str, problem: str) -> NoReturn:
    """Raise the SettingsError that names this field."""
    raise BadField(field, problem)


class Change(Frozen):
    """Some fields of a row. What is not given stays as it is; None empties a field."""

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Check the fields one by one; raise SettingsError that names the first bad one."""
        try:
            return cls(**given)
        except ValidationError as error:
            (first,) = first_errors(error, 1)
            problem = first["msg"].removeprefix("Value error, ")
            if first["type"] == "string_pattern_mismatch":
                problem = "must be text on one line"
            refuse(str(first["loc"][0]), problem[0].lower() + problem[1:])

    def values(self) -> dict[str, Any]:
        """Return what is given, by column."""
        return {name: getattr(self, name) for name in self.model_fields_set}


def serving(
    catalogue: Catalogue,
    use_case: str,
    *,
    account_id: UUID,
    mode: Mode,
    now: datetime | None = None,
) -> tuple[Provider, ...]:
    """Return the rows that a small job of this use case tries, in order; raises as `route`.

    `mode` is the setting `catalogue`; `now` the moment, the present one if not given.
    """
    needs = Needs(
        use_case=use_case,
        capabilities=frozenset(),
        prompt_tokens=100,
        max_tokens=None,
        model=None,
    )
    return route(
        needs,
        catalogue,
        account_id=account_id,
        mode=mode,
        now=now or datetime.now(UTC),
        first_token_ms={},
    )


def check_served(
    connection: Connection,
    before: Catalogue,
    after: Catalogue,
    *,
    account_id: UUID | None,
    mode: Mode,
) -> None:
    """Raise SettingsError if a use case, or jobs that wait, have lost their last provider."""
    had = _pools(before, account_id or NOBODY, mode)
    have = _pools(after, account_id or NOBODY, mode)
    bare = sorted(name for name in had if name not in have and after.use_cases[name].is_active)
    if bare:
        raise SettingsError(
            f"no provider would be left for {', '.join(bare)}; "
            "give it another one first, or use --force"
        )
    lost = [
        queue
        for name, pools in had.items()
        for queue in queues_of(name, pools - have.get(name, set()))
    ]
    waiting = connection.execute(
        select(jobs.c.queue, func.count())
        .where(jobs.c.queue.in_(lost), jobs.c.state.in_(WAITING))
        .group_by(jobs.c.queue)
        .order_by(jobs.c.queue)
    ).all()
    if waiting:
        listed = ", ".join(f"{count} in {queue}" for queue, count in waiting)
        raise SettingsError(
            f"jobs that wait would fail, as no other provider of their pool serves them: {listed}; "
            "wait until they are done, or use --force"
        )


def queues_of(use_case: str, pools: Collection[str]) -> list[str]:
    """Return the names of a use case's queues at these pools."""
    return [queue_name(use_case, pool, lane) for pool in pools for lane in Lane]


def _pools(catalogue: Catalogue, account_id: UUID, mode: Mode) -> dict[str, set[str]]:
    """Return which pools serve each use case that is served."""
    found: dict[str, set[str]] = {}
    for name in catalogue.use_cases:
        try:
            rows = serving(catalogue, name, account_id=account_id, mode=mode)
        except (InvalidJob, UnknownPrice):
            continue
        found[name] = {row.provider for row in rows}
    return found

"""Lists of jobs, newest first, by what an operator knows of them. No I/O here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, TypedDict
from uuid import UUID

from pydantic import AwareDatetime, BeforeValidator, Field, StringConstraints, ValidationError
from sqlalchemy import Row

from sluicegate.shared.bodies import Bodies
from sluicegate.shared.errors import ErrorClass, InvalidJob
from sluicegate.shared.ids import first_id
from sluicegate.shared.jobs import Lane, State, dollars
from sluicegate.shared.messages import Frozen
from sluicegate.shared.refusals import refusal

#: Jobs that one list may hold.
MAX_LISTED: Final = 10_000

#: A submitter's clock, which ids are made by, may be off from Postgres' by so much.
_CLOCKS_DIFFER = timedelta(hours=1)

_AGE = re.compile(r"(\d{1,9})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class JobFilters(TypedDict, total=False):
    """Which jobs `list_jobs` returns: those that meet all that is given.

    state: one or several. account: name or id. batch: its id. since: submitted at most so long
    ago, or after that moment. submitted_by: as the submit named him. limit: the newest so many, 50
    if not given.
    """

    state: State | str | Iterable[State | str] | None
    use_case: str | None
    account: str | UUID | None
    lane: Lane | Literal["interactive", "bulk"] | None
    queue: str | None
    batch: UUID | str | None
    since: timedelta | datetime | None
    submitted_by: str | None
    limit: int


def _states(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, Iterable) else value


def _moment(value: object) -> object:
    if not isinstance(value, timedelta):
        return value
    try:
        return datetime.now(UTC) - value
    except OverflowError:
        raise ValueError("is before all time") from None


_Name = Annotated[str, StringConstraints(max_length=255, pattern=r"^[^\x00]*$")]


class _Filters(Frozen):
    state: Annotated[tuple[State, ...], BeforeValidator(_states)] | None = None
    use_case: _Name | None = None
    account: Annotated[_Name, BeforeValidator(str)] | None = None
    lane: Lane | None = None
    queue: _Name | None = None
    batch: UUID | None = None
    since: Annotated[AwareDatetime, BeforeValidator(_moment)] | None = None
    submitted_by: _Name | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_LISTED)] = 50


class JobSummary(Frozen):
    """A job in a list; `get` tells more."""

    id: UUID
    state: State
    use_case: str
    lane: Lane
    queue: str
    #: The account's name.
    account: str
    batch_id: UUID | None
    attempts: int
    max_attempts: int
    cost_nano_usd: int
    created_at: datetime
    #: Not started before.
    run_at: datetime
    deadline_at: datetime
    finished_at: datetime | None
    #: Why it ended without an answer.
    error_class: ErrorClass | None
    error: str | None

    @property
    def cost(self) -> Decimal:
        """What its calls have cost so far, in US dollars, exact."""
        return dollars(self.cost_nano_usd)


#: The id of an account, active or not, by what a caller calls it.
ACCOUNT_QUERY: Final = """
SELECT id FROM accounts WHERE name = %(account)s OR id::text = lower(%(account)s)
ORDER BY name = %(account)s
"""

# Jobs are found first and dressed up afterwards. The id is made of the time, so the primary key
# serves `since` and the order; what it finds is then judged by Postgres' own clock.
_LIST = """
SELECT j.id, j.state, j.use_case, j.lane, j.queue, a.name AS account, j.batch_id,
       j.attempts_used AS attempts, j.max_attempts, j.cost_nano_usd, j.created_at, j.run_at,
       j.deadline_at, j.finished_at, r.body->'error'->>'error_class' AS error_class,
       r.body->'error'->>'message' AS error, r.body->>'sealed' AS sealed
FROM (SELECT * FROM jobs WHERE {conditions} ORDER BY id DESC LIMIT %(limit)s) j
JOIN accounts a ON a.id = j.account_id
LEFT JOIN results r ON r.job_id = j.id AND j.state <> 'succeeded'
ORDER BY j.id DESC
"""

_CONDITIONS = {
    "state": "state = ANY(%(state)s)",
    "use_case": "use_case = %(use_case)s",
    "account_id": "account_id = %(account_id)s",
    "lane": "lane = %(lane)s",
    "queue": "queue = %(queue)s",
    "batch": "batch_id = %(batch)s",
    "submitted_by": "submitted_by = %(submitted_by)s",
    "since": "id >= %(first_id)s AND created_at >= %(since)s",
}


class JobList:
    """One question for a list: its statement, by its filters."""

    def __init__(self, filters: Mapping[str, Any]) -> None:
        given = {name: value for name, value in filters.items() if value is not None}
        unknown = given.keys() - _Filters.model_fields.keys()
        if unknown:
            known = ", ".join(_Filters.model_fields)
            raise InvalidJob(min(unknown), f"is not a filter of jobs; there are {known}")
        try:
            self._filters = _Filters(**given)
        except ValidationError as error:
            refused = refusal(error)
            raise InvalidJob(refused.field.partition(".")[0], refused.problem) from None

    @property
    def account(self) -> str | None:
        """The account to be found by `ACCOUNT_QUERY` first."""
        return self._filters.account

    def parameters(self) -> dict[str, str]:
        """Return the filters as parameters of an address; `read_parameters` reads them again."""
        given = self._filters.model_dump(mode="json", exclude_none=True, exclude_unset=True)
        return {
            name: ",".join(value) if isinstance(value, list) else str(value)
            for name, value in given.items()
        }

    def statement(self, accounts: Iterable[Row[Any]] = ()) -> tuple[str, dict[str, Any]]:
        """Return the statement and its parameters; raise `InvalidJob` if the account is not there.

        `accounts` are the rows of `ACCOUNT_QUERY`.
        """
        filters = self._filters
        values: dict[str, Any] = {
            name: value
            for name, value in filters
            if value is not None and name not in ("account", "state")
        }
        if filters.account is not None:
            ids = [row.id for row in accounts]
            if not ids:
                raise InvalidJob("account", f"there is no account {filters.account!r}")
            values["account_id"] = ids[0]
        if filters.state is not None:
            values["state"] = [state.value for state in filters.state]
        conditions = [sql for name, sql in _CONDITIONS.items() if name in values]
        if filters.since is not None:
            earliest = datetime.min.replace(tzinfo=UTC) + _CLOCKS_DIFFER
            values["first_id"] = first_id(max(filters.since, earliest) - _CLOCKS_DIFFER)
        return _LIST.format(conditions=" AND ".join(conditions) or "true"), values


def read_parameters(parameters: Mapping[str, str]) -> dict[str, Any]:
    """Return the filters that parameters of an address name, unchecked."""
    filters: dict[str, Any] = dict(parameters)
    if "state" in filters:
        filters["state"] = filters["state"].split(",")
    return filters


def load_summary(row: Row[Any], bodies: Bodies) -> JobSummary:
    """Build a summary from a row of the list."""
    values = dict(row._mapping)
    values["error"] = bodies.open_error(row.error, values.pop("sealed"))
    return JobSummary.model_validate(values)


def read_since(text: str) -> timedelta | datetime:
    """Read an age such as 30s, 15m, 1h or 2d, or a moment; raise `InvalidJob`."""
    if match := _AGE.fullmatch(text.strip()):
        return timedelta(**{_UNITS[match[2]]: int(match[1])})
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidJob(
            "since", f"{text!r} is neither an age, such as 30s, 15m, 1h or 2d, nor a time"
        ) from None
    if moment.tzinfo is None:
        raise InvalidJob("since", f"{text!r} has no time zone; add one, such as Z or +01:00")
    return moment

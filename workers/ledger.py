"""The ledger's SQL: what budgets have room for, and what they are charged.

Parts of the statements that dispatch, settle and resolve attempts. Each locks the budgets after
the attempts, by key, and decides on the rows as they are then; both windows of a budget stand in
one row, so `spent + held <= limit` is decided in one place. An attempt belongs to the windows that
it was dispatched in, whenever it ends. Accounts without budgets have no rows here and cost nothing.

A budget that begins counts what is booked and held already, under a lock that keeps all of these
statements out (`shared/budgets.py`): none of them sees only a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Self

from sluicegate.shared.budgets import REACHED, WINDOWS, WindowName, dollars, name_budget

#: A budget as the copy in Redis has it; see `shared/admission/budget_copies.py`.
Copy = Mapping[str, Any]

#: What is told of budgets that have changed.
Told = Callable[[Sequence[Copy]], None]

#: Of a row `b` of `budgets`, for the copy.
COPY: Final = """json_build_object(
    'id', b.id, 'account_id', b.account_id, 'use_case', b.use_case, 'version', b.version,
    'day_limit', b.day_limit_nano_usd, 'day_spent', b.day_spent_nano_usd,
    'day_held', b.day_held_nano_usd,
    'day_resets_us', (extract(epoch FROM b.day_resets_at) * 1000000)::bigint,
    'month_limit', b.month_limit_nano_usd, 'month_spent', b.month_spent_nano_usd,
    'month_held', b.month_held_nano_usd,
    'month_resets_us', (extract(epoch FROM b.month_resets_at) * 1000000)::bigint)"""

#: The budgets that rows of {source} (account_id, use_case) come under, with a {lock}. Counting
#: makes sure that all of them are there, and their own locks taken, before the first one here.
_BUDGET = """budget AS (
    SELECT b.*
    FROM (SELECT DISTINCT account_id FROM {source}) whose
    JOIN budgets b ON b.account_id = whose.account_id
    WHERE (b.use_case IS NULL OR b.use_case = ANY(ARRAY(SELECT use_case FROM {source})))
      AND (SELECT count(*) FROM {source}) >= 0
    ORDER BY b.id
    {lock}
)"""
_LOCKED: Final = "FOR NO KEY UPDATE OF b"

#: Whether budget `b` is one of those that row `s` comes under.
_APPLIES = "s.account_id = b.account_id AND (b.use_case IS NULL OR b.use_case = s.use_case)"

#: Which rows of `held` (n, account_id, use_case, reserved_nano_usd) would not fit alone, with a
#: {lock} on their budgets.
_ALONE = f"""{_BUDGET.format(source="held", lock="{lock}")}, {WINDOWS}, applies AS (
    SELECT s.n, s.reserved_nano_usd AS cost, b.*
    FROM held s JOIN windows b ON {_APPLIES}
), alone AS (
    SELECT n, coalesce(bool_or(spent + held + cost > cap), false) AS is_full
    FROM applies GROUP BY n
)"""

#: Those that do not fit, alone or together, in `full_`. Who would not fit alone takes no room from
#: the others.
ROOM: Final = f"""{_ALONE.format(lock=_LOCKED)}, together AS (
    SELECT a.n, a.spent + a.held
        + sum(a.cost) OVER (PARTITION BY a.id, a.name ORDER BY a.n) > a.cap AS is_full
    FROM applies a JOIN alone USING (n) WHERE NOT alone.is_full
), full_ AS (
    SELECT n FROM alone WHERE is_full UNION SELECT n FROM together WHERE is_full
)"""

#: The same question without a lock, each row by itself.
LOOK: Final = f"""{_ALONE.format(lock="")}, full_ AS (
    SELECT n FROM alone WHERE is_full
)"""

#: Holds what {source} (account_id, use_case, reserved_nano_usd) reserves, in budgets whose windows
#: have turned where they were over.
HOLD: Final = f"""taken AS (
    SELECT b.id, sum(s.reserved_nano_usd)::bigint AS amount
    FROM {{source}} s JOIN budget b ON {_APPLIES}
    GROUP BY b.id
), after AS (
    UPDATE budgets b
    SET day_started_at = day.started_at, day_resets_at = day.resets_at,
        day_spent_nano_usd = day.spent, day_held_nano_usd = day.held + taken.amount,
        month_started_at = month.started_at, month_resets_at = month.resets_at,
        month_spent_nano_usd = month.spent, month_held_nano_usd = month.held + taken.amount,
        version = b.version + 1
    FROM taken
    JOIN windows day ON day.id = taken.id AND day.name = 'day'
    JOIN windows month ON month.id = taken.id AND month.name = 'month'
    WHERE b.id = taken.id
    RETURNING b.*
)"""

#: What a refused row is told: the window that keeps it out longest.
FULL: Final = """
    SELECT DISTINCT ON (a.n) a.n, json_build_object(
        'window', a.name, 'use_case', a.use_case, 'limit_nano_usd', a.cap,
        'spent_nano_usd', a.spent, 'held_nano_usd', a.held, 'reserve_nano_usd', a.cost,
        'resets_at', a.resets_at AT TIME ZONE a.time_zone, 'time_zone', a.time_zone,
        'resets_in_s', extract(epoch FROM a.resets_at - now())::float8,
        'by_spend', a.spent + a.cost > a.cap) AS problem
    FROM applies a JOIN full_ USING (n)
    WHERE a.cap IS NOT NULL
    ORDER BY a.n, a.spent + a.cost > a.cap DESC, a.spent + a.held + a.cost > a.cap DESC,
             a.resets_at DESC"""

#: Charges budgets for {source} (account_id, use_case, dispatched_at, released, spent): reservations
#: that ended and amounts that were booked. Whoever crosses a threshold says so, once a window.
CHARGE: Final = f"""{_BUDGET.format(source="{source}", lock=_LOCKED)}, due AS (
    SELECT b.id,
           coalesce(sum(s.released) FILTER (WHERE s.dispatched_at >= b.day_started_at), 0)::bigint
               AS day_released,
           coalesce(sum(s.spent) FILTER (WHERE s.dispatched_at >= b.day_started_at), 0)::bigint
               AS day_spent,
           coalesce(sum(s.released) FILTER (WHERE s.dispatched_at >= b.month_started_at), 0)::bigint
               AS month_released,
           coalesce(sum(s.spent) FILTER (WHERE s.dispatched_at >= b.month_started_at), 0)::bigint
               AS month_spent
    FROM budget b JOIN {{source}} s ON {_APPLIES}
    GROUP BY b.id
), after AS (
    UPDATE budgets b
    SET day_held_nano_usd = b.day_held_nano_usd - due.day_released,
        day_spent_nano_usd = b.day_spent_nano_usd + due.day_spent,
        month_held_nano_usd = b.month_held_nano_usd - due.month_released,
        month_spent_nano_usd = b.month_spent_nano_usd + due.month_spent,
        version = b.version + 1
    FROM due WHERE b.id = due.id
    RETURNING b.*
), reached AS ({REACHED}
)"""


def tell(rows: Sequence[Any], told: Told) -> None:
    """Have `told` hear of the budgets that are among the rows of a statement."""
    if copies := [row.budget for row in rows if row.budget is not None]:
        told(copies)


@dataclass(frozen=True, slots=True, kw_only=True)
class Full:
    """A budget has no room for a call."""

    window: WindowName
    #: Null: the account's budget for all use cases.
    use_case: str | None
    limit_nano_usd: int
    spent_nano_usd: int
    held_nano_usd: int
    #: What the call may cost at most.
    reserve_nano_usd: int
    #: On the account's clock.
    resets_at: datetime
    resets_in_s: float
    time_zone: str
    #: By what is spent: nothing but the next window helps. Else calls that are under way hold it.
    by_spend: bool

    @classmethod
    def read(cls, problem: Mapping[str, Any]) -> Self:
        """Read what `FULL` says."""
        return cls(**dict(problem) | {"resets_at": datetime.fromisoformat(problem["resets_at"])})

    def __str__(self) -> str:
        """Say it to whoever waits for the job."""
        budget = name_budget(self.use_case, self.window)
        return (
            f"the account's {budget} of {dollars(self.limit_nano_usd)} is full: "
            f"{dollars(self.spent_nano_usd)} is spent, {dollars(self.held_nano_usd)} is held by "
            f"calls under way, and this one may cost {dollars(self.reserve_nano_usd)}; it resets "
            f"at {self.resets_at:%Y-%m-%d %H:%M} ({self.time_zone})"
        )

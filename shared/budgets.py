"""Budgets: what an account may spend in a day and a month, in all or for one use case.

Amounts are nano-USD. Workers reserve and charge (`workers/ledger.py`); here budgets are set,
cleared and read. A change works on a connection whose transaction is the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import UUID

from sqlalchemy import Connection, func, select, text
from sqlalchemy.exc import OperationalError

from sluicegate.shared import jobs
from sluicegate.shared.database import sqlstate
from sluicegate.shared.errors import InvalidJob, NotFound, QueueUnavailable
from sluicegate.shared.gate_changes import check_use_case, record_change
from sluicegate.shared.ids import new_id
from sluicegate.shared.pricing import MAX_NANO_USD

if TYPE_CHECKING:
    from sluicegate.shared.accounts import Account

WindowName = Literal["day", "month"]
WINDOW_NAMES: Final[tuple[WindowName, ...]] = ("day", "month")
WINDOW_WORDS: Final[Mapping[WindowName, str]] = {"day": "daily", "month": "monthly"}
DEFAULT_THRESHOLDS: Final = (80, 100)

#: The Postgres channel on which a change of a budget is told: it wakes the sweep, which sets the
#: copies in Redis.
BUDGET_CHANNEL: Final = "sluice_budgets"

_NANO: Final = 1_000_000_000
_MOST_THRESHOLDS: Final = 10
#: What Postgres says where a lock was not to be had in time.
_LOCK_NOT_AVAILABLE: Final = "55P03"
_CANCELED: Final = "57014"
#: Of an account's last entries, those that say what a job of each use case costs.
_RECENT_ENTRIES: Final = 5000

#: Both windows of each row of `budget` as they are now: one that is over has begun anew, with
#: nothing in it. All budgets of an account go by one moment: a statement that began before midnight
#: and finds one of them turned by another statement is in the new window with all of them.
WINDOWS: Final = """moment AS MATERIALIZED (
    SELECT account_id, greatest(now(), max(day_started_at), max(month_started_at)) AS at
    FROM budget GROUP BY account_id
), windows AS (
    SELECT b.id, b.account_id, b.use_case, b.time_zone, w.name, w.cap,
           CASE WHEN w.is_over THEN date_trunc(w.name, moment.at, b.time_zone)
                ELSE w.started_at END AS started_at,
           CASE WHEN w.is_over
                THEN (date_trunc(w.name, moment.at AT TIME ZONE b.time_zone) + w.length)
                     AT TIME ZONE b.time_zone
                ELSE w.resets_at END AS resets_at,
           CASE WHEN w.is_over THEN 0 ELSE w.spent END AS spent,
           CASE WHEN w.is_over THEN 0 ELSE w.held END AS held
    FROM budget b JOIN moment USING (account_id) CROSS JOIN LATERAL (VALUES
        ('day', interval '1 day', b.day_limit_nano_usd, moment.at >= b.day_resets_at,
         b.day_started_at, b.day_resets_at, b.day_spent_nano_usd, b.day_held_nano_usd),
        ('month', interval '1 month', b.month_limit_nano_usd, moment.at >= b.month_resets_at,
         b.month_started_at, b.month_resets_at, b.month_spent_nano_usd, b.month_held_nano_usd)
    ) AS w(name, length, cap, is_over, started_at, resets_at, spent, held)
)"""

_SPENT = """
        ('{window}', '{word}', after.{window}_started_at, after.{window}_spent_nano_usd,
         after.{window}_limit_nano_usd,
         (after.{window}_spent_nano_usd - due.{window}_spent) * 100
             < after.{window}_limit_nano_usd * percent
         AND after.{window}_spent_nano_usd * 100 >= after.{window}_limit_nano_usd * percent)"""

#: Raises the alerts for thresholds that rows of `after` have reached by `due` (id, day_spent,
#: month_spent); at most one for each account, window and threshold.
REACHED: Final = f"""
    INSERT INTO alerts (kind, account_id, use_case, "window", window_started_at, threshold, message)
    SELECT 'budget', after.account_id, after.use_case, w.name, w.started_at, percent,
           concat(a.name, ' has spent ', percent, ' percent of its ', w.word, ' budget',
                  ' for ' || after.use_case, ': $', trim_scale(w.spent / 1000000000.0), ' of $',
                  trim_scale(w.cap / 1000000000.0))
    FROM after JOIN due USING (id) JOIN accounts a ON a.id = after.account_id
    CROSS JOIN unnest(after.thresholds) AS percent
    CROSS JOIN LATERAL (VALUES {
    ",".join(_SPENT.format(window=window, word=word) for window, word in WINDOW_WORDS.items())
}
    ) AS w(name, word, started_at, spent, cap, is_crossed)
    WHERE w.is_crossed
    ORDER BY after.id, w.name, percent
    ON CONFLICT (account_id, use_case, "window", window_started_at, threshold)
        WHERE "window" IS NOT NULL DO NOTHING"""

# What a budget that begins now has spent and holds, by window.
_COUNTED = text("""
SELECT w.name, w.started_at,
       (date_trunc(w.name, CAST(:at AS timestamptz) AT TIME ZONE :time_zone) + w.length)
           AT TIME ZONE :time_zone
           AS resets_at,
       (SELECT coalesce(sum(e.amount_nano_usd), 0)::bigint FROM cost_entries e
        WHERE e.account_id = :account_id AND e.dispatched_at >= w.started_at
          AND (CAST(:use_case AS text) IS NULL OR e.use_case = :use_case)) AS spent,
       (SELECT coalesce(sum(a.reserved_nano_usd), 0)::bigint FROM attempts a
        WHERE a.account_id = :account_id AND a.state = 'dispatching'
          AND a.dispatched_at >= w.started_at
          AND (CAST(:use_case AS text) IS NULL OR a.use_case = :use_case)) AS held
FROM (SELECT name, length, date_trunc(name, CAST(:at AS timestamptz), :time_zone) AS started_at
      FROM (VALUES ('day', interval '1 day'), ('month', interval '1 month')) v(name, length)) w
""")

_OF = """b.account_id = :account_id
    AND b.use_case IS NOT DISTINCT FROM CAST(:use_case AS text)"""

_ZONE = text("SELECT time_zone FROM accounts WHERE id = :account_id")
_FIND = text(f"SELECT b.* FROM budgets b WHERE {_OF} FOR UPDATE")
_DELETE = text(f"DELETE FROM budgets b WHERE {_OF} RETURNING b.id")
_INSERT = text("""
INSERT INTO budgets (id, account_id, use_case, time_zone, thresholds, day_limit_nano_usd,
                     month_limit_nano_usd, day_started_at, day_resets_at, day_spent_nano_usd,
                     day_held_nano_usd, month_started_at, month_resets_at, month_spent_nano_usd,
                     month_held_nano_usd)
VALUES (:id, :account_id, :use_case, :time_zone, :thresholds, :day_limit, :month_limit,
        :day_started_at, :day_resets_at, :day_spent, :day_held, :month_started_at,
        :month_resets_at, :month_spent, :month_held)
""")
_CHANGE = text("""
UPDATE budgets SET day_limit_nano_usd = :day_limit, month_limit_nano_usd = :month_limit,
                   thresholds = :thresholds, version = version + 1
WHERE id = :id
""")
_RECOUNT = text("""
UPDATE budgets SET time_zone = :time_zone, version = version + 1,
    day_started_at = :day_started_at, day_resets_at = :day_resets_at,
    day_spent_nano_usd = :day_spent, day_held_nano_usd = :day_held,
    month_started_at = :month_started_at, month_resets_at = :month_resets_at,
    month_spent_nano_usd = :month_spent, month_held_nano_usd = :month_held
WHERE id = :id
""")
_RAISE = text(f"""
WITH after AS (
    SELECT id, account_id, use_case, thresholds,
           day_started_at, day_spent_nano_usd,
           CASE WHEN now() < day_resets_at THEN day_limit_nano_usd END AS day_limit_nano_usd,
           month_started_at, month_spent_nano_usd,
           CASE WHEN now() < month_resets_at THEN month_limit_nano_usd END AS month_limit_nano_usd
    FROM budgets WHERE id = :id
), due AS (
    SELECT id, day_spent_nano_usd AS day_spent, month_spent_nano_usd AS month_spent FROM after
) {REACHED}
""")
_LIST = text(f"""
WITH budget AS (
    SELECT b.* FROM budgets b
    WHERE CAST(:account_id AS uuid) IS NULL OR b.account_id = :account_id
), {WINDOWS}
SELECT b.id, b.account_id, a.name AS account, b.use_case, b.time_zone, b.thresholds,
       day.cap AS day_cap, day.spent AS day_spent, day.held AS day_held,
       day.started_at AS day_started_at, day.resets_at AS day_resets_at,
       month.cap AS month_cap, month.spent AS month_spent, month.held AS month_held,
       month.started_at AS month_started_at, month.resets_at AS month_resets_at
FROM budget b JOIN accounts a ON a.id = b.account_id
JOIN windows day ON day.id = b.id AND day.name = 'day'
JOIN windows month ON month.id = b.id AND month.name = 'month'
ORDER BY a.name, b.use_case NULLS FIRST
""")
_TYPICAL = text("""
SELECT use_case, (sum(amount_nano_usd) / count(DISTINCT job_id))::bigint AS cost
FROM (SELECT use_case, amount_nano_usd, job_id FROM cost_entries
      WHERE account_id = :account_id ORDER BY dispatched_at DESC LIMIT :recent) e
GROUP BY use_case ORDER BY use_case
""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A budget's day or month, as it is now."""

    #: None: this window has no limit.
    limit_nano_usd: int | None
    spent_nano_usd: int
    #: Reserved by calls whose outcome is open.
    held_nano_usd: int
    started_at: datetime
    resets_at: datetime

    @property
    def left_nano_usd(self) -> int | None:
        """What may still be reserved; None without a limit."""
        if self.limit_nano_usd is None:
            return None
        return max(0, self.limit_nano_usd - self.spent_nano_usd - self.held_nano_usd)

    @property
    def limit(self) -> Decimal | None:
        """In US dollars, exact; None: this window has no limit."""
        return None if self.limit_nano_usd is None else jobs.dollars(self.limit_nano_usd)

    @property
    def spent(self) -> Decimal:
        """In US dollars, exact."""
        return jobs.dollars(self.spent_nano_usd)

    @property
    def held(self) -> Decimal:
        """In US dollars, exact."""
        return jobs.dollars(self.held_nano_usd)

    @property
    def left(self) -> Decimal | None:
        """What may still be reserved, in US dollars, exact; None without a limit."""
        left = self.left_nano_usd
        return None if left is None else jobs.dollars(left)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What an account may spend."""

    id: UUID
    account_id: UUID
    account: str
    #: None: all of them together.
    use_case: str | None
    time_zone: str
    #: Percents of a limit at which an alert is raised.
    thresholds: tuple[int, ...]
    day: Window
    month: Window

    @property
    def left_nano_usd(self) -> int:
        """What may still be reserved in both windows."""
        lefts = (self.day.left_nano_usd, self.month.left_nano_usd)
        return min(left for left in lefts if left is not None)

    @property
    def left(self) -> Decimal:
        """What may still be reserved in both windows, in US dollars, exact."""
        return jobs.dollars(self.left_nano_usd)


def dollars(nano_usd: int) -> str:
    """Write an amount exactly, with cents at least."""
    whole, nano = divmod(abs(nano_usd), _NANO)
    decimals = f"{nano:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nano_usd < 0 else ''}${whole:,}.{decimals}"


def name_budget(use_case: str | None, window: WindowName | None = None) -> str:
    """Say which budget: "budget", "budget for voice", and of a window "daily budget for voice"."""
    word = "" if window is None else f"{WINDOW_WORDS[window]} "
    return f"{word}budget{f' for {use_case}' if use_case else ''}"


def read_dollars(field: str, amount: str | int | float | Decimal) -> int:
    """Return an amount of dollars in nano-USD; raise `InvalidJob` that names the field."""
    try:
        nano = Decimal(str(amount).strip().removeprefix("$").replace("_", "")) * _NANO
    except ArithmeticError:
        raise InvalidJob(field, f"{amount!r} is not an amount of dollars such as 25.50") from None
    if not nano.is_finite() or not 0 <= nano <= MAX_NANO_USD:
        raise InvalidJob(field, f"must be from $0 to {dollars(MAX_NANO_USD)}")
    if nano != int(nano):
        raise InvalidJob(field, "has more than nine decimals")
    return int(nano)


def check_thresholds(thresholds: Sequence[int]) -> tuple[int, ...]:
    """Return the percents in order; raise `InvalidJob` if they cannot be thresholds."""
    found: set[Any] = set(thresholds)
    if len(found) > _MOST_THRESHOLDS or not all(
        isinstance(percent, int) and 1 <= percent <= 1000 for percent in found
    ):
        raise InvalidJob("thresholds", "must be up to ten whole percents from 1 to 1000")
    return tuple(sorted(found))


def set_budget(
    connection: Connection,
    account: Account,
    *,
    use_case: str | None = None,
    limits: Mapping[WindowName, int | None],
    thresholds: Sequence[int] | None = None,
) -> Budget:
    """Set the limits that are given (None: no limit) and keep the others; return the budget.

    What was spent and is held since its windows began counts. Raises `NotFound` for a use
    case that there is not, and `InvalidJob` if neither window would have a limit.
    """
    if use_case is not None:
        check_use_case(connection, use_case)
    key = {"account_id": account.id, "use_case": use_case}
    found = connection.execute(_FIND, key).one_or_none()
    if found is None:
        # What is under way must not fall between what is counted now and what is charged later.
        at = _lock_ledger(connection)
        found = connection.execute(_FIND, key).one_or_none()
    before = {} if found is None else _limits_of(found)
    after = {name: limits.get(name, before.get(name)) for name in WINDOW_NAMES}
    if all(limit is None for limit in after.values()):
        raise InvalidJob("limit", "a budget needs a daily or a monthly limit; clear it otherwise")
    checked = None if thresholds is None else check_thresholds(thresholds)
    values: dict[str, Any] = {"day_limit": after["day"], "month_limit": after["month"]}
    if found is None:
        # As it is now: another one takes the same lock before it looks for budgets.
        time_zone = connection.scalar(_ZONE, key) or account.time_zone
        values |= key | {"id": new_id(), "time_zone": time_zone}
        values["thresholds"] = list(DEFAULT_THRESHOLDS if checked is None else checked)
        connection.execute(_INSERT, values | _counted(connection, values | {"at": at}))
    else:
        values |= {"id": found.id}
        values["thresholds"] = list(found.thresholds if checked is None else checked)
        connection.execute(_CHANGE, values)
    connection.execute(_RAISE, {"id": values["id"]})
    _record(connection, account.id, use_case, _words(before), _words(after))
    (budget,) = [one for one in list_budgets(connection, account.id) if one.id == values["id"]]
    return budget


def clear_budget(connection: Connection, account: Account, *, use_case: str | None = None) -> None:
    """Take a budget away; raise `NotFound` if there is none.

    Not in one transaction with `set_budget`, which locks in another order.
    """
    key = {"account_id": account.id, "use_case": use_case}
    found = connection.execute(_FIND, key).one_or_none()
    if found is None:
        raise NotFound(f"account {account.name} has no {name_budget(use_case)}")
    connection.execute(_DELETE, key)
    _record(connection, account.id, use_case, _words(_limits_of(found)), _words({}))


def recount_budgets(connection: Connection, account_id: UUID, time_zone: str) -> None:
    """Have an account's budgets go by the days and months of another time zone."""
    at = _lock_ledger(connection)
    budgets = connection.execute(
        text(
            "SELECT id, use_case, time_zone FROM budgets WHERE account_id = :account_id ORDER BY id"
        ),
        {"account_id": account_id},
    ).all()
    for budget in budgets:
        values = {
            "id": budget.id,
            "account_id": account_id,
            "use_case": budget.use_case,
            "time_zone": time_zone,
            "at": at,
        }
        connection.execute(_RECOUNT, values | _counted(connection, values))
        connection.execute(_RAISE, {"id": budget.id})
    if budgets:
        # Whoever waits for the old windows to reset looks again.
        _record(connection, account_id, None, budgets[0].time_zone, time_zone)


def list_budgets(connection: Connection, account_id: UUID | None = None) -> list[Budget]:
    """Return the budgets of an account, or of all, that of all use cases first."""
    return [
        Budget(
            id=row.id,
            account_id=row.account_id,
            account=row.account,
            use_case=row.use_case,
            time_zone=row.time_zone,
            thresholds=tuple(row.thresholds),
            day=_window(row, "day"),
            month=_window(row, "month"),
        )
        for row in connection.execute(_LIST, {"account_id": account_id})
    ]


def typical_costs(connection: Connection, account_id: UUID) -> dict[str, int]:
    """Return what a job of each use case has cost on average lately, in nano-USD."""
    rows = connection.execute(_TYPICAL, {"account_id": account_id, "recent": _RECENT_ENTRIES})
    return {row.use_case: row.cost for row in rows if row.cost > 0}


def _lock_ledger(connection: Connection) -> datetime:
    """Keep out whoever writes the ledger until the transaction ends; return the time after that."""
    # Whoever dispatches, settles or resolves writes attempts, and decides by what it sees after it
    # has this table's lock.
    connection.execute(text("SET LOCAL lock_timeout = '2s'"))
    try:
        connection.execute(text("LOCK TABLE attempts IN SHARE ROW EXCLUSIVE MODE"))
    except OperationalError as error:
        if sqlstate(error) != _LOCK_NOT_AVAILABLE:
            raise
        raise QueueUnavailable("the ledger is busy, so nothing was changed; try again") from error
    connection.execute(text("SET LOCAL lock_timeout = 0"))
    # Not now(): the transaction may have begun before midnight, and others since have dispatched.
    at: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    return at


def _counted(connection: Connection, values: Mapping[str, Any]) -> dict[str, Any]:
    whose = {name: values[name] for name in ("account_id", "use_case", "time_zone", "at")}
    try:
        rows = connection.execute(_COUNTED, whose).all()
    except OperationalError as error:
        if sqlstate(error) != _CANCELED:
            raise
        # Not to be tried again by itself: the fleet waits meanwhile.
        raise QueueUnavailable(
            "counting what the account has spent this month took too long, so nothing was changed; "
            "try again with a longer SLUICE_COMMAND_TIMEOUT_S"
        ) from error
    return {
        f"{row.name}_{name}": getattr(row, name)
        for row in rows
        for name in ("started_at", "resets_at", "spent", "held")
    }


def _limits_of(row: Any) -> dict[WindowName, int | None]:
    return {"day": row.day_limit_nano_usd, "month": row.month_limit_nano_usd}


def _window(row: Any, name: WindowName) -> Window:
    return Window(
        limit_nano_usd=getattr(row, f"{name}_cap"),
        spent_nano_usd=getattr(row, f"{name}_spent"),
        held_nano_usd=getattr(row, f"{name}_held"),
        started_at=getattr(row, f"{name}_started_at"),
        resets_at=getattr(row, f"{name}_resets_at"),
    )


def _record(
    connection: Connection, account_id: UUID, use_case: str | None, before: str, after: str
) -> None:
    about: dict[str, UUID | str] = {"account_id": account_id}
    if use_case is not None:
        about["use_case"] = use_case
    record_change(connection, "budget", about, before, after)
    connection.execute(select(func.pg_notify(BUDGET_CHANNEL, "")))


def _words(limits: Mapping[WindowName, int | None]) -> str:
    given = [f"{dollars(limit)} a {name}" for name, limit in limits.items() if limit is not None]
    return ", ".join(given) or "none"

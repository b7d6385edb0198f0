"""What an account has spent, and what it may spend."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.responses import Response

from sluicegate.producers.budgeting import Limit, reading, setting
from sluicegate.producers.http.callers import Rule
from sluicegate.producers.http.routes import Answer, Route, Visit, json_response
from sluicegate.producers.http.shapes import Shape, Told, usd
from sluicegate.producers.spend import Latency, Spend, read_day, spend_report
from sluicegate.shared.budgets import Budget, Window
from sluicegate.shared.jobs import UseCaseName

#: Such as 2026-11-23.
Day = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"),
    Field(json_schema_extra={"format": "date"}),
]


class Days(BaseModel):
    """Which days, in the account's time zone, and what each row stands for."""

    model_config = ConfigDict(extra="forbid")

    by: Literal["provider", "model", "use_case", "day"] = "use_case"
    #: The first day; the month's if not given.
    first: Annotated[Day | None, Field(alias="from")] = None
    #: The last day; today if not given.
    last: Annotated[Day | None, Field(alias="to")] = None


class LatencyTold(Told):
    """What half, 95 % and 99 % of the answers took at most, in milliseconds."""

    p50_ms: int
    p95_ms: int
    p99_ms: int


class RowTold(Told):
    """The figures of one row, amounts in US dollars."""

    key: str
    #: Calls, failed ones included, and how many of them failed.
    requests: int
    failures: int
    usd: float
    baseline_usd: float
    saving_usd: float
    saving_percent: float | None
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    duration: LatencyTold | None
    first_token: LatencyTold | None


class UsageReport(Told):
    """What an account spent in some days."""

    account: str
    by: str
    time_zone: str
    first_day: date
    last_day: date
    rows: tuple[RowTold, ...]
    total: RowTold


class WindowTold(Told):
    """A day or a month of a budget, in US dollars."""

    limit_usd: float | None
    spent_usd: float
    #: For calls that are under way.
    held_usd: float
    left_usd: float | None
    resets_at: datetime


class BudgetTold(Told):
    """What an account may spend, in all or on a use case."""

    account: str
    use_case: str | None
    time_zone: str
    #: Percents of a limit at which an alert is raised.
    thresholds: tuple[int, ...]
    day: WindowTold
    month: WindowTold


class BudgetsTold(Told):
    """The budgets of an account."""

    budgets: tuple[BudgetTold, ...]


Dollars = (
    Annotated[float, Field(ge=0, le=9_000_000, allow_inf_nan=False)]
    | Annotated[str, StringConstraints(pattern=r"^[0-9]{1,7}(\.[0-9]{1,9})?$")]
)


class OwnLimits(Shape):
    """What a budget is to be. What is left out stays; null takes a limit away."""

    #: Of the account's jobs of one use case; of all if not given.
    use_case: UseCaseName | None = None
    #: In US dollars, as a number or, to be exact, as text.
    daily: Dollars | None = None
    monthly: Dollars | None = None
    thresholds: (
        Annotated[tuple[Annotated[int, Field(ge=1, le=1000)], ...], Field(max_length=10)] | None
    ) = None


async def usage(visit: Visit) -> Response:
    """Report what the account spent."""
    asked = visit.query(Days)
    first = None if asked.first is None else read_day("from", asked.first)
    last = None if asked.last is None else read_day("to", asked.last)
    account_id = visit.known.account_id
    report = await visit.look(
        lambda connection: spend_report(
            connection, by=asked.by, first_day=first, last_day=last, account=account_id
        )
    )
    return json_response(
        {
            "account": report.account,
            "by": report.by.value,
            "timeZone": report.time_zone,
            "firstDay": report.first_day,
            "lastDay": report.last_day,
            "rows": [_row(row) for row in report.rows],
            "total": _row(report.total),
        }
    )


async def budgets(visit: Visit) -> Response:
    """Show the account's budgets."""
    found = await visit.look(reading(visit.known.account_id))
    return json_response({"budgets": [_budget(one) for one in found]})


async def set_budget(visit: Visit) -> Response:
    """Set one of the account's budgets."""
    asked = await visit.read(OwnLimits)
    daily, monthly = (
        _limit(getattr(asked, name)) if name in asked.model_fields_set else ...
        for name in ("daily", "monthly")
    )
    work = setting(
        visit.known.account_id,
        use_case=asked.use_case,
        daily=daily,
        monthly=monthly,
        thresholds=asked.thresholds,
    )
    return json_response(_budget(await visit.change(work)))


def _limit(given: float | str | None) -> Limit:
    # A float as JSON wrote it, not as it is in binary.
    return None if given is None else str(given)


def _row(row: Spend) -> dict[str, Any]:
    return {
        "key": row.key,
        "requests": row.requests,
        "failures": row.failures,
        "usd": usd(row.cost_nano_usd),
        "baselineUsd": usd(row.baseline_nano_usd),
        "savingUsd": usd(row.saving_nano_usd),
        "savingPercent": row.saving_percent,
        "inputTokens": row.prompt_tokens,
        "cachedTokens": row.cache_read_tokens,
        "outputTokens": row.output_tokens,
        "reasoningTokens": row.reasoning_tokens,
        "duration": _latency(row.duration),
        "firstToken": _latency(row.first_token),
    }


def _latency(latency: Latency | None) -> dict[str, int] | None:
    if latency is None:
        return None
    return {"p50Ms": latency.p50_ms, "p95Ms": latency.p95_ms, "p99Ms": latency.p99_ms}


def _budget(budget: Budget) -> dict[str, Any]:
    return {
        "account": budget.account,
        "useCase": budget.use_case,
        "timeZone": budget.time_zone,
        "thresholds": budget.thresholds,
        "day": _window(budget.day),
        "month": _window(budget.month),
    }


def _window(window: Window) -> dict[str, Any]:
    return {
        "limitUsd": _usd(window.limit_nano_usd),
        "spentUsd": usd(window.spent_nano_usd),
        "heldUsd": usd(window.held_nano_usd),
        "leftUsd": _usd(window.left_nano_usd),
        "resetsAt": window.resets_at,
    }


def _usd(nano_usd: int | None) -> float | None:
    return None if nano_usd is None else usd(nano_usd)


ROUTES: Final = (
    Route(
        method="GET",
        path="/api/usage",
        rule=Rule.OWNER,
        handler=usage,
        summary="What the account spent in some days, both ends included",
        tag="money",
        query=Days,
        answers={200: Answer(description="The report.", model=UsageReport)},
    ),
    Route(
        method="GET",
        path="/api/budget",
        rule=Rule.OWNER,
        handler=budgets,
        summary="What the account may spend",
        tag="money",
        answers={200: Answer(description="Its budgets.", model=BudgetsTold)},
    ),
    Route(
        method="PUT",
        path="/api/budget",
        rule=Rule.OWNER,
        handler=set_budget,
        summary="Set what the account may spend",
        tag="money",
        body=OwnLimits,
        answers={200: Answer(description="The budget as it is now.", model=BudgetTold)},
    ),
)

"""Budgets as the Python client sets and reads them."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, WithJsonSchema
from starlette.responses import Response

from sluicegate.producers.budgeting import Limit, clearing, setting
from sluicegate.producers.http.callers import Caller, Rule
from sluicegate.producers.http.client_jobs import CLIENT
from sluicegate.producers.http.routes import JSON, Answer, Route, Visit, json_response
from sluicegate.shared.budgets import Budget
from sluicegate.shared.pricing import MAX_NANO_USD

#: Checked by `read_dollars`, so this is for the document alone.
_Dollars = Annotated[
    str | int,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "examples": ["25.50"]},
                {"type": "integer", "minimum": 0, "maximum": MAX_NANO_USD // 1_000_000_000},
            ]
        }
    ),
]


class BudgetNamed(BaseModel):
    """Whose budgets, and which of them."""

    model_config = ConfigDict(extra="forbid")

    #: The caller's own if not given; of an administrator, all.
    account: Annotated[str, Field(max_length=255)] | None = None
    #: The budget of this use case instead of that for all together.
    use_case: Annotated[str, Field(max_length=255)] | None = None


class BudgetLimits(BudgetNamed):
    """What a budget is to be. What is not given stays; null takes a limit away."""

    model_config = ConfigDict(extra="forbid", strict=True)

    #: US dollars, exact, such as "25.50".
    daily: _Dollars | None = None
    monthly: _Dollars | None = None
    #: Percents of a limit at which an alert is raised.
    thresholds: (
        Annotated[list[Annotated[int, Field(ge=1, le=1000)]], Field(max_length=10)] | None
    ) = None


class Budgets(BaseModel):
    """Budgets as they are now."""

    budgets: list[Budget]


_BUDGET: Final = TypeAdapter(Budget)
_BUDGETS: Final = TypeAdapter(Budgets)


async def read(visit: Visit) -> Response:
    """Return the budgets of an account, or of all."""
    asked = visit.query(BudgetNamed)
    account = visit.known.account_meant(asked.account)
    found = await visit.client.budgets(account)
    return Response(_BUDGETS.dump_json(Budgets(budgets=found)), media_type=JSON)


async def change(visit: Visit) -> Response:
    """Set a budget."""
    asked = await visit.read(BudgetLimits)
    limits: dict[str, Limit] = {
        name: getattr(asked, name)
        for name in ("daily", "monthly")
        if name in asked.model_fields_set
    }
    # In the caller's name, which the client's own call would not be in.
    work = setting(
        _one(visit.known, asked.account),
        use_case=asked.use_case,
        daily=limits.get("daily", ...),
        monthly=limits.get("monthly", ...),
        thresholds=asked.thresholds,
    )
    budget = await visit.change(work)
    return Response(_BUDGET.dump_json(budget), media_type=JSON)


async def clear(visit: Visit) -> Response:
    """Take a budget away."""
    asked = visit.query(BudgetNamed)
    await visit.change(clearing(_one(visit.known, asked.account), asked.use_case))
    return json_response({})


def _one(caller: Caller, named: str | None) -> str:
    """Return the account whose budget is set: an admin who names none sets that of his own."""
    return caller.account_meant(named) or str(caller.account_id)


class Nothing(BaseModel):
    """It is done."""


_TAG: Final = "Python client"

ROUTES: Final = (
    Route(
        method="GET",
        path="/api/budgets",
        rule=Rule.OWNER,
        handler=read,
        summary="Read budgets",
        door=CLIENT,
        tag=_TAG,
        query=BudgetNamed,
        answers={200: Answer(description="As they are now.", model=Budgets)},
    ),
    Route(
        method="PUT",
        path="/api/budgets",
        rule=Rule.OWNER,
        handler=change,
        summary="Set a budget",
        door=CLIENT,
        tag=_TAG,
        body=BudgetLimits,
        answers={200: Answer(description="The budget as it is now.", model=Budget)},
    ),
    Route(
        method="DELETE",
        path="/api/budgets",
        rule=Rule.OWNER,
        handler=clear,
        summary="Take a budget away",
        door=CLIENT,
        tag=_TAG,
        query=BudgetNamed,
        answers={200: Answer(description="It is gone.", model=Nothing)},
    ),
)

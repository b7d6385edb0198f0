"""Routes for accounts: on whose behalf jobs run."""

from __future__ import annotations

from typing import Annotated, Final
from uuid import UUID

from pydantic import StringConstraints
from sqlalchemy import Connection
from starlette.responses import Response

from sluicegate.producers.http.administering import change, look
from sluicegate.producers.http.callers import Rule
from sluicegate.producers.http.routes import Answer, Route, Visit, json_response
from sluicegate.producers.http.shapes import Line, Shape, Told
from sluicegate.shared.accounts import (
    Account,
    add_account,
    find_account,
    list_accounts,
    set_account,
)

_AccountName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,127}$")]


class NewAccount(Shape):
    """An account to be added."""

    name: _AccountName
    #: Where its days and months turn, such as Europe/Berlin.
    time_zone: Line = "UTC"


class AccountPatch(Shape):
    """Changes of an account; what is not given stays as it is."""

    name: _AccountName | None = None
    time_zone: Line | None = None
    #: An account that is not active keeps its jobs, and gets no new ones.
    is_active: bool | None = None


class AccountTold(Told):
    """An account."""

    id: UUID
    name: str
    time_zone: str
    is_active: bool


class AccountsTold(Told):
    """All accounts, by name."""

    accounts: list[AccountTold]


async def accounts(visit: Visit) -> Response:
    """List accounts."""
    found = await look(visit, list_accounts)
    return json_response({"accounts": [AccountTold.of(one) for one in found]})


async def account(visit: Visit) -> Response:
    """Show an account."""
    name = visit.request.path_params["name"]
    found = await look(visit, lambda line: find_account(line, name))
    return json_response(AccountTold.of(found))


async def new_account(visit: Visit) -> Response:
    """Add an account."""
    asked = await visit.read(NewAccount)
    added = await change(visit, lambda line: add_account(line, asked.name, asked.time_zone))
    return json_response(AccountTold.of(added), 201)


async def patch_account(visit: Visit) -> Response:
    """Change an account."""
    name, asked = visit.request.path_params["name"], await visit.read(AccountPatch)

    def work(line: Connection) -> Account:
        return set_account(
            line, name, name=asked.name, time_zone=asked.time_zone, is_active=asked.is_active
        )

    return json_response(AccountTold.of(await change(visit, work)))


_ACCOUNT: Final = Answer(description="The account as it is now.", model=AccountTold)

ROUTES: Final = (
    Route(
        method="GET",
        path="/api/accounts",
        rule=Rule.ADMIN,
        handler=accounts,
        summary="List accounts",
        tag="accounts",
        answers={200: Answer(description="All accounts.", model=AccountsTold)},
    ),
    Route(
        method="POST",
        path="/api/accounts",
        rule=Rule.ADMIN,
        handler=new_account,
        summary="Add an account",
        tag="accounts",
        body=NewAccount,
        answers={201: _ACCOUNT},
    ),
    Route(
        method="GET",
        path="/api/accounts/{name}",
        rule=Rule.ADMIN,
        handler=account,
        summary="Show an account, by name or id",
        tag="accounts",
        answers={200: _ACCOUNT},
    ),
    Route(
        method="PATCH",
        path="/api/accounts/{name}",
        rule=Rule.ADMIN,
        handler=patch_account,
        summary="Change an account",
        tag="accounts",
        body=AccountPatch,
        answers={200: _ACCOUNT},
    ),
)

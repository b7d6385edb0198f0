"""Routes for API keys, and for the audit of what was changed."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import Connection
from starlette.responses import Response

from sluicegate.producers.http.administering import account_id_meant, change, look
from sluicegate.producers.http.callers import Role, Rule
from sluicegate.producers.http.problems import Problem, wrong
from sluicegate.producers.http.routes import Answer, Route, Visit, json_response
from sluicegate.producers.http.shapes import Line, Shape, Told
from sluicegate.shared.accounts import name_or_id
from sluicegate.shared.api_keys import (
    MAX_NAME_CHARS,
    NAME_PATTERN,
    ApiKey,
    RoleName,
    create_key,
    find_key,
    list_keys,
    revoke_key,
)
from sluicegate.shared.audit import Action, read_audit
from sluicegate.shared.errors import NotFound

_TAG: Final = "keys"


class NewKey(Shape):
    """A key to be made."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=MAX_NAME_CHARS)]
    role: RoleName = "user"
    #: By name or id; the caller's own if not given.
    account: Line | None = None
    #: Of no account: each of its requests names one in `X-Sluice-Account`. For admins to make.
    is_service: bool = False
    #: Null: never.
    expires_at: AwareDatetime | None = None


class KeyTold(Told):
    """A key, without the key itself."""

    id: UUID
    name: str
    role: RoleName
    #: Null: a service key.
    account: str | None
    #: How it begins.
    hint: str
    state: Literal["active", "expired", "revoked"]
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    revoked_at: datetime | None
    #: To about a minute.
    last_used_at: datetime | None


class NewKeyTold(KeyTold):
    """A key that was just made, and itself, this once."""

    key: str


class KeysTold(Told):
    """Keys, the newest first."""

    keys: list[KeyTold]


class AccountAsked(BaseModel):
    """Of which account: the caller's own if not given, and of admins all."""

    model_config = ConfigDict(extra="forbid")

    account: Line | None = None


class AuditQuery(AccountAsked):
    """Which changes."""

    since: AwareDatetime | None = None
    #: By whom, as `key:…`, `jwt:…`, `cli:…` or `db:…`.
    who: Line | None = None
    #: Of which kind, such as `provider`, or of what has this name or id.
    what: Line | None = None
    #: Those before this number: where the last page ended.
    below: Annotated[int, Field(ge=1, le=2**63 - 1)] | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 50


class ChangeTold(Told):
    """A change: columns of the row, and of one that was there before those that changed."""

    number: int
    at: datetime
    actor: str
    request_id: str | None
    action: Action
    kind: str
    subject: str
    subject_id: str | None
    account: str | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class AuditTold(Told):
    """Changes, the newest first."""

    changes: list[ChangeTold]


async def list_all(visit: Visit) -> Response:
    """List keys."""
    asked = visit.query(AccountAsked)

    def work(line: Connection) -> list[ApiKey]:
        return list_keys(line, account_id_meant(visit, line, asked.account))

    found = await look(visit, work)
    return json_response({"keys": [_told(one) for one in found]})


async def create(visit: Visit) -> Response:
    """Make a key."""
    asked, caller = await visit.read(NewKey), visit.known
    if not Rule(asked.role).allows(caller.role):
        raise _forbidden("role", f"the caller is {caller.role}, and cannot give {asked.role}")
    if asked.is_service and caller.role is not Role.ADMIN:
        raise _forbidden("isService", "only an admin makes keys that act for any account")
    if asked.is_service and asked.account is not None:
        raise wrong("account", "a service key has none; leave it out")

    def work(line: Connection) -> NewKeyTold:
        account = None if asked.is_service else _own(visit, line, asked.account)
        made, token = create_key(
            line,
            asked.name,
            role=asked.role,
            account=account,
            created_by=caller.subject,
            expires_at=asked.expires_at,
        )
        return NewKeyTold.of(_fields(made) | {"key": token.get_secret_value()})

    made = await change(visit, work)
    return json_response(made, 201, {"Cache-Control": "no-store"})


async def revoke(visit: Visit) -> Response:
    """Revoke a key: whoever could make it can take it away."""
    named, caller = visit.request.path_params["key_id"], visit.known
    if not isinstance(name_or_id(named), UUID):
        # Not by its name: that may become another's.
        raise NotFound(f"there is no API key with the id {named!r}; `GET /api/keys` lists all")
    own = None if caller.role is Role.ADMIN else caller.account_id

    def work(line: Connection) -> ApiKey:
        found = find_key(line, named, own)
        if not Rule(found.role).allows(caller.role):
            raise _forbidden(
                "key_id", f"the caller is {caller.role}, and cannot revoke a key of {found.role}"
            )
        return revoke_key(line, found.id)

    return json_response(_told(await change(visit, work)))


async def audit(visit: Visit) -> Response:
    """List changes: an admin's are all there are, an owner's those of what is his account's."""
    asked = visit.query(AuditQuery)

    def work(line: Connection) -> list[ChangeTold]:
        found = read_audit(
            line,
            account_id=account_id_meant(visit, line, asked.account),
            who=asked.who,
            what=asked.what,
            since=asked.since,
            below=asked.below,
            limit=asked.limit,
        )
        return [ChangeTold.of(one) for one in found]

    return json_response({"changes": await look(visit, work)})


def _own(visit: Visit, line: Connection, named: str | None) -> str:
    """Return the account that a new key is for: the one that is named, or the caller's."""
    own_id = visit.known.account_id
    return str(account_id_meant(visit, line, named or str(own_id)) or own_id)


def _fields(key: ApiKey) -> dict[str, Any]:
    names = (name for name in KeyTold.model_fields if name != "state")
    return {**{name: getattr(key, name) for name in names}, "state": key.state()}


def _told(key: ApiKey) -> KeyTold:
    return KeyTold.of(_fields(key))


def _forbidden(field: str, sentence: str) -> Problem:
    return Problem(403, "forbidden", f"{field}: {sentence}", field=field)


ROUTES: Final = (
    Route(
        method="GET",
        path="/api/keys",
        rule=Rule.OWNER,
        handler=list_all,
        summary="List API keys",
        tag=_TAG,
        query=AccountAsked,
        answers={200: Answer(description="The keys, without themselves.", model=KeysTold)},
    ),
    Route(
        method="POST",
        path="/api/keys",
        rule=Rule.OWNER,
        handler=create,
        summary="Make an API key",
        tag=_TAG,
        body=NewKey,
        answers={201: Answer(description="The key, this once.", model=NewKeyTold)},
    ),
    Route(
        method="DELETE",
        path="/api/keys/{key_id}",
        rule=Rule.OWNER,
        handler=revoke,
        summary="Revoke an API key",
        tag=_TAG,
        answers={200: Answer(description="The key, revoked.", model=KeyTold)},
    ),
    Route(
        method="GET",
        path="/api/audit",
        rule=Rule.OWNER,
        handler=audit,
        summary="List what was changed, and by whom",
        tag=_TAG,
        query=AuditQuery,
        answers={200: Answer(description="Changes, the newest first.", model=AuditTold)},
    ),
)

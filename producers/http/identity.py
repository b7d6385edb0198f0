"""Whose request it is: an API key or a token, and the account that it acts for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import Request

from sluicegate.producers.http.callers import Caller, Role
from sluicegate.producers.http.problems import Problem, wrong
from sluicegate.producers.http.recent import Recent
from sluicegate.producers.http.strangers import Strangers
from sluicegate.producers.http.tokens import Tokens, refused
from sluicegate.shared.accounts import DEFAULT_ACCOUNT, check_name, name_or_id
from sluicegate.shared.addresses import is_loopback
from sluicegate.shared.api_keys import PREFIX, hash_of, is_whole
from sluicegate.shared.database import DATABASE_ERRORS, explain, make_async_engine
from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.settings import Settings

log = logging.getLogger(__name__)

#: The account that a request is for, by name or id: of service keys and admins.
ACCOUNT_HEADER: Final = "X-Sluice-Account"

#: Of their own: who asks must not wait behind those who were let in, nor those behind strangers.
_CONNECTIONS: Final = 2
_CONNECTIONS_OF_STRANGERS: Final = 1
#: How long it is known of a key that it is wrong.
_WRONG_FOR_S: Final = 1.0
#: How often the use of a key is written down.
_USE_NOTED_EVERY: Final = timedelta(seconds=60)

_FIND_KEY: Final = """
SELECT id, role, account_id, expires_at, revoked_at, last_used_at
FROM api_keys WHERE token_hash = %(hash)s
"""
_FIND_ACCOUNT: Final = "SELECT id, name, is_active FROM accounts WHERE name = %(account)s"
_FIND_ACCOUNT_BY_ID: Final = "SELECT id, name, is_active FROM accounts WHERE id = %(account)s"
_NOTE_USE: Final = f"""
UPDATE api_keys SET last_used_at = now()
WHERE id = %(id)s
  AND (last_used_at IS NULL OR last_used_at < now() - interval '{_USE_NOTED_EVERY.seconds} s')
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bearer:
    """Who has proved who he is, before it is known for which account he acts."""

    subject: str
    role: Role
    #: His own, by name or id; None: he has none.
    account: str | UUID | None
    #: Whether he may name another one.
    acts_for_others: bool
    #: What to call what he came with.
    what: str


class Identity(AbstractAsyncContextManager["Identity"]):
    """Says whose request it is; it connects at first use, and has to be closed.

    is_sandbox: whoever is on this machine may do without credentials, as an owner of any account.
    """

    def __init__(self, settings: Settings, *, is_sandbox: bool = False) -> None:
        self._is_sandbox = is_sandbox
        self._tokens = Tokens(settings)
        self._engine = make_async_engine(
            settings, application_name="sluice http callers", pool_size=_CONNECTIONS
        )
        self._engine_of_strangers = make_async_engine(
            settings,
            application_name="sluice http strangers",
            pool_size=_CONNECTIONS_OF_STRANGERS,
        )
        self._strangers = Strangers()
        ttl_s = settings.api_key_ttl_s
        self._keys: Recent[bytes, Row[Any]] = Recent(
            self._find_key, ttl_s=ttl_s, miss_ttl_s=_WRONG_FOR_S
        )
        self._accounts: Recent[str | UUID, Row[Any]] = Recent(self._find_account, ttl_s=ttl_s)
        self._noting: dict[UUID, asyncio.Task[None]] = {}

    async def __call__(self, request: Request) -> Caller | None:
        """Return the caller; None: there are no credentials. Raises `Problem`, `SluiceError`."""
        token = _credentials(request)
        if self._is_sandbox and not (token and _is_ours(token)):
            # SDKs want a key in any case, whatever it is.
            return await self._acting(_sandboxed(request), request)
        if token is None:
            return None
        if token.startswith(PREFIX):
            bearer = await self._bearer_of_key(token)
        else:
            holder = await self._tokens.read(token)
            bearer = _Bearer(
                subject=f"jwt:{holder.subject}",
                role=holder.role,
                account=holder.account,
                acts_for_others=holder.role is Role.ADMIN,
                what="token",
            )
        return await self._acting(bearer, request)

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.gather(*self._noting.values())
        await self._engine.dispose()
        await self._engine_of_strangers.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _bearer_of_key(self, token: str) -> _Bearer:
        if not is_whole(token):
            raise refused(f"this API key is not known: a whole one is {PREFIX} and 43 characters")
        row = await self._keys.get(hash_of(token))
        if row is None:
            raise refused("this API key is not known; `sluice apikey create` makes one")
        if row.revoked_at is not None:
            raise refused("this API key was revoked; ask for a new one")
        now = datetime.now(UTC)
        if row.expires_at is not None and row.expires_at <= now:
            raise refused("this API key has expired; ask for a new one")
        if row.last_used_at is None or now - row.last_used_at > _USE_NOTED_EVERY:
            self._note_use(row.id)
        role = Role(row.role)
        is_service = row.account_id is None
        return _Bearer(
            subject=f"key:{row.id}",
            role=role,
            account=None if is_service else row.account_id,
            acts_for_others=is_service or role is Role.ADMIN,
            what="service key" if is_service else "API key",
        )

    async def _acting(self, bearer: _Bearer, request: Request) -> Caller:
        """Return the caller as whom this bearer acts; raises `Problem`."""
        named = request.headers.get(ACCOUNT_HEADER)
        if bearer.acts_for_others:
            wanted = named or bearer.account
            if wanted is None and bearer.role is Role.ADMIN:
                # Most of what admins do is for no account.
                wanted = DEFAULT_ACCOUNT
            if wanted is None:
                raise wrong(ACCOUNT_HEADER, f"name the account that this {bearer.what} acts for")
            found = await self._account(wanted)
            if found is None:
                raise _forbidden(f"{ACCOUNT_HEADER}: there is no such account")
        else:
            if bearer.account is None:
                raise _forbidden(f"this {bearer.what} is for no account: its claim names none")
            found = await self._account(bearer.account)
            if found is None:
                raise _forbidden(f"the account that this {bearer.what} is for is not known here")
            # Compared with its own: whether there is another one of this name shows in nothing.
            if named is not None and name_or_id(named) not in (found.name, found.id):
                raise _forbidden(
                    f"this {bearer.what} acts for its own account alone: leave {ACCOUNT_HEADER} out"
                )
        if not found.is_active:
            raise Problem(
                *(403, "account_inactive"),
                "this account is not active: `sluice account set NAME --active` lets it in again",
            )
        return Caller(
            subject=bearer.subject, role=bearer.role, account_id=found.id, account=found.name
        )

    async def _account(self, wanted: str | UUID) -> Row[Any] | None:
        if isinstance(wanted, str):
            wanted = name_or_id(wanted)
        try:
            return await self._accounts.get(
                wanted if isinstance(wanted, UUID) else check_name(wanted)
            )
        except InvalidJob:
            return None

    async def _find_key(self, hash_: bytes) -> Row[Any] | None:
        if hash_ in self._keys:
            return await _first(self._engine, _FIND_KEY, hash=hash_)
        row = await _first(
            self._engine_of_strangers, _FIND_KEY, when=self._strangers.check, hash=hash_
        )
        if row is None:
            self._strangers.count()
        return row

    async def _find_account(self, account: str | UUID) -> Row[Any] | None:
        statement = _FIND_ACCOUNT_BY_ID if isinstance(account, UUID) else _FIND_ACCOUNT
        return await _first(self._engine, statement, account=account)

    def _note_use(self, key_id: UUID) -> None:
        """Have it written down that a key was used, while its request goes on."""
        if key_id in self._noting:
            return
        task = self._noting[key_id] = asyncio.create_task(self._write_use(key_id))
        task.add_done_callback(lambda _: self._noting.pop(key_id))

    async def _write_use(self, key_id: UUID) -> None:
        try:
            async with self._engine.connect() as connection:
                await connection.exec_driver_sql(_NOTE_USE, {"id": key_id})
        except DATABASE_ERRORS as error:
            # The next use is written down in its place.
            log.warning("the use of an API key was not written down: %s", explain(error))


async def _first(
    engine: AsyncEngine,
    statement: str,
    *,
    when: Callable[[], None] | None = None,
    **values: Any,
) -> Row[Any] | None:
    """Return the first row; `when` is called as soon as there is a connection, and may raise."""
    try:
        async with engine.connect() as connection:
            if when is not None:
                when()
            return (await connection.exec_driver_sql(statement, values)).first()
    except DATABASE_ERRORS as error:
        raise explain(error) from error


def _credentials(request: Request) -> str | None:
    """Return what the request came with; raise `Problem` if that is of a kind not taken here."""
    given = request.headers.get("Authorization", "").strip()
    if not given:
        # As Anthropic's SDKs have it.
        return request.headers.get("x-api-key", "").strip() or None
    scheme, _, token = given.partition(" ")
    if scheme.lower() != "bearer":
        raise refused("the Authorization header must be `Bearer` and an API key or a token")
    return token.strip() or None


def _is_ours(token: str) -> bool:
    """Whether this was given out by somebody, as a key or a token."""
    return token.startswith(PREFIX) or token.count(".") == 2


def _sandboxed(request: Request) -> _Bearer:
    """Return who does without credentials; raise `Problem` if that is not somebody here.

    A page of the web that is open on this machine is not: neither by itself, which browsers tell,
    nor by a name of its own that leads here.
    """
    client = request.client
    host = urlsplit(f"//{request.headers.get('Host', '')}").hostname or ""
    is_here = client is not None and is_loopback(client.host) and is_loopback(host)
    if not is_here or request.headers.get("Sec-Fetch-Site") == "cross-site":
        raise Problem(
            *(401, "unauthorized"),
            "without credentials only this machine may call, at localhost or 127.0.0.1",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return _Bearer(
        subject="sandbox",
        role=Role.OWNER,
        account=DEFAULT_ACCOUNT,
        acts_for_others=True,
        what="sandbox",
    )


def _forbidden(sentence: str) -> Problem:
    return Problem(403, "forbidden", sentence)

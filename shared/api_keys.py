"""API keys: what opens the HTTP producer, for whom, and until when.

A key is `sk-sluice-` and 43 characters, of 256 random bits. It is shown once, when it is made; the
database has its SHA-256.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from secrets import token_urlsafe
from typing import Any, Final, Literal, get_args
from uuid import UUID

from sqlalchemy import Connection, Row, Select, func, insert, select, update

from sluicegate.shared.accounts import account_id_of
from sluicegate.shared.errors import InvalidJob, NotFound
from sluicegate.shared.ids import new_id
from sluicegate.shared.secrets import Secret
from sluicegate.shared.tables import accounts, api_keys

RoleName = Literal["user", "owner", "admin"]
ROLES: Final[tuple[str, ...]] = get_args(RoleName)

PREFIX: Final = "sk-sluice-"
_RANDOM_BYTES: Final = 32
#: What 32 bytes come to in URL-safe base64.
_TOKEN: Final = re.compile(PREFIX + r"[A-Za-z0-9_-]{43}")
#: Of 43 random characters; the 38 that are not shown hold 228 bits.
_HINT_CHARS: Final = len(PREFIX) + 5
MAX_NAME_CHARS: Final = 128
#: What a name holds: no line breaks or codes of terminals, and nothing that turns the direction of
#: what is shown after it.
NAME_PATTERN: Final = r"^[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+$"
#: Half a character, as a shell may pass it, can be stored nowhere.
_HALF: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key, without the key itself."""

    id: UUID
    name: str
    role: RoleName
    #: None: a service key, each of whose requests names the account that it acts for.
    account_id: UUID | None
    account: str | None
    #: How it begins.
    hint: str
    created_at: datetime
    #: Who made it.
    created_by: str
    #: None: never.
    expires_at: datetime | None
    revoked_at: datetime | None
    #: To about a minute; None: never.
    last_used_at: datetime | None

    def state(self, now: datetime | None = None) -> Literal["active", "expired", "revoked"]:
        """Whether it opens anything at this moment; the present one if not given."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= (now or datetime.now(UTC)):
            return "expired"
        return "active"


def new_token() -> Secret:
    """Make a key."""
    return Secret(PREFIX + token_urlsafe(_RANDOM_BYTES))


def is_whole(token: str) -> bool:
    """Whether this is written as a key is; if not, there is no need to look for it."""
    return _TOKEN.fullmatch(token) is not None


def hash_of(token: str) -> bytes:
    """Return what the database has of a key.

    One round of SHA-256 and no salt, unlike for passwords: nobody guesses 256 random bits, however
    fast he can try, and no two keys are the same. It has to be found by its hash with each request.
    That a look-up by hash takes longer for some than for others tells nothing: whoever could choose
    the hash of what he sends would have the key already.
    """
    return sha256(token.encode()).digest()


def create_key(
    connection: Connection,
    name: str,
    *,
    role: RoleName,
    account: str | None,
    created_by: str,
    expires_at: datetime | None = None,
) -> tuple[ApiKey, Secret]:
    """Make a key; return it, and what its holder is to be given, this once.

    account: by name or id; None: a service key. Raises `InvalidJob` that names the field.
    """
    if len(name) > MAX_NAME_CHARS or not re.fullmatch(NAME_PATTERN, name) or _HALF.search(name):
        raise InvalidJob("name", f"must be 1 to {MAX_NAME_CHARS} characters on one line")
    if role not in ROLES:
        raise InvalidJob("role", f"{role!r} is not a role; there are {', '.join(ROLES)}")
    if expires_at is not None and expires_at <= datetime.now(UTC):
        raise InvalidJob("expires_at", "is in the past; give a moment to come")
    token = new_token()
    plain = token.get_secret_value()
    id_ = new_id()
    connection.execute(
        insert(api_keys).values(
            id=id_,
            name=name,
            role=role,
            account_id=account_id_of(connection, account),
            token_hash=hash_of(plain),
            hint=plain[:_HINT_CHARS],
            created_by=created_by,
            expires_at=expires_at,
        )
    )
    return _read(connection.execute(_keys().where(api_keys.c.id == id_)).one()), token


def list_keys(connection: Connection, account_id: UUID | None = None) -> list[ApiKey]:
    """Return the keys of an account, or all, the newest first."""
    query = _keys().order_by(api_keys.c.created_at.desc(), api_keys.c.id.desc())
    if account_id is not None:
        query = query.where(api_keys.c.account_id == account_id)
    return [_read(row) for row in connection.execute(query)]


def find_key(connection: Connection, key: str, account_id: UUID | None = None) -> ApiKey:
    """Return a key by id or name.

    account_id: only if it is this account's. Raises `NotFound`, and `InvalidJob` for a name that
    several keys have which are not revoked.
    """
    return _find(list_keys(connection, account_id), key)


def revoke_key(connection: Connection, key_id: UUID) -> ApiKey:
    """Have a key open nothing any more; it stays in the list. `find_key` returns its id."""
    connection.execute(
        update(api_keys)
        .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
        .values(revoked_at=func.now())
    )
    return _read(connection.execute(_keys().where(api_keys.c.id == key_id)).one())


def _find(keys: Sequence[ApiKey], wanted: str) -> ApiKey:
    for one in keys:
        if str(one.id) == wanted.lower():
            return one
    named = [one for one in keys if one.name == wanted]
    # Whoever is asked to revoke one means one that can be.
    live = [one for one in named if one.revoked_at is None] or named[:1]
    if not live:
        raise NotFound(f"there is no API key {wanted!r}; `sluice apikey list` shows all")
    if len(live) > 1:
        listed = ", ".join(str(one.id) for one in live)
        raise InvalidJob(
            "key", f"{len(live)} keys are called {wanted!r}; name one by its id: {listed}"
        )
    return live[0]


def _keys() -> Select[Any]:
    columns = api_keys.c
    names = ("id", "name", "role", "account_id", "hint", "created_at", "created_by")
    return select(
        *(columns[name] for name in names),
        accounts.c.name.label("account"),
        *(columns[name] for name in ("expires_at", "revoked_at", "last_used_at")),
    ).outerjoin_from(api_keys, accounts)


def _read(row: Row[Any]) -> ApiKey:
    return ApiKey(**row._mapping)

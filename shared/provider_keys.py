"""Keys of providers: which one opens a call, and those that the database keeps, encrypted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from pydantic import SecretStr
from sqlalchemy import (
    Column,
    Connection,
    Row,
    Table,
    Text,
    delete,
    func,
    null,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from sluicegate.shared.catalogue import PoolName, Provider
from sluicegate.shared.errors import SluiceError
from sluicegate.shared.ids import new_id
from sluicegate.shared.secrets import Keyring, Secret, SecretUnreadable
from sluicegate.shared.settings import Settings
from sluicegate.shared.tables import accounts, llm_providers, provider_keys

#: The environment's name for each pool's key, as the SDKs call it.
KEY_VARIABLES: Final[dict[PoolName, str]] = {
    "openai": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
}

#: Workers that begin calls; one that has died has said nothing for this long.
_LIVE = text("""
SELECT name, keyring FROM workers
WHERE seen_at > now() - interval '30 s' AND NOT draining
  AND pool = coalesce(CAST(:pool AS text), pool)
ORDER BY name
""")

#: What the key ring has encrypted: keys, and what the alerts of accounts are signed with.
_Place = tuple[Table, Column[Any]]
_ENCRYPTED: Final[tuple[_Place, ...]] = (
    (provider_keys, provider_keys.c.api_key_encrypted),
    (llm_providers, llm_providers.c.api_key_encrypted),
    (accounts, accounts.c.alert_secret_encrypted),
)

_BATCH_ROWS = 500
_TRIES = 10


class KeySource(StrEnum):
    """Where a key comes from, in the order in which they are looked for."""

    ACCOUNT_ROW = "account_row"  # on a provider row that belongs to the account
    ACCOUNT = "account"  # the account's own, in provider_keys
    ENVIRONMENT = "environment"
    ROW = "row"  # on a provider row that is everybody's
    DATABASE = "database"  # everybody's, in provider_keys


@dataclass(frozen=True, slots=True)
class ProviderKey:
    """The key that opens a provider; a `str` is encrypted."""

    source: KeySource
    value: SecretStr | str = field(repr=False)

    def open(self, keyring: Keyring) -> Secret:
        """Return it in the clear; raises SecretUnreadable."""
        if isinstance(self.value, SecretStr):
            return Secret(self.value.get_secret_value())
        return keyring.decrypt(self.value)


def is_sendable(key: SecretStr) -> bool:
    """Whether an HTTP header can carry this key."""
    plain = key.get_secret_value()
    return plain.isascii() and plain.isprintable()


def environment_key(settings: Settings, pool: PoolName) -> SecretStr | None:
    """Return the fleet's own key for a pool's official API."""
    return settings.openai_api_key if pool == "openai" else settings.anthropic_api_key


def choose_key(
    provider: Provider,
    account_id: UUID | None,
    keys: Mapping[tuple[PoolName, UUID | None], str],
    environment: SecretStr | None,
) -> ProviderKey | None:
    """Return the key for an account's call to this provider; None: there is none.

    The account's own comes first: on its own provider row, then its key for the pool. Then what
    is everybody's: the environment, the provider row, the pool's key in the database. A row with
    an address of its own is somebody else's server: it gets the key on the row and no other.
    `keys` is `Catalogue.keys`; `environment` is the pool's own, see `environment_key`.
    """
    own = provider.account_id is not None and provider.account_id == account_id
    on_row = provider.api_key_encrypted
    pool = provider.provider if provider.base_url is None else None
    choices: tuple[tuple[KeySource, SecretStr | str | None], ...] = (
        (KeySource.ACCOUNT_ROW, on_row if own else None),
        (KeySource.ACCOUNT, keys.get((pool, account_id)) if pool and account_id else None),
        (KeySource.ENVIRONMENT, environment if pool else None),
        (KeySource.ROW, on_row if provider.account_id is None else None),
        (KeySource.DATABASE, keys.get((pool, None)) if pool else None),
    )
    return next((ProviderKey(source, value) for source, value in choices if value), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredKey:
    """A key in the database."""

    pool: PoolName
    #: The provider row that holds it; None: it is for all rows of the pool without an address.
    provider: str | None
    #: None: every account's.
    account: str | None
    token: str = field(repr=False)
    updated_at: datetime

    def __str__(self) -> str:
        """Name it."""
        what = f"provider {self.provider}" if self.provider else self.pool
        return f"{what} of account {self.account}" if self.account else what


def set_key(connection: Connection, pool: PoolName, account_id: UUID | None, token: str) -> None:
    """Store an encrypted key, in place of the one that is there."""
    statement = insert(provider_keys).values(
        id=new_id(), provider=pool, account_id=account_id, api_key_encrypted=token
    )
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["provider", "account_id"],
            set_={"api_key_encrypted": token, "updated_at": func.now()},
        )
    )


def remove_key(connection: Connection, pool: PoolName, account_id: UUID | None) -> bool:
    """Remove a key; return whether there was one."""
    found = connection.execute(
        delete(provider_keys).where(
            provider_keys.c.provider == pool,
            provider_keys.c.account_id.is_not_distinct_from(account_id),
        )
    )
    return found.rowcount > 0


def list_keys(connection: Connection) -> list[StoredKey]:
    """Return all keys in the database, those of rows that are not active as well."""
    keys, rows = provider_keys.c, llm_providers.c
    statement = (
        select(
            keys.provider.label("pool"),
            null().cast(Text).label("provider"),
            accounts.c.name.label("account"),
            keys.api_key_encrypted.label("token"),
            keys.updated_at,
        )
        .outerjoin_from(provider_keys, accounts)
        .union_all(
            select(
                rows.provider, rows.name, accounts.c.name, rows.api_key_encrypted, rows.updated_at
            )
            .outerjoin_from(llm_providers, accounts)
            .where(rows.api_key_encrypted.is_not(None))
        )
        .order_by("pool", "provider", "account")
    )
    return [StoredKey(**row._mapping) for row in connection.execute(statement)]


def list_alert_secrets(connection: Connection) -> list[tuple[str, str]]:
    """Return what the alerts of accounts are signed with, encrypted, by the account's name."""
    columns = accounts.c
    query = select(columns.name, columns.alert_secret_encrypted).order_by(columns.name)
    rows = connection.execute(query.where(columns.alert_secret_encrypted.is_not(None)))
    return [(row.name, row.alert_secret_encrypted) for row in rows]


class KeyState(StrEnum):
    """What the keyring can do with a key in the database."""

    CURRENT = "current"  # encrypted with the newest of its keys
    OLDER = "older"  # with another of them: `sluice secrets rotate`
    UNREADABLE = "unreadable"  # with none of them


def state_of(token: str, keyring: Keyring) -> KeyState:
    """Return what the keyring can do with this key."""
    try:
        return KeyState.CURRENT if keyring.rotate(token) == token else KeyState.OLDER
    except SecretUnreadable:
        return KeyState.UNREADABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """Which workers that run can decrypt what is encrypted with the newest key."""

    #: How many there are, of either kind.
    live: int
    #: Names of those that do not hold that key.
    without: tuple[str, ...]

    @property
    def problem(self) -> str:
        """What will go wrong, in a clause; empty if nothing will."""
        if not self.without:
            return ""
        return f"{', '.join(self.without)} cannot decrypt what the newest key encrypts"


#: What to do about `Readers.problem`.
GIVE_KEY: Final = "give these workers this SLUICE_ENCRYPTION_KEYS, and restart them"


def readers(connection: Connection, keyring: Keyring, pool: PoolName | None = None) -> Readers:
    """Ask which workers hold the keyring's newest key; `pool`: among that pool's workers.

    The keyring must hold a key.
    """
    newest = keyring.fingerprints[0]
    found = connection.execute(_LIVE, {"pool": pool}).all()
    lacking = (row.name for row in found if newest not in row.keyring)
    return Readers(live=len(found), without=tuple(dict.fromkeys(lacking)))


@dataclass(slots=True, kw_only=True)
class Rotation:
    """How many keys a rotation has met so far."""

    renewed: int = 0
    #: Were encrypted with the newest key already.
    current: int = 0
    unreadable: int = 0


def rotate(
    connection: Connection, keyring: Keyring, *, progress: Callable[[Rotation], None]
) -> Rotation:
    """Encrypt everything with the newest key, while others read and change it.

    The connection is in autocommit: a rotation that is cut off has done what it has done, and the
    next one goes on. What cannot be decrypted stays as it is. `progress` is told after each batch.
    """
    done = Rotation()
    for place in _ENCRYPTED:
        for batch in _batches(connection, place):
            for row in batch:
                _renew(connection, place, row, keyring, done)
            progress(done)
    return done


def _batches(connection: Connection, place: _Place) -> Iterator[Sequence[Row[Any, Any]]]:
    table, stored = place
    id_ = table.c.id
    every = select(id_, stored.label("token")).where(stored.is_not(None))
    query = every.order_by(id_).limit(_BATCH_ROWS)
    batch = connection.execute(query).all()
    while batch:
        yield batch
        batch = connection.execute(query.where(id_ > batch[-1].id)).all()


def _renew(
    connection: Connection, place: _Place, row: Row[Any, Any], keyring: Keyring, done: Rotation
) -> None:
    """Replace a key if it is still the one that was read; if it is not, look again."""
    table, stored = place
    here = table.c.id == row.id
    token: str | None = row.token
    for _ in range(_TRIES):
        if token is None:
            return  # removed meanwhile
        try:
            renewed = keyring.rotate(token)
        except SecretUnreadable:
            done.unreadable += 1
            return
        if renewed == token:
            done.current += 1
            return
        # `updated_at` stays: the key itself is the same. A row at a time, so that no two
        # statements can wait for each other.
        statement = update(table).where(here, stored == token).values({stored: renewed})
        if connection.execute(statement).rowcount:
            done.renewed += 1
            return
        token = connection.scalar(select(stored).where(here))
    raise SluiceError("a key is being changed all the time; run `sluice secrets rotate` again")

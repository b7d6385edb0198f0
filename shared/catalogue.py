"""The catalogue: provider rows and use cases, cached in each process.

A hit costs a clock reading. On use, at most every half second, the cache asks Redis whether the
catalogue's version token has changed, and after `catalogue_ttl_s` it reads the rows again whatever
Redis says: a change is seen within a second, and no thread has to listen for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal, cast
from uuid import UUID, uuid4

import redis
import redis.asyncio
from sqlalchemy import Connection, Row, select
from sqlalchemy.ext.asyncio import AsyncEngine

from sluicegate.shared import adopted_prices
from sluicegate.shared.price_lists import InvalidPriceList
from sluicegate.shared.pricing import PriceCard, price_card, price_version, tier_card
from sluicegate.shared.redis_client import make_redis
from sluicegate.shared.settings import Settings
from sluicegate.shared.tables import accounts, llm_providers, pauses, provider_keys, use_cases

log = logging.getLogger(__name__)

#: Holds a token that changes with the catalogue; absent after a flush, which reads as a change.
VERSION_KEY: Final = "catalogue:version"

Capability = Literal["vision", "tools", "json_schema", "effort"]
PoolName = Literal["openai", "anthropic"]

_REVALIDATE_AFTER_S = 0.5
_STALE_AFTER_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A row of `llm_providers`: a model behind an API."""

    id: UUID
    #: Its name in the catalogue, such as `openai-gpt4o-mini`.
    name: str
    #: The pool that serves it.
    provider: PoolName
    model: str
    base_url: str | None
    #: Serves use cases that no other row claims.
    is_default: bool
    #: Serves these first, and these when those that do have said no.
    use_case: frozenset[str]
    failover: frozenset[str]
    max_tokens: int
    context_tokens: int
    capabilities: frozenset[str]
    #: None: every account's.
    account_id: UUID | None
    #: The default set it belongs to; None: an operator's own row, in use in both.
    catalogue: Literal["current", "original"] | None
    #: Lower is tried first.
    priority: int
    retires_at: datetime | None
    successor: str | None
    price_override: Mapping[str, float] | None = field(hash=False)
    #: The operator's lever.
    breaker: Literal["auto", "forced_open", "disabled"] = "auto"
    #: The provider's limits for our key; None: not known.
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    input_tokens_per_minute: int | None = None
    output_tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    #: The row's own key, encrypted.
    api_key_encrypted: str | None = field(default=None, repr=False)

    @property
    def card(self) -> PriceCard:
        """Its rates; raises `UnknownPrice`."""
        return price_card(self.provider, self.model, self.price_override)

    def card_of(self, service_tier: str | None) -> PriceCard:
        """Its rates for a call that the provider says was served so; raises `UnknownPrice`."""
        return tier_card(self.provider, self.model, self.price_override, service_tier)


@dataclass(frozen=True, slots=True, kw_only=True)
class UseCase:
    """A kind of work, and how its jobs are to be routed."""

    name: str
    description: str
    prefer: Literal["priority", "cheapest", "fastest"]
    #: Longest answer when the job names none.
    max_tokens: int
    unknown_policy: Literal["retry_once", "fail"]
    #: Whether new jobs are accepted; those that wait are done in any case.
    is_active: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Pauses:
    """What an operator has stopped."""

    providers: frozenset[UUID] = frozenset()
    accounts: frozenset[UUID] = frozenset()
    use_cases: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Catalogue:
    """One reading of the active provider rows and of all use cases."""

    providers: tuple[Provider, ...]
    use_cases: Mapping[str, UseCase]
    #: Encrypted keys for the providers' own APIs, by pool and account; None: every account's.
    keys: Mapping[tuple[PoolName, UUID | None], str] = field(default_factory=dict, repr=False)
    #: Names of the accounts that have one of these keys.
    key_owners: Mapping[UUID, str] = field(default_factory=dict)
    pauses: Pauses = Pauses()

    @property
    def open_use_cases(self) -> str:
        """The names of those that take jobs, for a sentence."""
        return ", ".join(sorted(name for name, one in self.use_cases.items() if one.is_active))


PROVIDERS = select(
    *(
        llm_providers.c[name]
        for name in (
            "id",
            "name",
            "provider",
            "model",
            "base_url",
            "is_default",
            "use_case",
            "failover",
            "max_tokens",
            "context_tokens",
            "capabilities",
            "account_id",
            "catalogue",
            "priority",
            "retires_at",
            "successor",
            "price_override",
            "api_key_encrypted",
            "breaker",
            "requests_per_minute",
            "tokens_per_minute",
            "input_tokens_per_minute",
            "output_tokens_per_minute",
            "max_concurrent",
        )
    )
).where(llm_providers.c.is_active)

USE_CASES = select(
    use_cases.c.name,
    use_cases.c.description,
    use_cases.c.prefer,
    use_cases.c.max_tokens,
    use_cases.c.unknown_policy,
    use_cases.c.is_active,
)

KEYS = select(
    provider_keys.c.provider,
    provider_keys.c.account_id,
    provider_keys.c.api_key_encrypted,
    accounts.c.name.label("account"),
).outerjoin_from(provider_keys, accounts)

PAUSES = select(pauses.c.kind, pauses.c.subject)

_QUERIES: Final = (PROVIDERS, USE_CASES, KEYS, PAUSES)


def build(
    provider_rows: Iterable[Row[Any]],
    use_case_rows: Iterable[Row[Any]],
    key_rows: Iterable[Row[Any]],
    pause_rows: Iterable[Row[Any]],
) -> Catalogue:
    """Make a catalogue of rows as `PROVIDERS`, `USE_CASES`, `KEYS` and `PAUSES` select them."""
    providers = []
    for row in provider_rows:
        values = dict(row._mapping)
        for name in ("use_case", "failover", "capabilities"):
            values[name] = frozenset(values[name])
        providers.append(Provider(**values))
    keys = list(key_rows)
    paused: dict[str, set[str]] = {"provider": set(), "account": set(), "use_case": set()}
    for row in pause_rows:
        paused[row.kind].add(row.subject)
    return Catalogue(
        tuple(providers),
        {row.name: UseCase(**row._mapping) for row in use_case_rows},
        {(row.provider, row.account_id): row.api_key_encrypted for row in keys},
        {row.account_id: row.account for row in keys if row.account_id is not None},
        Pauses(
            providers=frozenset(map(UUID, paused["provider"])),
            accounts=frozenset(map(UUID, paused["account"])),
            use_cases=frozenset(paused["use_case"]),
        ),
    )


def read(connection: Connection) -> Catalogue:
    """Read the catalogue now, and book by the price list that the fleet books by."""
    adopted_prices.follow(connection)
    return build(*(connection.execute(query) for query in _QUERIES))


def invalidate(client: redis.Redis, prefix: str) -> None:
    """Tell every process that the catalogue has changed; call it after the commit."""
    client.set(prefix + VERSION_KEY, uuid4().hex)


def announce(settings: Settings) -> bool:
    """Do as `invalidate`, for a process without a client; return whether Redis has it."""
    client = make_redis(settings)
    try:
        invalidate(client, settings.redis_prefix)
    except redis.RedisError:
        return False
    finally:
        client.close()
    return True


class _Cached:
    """What both caches share: one reading, its age and its version token."""

    def __init__(
        self, *, prefix: str, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._key = prefix + VERSION_KEY
        self._ttl_s = ttl_s
        self._clock = clock
        self._value: Catalogue | None = None
        self._token: bytes | None = None
        self._read_at = 0.0
        self._checked_at = 0.0

    def _fresh(self) -> Catalogue | None:
        if self._value is not None and self._clock() - self._checked_at < _REVALIDATE_AFTER_S:
            return self._value
        return None

    def _still_valid(self, token: bytes | None) -> Catalogue | None:
        """Compare the token read from Redis; None means: read the rows."""
        now = self._clock()
        if self._value is None or token != self._token or now - self._read_at >= self._ttl_s:
            return None  # until the rows are read, what is known is not fresh
        self._checked_at = now
        return self._value

    def _keep(self, value: Catalogue, token: bytes | None) -> Catalogue:
        """Keep rows that were read after `token`; had the reading failed, it would be repeated."""
        self._token = token
        self._value = value
        self._read_at = self._checked_at = self._clock()
        return value


class CatalogueCache(_Cached):
    """The cache of a synchronous process; safe in threads (a race reads twice, harmlessly)."""

    def get(self, read_rows: Callable[[], Catalogue], client: redis.Redis) -> Catalogue:
        """Return the catalogue; `read_rows` is called when it has to be read."""
        fresh = self._fresh()
        if fresh is not None:
            return fresh
        try:
            token = cast("bytes | None", client.get(self._key))
        except redis.RedisError:
            # Redis only tells that a copy is old: without it the copy's own age decides.
            token = self._token
        return self._still_valid(token) or self._keep(read_rows(), token)


class AsyncCatalogueCache(_Cached):
    """The cache of an asyncio process."""

    def __init__(
        self, *, prefix: str, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(prefix=prefix, ttl_s=ttl_s, clock=clock)
        self._asking = asyncio.Lock()

    async def get(self, engine: AsyncEngine, client: redis.asyncio.Redis) -> Catalogue:
        """Return the catalogue, read again if it has changed."""
        fresh = self._fresh()
        if fresh is not None:
            return fresh
        # One asks. Whoever comes meanwhile goes by what is known, if it was right a moment ago:
        # after a pause in the work it may be as old as that.
        age_s = self._clock() - self._checked_at
        if self._asking.locked() and self._value is not None and age_s < _STALE_AFTER_S:
            return self._value
        async with self._asking:
            return self._fresh() or await self._ask(engine, client)

    async def _ask(self, engine: AsyncEngine, client: redis.asyncio.Redis) -> Catalogue:
        try:
            token = cast("bytes | None", await client.get(self._key))
        except redis.RedisError:
            token = self._token
        valid = self._still_valid(token)
        if valid is not None:
            return valid
        async with engine.connect() as connection:
            try:
                await connection.run_sync(adopted_prices.follow)
            except InvalidPriceList as problem:
                if self._value is None:
                    raise
                # Mid-work the list of before does, and every entry says by which it was booked.
                log.error("%s; going on with %s", problem, price_version())
            return self._keep(
                build(*[await connection.execute(query) for query in _QUERIES]), token
            )

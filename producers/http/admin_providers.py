"""Routes for provider rows: the models that jobs go to. Keys go in, and never come out."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints
from sqlalchemy import Connection
from starlette.responses import Response

from sluicegate.producers.http.administering import change, look
from sluicegate.producers.http.callers import Rule
from sluicegate.producers.http.problems import wrong
from sluicegate.producers.http.routes import Answer, Route, Visit, json_response
from sluicegate.producers.http.shapes import Shape, Told
from sluicegate.shared.accounts import account_id_of
from sluicegate.shared.catalogue import Capability, PoolName
from sluicegate.shared.pricing import context_window
from sluicegate.shared.provider_changes import (
    ProviderChange,
    add_provider,
    find_provider,
    no_provider,
    rates_of,
    set_provider,
    switch_provider,
)
from sluicegate.shared.provider_keys import is_sendable
from sluicegate.shared.provider_listing import describe, read_entries
from sluicegate.shared.secrets import Keyring, Secret
from sluicegate.shared.settings import Settings

#: Text on one line, such as a name or an address.
OneLine = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=1000)]
ModelName = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=200)]
Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Usd = Annotated[float, Field(ge=0, le=100_000, allow_inf_nan=False, strict=False)]

_DEFAULT_MAX_TOKENS: Final = 4096
_MAX_KEY_CHARS: Final = 4096
_TAG: Final = "providers"
#: Fields that the row calls otherwise.
_COLUMNS: Final[Mapping[str, str]] = {
    "use_cases": "use_case",
    "key": "api_key_encrypted",
    "prices": "price_override",
}
_APART: Final = ("name", "pool", "account", "is_active", "force")
#: What every row has: null leaves it as it is.
_NEVER_EMPTY: Final = ("model", "is_default", "max_tokens", "context_tokens", "priority")


class Prices(Shape):
    """What a million tokens cost, in US dollars."""

    input: _Usd
    output: _Usd
    cache_read: _Usd | None = None
    cache_write_5m: Annotated[_Usd | None, Field(alias="cacheWrite")] = None


class ProviderFields(Shape):
    """What a provider is.

    What is not given stays as it is, and what every provider has; null empties the rest.
    """

    account: OneLine | None = None
    model: ModelName | None = None
    base_url: OneLine | None = None
    #: Opens it; stored encrypted, and never answered.
    key: Annotated[str, StringConstraints(min_length=1, max_length=_MAX_KEY_CHARS)] | None = None
    use_cases: list[OneLine] | None = None
    failover: list[OneLine] | None = None
    #: Whether it serves what no other provider claims.
    is_default: bool | None = None
    max_tokens: Tokens | None = None
    context_tokens: Tokens | None = None
    capabilities: list[Capability] | None = None
    #: Lower is tried first.
    priority: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    prices: Prices | None = None
    requests_per_minute: Tokens | None = None
    tokens_per_minute: Tokens | None = None
    input_tokens_per_minute: Tokens | None = None
    output_tokens_per_minute: Tokens | None = None
    max_concurrent: Tokens | None = None
    retires_at: AwareDatetime | None = None
    successor: OneLine | None = None


class NewProvider(ProviderFields):
    """A provider to be added."""

    name: OneLine
    pool: PoolName
    model: ModelName


class ProviderPatch(ProviderFields):
    """Changes of a provider."""

    is_active: bool | None = None
    #: Even if jobs have nowhere to go then.
    force: bool = False


class ProviderOf(BaseModel):
    """Whose provider row it is: this account's own; everybody's if not given."""

    model_config = ConfigDict(extra="forbid")

    account: OneLine | None = None


class ForcedProviderOf(ProviderOf):
    """Whose row it is, and whether it goes even if jobs have nowhere to go then."""

    force: bool = False


class ProviderTold(Told):
    """A provider."""

    id: str
    name: str
    #: Whose it is; null: everybody's.
    account: str | None
    pool: PoolName
    model: str
    base_url: str | None
    is_active: bool
    is_default: bool
    use_cases: list[str]
    failover: list[str]
    priority: int
    max_tokens: int
    context_tokens: int
    capabilities: list[str]
    input_usd_per_million: float | None
    output_usd_per_million: float | None
    #: Nano-USD a token, by class; null: the price list knows.
    price_override: dict[str, float] | None
    #: Where its key comes from; null: there is none.
    key: Literal["account_row", "account", "environment", "row", "database"] | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    input_tokens_per_minute: int | None
    output_tokens_per_minute: int | None
    max_concurrent: int | None
    retires_at: datetime | None
    successor: str | None
    catalogue: str | None


class ProvidersTold(Told):
    """All providers."""

    providers: list[ProviderTold]


async def list_all(visit: Visit) -> Response:
    """List all rows, active or not."""
    found = await look(visit, lambda line: read_entries(line, visit.settings))
    return json_response({"providers": [ProviderTold.of(describe(*one)) for one in found]})


async def show(visit: Visit) -> Response:
    """Show one row."""
    name, whose = visit.request.path_params["name"], visit.query(ProviderOf)
    return json_response(
        await look(visit, lambda line: _read(line, visit.settings, name, whose.account))
    )


async def add(visit: Visit) -> Response:
    """Add a row."""
    asked = await visit.read(NewProvider)
    given = asked.model_dump(exclude_unset=True)
    room = given.get("context_tokens") or context_window(asked.pool, asked.model)
    if room is None:
        raise wrong("contextTokens", f"how many tokens {asked.model} takes is not known; give it")
    given |= {
        "context_tokens": room,
        "max_tokens": given.get("max_tokens") or min(_DEFAULT_MAX_TOKENS, room),
    }

    def work(line: Connection) -> ProviderTold:
        # What is null is not there yet.
        fields = {name: value for name, value in given.items() if value is not None}
        made = _change(fields, visit.settings, price_before=None)
        add_provider(line, asked.name, asked.pool, made, account=asked.account)
        return _read(line, visit.settings, asked.name, asked.account)

    return json_response(await change(visit, work, catalogue=True), 201)


async def patch(visit: Visit) -> Response:
    """Change what is given of a row."""
    name = visit.request.path_params["name"]
    asked = await visit.read(ProviderPatch)
    given = {
        name: value
        for name, value in asked.model_dump(exclude_unset=True).items()
        if value is not None or name not in _NEVER_EMPTY
    }
    mode, account = visit.settings.catalogue, asked.account

    def work(line: Connection) -> ProviderTold:
        before = find_provider(line, name, account)
        made = _change(given, visit.settings, price_before=before.price_override)
        if made.model_fields_set:
            set_provider(line, name, made, account=account, mode=mode, force=asked.force)
        if asked.is_active is not None:
            active = asked.is_active
            # An account's row hides everybody's of the same name: that is what it is for.
            force = asked.force or active
            switch_provider(line, name, active=active, account=account, mode=mode, force=force)
        return _read(line, visit.settings, name, account)

    return json_response(await change(visit, work, catalogue=True))


async def remove(visit: Visit) -> Response:
    """Take a row out of use: what it has done is booked in its name, so it stays in the list."""
    name, asked = visit.request.path_params["name"], visit.query(ForcedProviderOf)
    mode, account = visit.settings.catalogue, asked.account

    def work(line: Connection) -> ProviderTold:
        switch_provider(line, name, active=False, account=account, mode=mode, force=asked.force)
        return _read(line, visit.settings, name, account)

    return json_response(await change(visit, work, catalogue=True))


def _read(line: Connection, settings: Settings, name: str, account: str | None) -> ProviderTold:
    account_id = account_id_of(line, account)
    found = read_entries(line, settings)
    for entry, key in found:
        if entry.provider.name == name and entry.provider.account_id == account_id:
            return ProviderTold.of(describe(entry, key))
    known = [e.provider.name for e, _ in found if e.provider.account_id == account_id]
    raise no_provider(name, known, account)


def _change(
    given: Mapping[str, Any], settings: Settings, *, price_before: Mapping[str, float] | None
) -> ProviderChange:
    """Make the change of what is given; a price takes the rates that are not from before."""
    fields = {
        _COLUMNS.get(name, name): value for name, value in given.items() if name not in _APART
    }
    for names in ("use_case", "failover", "capabilities"):
        if names in fields:
            fields[names] = frozenset(fields[names] or ())
    if prices := given.get("prices"):
        usd = {rate: value for rate, value in prices.items() if value is not None}
        fields["price_override"] = {**(price_before or {}), **rates_of(usd)}
    if key := given.get("key"):
        fields["api_key_encrypted"] = _encrypted(Secret(key.strip()), settings)
    return ProviderChange.of(**fields)


def _encrypted(key: Secret, settings: Settings) -> str:
    if not key or not is_sendable(key):
        raise wrong("key", "must be one line of printable ASCII characters")
    keyring = Keyring.of(settings)
    keyring.check()
    return keyring.encrypt(key)


_ONE: Final = Answer(description="The provider as it is now.", model=ProviderTold)

ROUTES: Final = (
    Route(
        method="GET",
        path="/api/providers",
        rule=Rule.ADMIN,
        handler=list_all,
        summary="List providers",
        tag=_TAG,
        answers={200: Answer(description="All providers.", model=ProvidersTold)},
    ),
    Route(
        method="POST",
        path="/api/providers",
        rule=Rule.ADMIN,
        handler=add,
        summary="Add a provider",
        tag=_TAG,
        body=NewProvider,
        answers={201: _ONE},
    ),
    Route(
        method="GET",
        path="/api/providers/{name}",
        rule=Rule.ADMIN,
        handler=show,
        summary="Show a provider",
        tag=_TAG,
        query=ProviderOf,
        answers={200: _ONE},
    ),
    Route(
        method="PATCH",
        path="/api/providers/{name}",
        rule=Rule.ADMIN,
        handler=patch,
        summary="Change a provider",
        tag=_TAG,
        body=ProviderPatch,
        answers={200: _ONE},
    ),
    Route(
        method="DELETE",
        path="/api/providers/{name}",
        rule=Rule.ADMIN,
        handler=remove,
        summary="Take a provider out of use",
        tag=_TAG,
        query=ForcedProviderOf,
        answers={200: _ONE},
    ),
)

"""The price list that the fleet has adopted: kept in Postgres, so that all processes book by one.

Whoever reads the catalogue follows it: a version is compared, and the list is read only when it
is another. `sluice prices update` adopts one and then announces a change of the catalogue.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection, func, select
from sqlalchemy.dialects.postgresql import insert

from sluicegate.shared.errors import SluiceError
from sluicegate.shared.price_lists import InvalidPriceList, PriceList, in_use, use
from sluicegate.shared.tables import price_lists

_NEWEST: Final = (
    select(price_lists.c.version)
    .order_by(price_lists.c.adopted_at.desc(), price_lists.c.version.desc())
    .limit(1)
)
#: On Postgres' clock, as all times.
_VERSION: Final = func.to_char(
    func.timezone("UTC", func.now()), '"list "YYYY-MM-DD"T"HH24:MI:SS"Z"'
)


def follow(connection: Connection) -> None:
    """Book by the list that the fleet has adopted; raise InvalidPriceList if it cannot be read."""
    version = connection.scalar(_NEWEST)
    if version is None:
        use(None)
    elif version != in_use().version:
        use(_read(version, _data(connection, version)))


def adopt(connection: Connection, prices: PriceList) -> PriceList | None:
    """Have the fleet book by this list; return it under its new name.

    None: the fleet books by the same list already. Call `catalogue.announce` after the commit.
    """
    data = prices.as_json()
    newest = connection.scalar(_NEWEST)
    if newest is not None and _data(connection, newest) == data:
        return None
    version = connection.scalar(
        insert(price_lists)
        .values(version=_VERSION, data=data)
        .on_conflict_do_nothing()
        .returning(price_lists.c.version)
    )
    if version is None:
        raise SluiceError("another price list was adopted this very second: look, and try again")
    return _read(version, data)


def _data(connection: Connection, version: str) -> Any:
    return connection.scalar(select(price_lists.c.data).where(price_lists.c.version == version))


def _read(version: str, data: Any) -> PriceList:
    try:
        return PriceList.of(version, data)
    except InvalidPriceList as error:
        raise InvalidPriceList(
            f"the fleet books by the price {version}, which cannot be read here: {error}"
        ) from error

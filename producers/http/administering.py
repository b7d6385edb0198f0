"""Administrative work of routes: what commands do, in threads, in the caller's name.

It is rare, and made of the same functions that commands use, which block. Each piece has a
connection of its own for as long as it takes, so that it never holds up what serves jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar
from uuid import UUID

import redis
from anyio import CapacityLimiter, to_thread
from psycopg import DataError
from pydantic.alias_generators import to_camel
from sqlalchemy import Connection

from sluicegate.producers.http.problems import Problem, wrong
from sluicegate.producers.http.routes import Visit
from sluicegate.shared.accounts import find_account
from sluicegate.shared.audit import Actor
from sluicegate.shared.catalogue import announce
from sluicegate.shared.catalogue_changes import BadField
from sluicegate.shared.connecting import connection, transaction
from sluicegate.shared.errors import (
    InvalidJob,
    QueueUnavailable,
    SettingsError,
    UnknownPrice,
)
from sluicegate.shared.redis_client import make_redis
from sluicegate.shared.settings import Settings

T = TypeVar("T")

#: Pieces of such work that are done at a time.
_THREADS: Final = 4
#: What callers of these routes call fields that we call otherwise.
_NAMES: Final = {
    "use_case": "useCases",
    "price_override": "prices",
    "price": "prices",
    "api_key_encrypted": "key",
}


async def look(visit: Visit, work: Callable[[Connection], T]) -> T:
    """Read something; raises `Problem`, `SluiceError`."""

    def run() -> T:
        with connection(visit.settings, _actor(visit)) as line:
            return work(line)

    return await _in_thread(visit, run)


async def change(visit: Visit, work: Callable[[Connection], T], *, catalogue: bool = False) -> T:
    """Change something, all or nothing, in the caller's name; raises `Problem`, `SluiceError`.

    catalogue: tell the processes that run that the catalogue has changed.
    """

    def run() -> T:
        with transaction(visit.settings, _actor(visit)) as line:
            done = work(line)
        if catalogue:
            # Without Redis they see it a little later: SLUICE_CATALOGUE_TTL_S.
            announce(visit.settings)
        return done

    return await _in_thread(visit, run)


async def at_gates(visit: Visit, work: Callable[[redis.Redis], T]) -> T:
    """Do something with what Redis knows of the gates; raises as `look`."""

    def run() -> T:
        with redis_client(visit.settings) as client:
            return work(client)

    return await _in_thread(visit, run)


@contextmanager
def redis_client(settings: Settings) -> Iterator[redis.Redis]:
    """Connect to Redis, for work in a thread; raises `QueueUnavailable`."""
    try:
        with make_redis(settings) as client:
            yield client
    except (redis.RedisError, OSError) as error:
        raise QueueUnavailable("Redis did not answer; try again") from error


def account_id_meant(visit: Visit, line: Connection, named: str | None) -> UUID | None:
    """Return the id of the account that a caller means; see `Caller.account_meant`."""
    meant = visit.known.account_meant(named)
    return None if meant is None else find_account(line, meant).id


async def _in_thread(visit: Visit, run: Callable[[], T]) -> T:
    state = visit.request.app.state
    if not hasattr(state, "administering"):
        state.administering = CapacityLimiter(_THREADS)

    def worded() -> T:
        with _worded():
            return run()

    return await to_thread.run_sync(worded, limiter=state.administering)


@contextmanager
def _worded() -> Iterator[None]:
    """Tell what the caller is to blame for from what stands in the way."""
    try:
        yield
    except (BadField, InvalidJob) as error:
        raise wrong(field_name(error.field), error.problem) from None
    except UnknownPrice as error:
        raise wrong("prices", str(error)) from None
    except SettingsError as error:
        raise Problem(409, "conflict", str(error)) from None
    except QueueUnavailable as error:
        # Text that Postgres cannot hold, such as a NUL in a name.
        if isinstance(getattr(error.__cause__, "orig", None), DataError):
            sentence = "a value is not one that can be stored"
            raise Problem(400, "invalid_request", sentence) from None
        raise


def field_name(ours: str) -> str:
    """Return what callers of these routes call a field of ours."""
    return _NAMES.get(ours, to_camel(ours))


def _actor(visit: Visit) -> Actor:
    return Actor(name=visit.known.subject, request_id=visit.request_id)

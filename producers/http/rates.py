"""How often a caller may ask: a token bucket in Redis for each, shared by all HTTP processes."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import redis.asyncio
from redis.exceptions import NoScriptError

from sluicegate.producers.http.problems import Problem
from sluicegate.shared.settings import Settings

log = logging.getLogger(__name__)

_SCRIPT: Final = (Path(__file__).parent / "rates.lua").read_text("utf-8")
_SHA: Final = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()
#: What was taken in advance is given up after this long, and is this share of a burst at most.
_LEASE_S: Final = 0.25
_LEASE_SHARE: Final = 20
_CALLERS_KEPT: Final = 10_000
#: After Redis did not answer, how long it is not asked: requests go on without this limit.
_AWAY_S: Final = 5.0


@dataclass(slots=True)
class _Lease:
    """What this process may let through for a caller without asking Redis."""

    left: int = 0
    until: float = 0.0
    #: How many were asked for last.
    size: int = 1
    #: Nobody is let through before.
    closed_until: float = 0.0
    #: Held by the one who asks Redis; the others wait for what he brings.
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)


class Rates:
    """Counts requests by caller.

    A busy caller's requests are taken some at a time, so that most of them cost Redis nothing.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._prefix = settings.redis_prefix
        self._rate = settings.http_rate_per_s
        self._burst = settings.http_rate_burst
        self._most = max(1, self._burst // _LEASE_SHARE)
        self._clock = clock
        #: Those who have not asked for longest come first, and go.
        self._leases: OrderedDict[str, _Lease] = OrderedDict()
        self._away_until = 0.0

    async def take(self, subject: str) -> None:
        """Count one request of this caller; raise `Problem` (429) if it comes too soon."""
        lease = self._lease(subject)
        if not self._let_through(lease):
            async with lease.asking:
                if not self._let_through(lease):
                    await self._refill(subject, lease)

    async def charge(self, subject: str, amount: int) -> None:
        """Count so many more of this caller's, which go on: those after them wait for it.

        A burst at most, so that one long list does not shut its caller out for long.
        """
        if amount <= 0 or self._away_until > self._clock():
            return
        lease = self._lease(subject)
        async with lease.asking:
            lease.left = 0
            await self._ask(subject, min(amount, self._burst), is_owed=True)

    def _lease(self, subject: str) -> _Lease:
        lease = self._leases.get(subject)
        if lease is None:
            lease = self._leases[subject] = _Lease()
            if len(self._leases) > _CALLERS_KEPT:
                self._leases.popitem(last=False)
        else:
            self._leases.move_to_end(subject)
        return lease

    def _let_through(self, lease: _Lease) -> bool:
        """Whether Redis need not be asked; raise `Problem` if that is known to be in vain."""
        now = self._clock()
        if lease.closed_until > now:
            raise self._too_many(lease.closed_until - now)
        if lease.left and lease.until > now:
            lease.left -= 1
            return True
        return self._away_until > now

    async def _refill(self, subject: str, lease: _Lease) -> None:
        """Take more from the bucket, one of it for whoever asks; raise `Problem` if it is empty."""
        # One that was used up in time was too small.
        is_busy = lease.until > self._clock()
        lease.size = min(self._most, lease.size * 2) if is_busy else 1
        found = await self._ask(subject, lease.size)
        if found is None:
            return
        taken, wait_ms = found
        now = self._clock()
        if not taken:
            lease.closed_until = now + wait_ms / 1000
            raise self._too_many(wait_ms / 1000)
        lease.left, lease.until = taken - 1, now + _LEASE_S

    async def _ask(
        self, subject: str, wanted: int, *, is_owed: bool = False
    ) -> tuple[int, int] | None:
        """Return what the script does; None: Redis is away."""
        # Hashed: a subject may be a person's name, and keys are seen by whoever watches Redis.
        digest = hashlib.sha256(subject.encode()).hexdigest()[:32]
        arguments: list[Any] = [1, f"{self._prefix}http:1:rate:{digest}"]
        arguments += [self._rate, self._burst, wanted, int(is_owed)]
        found: Any
        try:
            try:
                found = await self._client.evalsha(_SHA, *arguments)
            except NoScriptError:
                found = await self._client.eval(_SCRIPT, *arguments)
        except (redis.RedisError, OSError) as error:
            log.warning("Redis did not answer, so requests are not limited: %s", error)
            self._away_until = self._clock() + _AWAY_S
            return None
        return int(found[0]), int(found[1])

    def _too_many(self, wait_s: float) -> Problem:
        return Problem(
            429,
            "rate_limited",
            f"too many requests: this key may make {self._rate:g} a second; wait and try again",
            retry_after_s=max(1, math.ceil(wait_s)),
        )

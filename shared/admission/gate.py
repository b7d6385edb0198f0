"""The gate: asks Redis whether calls may leave, and tells it how they ended.

One Lua call each, many in a pipeline. What is asked for twice under one attempt id counts once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from random import Random
from typing import Any
from uuid import UUID

import orjson
import redis.asyncio
from redis.exceptions import NoScriptError

from sluicegate.shared.admission import keys
from sluicegate.shared.admission.breaker import BreakerPolicy
from sluicegate.shared.admission.headroom import Headroom
from sluicegate.shared.admission.limits import LimitPolicy, row_limits
from sluicegate.shared.catalogue import Provider
from sluicegate.shared.jobs import Lane
from sluicegate.shared.settings import Settings

#: What is longer than this, as headers may say, is this long.
_LONGEST_S = 1e9
#: Longest message in the trail.
_MESSAGE_MAX = 300
#: Attempts that one call of the script renews: Redis serves nobody else meanwhile.
_RENEW_MAX = 500


class Reason(StrEnum):
    """Why a call may not leave now."""

    BREAKER = "breaker"
    COOLDOWN = "cooldown"
    REQUESTS = "requests"
    TOKENS = "tokens"
    CONCURRENCY = "concurrency"
    RETRIES = "retries"
    SUSPENDED = "suspended"
    #: A budget of the account's, by the copy in Redis: by what is spent, or by what is held too.
    BUDGET_SPENT = "budget_spent"
    BUDGET_HELD = "budget_held"


#: As the script numbers them; 0: admitted.
_REASONS: tuple[Reason | None, ...] = (None, *Reason)


class Outcome(StrEnum):
    """How a call ended, as far as the gate is concerned."""

    SUCCEEDED = "succeeded"
    #: Counts against the breaker.
    FAILED = "failed"
    #: Counts against the breaker, and the row takes fewer calls at a time (503, 529).
    OVERLOADED = "overloaded"
    #: The same, for no answer within a deadline.
    TIMED_OUT = "timed_out"
    #: The row rests, and takes fewer calls at a time (429); neither success nor failure.
    THROTTLED = "throttled"
    #: The row is suspended for the account (401, 402, 403, quota); neither.
    REFUSED = "refused"
    #: Another 4xx, a cancellation, a fault of ours; neither.
    NEUTRAL = "neutral"
    #: The call never left: all that was taken is given back; neither.
    RETURNED = "returned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A call that would like to leave."""

    attempt_id: UUID
    provider: Provider
    account_id: UUID
    lane: Lane
    #: Both as estimated; what is used beyond or below it is corrected by the report.
    input_tokens: int
    output_tokens: int
    #: What it may cost at most; None: the account's budgets are not asked.
    cost_nano_usd: int | None = None
    use_case: str = ""
    #: The job was called for at this row before.
    is_retry: bool = False
    #: False: only look whether it could; nothing is written.
    take: bool = True
    #: A refusal is given its turn in the lane's line, so that not all come back at once.
    line_up: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer to an `Ask`."""

    #: None: admitted (or, when only looking, it would be).
    reason: Reason | None
    #: Until it may be worth asking again; 0 when admitted.
    wait_s: float = 0.0
    #: Of the breaker, to be handed back in the report.
    generation: int = 0
    #: It is one of the few that a half-open breaker lets through.
    is_probe: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How an admitted call ended."""

    attempt_id: UUID
    provider: Provider
    account_id: UUID
    lane: Lane
    #: Both as in the verdict.
    generation: int
    is_probe: bool
    outcome: Outcome
    #: Both as in the ask.
    reserved_input_tokens: int
    reserved_output_tokens: int
    #: None: not known, what was reserved stays taken.
    used_input_tokens: int | None = None
    used_output_tokens: int | None = None
    #: What `Retry-After` or the reset headers ask for.
    cooldown_s: float | None = None
    headroom: Headroom | None = None
    #: Why, for the trail; no prompt, no key.
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A probe whose first token has come; all as asked for and in the verdict."""

    attempt_id: UUID
    provider: Provider
    generation: int


class Gate:
    """The gate of all provider rows, for asyncio.

    `clock_offset_us` moves the clock, for tests. Its methods raise `RedisError` or `OSError`
    when Redis cannot be asked; what they sent may then have been done, and can be sent again.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        settings: Settings,
        *,
        clock_offset_us: int = 0,
        random: Random | None = None,
    ) -> None:
        self.clock_offset_us = clock_offset_us
        self._client = client
        self._prefix = settings.redis_prefix
        self._breaker = BreakerPolicy.of(settings)
        self._limits = LimitPolicy.of(settings)
        self._random = random or Random()  # noqa: S311 - spreads breakers, guards nothing
        self._ttl_ms = keys.ttl_ms(self._limits.cooldown_max_us, self._limits.suspension_us)
        self._heads: dict[UUID, tuple[Provider, tuple[bytes, ...]]] = {}

    async def admit(self, asks: Sequence[Ask]) -> list[Verdict]:
        """Answer each ask, in their order; those admitted hold what they asked for."""
        calls = [
            (
                *self._head(ask.provider),
                self._call(
                    attempt=ask.attempt_id.hex,
                    account=str(ask.account_id),
                    lane=ask.lane,
                    input=ask.input_tokens,
                    output=ask.output_tokens,
                    is_retry=ask.is_retry,
                    take=ask.take,
                    line_up=ask.line_up,
                    **self._budgets(ask),
                ),
            )
            for ask in asks
        ]
        return [
            Verdict(
                reason=_REASONS[code],
                wait_s=wait_us / 1e6,
                generation=generation,
                is_probe=bool(is_probe),
            )
            for code, wait_us, generation, is_probe in await self._run(keys.ADMIT, calls)
        ]

    async def report(self, reports: Sequence[Report]) -> None:
        """Say how calls ended: slots, probe permits and unused tokens are given back."""
        calls = []
        for report in reports:
            said: dict[str, object] = {
                "attempt": report.attempt_id.hex,
                "account": str(report.account_id),
                "lane": report.lane,
                "generation": report.generation,
                "outcome": report.outcome,
                "reserved_input": report.reserved_input_tokens,
                "reserved_output": report.reserved_output_tokens,
                "message": report.message[:_MESSAGE_MAX].encode(errors="replace").decode(),
            }
            if report.used_input_tokens is not None:
                said["used_input"] = report.used_input_tokens
            if report.used_output_tokens is not None:
                said["used_output"] = report.used_output_tokens
            if report.cooldown_s is not None:
                said["cooldown_us"] = _micros(report.cooldown_s)
            if report.headroom is not None:
                said["left"] = _left(report.headroom)
            calls.append((*self._head(report.provider), self._call(**said)))
        await self._run(keys.REPORT, calls)

    async def probed(self, probes: Sequence[Probe]) -> None:
        """Say that probes have had their first token: it closes the breaker now."""
        calls = [
            (
                *self._head(probe.provider),
                self._call(
                    attempt=probe.attempt_id.hex,
                    outcome="first_token",
                    generation=probe.generation,
                ),
            )
            for probe in probes
        ]
        await self._run(keys.REPORT, calls)

    async def renew(self, leases: Mapping[UUID, Sequence[UUID]]) -> None:
        """Keep the slots and probe permits of attempts in flight, given by provider row."""
        calls = [
            (
                4,
                *self._keys(provider_id)[:4],
                self.clock_offset_us,
                self._limits.lease_us,
                self._ttl_ms,
                *(attempt.hex for attempt in attempts[start : start + _RENEW_MAX]),
            )
            for provider_id, attempts in leases.items()
            for start in range(0, len(attempts), _RENEW_MAX)
        ]
        await self._run(keys.RENEW, calls)

    def _keys(self, provider_id: UUID) -> tuple[str, ...]:
        return (
            keys.row_key(self._prefix, provider_id),
            keys.flight_key(self._prefix, provider_id),
            keys.bulk_key(self._prefix, provider_id),
            keys.probes_key(self._prefix, provider_id),
            keys.suspended_key(self._prefix, provider_id),
            keys.changes_key(self._prefix),
        )

    def _head(self, provider: Provider) -> tuple[bytes, ...]:
        """Return what every call for a row begins with: its keys and policies, ready to be sent."""
        known = self._heads.get(provider.id)
        if known is None or known[0] is not provider:
            # A changed row is a new object, so this is made again when the catalogue is read.
            policy = {
                "provider_id": str(provider.id),
                "lever": provider.breaker,
                "ttl_ms": self._ttl_ms,
                **asdict(self._breaker),
                **asdict(self._limits),
                **row_limits(provider),
            }
            row_keys = [key.encode() for key in self._keys(provider.id)]
            head = (b"%d" % len(row_keys), *row_keys, orjson.dumps(policy))
            known = self._heads[provider.id] = (provider, head)
        return known[1]

    def _budgets(self, ask: Ask) -> dict[str, object]:
        if ask.cost_nano_usd is None:
            return {}
        return {
            "budgets": keys.budgets_key(self._prefix, ask.account_id),
            "cost": ask.cost_nano_usd,
            "use_case": ask.use_case,
        }

    def _call(self, **said: object) -> bytes:
        said["offset_us"] = self.clock_offset_us
        said["random_ppm"] = self._random.randrange(1_000_000)
        return orjson.dumps(said)

    async def _run(self, script: keys.Script, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        if not calls:
            return []
        replies = await self._send(script, calls)
        unseen = [n for n, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unseen:
            # A restarted server has forgotten the script, and has done nothing.
            await self._client.script_load(script.source)
            again = await self._send(script, [calls[n] for n in unseen])
            for n, reply in zip(unseen, again, strict=True):
                replies[n] = reply
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def _send(self, script: keys.Script, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipeline:
            for call in calls:
                pipeline.execute_command("EVALSHA", script.sha, *call)
            replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies


def _micros(seconds: float) -> int:
    return round(min(max(0.0, seconds), _LONGEST_S) * 1e6)


def _left(headroom: Headroom) -> dict[str, int]:
    left = {
        "requests": headroom.requests,
        "tokens": headroom.tokens,
        "input": headroom.input_tokens,
        "output": headroom.output_tokens,
        "reset_us": None if headroom.reset_s is None else _micros(headroom.reset_s),
    }
    return {name: value for name, value in left.items() if value is not None}

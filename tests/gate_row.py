"""One provider row's gate in a test's hands: its time stands still until the test moves it.

A row's time never goes back, so a gate whose own clock is far behind goes by the row's.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any
from uuid import UUID

import redis
import redis.asyncio

from sluicegate.shared.admission import keys
from sluicegate.shared.admission.gate import Ask, Gate, Outcome, Probe, Report, Verdict
from sluicegate.shared.admission.states import GateState, read_states
from sluicegate.shared.catalogue import Provider
from sluicegate.shared.jobs import Lane
from sluicegate.shared.settings import Settings

ROW_ID = UUID(int=0xFEED)
ACCOUNT, OTHER_ACCOUNT = UUID(int=1), UUID(int=2)


def provider(**values: Any) -> Provider:
    """Return a provider row with these limits and this lever."""
    given: dict[str, Any] = {
        "id": ROW_ID,
        "name": "gated",
        "provider": "openai",
        "model": "gpt-6-luna",
        "base_url": None,
        "is_default": True,
        "use_case": frozenset(),
        "failover": frozenset(),
        "max_tokens": 1000,
        "context_tokens": 100_000,
        "capabilities": frozenset(),
        "account_id": None,
        "catalogue": None,
        "priority": 1,
        "retires_at": None,
        "successor": None,
        "price_override": None,
    }
    return Provider(**(given | values))


class Chance(random.Random):
    """Gives what it is told to; at first neither more nor less than a fifth."""

    ppm = 500_000

    def randrange(self, *_: Any, **__: Any) -> int:
        return self.ppm


class Server:
    """A Redis of any kind, with a loop for the asyncio client."""

    def __init__(self, plain: redis.Redis, asynchronous: redis.asyncio.Redis) -> None:
        self.plain = plain
        self.asynchronous = asynchronous
        self.runner = asyncio.Runner()

    def close(self) -> None:
        self.runner.run(self.asynchronous.aclose())
        self.runner.close()


class GateRow:
    """A row nobody has called for yet."""

    #: What puts a clock far behind the row's own.
    behind_us = -(10**15)

    def __init__(self, server: Server, settings: Settings, **limits: Any) -> None:
        self.server = server
        self.prefix = settings.redis_prefix
        self.key = keys.row_key(self.prefix, ROW_ID)
        self.provider = provider(**limits)
        self.chance = Chance()
        self.gate = Gate(
            server.asynchronous, settings, clock_offset_us=self.behind_us, random=self.chance
        )
        self.attempts = 0
        self.sets = [
            of(self.prefix, ROW_ID)
            for of in (keys.flight_key, keys.bulk_key, keys.probes_key, keys.suspended_key)
        ]
        server.plain.delete(self.key, keys.changes_key(self.prefix), *self.sets)
        self.now_us = 10**15 + 123_456
        self.wait(0)

    @property
    def now(self) -> float:
        """The row's time, in seconds."""
        return self.now_us / 1e6

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now_us += round(seconds * 1e6)
        self.server.plain.hset(self.key, "last", str(self.now_us))

    def new(self, lane: Lane = Lane.INTERACTIVE, **values: Any) -> Ask:
        """Return an ask that nobody has made yet."""
        self.attempts += 1
        given: dict[str, Any] = {
            "account_id": ACCOUNT,
            "input_tokens": 100,
            "output_tokens": 60,
        } | values
        attempt_id = UUID(int=self.attempts)
        return Ask(attempt_id=attempt_id, provider=self.provider, lane=lane, **given)

    def admit(self, *asks: Ask) -> list[Verdict]:
        return self.server.runner.run(self.gate.admit(asks))

    def ask(self, lane: Lane = Lane.INTERACTIVE, **values: Any) -> Verdict:
        """Ask for one more call."""
        return self.admit(self.new(lane, **values))[0]

    def call(self, lane: Lane = Lane.INTERACTIVE, **values: Any) -> tuple[Ask, Verdict]:
        """Ask for one more call, which must be admitted."""
        ask = self.new(lane, **values)
        (verdict,) = self.admit(ask)
        assert verdict.reason is None, verdict
        return ask, verdict

    def end(self, call: tuple[Ask, Verdict], outcome: Outcome, **values: Any) -> None:
        """Report how a call ended."""
        ask, verdict = call
        given: dict[str, Any] = {
            "provider": self.provider,
            "generation": verdict.generation,
            "is_probe": verdict.is_probe,
            "message": "it said so",
        }
        report = Report(
            attempt_id=ask.attempt_id,
            account_id=ask.account_id,
            lane=ask.lane,
            outcome=outcome,
            reserved_input_tokens=ask.input_tokens,
            reserved_output_tokens=ask.output_tokens,
            **(given | values),
        )
        self.server.runner.run(self.gate.report([report]))

    def make(self, outcome: Outcome, times: int = 1, **values: Any) -> None:
        """Make calls that end like this, one after the other."""
        for _ in range(times):
            self.end(self.call(), outcome, **values)

    def first_token(self, probe: Probe) -> None:
        self.server.runner.run(self.gate.probed([probe]))

    def renew(self, *calls: tuple[Ask, Verdict]) -> None:
        attempts = [ask.attempt_id for ask, _ in calls]
        self.server.runner.run(self.gate.renew({ROW_ID: attempts}))

    def pull(self, lever: str) -> None:
        """Do what an operator does to the breaker."""
        values = {name: getattr(self.provider, name) for name in Provider.__dataclass_fields__}
        self.provider = Provider(**(values | {"breaker": lever}))

    def state(self) -> GateState:
        (state,) = read_states(
            self.server.plain, self.prefix, [ROW_ID], clock_offset_us=self.behind_us
        )
        return state

    @property
    def changes(self) -> list[tuple[str, ...]]:
        """The trail: kind, account, before, after, reason."""
        entries: Any = self.server.plain.xrange(keys.changes_key(self.prefix))
        names = (b"kind", b"account_id", b"before", b"after", b"reason")
        return [tuple(entry[name].decode() for name in names) for _, entry in entries]

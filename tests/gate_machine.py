"""Hypothesis takes a gate and its model through the same life, and both must answer alike.

Run against fakeredis and against the real server. Time stands still while a script runs: the row
itself says when it is, through `last`, and the server's own clock is far behind it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from typing import Any, ClassVar, cast
from uuid import UUID

import redis
import redis.asyncio
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sluicegate.shared.admission import keys
from sluicegate.shared.admission.gate import Ask, Gate, Outcome, Probe, Reason, Report, Verdict
from sluicegate.shared.admission.headroom import Headroom
from sluicegate.shared.admission.states import BreakerState, GateState, read_states, reset
from sluicegate.shared.catalogue import Provider
from sluicegate.shared.jobs import Lane
from sluicegate.shared.settings import Settings
from tests.gate_model import DIMENSIONS, MILLION, GateModel
from tests.harness import FULL

ACCOUNTS = [UUID(int=1), UUID(int=2)]
ROW_ID = UUID(int=0xFEED)
TOKENS = st.sampled_from([0, 1, 40, 160, 900, 3_000])
#: Behind every row's own time.
LONG_AGO_US = -(10**15)


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
    """Gives what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.ppm = 0

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


class GateMachine(RuleBasedStateMachine):
    """What both machines can do; `settings` and `limits` make one of them."""

    server: ClassVar[Server]
    settings: ClassVar[Settings]
    limits: ClassVar[dict[str, Any]]

    @initialize()
    def begin(self) -> None:
        self.chance = Chance()
        self.gate = Gate(
            self.server.asynchronous,
            self.settings,
            clock_offset_us=LONG_AGO_US,
            random=self.chance,
        )
        self.model = GateModel(self.settings)
        self.provider = provider(**self.limits)
        self.prefix = self.settings.redis_prefix
        self.row = keys.row_key(self.prefix, ROW_ID)
        self.asked: list[tuple[Ask, Verdict]] = []
        self.admitted: list[tuple[Ask, Verdict]] = []
        self.attempts = 0
        self.server.plain.delete(self.row, keys.changes_key(self.prefix), *self._sets())
        self.now = 10**15 + 123_456
        self._set_time()

    def _sets(self) -> list[str]:
        return [
            of(self.prefix, ROW_ID)
            for of in (keys.flight_key, keys.bulk_key, keys.probes_key, keys.suspended_key)
        ]

    def _set_time(self) -> None:
        self.server.plain.hset(self.row, "last", str(self.now))

    def _new(self, **values: Any) -> Ask:
        self.attempts += 1
        return Ask(attempt_id=UUID(int=self.attempts), provider=self.provider, **values)

    def _admit(self, ask: Ask) -> Verdict:
        (verdict,) = self.server.runner.run(self.gate.admit([ask]))
        assert verdict == self.model.admit(ask, self.now, self.chance.ppm), ask
        return verdict

    def _report(self, report: Report) -> None:
        self.server.runner.run(self.gate.report([report]))
        self.model.report(report, self.now, self.chance.ppm)

    def _everything(self) -> Any:
        """Return all that is in Redis about the row."""
        plain = self.server.plain
        sets = [plain.zrange(key, 0, -1, withscores=True) for key in self._sets()]
        return plain.hgetall(self.row), sets, plain.xlen(keys.changes_key(self.prefix))

    @rule(
        seconds=st.sampled_from([0.0004, 0.02, 0.3, 0.5, 1, 2, 4.5, 6, 15, 15.1, 31, 60, 61, 130]),
        ppm=st.sampled_from([0, 250_000, 500_000, 999_999]),
    )
    def time_passes(self, seconds: float, ppm: int) -> None:
        self.chance.ppm = ppm
        self.now += round(seconds * MILLION)
        self._set_time()

    @rule(
        lane=st.sampled_from(Lane),
        account=st.sampled_from(ACCOUNTS),
        tokens=st.tuples(TOKENS, TOKENS),
        is_retry=st.sampled_from([False, False, True]),
        many=st.sampled_from([1, 1, 3]),
    )
    def ask(
        self, lane: Lane, account: UUID, tokens: tuple[int, int], is_retry: bool, many: int
    ) -> None:
        for _ in range(many):
            ask = self._new(
                lane=lane,
                account_id=account,
                input_tokens=tokens[0],
                output_tokens=tokens[1],
                is_retry=is_retry,
                line_up=many == 3,
            )
            verdict = self._admit(ask)
            self.asked.append((ask, verdict))
            if verdict.reason is None:
                assert verdict.wait_s == 0
                self.admitted.append((ask, verdict))
            else:
                assert verdict.wait_s > 0

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        ask, _ = data.draw(st.sampled_from(self.asked))
        before = self._everything()
        self._admit(_changed(ask, provider=self.provider, take=False))
        assert self._everything() == before

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        """An answer was lost on the way: the same ask gets the same answer and takes nothing."""
        ask, verdict = data.draw(st.sampled_from(self.admitted))
        call = self.model.calls.get(ask.attempt_id)
        if call is not None and call.lease_us > self.now:
            before = self._everything()
            assert self._admit(ask) == verdict
            assert self._everything() == before

    @precondition(lambda self: self.admitted)
    @rule(
        data=st.data(),
        outcome=st.sampled_from([*Outcome, Outcome.FAILED, Outcome.FAILED, Outcome.SUCCEEDED]),
        cooldown_s=st.sampled_from([None, None, 0.0, 2.0, 7200.0]),
        headroom=st.sampled_from(
            [
                None,
                None,
                Headroom(requests=3, tokens=0, reset_s=1.5),
                Headroom(requests=0),
                Headroom(input_tokens=20, output_tokens=7),
            ]
        ),
        is_stale=st.sampled_from([False, False, False, True]),
    )
    def report(
        self,
        data: st.DataObject,
        outcome: Outcome,
        cooldown_s: float | None,
        headroom: Headroom | None,
        is_stale: bool,
    ) -> None:
        ask, verdict = data.draw(st.sampled_from(self.admitted[-8:]))
        used = data.draw(st.sampled_from([None, 0, ask.input_tokens // 2, ask.input_tokens + 50]))
        report = Report(
            attempt_id=ask.attempt_id,
            provider=self.provider,
            account_id=ask.account_id,
            lane=ask.lane,
            generation=verdict.generation - is_stale,
            is_probe=verdict.is_probe,
            outcome=outcome,
            reserved_input_tokens=ask.input_tokens,
            reserved_output_tokens=ask.output_tokens,
            used_input_tokens=used,
            used_output_tokens=None if used is None else ask.output_tokens // 3,
            cooldown_s=cooldown_s if outcome in {Outcome.THROTTLED, Outcome.OVERLOADED} else None,
            headroom=headroom if outcome is Outcome.SUCCEEDED else None,
            message="as the test wants it",
        )
        state = self.model.state, self.model.generation, self.model.window, self.model.streak
        lost = [lease for lease in self.model.probes.values() if lease <= self.now]
        self._report(report)
        if report.generation != state[1] and not lost:
            # INV: a stale report never changes the breaker.
            now = self.model.state, self.model.generation, self.model.window, self.model.streak
            assert now == state
        self._agree()
        before = self._everything()
        self._report(report)
        assert self._everything() == before, "it counted twice"

    @precondition(lambda self: any(verdict.is_probe for _, verdict in self.admitted))
    @rule(data=st.data(), is_stale=st.sampled_from([0, 0, 0, 1]))
    def first_token(self, data: st.DataObject, is_stale: int) -> None:
        probes = [one for one in self.admitted if one[1].is_probe]
        ask, verdict = data.draw(st.sampled_from(probes[-4:]))
        probe = Probe(
            attempt_id=ask.attempt_id,
            provider=self.provider,
            generation=verdict.generation - is_stale,
        )
        self.server.runner.run(self.gate.probed([probe]))
        self.model.probed(probe, self.now, self.chance.ppm)

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        recent = [ask.attempt_id for ask, _ in self.admitted[-8:]]
        attempts = data.draw(st.lists(st.sampled_from(recent), unique=True))
        self.server.runner.run(self.gate.renew({ROW_ID: attempts}))
        self.model.renew(attempts, self.now)

    @rule(lever=st.sampled_from(["auto", "auto", "auto", "forced_open", "disabled"]))
    def pull(self, lever: str) -> None:
        self.provider = provider(**self.limits, breaker=lever)

    @rule()
    def operator_resets(self) -> None:
        reset(self.server.plain, self.prefix, ROW_ID)
        self.model.reset()

    @rule()
    def server_forgets_scripts(self) -> None:
        self.server.plain.script_flush()

    @rule(
        lane=st.sampled_from(Lane),
        account=st.sampled_from(ACCOUNTS),
        tokens=st.tuples(TOKENS, TOKENS),
        is_retry=st.booleans(),
    )
    def wait_as_told(
        self, lane: Lane, account: UUID, tokens: tuple[int, int], is_retry: bool
    ) -> None:
        """Whoever asks again after the wait, alone on the row, is admitted.

        Unless calls in flight hold what is wanted: nobody knows when they end.
        """
        ask = self._new(
            lane=lane,
            account_id=account,
            input_tokens=tokens[0],
            output_tokens=tokens[1],
            is_retry=is_retry,
        )
        verdict = self._admit(ask)
        for _ in range(2):
            held = {Reason.CONCURRENCY: True, Reason.BREAKER: self._waits_for_calls()}
            if verdict.reason is None or held.get(verdict.reason, False):
                break
            self.now += round(verdict.wait_s * MILLION)
            self._set_time()
            verdict = self._admit(ask)
            assert verdict.reason in {None, Reason.CONCURRENCY, Reason.BREAKER}
            if verdict.reason is Reason.BREAKER:
                assert self._waits_for_calls()
        if verdict.reason is None:
            self.admitted.append((ask, verdict))

    def _waits_for_calls(self) -> bool:
        return self.provider.breaker == "forced_open" or self.model.live_probes(self.now) > 0

    def _agree(self) -> None:
        row = self.server.plain.hgetall(self.row)
        model = self.model
        if model.levels:
            levels = json.loads(row[b"levels"])
            places = itertools.product([Lane.INTERACTIVE, Lane.BULK], DIMENSIONS)
            assert levels == [model.levels.get(place, False) for place in places]
        assert row.get(b"cap") == (None if model.cap is None else b"%d" % model.cap)
        assert int(row.get(b"retries", 10 * MILLION)) == model.retries
        assert int(row.get(b"generation", 0)) == model.generation
        entries: Any = self.server.plain.xrange(keys.changes_key(self.prefix))
        names = (b"kind", b"account_id", b"before", b"after")
        assert model.changes == [
            tuple(entry[name].decode() for name in names) for _, entry in entries
        ]

    @invariant()
    def holds(self) -> None:
        (seen,) = read_states(self.server.plain, self.prefix, [ROW_ID], clock_offset_us=LONG_AGO_US)
        model, now = self.model, self.now
        open_left_us = model.open_until - now if model.state == "open" else 0
        is_due = model.state == "open" and open_left_us <= 0
        bucket = now // model.breaker.bucket_us
        window = [failed for at, failed in model.window if at > bucket - 12]
        assert seen == GateState(
            provider_id=ROW_ID,
            state="half_open" if is_due else cast("BreakerState", model.state),
            half_open_in_s=max(0, open_left_us) / 1e6,
            probes=model.live_probes(now),
            generation=model.generation,
            calls=len(window),
            failures=sum(window),
            streak=model.streak,
            cooldown_left_s=max(0, model.cooldown - now) / 1e6,
            in_flight=model.in_flight(now, *Lane),
            in_flight_bulk=model.in_flight(now, Lane.BULK),
            concurrency_cap=None if model.cap is None else model.cap // MILLION,
            suspensions={
                account: (until - now) / 1e6
                for account, until in model.suspended.items()
                if until > now
            },
        )
        # INV: live probes ≤ permits; an open breaker always reaches half-open.
        assert seen.probes <= model.breaker.probes
        assert open_left_us <= 1.2 * model.breaker.open_max_us
        assert seen.in_flight <= (self.provider.max_concurrent or seen.in_flight)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        self._agree()
        # INV: an open breaker always reaches half-open, and a half-open one lets probes through.
        self.provider = provider(**self.limits)
        self.now += 10_000 * MILLION
        self._set_time()
        ask = self._new(lane=Lane.BULK, account_id=ACCOUNTS[0], input_tokens=100, output_tokens=10)
        verdict = self._admit(ask)
        assert verdict.reason is None
        assert verdict.is_probe == (self.model.state == "half_open")


def _changed(ask: Ask, **values: Any) -> Ask:
    given = {name: getattr(ask, name) for name in Ask.__dataclass_fields__}
    return Ask(**(given | values))


#: Many outcomes, no limits: the life of a breaker.
BREAKER: dict[str, Any] = {"max_concurrent": 6}
#: Everything limited.
LIMITS: dict[str, Any] = {
    "requests_per_minute": 60,
    "tokens_per_minute": 12_000,
    "input_tokens_per_minute": 9_000,
    "output_tokens_per_minute": 4_000,
    "max_concurrent": 5,
}
TINY: dict[str, Any] = {"requests_per_minute": 3, "output_tokens_per_minute": 2_000}


def run_machine(
    server: Server, settings: Settings, limits: dict[str, Any], *, examples: int, steps: int
) -> None:
    """Take a gate with these limits through many lives."""
    changed = settings.model_copy(update={"breaker_min_calls": 6, "breaker_streak": 3})
    given = {"server": server, "settings": changed, "limits": limits}
    run_state_machine_as_test(
        type("GateMachineHere", (GateMachine,), given),
        settings=hypothesis_settings(
            max_examples=examples * (10 if FULL else 1),
            stateful_step_count=steps,
            suppress_health_check=list(HealthCheck),
            # A shorter example would take minutes to find, of which nothing would be seen.
            phases=[*([Phase.shrink] if FULL else []), Phase.generate],
        ),
    )

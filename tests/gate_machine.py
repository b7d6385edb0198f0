"""Hypothesis takes a gate and its model through the same life, and both must answer alike.

Run against fakeredis and against the real server, with what DESIGN calls invariants (INV).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any, ClassVar, cast
from uuid import UUID

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

from sluicegate.shared.admission.gate import Ask, Outcome, Probe, Reason, Report, Verdict
from sluicegate.shared.admission.headroom import Headroom
from sluicegate.shared.admission.states import BreakerState, GateState, lift_suspension, reset
from sluicegate.shared.jobs import Lane
from sluicegate.shared.settings import Settings
from tests.gate_model import DIMENSIONS, MILLION, SLOT_US, SLOTS, GateModel, Taken
from tests.gate_row import ACCOUNT, OTHER_ACCOUNT, ROW_ID, GateRow, Server
from tests.harness import FULL

LANES = st.sampled_from(Lane)
ACCOUNTS = st.sampled_from([ACCOUNT, ACCOUNT, OTHER_ACCOUNT])
TOKENS = st.sampled_from([0, 1, 40, 160, 900, 3_000])
HEADROOMS = [
    Headroom(requests=3, tokens=0, reset_s=1.5),
    Headroom(requests=0),
    Headroom(requests=5, reset_s=2.0),
    Headroom(input_tokens=20, output_tokens=7),
]
#: Around the ends of what lasts: buckets, leases, the window, the minute.
DURATIONS = [0.02, 0.3, 0.5, 1, 2, 4.5, 6, 15, 31, 60, 61, 130]


class GateMachine(RuleBasedStateMachine):
    """Any row; `settings` and `limits` say which."""

    server: ClassVar[Server]
    settings: ClassVar[Settings]
    limits: ClassVar[dict[str, Any]]

    @initialize()
    def begin(self) -> None:
        self.row = GateRow(self.server, self.settings, **self.limits)
        self.model = GateModel(self.settings)
        self.asked: list[Ask] = []
        self.admitted: list[tuple[Ask, Verdict]] = []

    @property
    def now(self) -> int:
        return self.row.now_us

    def _admit(self, ask: Ask) -> Verdict:
        (verdict,) = self.row.admit(ask)
        expected = self.model.admit(ask, self.now, self.row.chance.ppm)
        assert verdict == expected, f"{verdict} is not {expected}: {ask}"
        assert (verdict.reason is None) == (verdict.wait_s == 0)
        if ask.take:
            self.asked.append(ask)
            if verdict.reason is None:
                self.admitted.append((ask, verdict))
        return verdict

    def _end(self, call: tuple[Ask, Verdict], outcome: Outcome, **values: Any) -> None:
        self.row.end(call, outcome, **values)
        ask, verdict = call
        given: dict[str, Any] = {
            "provider": self.row.provider,
            "generation": verdict.generation,
            "is_probe": verdict.is_probe,
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
        self.model.report(report, self.now, self.row.chance.ppm)

    def _everything(self) -> Any:
        """Return all that is in Redis about the row."""
        plain = self.server.plain
        sets = [plain.zrange(key, 0, -1, withscores=True) for key in self.row.sets]
        return plain.hgetall(self.row.key), sets, self.row.changes

    # Time

    @rule(
        seconds=st.sampled_from(DURATIONS),
        ppm=st.sampled_from([0, 250_000, 500_000, 999_999]),
    )
    def time_passes(self, seconds: float, ppm: int) -> None:
        self.row.chance.ppm = ppm
        self.row.wait(seconds)

    @precondition(lambda self: self.model.state == "open" and self.model.open_until > self.now)
    @rule(late_us=st.sampled_from([-1, 0, 0, 0, 700_000]))
    def breaker_is_due(self, late_us: int) -> None:
        self.row.wait((self.model.open_until - self.now + late_us) / 1e6)

    @precondition(lambda self: any(lease > self.now for lease in self.model.probes.values()))
    @rule(late_us=st.sampled_from([-1, 0, 3 * MILLION, 60 * MILLION]))
    def a_probe_is_lost(self, late_us: int) -> None:
        first = min(lease for lease in self.model.probes.values() if lease > self.now)
        self.row.wait((first - self.now + late_us) / 1e6)

    # Asking

    @rule(
        lane=LANES,
        account=ACCOUNTS,
        tokens=st.tuples(TOKENS, TOKENS),
        is_retry=st.sampled_from([False, False, True]),
        many=st.sampled_from([1, 1, 3]),
    )
    def ask(
        self, lane: Lane, account: UUID, tokens: tuple[int, int], is_retry: bool, many: int
    ) -> None:
        for _ in range(many):
            self._admit(
                self.row.new(
                    lane,
                    account_id=account,
                    input_tokens=tokens[0],
                    output_tokens=tokens[1],
                    is_retry=is_retry,
                    line_up=many == 3,
                )
            )

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        ask = data.draw(st.sampled_from(self.asked[-10:]))
        before = self._everything()
        self._admit(_changed(ask, provider=self.row.provider, take=False))
        assert self._everything() == before

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        """An answer was lost on the way: the same ask gets the same answer and takes nothing."""
        ask, verdict = data.draw(st.sampled_from(self.admitted[-10:]))
        call = self.model.calls.get(ask.attempt_id)
        if call is not None and call.lease_us > self.now:
            before = self._everything()
            assert self._admit(ask) == verdict
            assert self._everything() == before

    @rule(lane=LANES, account=ACCOUNTS, tokens=st.tuples(TOKENS, TOKENS), is_retry=st.booleans())
    def wait_as_told(
        self, lane: Lane, account: UUID, tokens: tuple[int, int], is_retry: bool
    ) -> None:
        """Whoever asks again after the wait, alone on the row, is admitted.

        Unless calls in flight hold what is wanted: nobody knows when they end.
        """
        ask = self.row.new(
            lane,
            account_id=account,
            input_tokens=tokens[0],
            output_tokens=tokens[1],
            is_retry=is_retry,
        )
        verdict = self._admit(ask)
        if verdict.reason not in {None, Reason.CONCURRENCY} and not self._waits_for_probes():
            self.row.wait(verdict.wait_s)
            verdict = self._admit(ask)
            assert verdict.reason in {None, Reason.CONCURRENCY} or self._waits_for_probes()

    def _waits_for_probes(self) -> bool:
        return self.row.provider.breaker == "forced_open" or bool(self.model.probes)

    # Calls end

    @rule(
        outcome=st.sampled_from([*Outcome, Outcome.FAILED, Outcome.FAILED, Outcome.SUCCEEDED]),
        many=st.integers(1, 4),
        lane=LANES,
    )
    def calls_come_and_go(self, outcome: Outcome, many: int, lane: Lane) -> None:
        for _ in range(many):
            ask = self.row.new(lane)
            verdict = self._admit(ask)
            if verdict.reason is None:
                self._end((ask, verdict), outcome)

    @precondition(lambda self: self.admitted)
    @rule(
        data=st.data(),
        outcome=st.sampled_from([*Outcome, Outcome.FAILED, Outcome.FAILED, Outcome.SUCCEEDED]),
        cooldown_s=st.sampled_from([None, None, 0.0, 2.0, 7200.0]),
        headroom=st.sampled_from([None, None, *HEADROOMS]),
        is_stale=st.sampled_from([False, False, False, True]),
    )
    def call_ends(
        self,
        data: st.DataObject,
        outcome: Outcome,
        cooldown_s: float | None,
        headroom: Headroom | None,
        is_stale: bool,
    ) -> None:
        ask, verdict = data.draw(st.sampled_from(self.admitted[-8:]))
        used = data.draw(st.sampled_from([None, 0, ask.input_tokens // 2, ask.input_tokens + 50]))
        values: dict[str, Any] = {
            "generation": verdict.generation - is_stale,
            "used_input_tokens": used,
            "used_output_tokens": None if used is None else ask.output_tokens // 3,
            "cooldown_s": cooldown_s if outcome is Outcome.THROTTLED else None,
            "headroom": headroom if outcome is Outcome.SUCCEEDED else None,
        }
        before = self._breaker()
        lost = [lease for lease in self.model.probes.values() if lease <= self.now]
        self._end((ask, verdict), outcome, **values)
        # INV: a stale report never changes the breaker.
        assert values["generation"] == before[1] or lost or self._breaker() == before
        everything = self._everything()
        self._end((ask, verdict), outcome, **values)
        assert self._everything() == everything, "it counted twice"

    def _breaker(self) -> tuple[object, ...]:
        state = self.row.state()
        return state.state, state.generation, state.calls, state.failures, state.streak

    @precondition(lambda self: any(verdict.is_probe for _, verdict in self.admitted))
    @rule(data=st.data(), is_stale=st.sampled_from([0, 0, 0, 1]))
    def first_token(self, data: st.DataObject, is_stale: int) -> None:
        probes = [one for one in self.admitted if one[1].is_probe]
        ask, verdict = data.draw(st.sampled_from(probes[-3:]))
        probe = Probe(
            attempt_id=ask.attempt_id,
            provider=self.row.provider,
            generation=verdict.generation - is_stale,
        )
        self.row.first_token(probe)
        self.model.probed(probe, self.now, self.row.chance.ppm)

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        calls = data.draw(st.lists(st.sampled_from(self.admitted[-8:]), unique_by=id))
        self.row.renew(*calls)
        self.model.renew([ask.attempt_id for ask, _ in calls], self.now)

    # Operators, and what else happens

    @rule(lever=st.sampled_from(["auto", "auto", "auto", "forced_open", "disabled"]))
    def pull(self, lever: str) -> None:
        self.row.pull(lever)

    @precondition(lambda self: self.row.provider.breaker != "auto")
    @rule()
    def let_go(self) -> None:
        self.row.pull("auto")

    @precondition(lambda self: self.model.generation > 2)
    @rule()
    def operator_resets(self) -> None:
        reset(self.server.plain, self.row.prefix, ROW_ID)
        self.model.reset()

    @precondition(lambda self: self.model.suspended)
    @rule(account=st.sampled_from([ACCOUNT, None]))
    def suspension_is_lifted(self, account: UUID | None) -> None:
        lift_suspension(
            self.server.plain, self.row.prefix, ROW_ID, account, clock_offset_us=self.row.behind_us
        )
        self.model.lift(account, self.now)

    @rule()
    def server_forgets_scripts(self) -> None:
        self.server.plain.script_flush()

    # What holds at all times

    @invariant()
    def looks_like_its_model(self) -> None:
        seen, model, now = self.row.state(), self.model, self.now
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
        assert seen.in_flight <= (self.row.provider.max_concurrent or seen.in_flight)

    @invariant()
    def keeps_the_same_books(self) -> None:
        row: Any = self.server.plain.hgetall(self.row.key)
        model = self.model
        if model.levels:
            places = itertools.product([Lane.INTERACTIVE, Lane.BULK], DIMENSIONS)
            levels = [model.levels.get(place, False) for place in places]
            assert json.loads(row[b"levels"]) == levels
        if model.ring:
            assert json.loads(row[b"ring"])[1:] == _sums(model.ring)
        for slot, ring in itertools.groupby(model.ring, lambda one: one.at_us // SLOT_US):
            assert json.loads(row[b"slot:%d" % (slot % SLOTS)]) == _sums(ring)
        assert row.get(b"cap") == (None if model.cap is None else b"%d" % model.cap)
        assert int(row.get(b"retries", 10 * MILLION)) == model.retries
        assert model.changes == [change[:4] for change in self.row.changes]
        calls = {name for name in row if name.startswith(b"call:")}
        assert len(calls) >= model.in_flight(self.now, *Lane)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        # INV: an open breaker always reaches half-open, and a half-open one lets probes through.
        self.row.pull("auto")
        self.row.wait(10_000)
        was_closed = self.model.state == "closed"
        verdict = self._admit(self.row.new(Lane.BULK))
        assert verdict.reason is None
        assert verdict.is_probe != was_closed


def _sums(ring: Iterable[Taken]) -> list[int]:
    """Return requests, input and output tokens: of all, and of bulk."""
    sums = [0] * 6
    for taken in ring:
        for place, amount in enumerate([taken.requests, taken.input, taken.output]):
            sums[place] += amount
            if taken.lane is Lane.BULK:
                sums[place + 3] += amount
    return sums


def _changed(ask: Ask, **values: Any) -> Ask:
    given = {name: getattr(ask, name) for name in Ask.__dataclass_fields__}
    return Ask(**(given | values))


#: Rows of every kind: hardly limited, limited in everything, and hardly anything allowed.
ROWS: dict[str, dict[str, Any]] = {
    "breaker": {"max_concurrent": 12},
    "limits": {
        "requests_per_minute": 60,
        "tokens_per_minute": 12_000,
        "input_tokens_per_minute": 9_000,
        "output_tokens_per_minute": 4_000,
        "max_concurrent": 5,
    },
    "tiny": {"requests_per_minute": 3, "output_tokens_per_minute": 2_000},
}


def run_machine(server: Server, settings: Settings, kind: str) -> None:
    """Take a gate of this kind through many lives."""
    changed = settings.model_copy(update={"breaker_min_calls": 6, "breaker_streak": 3})
    given = {"server": server, "settings": changed, "limits": ROWS[kind]}
    run_state_machine_as_test(
        type("GateMachineHere", (GateMachine,), given),
        settings=hypothesis_settings(
            max_examples=500 if FULL else 25,
            stateful_step_count=40,
            suppress_health_check=list(HealthCheck),
            # A shorter example would take minutes to find, of which nothing would be seen.
            phases=[Phase.generate],
        ),
    )

"""What one provider row's gate does, written down a second time: plainly, without Redis.

The scripts keep packed sums; this keeps every call and adds up. Both must answer alike, to the
microsecond.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from sluicegate.shared.admission.breaker import BreakerPolicy
from sluicegate.shared.admission.gate import Ask, Outcome, Probe, Reason, Report, Verdict
from sluicegate.shared.admission.limits import LimitPolicy, row_limits
from sluicegate.shared.catalogue import Provider
from sluicegate.shared.jobs import Lane
from sluicegate.shared.settings import Settings

MILLION = 1_000_000
SLOT_US = 500_000
SLOTS = 122
REFILL = 1 / 60.5 - 1 / 3600
DIMENSIONS = ("requests", "tokens", "input", "output")

FAILURES = {Outcome.FAILED, Outcome.OVERLOADED, Outcome.TIMED_OUT}
CUTS = {Outcome.THROTTLED, Outcome.OVERLOADED, Outcome.TIMED_OUT}


Block = Callable[[Reason, float], None]


@dataclass(slots=True)
class Taken:
    """What a call takes of the limits, until it is corrected."""

    at_us: int
    lane: Lane
    requests: int
    input: int
    output: int

    def of(self, dimension: str) -> int:
        return self.input + self.output if dimension == "tokens" else getattr(self, dimension)


@dataclass(slots=True)
class Call:
    lane: Lane
    lease_us: int
    generation: int
    is_probe: bool
    is_retry: bool
    taken: Taken


@dataclass(slots=True)
class Kept:
    """Room for a large call that found none."""

    until_us: int = 0
    needs: dict[str, int] = field(default_factory=dict)


class GateModel:
    """One row. Every method is told when it is, and is given the chance it has."""

    def __init__(self, settings: Settings) -> None:
        self.breaker = BreakerPolicy.of(settings)
        self.limits = LimitPolicy.of(settings)
        self.state = "closed"
        self.generation = 0
        self.open_until = 0
        self.open_us = 0
        self.streak = 0
        self.window: list[tuple[int, bool]] = []
        self.probes: dict[UUID, int] = {}
        self.calls: dict[UUID, Call] = {}
        self.ring: list[Taken] = []
        self.levels: dict[tuple[Lane, str], int] = {}
        self.filled = 0
        self.kept = {lane: Kept() for lane in Lane}
        self.line = dict.fromkeys(Lane, 0)
        self.suspended: dict[UUID, int] = {}
        self.cooldown = 0
        self.throttles = 0
        self.throttled_at = 0
        self.cap: int | None = None
        self.cut_at = 0
        self.cut_from = 0
        self.took: int | None = None
        self.retries = 10 * MILLION
        self.retries_at = 0
        #: (kind, account, before, after) of every change.
        self.changes: list[tuple[str, str, str, str]] = []

    # The breaker

    def _become(self, state: str) -> None:
        self.changes.append(("breaker", "", self.state, state))
        self.state = state
        self.generation += 1
        self.streak = 0
        if state == "closed":
            self.line = dict.fromkeys(Lane, 0)
        self.window = []
        self.probes = {}

    def _trip(self, at_us: int, random_ppm: int) -> None:
        doubled = self.open_us * 2 if self.state == "half_open" else self.breaker.open_us
        self.open_us = min(doubled, self.breaker.open_max_us)
        self.open_until = at_us + _spread(self.open_us, random_ppm)
        self._become("open")

    def _settle(self, provider: Provider, now: int, random_ppm: int) -> None:
        if provider.breaker != "disabled" and self.state == "half_open" and self.probes:
            first = min(self.probes.values())
            if first <= now:
                self._trip(first, random_ppm)

    def live_probes(self, now: int) -> int:
        return sum(lease > now for lease in self.probes.values())

    def in_flight(self, now: int, *lanes: Lane) -> int:
        return sum(call.lane in lanes and call.lease_us > now for call in self.calls.values())

    # The limits

    def _limits(self, provider: Provider, *lanes: Lane) -> Iterator[tuple[Lane, str, float]]:
        limits = row_limits(provider)
        for lane in lanes:
            for dimension in DIMENSIONS:
                if dimension in limits:
                    share = self.limits.bulk_ppm if lane is Lane.BULK else MILLION
                    yield lane, dimension, limits[dimension] * share / MILLION

    def level(self, lane: Lane, dimension: str, limit: float, now: int) -> tuple[int, int]:
        burst = math.floor(limit * (MILLION / 60))
        stored = self.levels.get((lane, dimension))
        if stored is None:
            return burst, burst
        return min(burst, math.floor(stored + (now - self.filled) * limit * REFILL)), burst

    def spent(self, lane: Lane, dimension: str, now: int) -> int:
        """Return what was taken in the last minute; the interactive lane stands for all."""
        return sum(taken.of(dimension) for taken in self._recent(lane, now))

    def _recent(self, lane: Lane, now: int) -> list[Taken]:
        oldest = now // SLOT_US - SLOTS
        return [
            taken
            for taken in self.ring
            if taken.at_us // SLOT_US > oldest and (lane is Lane.INTERACTIVE or taken.lane is lane)
        ]

    def _ring_wait(self, lane: Lane, dimension: str, room: float, now: int) -> int:
        """Return how long until no more than `room` was taken in the last minute."""
        left = self.spent(lane, dimension, now)
        by_slot: dict[int, int] = {}
        for taken in self._recent(lane, now):
            slot = taken.at_us // SLOT_US
            by_slot[slot] = by_slot.get(slot, 0) + taken.of(dimension)
        for slot in sorted(by_slot):
            left -= by_slot[slot]
            if left <= room:
                return (slot + SLOTS) * SLOT_US - now
        raise AssertionError("an empty ring has room")

    # What the scripts do

    def admit(self, ask: Ask, now: int, random_ppm: int) -> Verdict:
        call = self.calls.get(ask.attempt_id)
        if call is not None and call.lane is ask.lane and call.lease_us > now:
            return Verdict(reason=None, generation=call.generation, is_probe=call.is_probe)
        model = self if ask.take else copy.deepcopy(self)
        return model._decide(ask, now, random_ppm)

    def _decide(self, ask: Ask, now: int, random_ppm: int) -> Verdict:
        self._settle(ask.provider, now, random_ppm)
        blocks: list[tuple[int, Reason]] = []

        def block(reason: Reason, wait_us: float) -> None:
            blocks.append((max(1, math.ceil(wait_us)), reason))

        is_probe = self._ask_breaker(ask.provider, now, block)
        if self.suspended.get(ask.account_id, 0) > now:
            block(Reason.SUSPENDED, self.suspended[ask.account_id] - now)
        if self.cooldown > now:
            block(Reason.COOLDOWN, self.cooldown - now)
        slot_us = self._concurrency(ask, now, block)
        retries = self._retries(ask, now, block)
        step_us = self._rates(ask, now, block)

        if blocks:
            wait, reason = max(blocks, key=lambda one: one[0])
            if ask.provider.breaker == "forced_open":
                reason = Reason.BREAKER
            wait = self._line_up(ask, reason, wait, now, steps=(step_us, slot_us))
            return Verdict(reason=reason, wait_s=wait / 1e6, generation=self.generation)

        if is_probe and self.state == "open" and ask.take:
            self._become("half_open")
        verdict = Verdict(reason=None, generation=self.generation, is_probe=is_probe)
        self.retries = retries
        self.retries_at = now
        taken = Taken(now, ask.lane, 1, ask.input_tokens, ask.output_tokens)
        if step_us > 0:
            self._take(ask.provider, taken, now)
        lease_us = now + self.limits.lease_us
        self.calls[ask.attempt_id] = Call(
            ask.lane, lease_us, self.generation, is_probe, ask.is_retry, taken
        )
        if is_probe:
            self.probes[ask.attempt_id] = lease_us
        return verdict

    def _ask_breaker(self, provider: Provider, now: int, block: Block) -> bool:
        """Return whether the call would be a probe."""
        if provider.breaker == "forced_open":
            block(Reason.BREAKER, self.breaker.open_max_us)
        elif provider.breaker == "auto" and self.state == "open":
            if now >= self.open_until:
                return True
            block(Reason.BREAKER, self.open_until - now)
        elif provider.breaker == "auto" and self.state == "half_open":
            if self.live_probes(now) < self.breaker.probes:
                return True
            block(Reason.BREAKER, MILLION)
        return False

    def _line_up(
        self, ask: Ask, reason: Reason, wait: int, now: int, *, steps: tuple[float, float]
    ) -> int:
        if not (ask.line_up and ask.take) or reason in {Reason.RETRIES, Reason.SUSPENDED}:
            return wait
        start = now + wait if reason in {Reason.BREAKER, Reason.COOLDOWN} else now
        step_us, slot_us = steps
        if reason not in {Reason.REQUESTS, Reason.TOKENS}:
            step_us = max(step_us, 20_000, slot_us)
        turn = max(self.line[ask.lane], start) + math.ceil(step_us)
        self.line[ask.lane] = min(turn, now + 900 * MILLION)
        return max(wait, self.line[ask.lane] - now)

    def _retries(self, ask: Ask, now: int, block: Block) -> int:
        """Return what is in the bucket once the call is admitted."""
        retries = self.retries
        if retries < MILLION:
            retries = min(MILLION, retries + (now - self.retries_at) // 5)
        if not ask.is_retry:
            return min(50 * MILLION, retries + self.limits.retry_ppm)
        if retries < MILLION:
            block(Reason.RETRIES, (MILLION - retries) * 5)
        return retries - MILLION

    def _concurrency(self, ask: Ask, now: int, block: Block) -> float:
        limits = [limit for limit in (ask.provider.max_concurrent,) if limit is not None]
        if self.cap is not None:
            limits.append(self.cap // MILLION)
        if not limits:
            return 0
        limit = min(limits)
        took = 250_000 if self.took is None else self.took
        slot_us = max(20_000, min(MILLION, took / limit))
        bulk_limit = max(1, math.floor(limit * self.limits.bulk_ppm / MILLION))
        is_full = self.in_flight(now, *Lane) >= limit
        bulk_is_full = self.in_flight(now, Lane.BULK) >= bulk_limit
        if is_full or (ask.lane is Lane.BULK and bulk_is_full):
            block(Reason.CONCURRENCY, slot_us)
        return slot_us

    def _rates(self, ask: Ask, now: int, block: Block) -> float:
        lanes = (Lane.INTERACTIVE, *((Lane.BULK,) if ask.lane is Lane.BULK else ()))
        needs = Taken(now, ask.lane, 1, ask.input_tokens, ask.output_tokens)
        large: list[tuple[str, int, int]] = []
        step = 0.0
        for lane, dimension, limit in self._limits(ask.provider, *lanes):
            reason = Reason.REQUESTS if dimension == "requests" else Reason.TOKENS
            need = needs.of(dimension)
            level, _ = self.level(lane, dimension, limit, now)
            if level < 0:
                block(reason, -level / (limit * REFILL) + 1)
            reach = need
            for keeper in {ask.lane, lane}:
                if self.kept[keeper].until_us > now:
                    reach = max(reach, self.kept[keeper].needs.get(dimension, 0))
            spent = self.spent(lane, dimension, now)
            if spent > 0 and spent + reach > limit:
                wait_us = self._ring_wait(lane, dimension, max(0, limit - reach), now)
                block(reason, wait_us)
                large.append((dimension, need, now + wait_us + 5 * MILLION))
            step = max(step, need / (limit * REFILL) * MILLION)
        kept = self.kept[ask.lane]
        needs_before = dict(kept.needs) if kept.until_us > now else {}
        for dimension, need, until_us in large:
            if dimension != "requests" and need >= needs_before.get(dimension, 0):
                needs_before[dimension] = need
                self.kept[ask.lane] = Kept(until_us, dict(needs_before))
        return step

    def _take(self, provider: Provider, taken: Taken, now: int) -> None:
        self.ring = [*self._recent(Lane.INTERACTIVE, now), taken]
        levels = {}
        for lane, dimension, limit in self._limits(provider, *Lane):
            level, burst = self.level(lane, dimension, limit, now)
            need = taken.of(dimension) * MILLION
            after = min(level, max(0, burst - need)) - need
            if lane is Lane.BULK and taken.lane is not Lane.BULK:
                after = level
            elif lane is not taken.lane and need > burst:
                after = min(level, 0)
            levels[lane, dimension] = after
        self.levels |= levels
        self.filled = now

    def report(self, report: Report, now: int, random_ppm: int) -> None:
        call = self.calls.get(report.attempt_id)
        if call is None or call.lane is not report.lane or call.lease_us <= now:
            return
        self._settle(report.provider, now, random_ppm)
        was_probe = self.state == "half_open" and self.probes.get(report.attempt_id, 0) > now
        is_current = report.generation == self.generation
        if report.provider.breaker != "disabled" and is_current:
            self._feed(report.outcome, now, random_ppm, is_probe=was_probe)
        self._rest(report, call, now, random_ppm)
        self._bear(report, call, now, may_cut=is_current and not was_probe)
        if report.outcome is Outcome.REFUSED:
            if self.suspended.get(report.account_id, 0) <= now:
                self.changes.append(("suspension", str(report.account_id), "active", "suspended"))
            self.suspended[report.account_id] = now + self.limits.suspension_us
        self._correct(report, call, now)
        if report.outcome is Outcome.SUCCEEDED:
            took = now - call.taken.at_us
            self.took = took if self.took is None else self.took + (took - self.took) // 8
        del self.calls[report.attempt_id]
        self.probes.pop(report.attempt_id, None)

    def _feed(self, outcome: Outcome, now: int, random_ppm: int, *, is_probe: bool) -> None:
        is_failure = outcome in FAILURES
        if not is_failure and outcome is not Outcome.SUCCEEDED:
            return
        if is_probe and is_failure:
            self._trip(now, random_ppm)
        elif is_probe:
            self._become("closed")
        elif self.state == "closed":
            bucket = now // self.breaker.bucket_us
            self.window = [one for one in self.window if one[0] > bucket - 12]
            self.window.append((bucket, is_failure))
            self.streak = self.streak + 1 if is_failure else 0
            calls, failures = len(self.window), sum(failed for _, failed in self.window)
            share = failures * MILLION >= calls * self.breaker.failure_ppm
            is_broken = self.streak >= self.breaker.streak or (
                calls >= self.breaker.min_calls and share
            )
            if is_failure and is_broken:
                self._trip(now, random_ppm)

    def _rest(self, report: Report, call: Call, now: int, random_ppm: int) -> None:
        rests = []
        if report.outcome is Outcome.THROTTLED:
            if call.taken.at_us > self.throttled_at:
                self.throttles += 1
                self.throttled_at = now
            if report.cooldown_s is None:
                doubled = self.limits.cooldown_us * 2 ** (self.throttles - 1)
                longest = max(self.limits.cooldown_us, 60 * MILLION)
                rests.append(_spread(min(doubled, longest), random_ppm))
        elif report.outcome is Outcome.SUCCEEDED:
            self.throttles = self.throttled_at = 0
        if report.cooldown_s is not None:
            rests.append(round(report.cooldown_s * 1e6))
        left = report.headroom
        if left is not None and left.reset_s is not None:
            says = {left.requests, left.tokens, left.input_tokens, left.output_tokens}
            if 0 in says:
                rests.append(round(left.reset_s * 1e6))
        for rest in rests:
            self.cooldown = max(self.cooldown, now + min(rest, self.limits.cooldown_max_us))

    def _bear(self, report: Report, call: Call, now: int, *, may_cut: bool) -> None:
        if report.outcome in CUTS and may_cut:
            if call.taken.at_us > self.cut_at and now - self.cut_at >= MILLION:
                in_flight = self.in_flight(now, *Lane)
                self.cap = max(1, math.floor(in_flight * 0.7)) * MILLION
                self.cut_from = in_flight
                self.cut_at = now
        elif report.outcome is Outcome.SUCCEEDED and self.cap is not None:
            self.cap += MILLION * MILLION // self.cap
            most = report.provider.max_concurrent
            is_enough = self.cap > 2 * self.cut_from * MILLION
            if is_enough or (most is not None and self.cap >= most * MILLION):
                self.cap = None

    def _correct(self, report: Report, call: Call, now: int) -> None:
        returned = report.outcome is Outcome.RETURNED
        used = [report.used_input_tokens, report.used_output_tokens]
        reserved = [report.reserved_input_tokens, report.reserved_output_tokens]
        more = Taken(
            now,
            call.lane,
            -1 if returned else 0,
            *(
                (0 if returned else kept if actual is None else actual) - kept
                for actual, kept in zip(used, reserved, strict=True)
            ),
        )
        if returned and call.is_retry:
            self.retries += MILLION
        call.taken.requests += more.requests
        call.taken.input += more.input
        call.taken.output += more.output
        left = report.headroom
        like_this = Taken(now, call.lane, 1, *reserved)
        is_corrected = any(more.of(dimension) for dimension in ("requests", "input", "output"))
        if not self.filled or not (is_corrected or left):
            return
        levels = {}
        for lane, dimension, limit in self._limits(report.provider, *Lane):
            level, burst = self.level(lane, dimension, limit, now)
            if lane is Lane.INTERACTIVE or call.lane is Lane.BULK:
                level -= more.of(dimension) * MILLION
            if lane is Lane.INTERACTIVE and left is not None:
                suffix = "_tokens" if dimension in {"input", "output"} else ""
                says = getattr(left, dimension + suffix)
                if says is not None:
                    level = min(level, (says - like_this.of(dimension)) * MILLION)
            levels[lane, dimension] = min(burst, level)
        self.levels |= levels
        self.filled = now

    def probed(self, probe: Probe, now: int, random_ppm: int) -> None:
        self._settle(probe.provider, now, random_ppm)
        is_fed = probe.provider.breaker != "disabled" and probe.generation == self.generation
        if is_fed and self.state == "half_open" and self.probes.get(probe.attempt_id, 0) > now:
            self._become("closed")

    def renew(self, attempts: Sequence[UUID], now: int) -> None:
        for attempt in attempts:
            call = self.calls.get(attempt)
            if call is not None and call.lease_us > now:
                call.lease_us = now + self.limits.lease_us
            if self.probes.get(attempt, 0) > now:
                self.probes[attempt] = now + self.limits.lease_us

    def lift(self, account: UUID | None, now: int) -> None:
        for until, suspended in sorted((until, one) for one, until in self.suspended.items()):
            if account in {None, suspended}:
                del self.suspended[suspended]
                if until > now:
                    self.changes.append(("suspension", str(suspended), "suspended", "active"))

    def reset(self) -> None:
        if self.state != "closed":
            self.changes.append(("breaker", "", self.state, "closed"))
        self.state = "closed"
        self.generation += 1
        self.streak = self.cooldown = self.throttles = self.throttled_at = 0
        self.window = []
        self.probes = {}
        self.cap = None
        self.cut_at = self.cut_from = 0
        self.line = dict.fromkeys(Lane, 0)


def _spread(duration_us: int, random_ppm: int) -> int:
    return duration_us * (8 * MILLION + 4 * random_ppm) // (10 * MILLION)

"""Limits that the sandbox provider enforces: of a sliding minute, and of calls at once.

The limits of a model count that model's calls; the limits of every model (`model` null) count
together the calls of all models that have none of their own. A call counts from its arrival, with
its prompt and its whole answer, which the sandbox knows by then: no stretch of `limit_window_s`
ever holds more than the limit. A call that is refused does not count, be it by a limit or by a
fault (an error status, a reset before headers). It stands among the `max_concurrent` until its
answer is sent or breaks off; a client that leaves ends a stream, and not an answer that is made
whole.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from sluicegate.workers.local.sandbox_prices import Usage

MAX_METERS = 1_000

Dimension = Literal["requests", "tokens", "input_tokens", "output_tokens"]
DIMENSIONS: Final[tuple[Dimension, ...]] = ("requests", "tokens", "input_tokens", "output_tokens")

Count = Annotated[int, Field(ge=1)]


class Limits(BaseModel):
    """What a model, or every model, may be asked for; null is no limit, only counted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None
    requests_per_minute: Count | None = None
    #: Prompt and answer together.
    tokens_per_minute: Count | None = None
    #: Prompts, cached or not.
    input_tokens_per_minute: Count | None = None
    #: Answers, reasoning included.
    output_tokens_per_minute: Count | None = None
    max_concurrent: Count | None = None
    #: How long a minute is here.
    limit_window_s: Annotated[float, Field(gt=0, le=3_600)] = 60

    @property
    def per_minute(self) -> tuple[int | None, ...]:
        """The four limits of a minute, in the order of DIMENSIONS."""
        return (
            self.requests_per_minute,
            self.tokens_per_minute,
            self.input_tokens_per_minute,
            self.output_tokens_per_minute,
        )


class Level(NamedTuple):
    """How a limit stands, as headers tell it."""

    limit: int
    remaining: int
    #: Until all of it is there again.
    reset_s: float


class Shortage(NamedTuple):
    """Why a call is not let in."""

    #: Calls at once are none of a minute.
    dimension: Dimension | Literal["concurrent"]
    limit: int
    used: int
    requested: int
    #: Until it would be let in; None: nobody knows (calls at once), or never (too large).
    retry_after_s: float | None


class _Counted(NamedTuple):
    at_s: float
    #: In the order of DIMENSIONS.
    amounts: tuple[int, int, int, int]


class Meter:
    """Counts the calls of one `Limits` and lets them in or not. Times are of one rising clock."""

    def __init__(self, limits: Limits) -> None:
        #: May be replaced while calls run; what was counted stays counted.
        self.limits = limits
        self._window: deque[_Counted] = deque()
        self._used = [0, 0, 0, 0]
        self._concurrent = 0
        self.reset()

    def reset(self) -> None:
        """Forget what was counted; calls under way keep their places."""
        self._window.clear()
        self._used = [0, 0, 0, 0]
        self._peak = [0, 0, 0, 0]
        self._total = [0, 0, 0, 0]
        self._peak_concurrent = self._concurrent
        self._refused: dict[str, int] = {}

    def enter(self, usage: Usage, now_s: float) -> Shortage | None:
        """Let a call in, which must `leave`, or say what is short."""
        self._forget(now_s)
        amounts = (1, usage.prompt + usage.output, usage.prompt, usage.output)
        shortage = self._shortage(amounts, now_s)
        if shortage is not None:
            self._refused[shortage.dimension] = self._refused.get(shortage.dimension, 0) + 1
            return shortage
        self._window.append(_Counted(now_s, amounts))
        for number, amount in enumerate(amounts):
            self._used[number] += amount
            self._total[number] += amount
            self._peak[number] = max(self._peak[number], self._used[number])
        self._concurrent += 1
        self._peak_concurrent = max(self._peak_concurrent, self._concurrent)
        return None

    def leave(self) -> None:
        """End a call that was let in."""
        self._concurrent -= 1

    def levels(self, now_s: float) -> dict[Dimension, Level]:
        """Return how each limit of a minute stands."""
        self._forget(now_s)
        reset_s = self._left_s(self._window[-1], now_s) if self._window else 0.0
        return {
            dimension: Level(limit, max(0, limit - used), reset_s if used else 0.0)
            for dimension, limit, used in zip(
                DIMENSIONS, self.limits.per_minute, self._used, strict=True
            )
            if limit is not None
        }

    def shown(self) -> dict[str, object]:
        """Return limits and counts: what was let in, its peak in any minute, what was refused."""
        return {
            "limits": self.limits.model_dump(),
            "total": dict(zip(DIMENSIONS, self._total, strict=True)),
            "peak": dict(zip(DIMENSIONS, self._peak, strict=True))
            | {"concurrent": self._peak_concurrent},
            "concurrent": self._concurrent,
            "refused": dict(self._refused),
        }

    def _shortage(self, amounts: tuple[int, int, int, int], now_s: float) -> Shortage | None:
        """Return the shortage that lasts longest, one that never ends first of all."""
        most = self.limits.max_concurrent
        found: Shortage | None = None
        if most is not None and self._concurrent >= most:
            found = Shortage("concurrent", most, self._concurrent, 1, None)
        longest_s = -1.0
        for number, limit in enumerate(self.limits.per_minute):
            requested, used = amounts[number], self._used[number]
            if limit is None or used + requested <= limit:
                continue
            wait_s = self._wait_s(number, used + requested - limit, now_s)
            if requested > limit:
                return Shortage(DIMENSIONS[number], limit, used, requested, None)
            if wait_s > longest_s:
                longest_s = wait_s
                found = Shortage(DIMENSIONS[number], limit, used, requested, wait_s)
        return found

    def _wait_s(self, number: int, over: int, now_s: float) -> float:
        """Return how long until so much has left the window."""
        wait_s = 0.0
        for counted in self._window:
            if over <= 0:
                break
            over -= counted.amounts[number]
            wait_s = self._left_s(counted, now_s)
        return wait_s

    def _left_s(self, counted: _Counted, now_s: float) -> float:
        return self.limits.limit_window_s - (now_s - counted.at_s)

    def _forget(self, now_s: float) -> None:
        while self._window and self._left_s(self._window[0], now_s) <= 0:
            for number, amount in enumerate(self._window.popleft().amounts):
                self._used[number] -= amount


class LimitBook:
    """The limits in force."""

    def __init__(self) -> None:
        self._meters: dict[str | None, Meter] = {}

    def set(self, limits: Limits) -> None:
        """Set the limits of a model, or of every one. Raises ValueError when there are too many."""
        meter = self._meters.get(limits.model)
        if meter is not None:
            meter.limits = limits
        elif len(self._meters) >= MAX_METERS:
            raise ValueError(f"there are limits for {MAX_METERS} models already; delete some first")
        else:
            self._meters[limits.model] = Meter(limits)

    def clear(self) -> None:
        """Lift every limit, and forget the counts."""
        self._meters.clear()

    def reset(self) -> None:
        """Forget the counts; the limits stay."""
        for meter in self._meters.values():
            meter.reset()

    def meter(self, model: str) -> Meter | None:
        """Return what counts the calls of a model, None if nothing does."""
        if not self._meters:
            return None
        return self._meters.get(model) or self._meters.get(None)

    def shown(self) -> list[dict[str, object]]:
        """Return every limit with its counts."""
        return [meter.shown() for meter in self._meters.values()]

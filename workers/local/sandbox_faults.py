"""Faults of the sandbox provider: what can go wrong on demand, and for which calls.

A rule strikes the calls that it names, all of them or every nth, for ever or a number of times:
`http_503` for a model without a number of times is that model's provider being down until the rule
is removed, `http_500` once is a hiccup. A call that a limit turns away has used up its strike.

Billing, unless `args.billed` says otherwise: an answer that was generated is billed although it
never arrives whole (`cut_stream`, `stall`, `garbage_body`, ... ; a stream up to where it broke);
a call that was refused or never answered (4xx, 5xx, `hang`, `reset_before_headers`, an error
body in place of a whole answer) is not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sluicegate.workers.local.sandbox_answers import Ask
from sluicegate.workers.local.sandbox_prices import SANDBOX_PREFIX, WireName

MAX_RULES = 1_000


class Fault(StrEnum):
    """What goes wrong. A model named `sandbox-<fault>` always has that fault."""

    # Refused, in the wire's own error shape
    HTTP_400 = "http_400"
    HTTP_401 = "http_401"
    HTTP_402 = "http_402"
    HTTP_403 = "http_403"
    HTTP_404 = "http_404"
    HTTP_413 = "http_413"
    HTTP_429 = "http_429"
    HTTP_500 = "http_500"
    HTTP_503 = "http_503"
    HTTP_529 = "http_529"
    QUOTA_429 = "quota_429"  # needs money, not patience
    CONTEXT_TOO_LONG = "context_too_long"
    CONTENT_POLICY = "content_policy"  # a filter that looks at the prompt
    # Never answered
    HANG = "hang"
    RESET_BEFORE_HEADERS = "reset_before_headers"
    RESET_AFTER_HEADERS = "reset_after_headers"
    # Slow
    SLOW_FIRST_TOKEN = "slow_first_token"  # noqa: S105 (a token of text)
    SLOW_DRIP = "slow_drip"
    # Broken at a fraction of the answer
    STALL = "stall"  # the connection stays open
    CUT_STREAM = "cut_stream"  # the connection is reset
    TRUNCATED_STREAM = "truncated_stream"  # a clean end, far too early
    ERROR_EVENT = "error_event"  # inside a 200
    MALFORMED_CHUNK = "malformed_chunk"  # one piece of broken JSON, then on as usual
    # Whole, but wrong
    MISSING_TERMINAL = "missing_terminal"  # no [DONE], no message_stop; unstreamed: no stop reason
    GARBAGE_BODY = "garbage_body"  # HTML with status 200
    CONTENT_FILTER = "content_filter"  # cut off, with a stop reason that says so
    REFUSAL = "refusal"  # the model declines: at OpenAI in a field of its own
    ANSWER_TEXT = "answer_text"
    BAD_JSON = "bad_json"  # JSON, and not what the schema asked for
    NO_USAGE = "no_usage"


#: Faults that refuse the call with an error status.
REFUSALS = frozenset(
    fault
    for fault in Fault
    if fault.startswith(("http_", "quota_", "context_")) or fault is Fault.CONTENT_POLICY
)


class FaultArgs(BaseModel):
    """How exactly; each fault reads the ones that mean something to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Headers of an error status, in seconds and milliseconds.
    retry_after_s: Annotated[float, Field(ge=0)] | None = None
    retry_after_ms: Annotated[float, Field(ge=0)] | None = None
    #: The message of an error.
    message: str | None = None
    #: Whether the call is billed whole (true) or not at all (false), against the fault's habit.
    billed: bool | None = None
    #: Where an answer breaks, as a part of its tokens.
    fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    #: How long a refusal, a reset or garbage waits.
    delay_ms: Annotated[float, Field(ge=0)] = 0
    #: `slow_first_token`: the wait before the first token, or before the whole answer.
    first_token_ms: Annotated[float, Field(ge=0)] = 5_000
    #: `slow_drip`: the speed of the answer.
    tokens_per_s: Annotated[float, Field(gt=0)] = 2
    #: `missing_terminal` of a stream: whether the response then ends, its connection stays open,
    #: or is closed in the middle of it; and whether the usage still comes.
    then: Literal["end", "hold", "close"] = "end"
    usage: bool = True
    #: `answer_text`: the answer as the inside of a JSON string, so that it can hold `\\u0000`
    #: and a lone `\\ud800`.
    text_json: str = ""

    @property
    def text(self) -> str:
        """The answer of `answer_text`, decoded."""
        decoded: str = json.loads(f'"{self.text_json}"')
        return decoded

    @model_validator(mode="after")
    def _text_is_json(self) -> FaultArgs:
        try:
            _ = self.text
        except ValueError as error:
            raise ValueError("text_json must be the inside of a JSON string") from error
        return self


class FaultRule(BaseModel):
    """Which calls get a fault; the oldest rule that fires decides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fault: Fault
    model: str | None = None
    wire: WireName | None = None
    #: Text that must occur in the prompt.
    prompt_contains: str | None = None
    #: How often the fault strikes before the rule is spent; null is for ever.
    times: Annotated[int, Field(ge=1)] | None = None
    #: Strike only every nth matching call, beginning with the nth.
    every_nth: Annotated[int, Field(ge=1)] = 1
    args: FaultArgs = FaultArgs()


@dataclass(slots=True, kw_only=True)
class Strike:
    """A fault that hits one call."""

    fault: Fault
    args: FaultArgs


@dataclass(slots=True, kw_only=True)
class _Armed:
    rule: FaultRule
    matched: int = 0
    fired: int = 0

    def strikes(self, ask: Ask) -> bool:
        """Count a call that matches, and say whether it is hit."""
        rule = self.rule
        if (
            (rule.times is not None and self.fired >= rule.times)
            or (rule.model is not None and rule.model != ask.model)
            or (rule.wire is not None and rule.wire != ask.wire)
            or (rule.prompt_contains is not None and rule.prompt_contains not in ask.prompt)
        ):
            return False
        self.matched += 1
        if self.matched % rule.every_nth:
            return False
        self.fired += 1
        return True


class FaultBook:
    """The rules in force."""

    def __init__(self) -> None:
        self._armed: dict[int, _Armed] = {}
        self._last_id = 0

    def add(self, rule: FaultRule) -> int:
        """Arm a rule and return its id. Raises ValueError when there are too many."""
        if len(self._armed) >= MAX_RULES:
            raise ValueError(f"there are {MAX_RULES} fault rules already; delete some first")
        self._last_id += 1
        self._armed[self._last_id] = _Armed(rule=rule)
        return self._last_id

    def remove(self, rule_id: int) -> bool:
        """Disarm one rule; false if there is none with this id."""
        return self._armed.pop(rule_id, None) is not None

    def clear(self) -> None:
        """Disarm every rule."""
        self._armed.clear()

    def rules(self) -> list[dict[str, object]]:
        """List the rules with how many calls each matched and hit."""
        return [
            {"id": rule_id, "matched": armed.matched, "fired": armed.fired}
            | armed.rule.model_dump(mode="json")
            for rule_id, armed in self._armed.items()
        ]

    def strike(self, ask: Ask) -> Strike | None:
        """Return the fault that hits this call, if any."""
        for armed in self._armed.values():
            if armed.strikes(ask):
                return Strike(fault=armed.rule.fault, args=armed.rule.args)
        if ask.model.startswith(SANDBOX_PREFIX):
            name = ask.model.removeprefix(SANDBOX_PREFIX).replace("-", "_")
            if name in _BY_NAME:
                return Strike(fault=_BY_NAME[name], args=_DEFAULT_ARGS)
        return None


_BY_NAME = {fault.value: fault for fault in Fault}
_DEFAULT_ARGS = FaultArgs()

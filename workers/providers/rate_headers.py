"""What is left of a provider's limits, as the headers of its answers tell it. Pure.

OpenAI and its compatible servers send `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`, the
resets as durations (`6m0s`); Anthropic sends
`anthropic-ratelimit-{requests,tokens,input-tokens,output-tokens}-{limit,remaining,reset}`, the
resets as times. Both kinds are read on either wire, because proxies mix them. A limit of -1 or 0 is
how Azure says that there is none to tell. What cannot be read counts as not sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final, Literal

from sluicegate.shared.admission.headroom import Headroom

Dimension = Literal["requests", "tokens", "input_tokens", "output_tokens"]
What = Literal["limit", "remaining", "reset"]

_DIMENSIONS: Final[tuple[Dimension, ...]] = ("requests", "tokens", "input_tokens", "output_tokens")
_WHAT: Final[tuple[What, ...]] = ("limit", "remaining", "reset")
#: Both wires' names, in lower case.
_NAMES: Final[dict[bytes, tuple[What, Dimension]]] = {
    pattern.format(what=what, dimension=dimension.replace("_", "-")).encode(): (what, dimension)
    for pattern in ("x-ratelimit-{what}-{dimension}", "anthropic-ratelimit-{dimension}-{what}")
    for what in _WHAT
    for dimension in _DIMENSIONS
}

#: More digits are no count of tokens, whatever they are.
_MAX_DIGITS: Final = 15
#: A reset further away is none that waiting is for, or another kind of number (a Unix time).
_MAX_RESET_S: Final = 86_400.0

_UNITS_S: Final = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "us": 1e-6}
_DURATION: Final = re.compile(r"(\d{1,15}(?:\.\d{0,9})?)(ms|us|µs|ns|d|h|m|s)", re.ASCII)
_SECONDS: Final = re.compile(r"\d{1,9}(?:\.\d{0,9})?", re.ASCII)


def headroom(
    headers: Iterable[tuple[bytes, bytes]], *, now: datetime | None = None
) -> Headroom | None:
    """Return what raw headers say is left, None if they say nothing of it.

    `now` is our clock, for resets that are times where the answer has no `date` of its own.
    """
    # One pass over bytes: a lookup by name in the client's headers decodes and compares them all.
    said: dict[tuple[What, Dimension], bytes] = {}
    date = b""
    for raw_name, value in headers:
        name = raw_name.lower()
        if name in _NAMES:
            said[_NAMES[name]] = value
        elif name == b"date":
            date = value
    left: dict[Dimension, int] = {}
    wait_s: float | None = None
    for dimension in _DIMENSIONS if said else ():
        count = _count(said.get(("remaining", dimension), b""))
        if count is None or said.get(("limit", dimension), b"").strip() in (b"0", b"-1"):
            continue
        left[dimension] = count
        if count == 0:
            reset = said.get(("reset", dimension), b"").decode("latin-1")
            back_s = reset_s(reset, date.decode("latin-1"), now=now)
            wait_s = wait_s if back_s is None else max(back_s, wait_s or 0.0)
    return Headroom(**left, reset_s=wait_s) if left else None


def reset_s(said: str, date: str = "", *, now: datetime | None = None) -> float | None:
    """Return the seconds until a reset: a duration, plain seconds, or a time; None for no such.

    A time is taken relative to `date`, the answer's own, so that no clock but one counts.
    """
    said = said.strip()
    wait_s = float(said) if _SECONDS.fullmatch(said) else _duration_s(said)
    if wait_s is None:
        try:
            until = datetime.fromisoformat(said)
        except ValueError:
            return None
        if "T" not in said and " " not in said:  # a date alone, or a number that passes for one
            return None
        wait_s = max(0.0, (_aware(until) - _moment(date, now)) / timedelta(seconds=1))
    return wait_s if wait_s <= _MAX_RESET_S else None


def _duration_s(said: str) -> float | None:
    """Read a duration as Go writes it: `1h2m3.5s`, `6m0s`, `120ms`."""
    total_s, end = 0.0, 0
    for part in _DURATION.finditer(said):
        if part.start() != end:
            return None
        end = part.end()
        number, unit = part.groups()
        total_s += float(number) * _UNITS_S.get(unit, 1e-6)  # µs and ns: as good as nothing
    return total_s if end and end == len(said) else None


def _moment(date: str, now: datetime | None) -> datetime:
    try:
        return _aware(parsedate_to_datetime(date))
    except (ValueError, OverflowError):
        return now or datetime.now(UTC)


def _aware(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def _count(said: bytes) -> int | None:
    said = said.strip()
    return int(said) if said.isdigit() and len(said) <= _MAX_DIGITS else None

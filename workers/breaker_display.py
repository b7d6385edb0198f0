"""What commands show of the gates of provider rows."""

from __future__ import annotations

from typing import Any, Final

from sluicegate.shared.gate_views import GateView, describe
from sluicegate.shared.terminal import age, moment

COLUMNS: Final = (
    *("provider", "state", "since", "until", "window", "in flight", "limits"),
    *("at most now", "rests for", "suspended"),
)


def cells(view: GateView) -> tuple[str, ...]:
    """Write a gate as a line of a table, by `COLUMNS`."""
    row, gate = view.entry.provider, view.gate
    limits = (
        (row.requests_per_minute, "requests"),
        (row.tokens_per_minute, "tokens"),
        (row.input_tokens_per_minute, "tokens in"),
        (row.output_tokens_per_minute, "tokens out"),
    )
    a_minute = [f"{limit:,} {what}/min" for limit, what in limits if limit is not None]
    at_once = [] if row.max_concurrent is None else [f"{row.max_concurrent:,} calls"]
    opens = gate.half_open_in_s if view.state == "open" else 0.0
    return (
        row.name + (f" (of {view.entry.account})" if view.entry.account else ""),
        view.state.replace("_", " "),
        age(view.since),
        _seconds(opens),
        f"{gate.failures} of {gate.calls} failed" if gate.calls else "",
        str(gate.in_flight),
        ", ".join(a_minute + at_once),
        "" if gate.concurrency_cap is None else f"{gate.concurrency_cap} calls",
        _seconds(gate.cooldown_left_s),
        ", ".join(f"{name} ({_seconds(left_s)})" for name, left_s in view.suspended.items()),
    )


def _seconds(left_s: float) -> str:
    return f"{left_s:.1f} s" if left_s > 0 else ""


def as_json_object(view: GateView) -> dict[str, Any]:
    """Return all of a gate for JSON."""
    return describe(view) | {"since": moment(view.since) or None}

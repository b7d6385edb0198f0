"""How a spend report is shown: as a table, as CSV, as JSON, and in sentences. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sluicegate.producers.spend import Latency, Spend, SpendReport
from sluicegate.producers.spend_forecast import CONFIDENCE, MIN_DAYS, Forecast
from sluicegate.shared.jobs import dollars
from sluicegate.shared.terminal import money

_TABLE_HEAD: Final = (
    *("requests", "failures", "cost", "baseline", "saving", "saved"),
    *("duration s", "first token s", "cached", "input", "output"),
    *("cache read", "cache write", "reasoning", "estimated"),
)
_TOKENS: Final = (
    *("input_tokens", "cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens"),
    *("output_tokens", "reasoning_tokens"),
)
_PERCENTILES: Final = tuple(
    f"{what}_{name}_ms" for what in ("duration", "first_token") for name in ("p50", "p95", "p99")
)


def table(report: SpendReport) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Return the head and the rows, the total last; latencies are p50/p95/p99."""
    head = (report.by.value.replace("_", " "), *_TABLE_HEAD)
    return head, [_cells(row) for row in (*report.rows, report.total)]


def _cells(row: Spend) -> Sequence[str]:
    written = row.cache_write_5m_tokens + row.cache_write_1h_tokens
    return (
        row.key,
        f"{row.requests:,}",
        f"{row.failures:,}",
        money(row.cost_nano_usd),
        money(row.baseline_nano_usd),
        signed(row.saving_nano_usd),
        _percent(row.saving_percent),
        _seconds(row.duration),
        _seconds(row.first_token),
        _percent(row.cache_hit_percent),
        f"{row.input_tokens:,}",
        f"{row.output_tokens:,}",
        # Columns with nothing in them are left out.
        f"{row.cache_read_tokens:,}" if row.cache_read_tokens else "",
        f"{written:,}" if written else "",
        f"{row.reasoning_tokens:,}" if row.reasoning_tokens else "",
        money(row.estimated_nano_usd) if row.estimates else "",
    )


def signed(nano_usd: int) -> str:
    """Write an amount in dollars, with its sign before the dollar's."""
    return f"-{money(-nano_usd)}" if nano_usd < 0 else money(nano_usd)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}%"


def _seconds(latency: Latency | None) -> str:
    if latency is None:
        return ""
    return "/".join(f"{ms / 1000:.2f}" for ms in (latency.p50_ms, latency.p95_ms, latency.p99_ms))


def csv_table(report: SpendReport) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Return head and rows for a spreadsheet: plain numbers, amounts in exact dollars, no total."""
    head = (
        report.by.value,
        *("requests", "failures", "cost_usd", "baseline_usd", "saving_usd", "saving_percent"),
        *("estimates", "estimated_usd", *_TOKENS, "cache_hit_percent", *_PERCENTILES),
    )
    return head, [_csv_cells(row) for row in report.rows]


def _csv_cells(row: Spend) -> Sequence[str]:
    return (
        row.key,
        str(row.requests),
        str(row.failures),
        _exact(row.cost_nano_usd),
        _exact(row.baseline_nano_usd),
        _exact(row.saving_nano_usd),
        _number(row.saving_percent),
        str(row.estimates),
        _exact(row.estimated_nano_usd),
        *(str(getattr(row, name)) for name in _TOKENS),
        _number(row.cache_hit_percent),
        *("" if ms is None else str(ms) for ms in _latencies(row)),
    )


def _latencies(row: Spend) -> list[int | None]:
    return [
        getattr(latency, f"{name}_ms") if latency else None
        for latency in (row.duration, row.first_token)
        for name in ("p50", "p95", "p99")
    ]


def _exact(nano_usd: int) -> str:
    return format(dollars(nano_usd), "f")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def as_json(report: SpendReport) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {
        "by": report.by.value,
        "account": report.account,
        "time_zone": report.time_zone,
        "from": report.first_day.isoformat(),
        "to": report.last_day.isoformat(),
        "rows": [_row_as_json(row) for row in report.rows],
        "total": _row_as_json(report.total),
        "forecast": report.forecast and report.forecast.model_dump(mode="json"),
    }


def _row_as_json(row: Spend) -> dict[str, Any]:
    return row.model_dump(mode="json") | {
        "saving_nano_usd": row.saving_nano_usd,
        "saving_percent": row.saving_percent,
        "cache_hit_percent": row.cache_hit_percent,
    }


def sentences(report: SpendReport) -> list[str]:
    """Say what the table cannot: that there is nothing, what is estimated, what comes."""
    said = []
    total = report.total
    if not report.rows:
        said.append(f"nothing was spent {_days(report)}")
    if total.estimates:
        share = 100 * total.estimated_nano_usd / total.cost_nano_usd if total.cost_nano_usd else 0
        said.append(
            f"{money(total.estimated_nano_usd)} of the cost ({share:.1f}%) is estimated: nobody "
            f"knows what {_count(total.estimates, 'call')} cost, so the most is booked"
        )
    if report.is_month_so_far and report.rows:
        said.append(_outlook(report))
    return said


def _days(report: SpendReport) -> str:
    whose = f" by {report.account}" if report.account else ""
    if report.first_day == report.last_day:
        return f"on {report.first_day}{whose} ({report.time_zone})"
    return f"from {report.first_day} to {report.last_day}{whose} ({report.time_zone})"


def _outlook(report: SpendReport) -> str:
    if report.forecast is None:
        return (
            f"no forecast for {report.first_day:%B} yet: it takes {MIN_DAYS} whole days "
            "from the first that cost anything"
        )
    return outlook(report.forecast)


def outlook(found: Forecast) -> str:
    """Say what a month will have cost."""
    return (
        f"{found.month:%B} will have cost about {money(found.cost_nano_usd)}, {CONFIDENCE:.0%} "
        f"likely between {money(found.low_nano_usd)} and {money(found.high_nano_usd)} "
        f"(from {_count(found.days, 'whole day')})"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"

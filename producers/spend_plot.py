"""The picture of a spend report: what each day cost, by use case, as stacked bars."""

# matplotlib is an extra, and takes long to import.
# ruff: noqa: PLC0415

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import date, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sluicegate.producers.spend import SpendReport
from sluicegate.shared.errors import InvalidJob, SluiceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SUFFIXES: Final = (".png", ".svg")
_SIZE_INCHES: Final = (11.0, 6.0)
_DPI: Final = 160

#: One for each use case, the dearest first; told apart also by those who see no red or green.
_COLOURS: Final = (
    *("#3b6fb6", "#f2a541", "#4aa89a", "#d1605e", "#8b6fb3", "#9bb85a"),
    *("#7fb3d9", "#b07d4f", "#e19ac0", "#5b6770"),
)
#: What finds no colour of its own is one bar together.
_OTHERS: Final = "others"
_INK, _FAINT, _GRID = "#22303c", "#6b7a86", "#e3e8ec"
#: Entries of the legend in a line, and characters of a name there.
_LINE, _SHORT_LINE, _NAME = 5, 6, 18
_MOST_DATES: Final = 31


class NoPlot(SluiceError):
    """Drawing needs matplotlib; run `pip install 'sluicegate[plot]'`."""


def check_plot(path: Path) -> None:
    """Raise `InvalidJob` if a picture cannot go there, `NoPlot` if none can be drawn."""
    if path.suffix.lower() not in _SUFFIXES:
        raise InvalidJob("plot", f"{path} must end in {' or '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise InvalidJob("plot", f"there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise NoPlot


def draw(report: SpendReport, path: Path) -> None:
    """Draw what each day cost; raises `InvalidJob` if the file cannot be written.

    The report is one with its `daily` costs.
    """
    with _style():
        figure = _figure(report)
        try:
            figure.savefig(path, dpi=_DPI, metadata={"Date": None} if _is_svg(path) else None)
        except OSError as error:
            raise InvalidJob("plot", f"{path} cannot be written: {error.strerror}") from None


def _style() -> AbstractContextManager[None]:
    """Have matplotlib draw as it ships, whoever draws; the same costs give the same picture."""
    from matplotlib import rc_context

    return rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "text.parse_math": False,  # a dollar is a dollar
            "svg.hashsalt": "sluicegate",
        }
    )


def _is_svg(path: Path) -> bool:
    return path.suffix.lower() == ".svg"


def series(report: SpendReport) -> dict[str, list[float]]:
    """Return what each day of the report cost in dollars, by use case, the dearest first."""
    totals: Counter[str] = Counter()
    costs: defaultdict[tuple[str, date], int] = defaultdict(int)
    for one in report.daily:
        totals[one.use_case] += one.cost_nano_usd
    ranked = sorted(totals, key=lambda name: (-totals[name], name))
    named = ranked if len(ranked) <= len(_COLOURS) else ranked[: len(_COLOURS) - 1]
    for one in report.daily:
        costs[one.use_case if one.use_case in named else _OTHERS, one.day] += one.cost_nano_usd
    shown = named if len(named) == len(ranked) else [*named, _OTHERS]
    days = days_of(report)
    return {name: [costs[name, day] / 1e9 for day in days] for name in shown}


def days_of(report: SpendReport) -> list[date]:
    """Return every day of the report."""
    number = (report.last_day - report.first_day).days + 1
    return [report.first_day + timedelta(days=n) for n in range(number)]


def _figure(report: SpendReport) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, facecolor="white")
    axes = figure.add_axes((0.075, 0.1, 0.895, 0.68))
    _bars(axes, report)
    _scales(axes, report)
    _words(figure, axes, report)
    return figure


def _bars(axes: Axes, report: SpendReport) -> None:
    days = days_of(report)
    # So many bars that a gap between them would be less than a dot are an area.
    width = 0.78 if len(days) <= 4 * _MOST_DATES else 1.0
    below = [0.0] * len(days)
    for (name, costs), colour in zip(series(report).items(), _COLOURS, strict=False):
        label = f"{name if len(name) <= _NAME else name[: _NAME - 1] + '…'}  {_usd(sum(costs))}"
        axes.bar(
            range(len(days)),
            costs,
            bottom=below,
            width=width,
            color=colour,
            label=label,
            antialiased=width < 1,
        )
        below = [base + cost for base, cost in zip(below, costs, strict=True)]
    axes.set_xlim(-0.6, len(days) - 0.4)


def _scales(axes: Axes, report: SpendReport) -> None:
    from matplotlib.ticker import MaxNLocator

    days = days_of(report)
    places = _ticks(days)
    axes.set_xticks(places, [_date(days, place) for place in places])
    axes.yaxis.set_major_locator(MaxNLocator(6))
    steps = axes.get_yticks()
    digits = _digits(float(steps[1] - steps[0]))
    axes.yaxis.set_major_formatter(lambda amount, _place: f"${amount:,.{digits}f}")
    axes.grid(axis="y", color=_GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_FAINT, pad=6)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)


def _ticks(days: Sequence[date]) -> list[int]:
    """Return which days bear their date: at most so many that they can be read."""
    if len(days) <= _MOST_DATES:
        return list(range(len(days)))
    if len(days) <= 7 * _MOST_DATES:
        step = -(-len(days) // _MOST_DATES)
        return list(range(0, len(days), step))
    firsts = [n for n, day in enumerate(days) if day.day == 1]
    return firsts[:: -(-len(firsts) // _MOST_DATES)]


def _date(days: Sequence[date], place: int) -> str:
    """Write a day; the month, or the year, where it is another than at the date before it."""
    day = days[place]
    if len(days) > 7 * _MOST_DATES:
        return f"{day:%b}\n{day.year}" if day.month == 1 or place == 0 else f"{day:%b}"
    before = next((days[n] for n in reversed(_ticks(days)) if n < place), None)
    if before is not None and before.month == day.month:
        return str(day.day)
    return (
        f"{day.day}\n{day:%b %Y}"
        if before is None or before.year != day.year
        else (f"{day.day}\n{day:%b}")
    )


def _digits(step: float) -> int:
    """Return how many digits tell amounts so far apart from one another."""
    return next((digits for digits in (0, 2, 3, 4, 5, 6) if step >= 10.0**-digits), 9)


def _words(figure: Figure, axes: Axes, report: SpendReport) -> None:
    figure.text(
        0.03, 0.945, "Spend by day and use case, in US dollars", color=_INK, size=17, weight="bold"
    )
    figure.text(0.03, 0.9, _subtitle(report), color=_FAINT, size=10.5)
    if not axes.containers:
        axes.set_yticks([])
        axes.text(
            0.5,
            0.5,
            "nothing was spent",
            transform=axes.transAxes,
            ha="center",
            color=_FAINT,
            size=13,
        )
        return
    figure.legend(
        loc="upper left",
        bbox_to_anchor=(0.0195, 0.885),
        ncols=_SHORT_LINE if len(axes.containers) <= _SHORT_LINE else _LINE,
        frameon=False,
        labelcolor=_INK,
        handlelength=0.9,
        handleheight=0.9,
        columnspacing=1.8,
    )


def _subtitle(report: SpendReport) -> str:
    total = report.total
    parts = [
        report.account or "all accounts",
        f"{_span(report.first_day, report.last_day)} ({report.time_zone})",
        f"{_usd(total.cost_nano_usd / 1e9)} in all",
    ]
    if total.saving_percent is not None:
        saved = "saved" if total.saving_nano_usd >= 0 else "more"
        parts.append(
            f"{_usd(abs(total.saving_nano_usd) / 1e9)} ({abs(total.saving_percent):.0f} %) {saved}"
            " against the baseline model"
        )
    return "   ·   ".join(parts)


def _span(first: date, last: date) -> str:
    """Write days, with what both have in common said once."""
    end = f"{last.day} {last:%b %Y}"
    if first == last:
        return end
    if first.year != last.year:
        return f"{first.day} {first:%b %Y} to {end}"
    return f"{first.day}{'' if first.month == last.month else f' {first:%b}'} to {end}"


def _usd(amount: float) -> str:
    """Write an amount, to what it is worth reading."""
    digits = 0 if amount >= 1000 else 2 if amount >= 1 or not amount else 6
    return f"${amount:,.{digits}f}"

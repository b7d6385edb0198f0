"""The picture of a report: what is in it, where it may go, and what is said where it cannot."""

from __future__ import annotations

import re
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest

from sluicegate.producers import spend_plot
from sluicegate.producers.spend import By, DayCost, Spend, SpendReport
from sluicegate.producers.spend_plot import NoPlot, check_plot, days_of, draw, series
from sluicegate.shared.errors import InvalidJob

USD = 1_000_000_000
LAST = date(2026, 11, 23)


def report(costs: dict[str, dict[int, int]], *, days: int = 10) -> SpendReport:
    """Make a report: nano-USD by use case and number of the day."""
    first = LAST - timedelta(days=days - 1)
    daily = tuple(
        DayCost(day=first + timedelta(days=number), use_case=name, cost_nano_usd=cost)
        for name, by_number in costs.items()
        for number, cost in by_number.items()
    )
    total = sum(one.cost_nano_usd for one in daily)
    return SpendReport(
        by=By.USE_CASE,
        account="a$b$",
        time_zone="Europe/Berlin",
        first_day=first,
        last_day=LAST,
        rows=(),
        total=Spend(key="all", cost_nano_usd=total, baseline_nano_usd=2 * total),
        daily=daily,
        is_month_so_far=False,
        forecast=None,
    )


def test_each_day_is_there_and_the_dearest_use_case_is_first() -> None:
    found = report({"draft": {0: USD}, "voice": {0: USD, 2: 3 * USD}}, days=4)
    assert series(found) == {"voice": [1, 0, 3, 0], "draft": [1, 0, 0, 0]}
    assert len(days_of(found)) == 4


def test_what_has_no_colour_of_its_own_is_together() -> None:
    found = series(report({f"u{n:02}": {1: (20 - n) * USD} for n in range(14)}, days=2))
    assert [*found] == [*(f"u{n:02}" for n in range(9)), "others"]
    assert found["others"] == [0, sum(20 - n for n in range(9, 14))]


@pytest.mark.parametrize("days", [1, 23, 75, 150, 800])
def test_the_picture_says_what_it_shows(tmp_path: Path, days: int) -> None:
    costs = {n: (n + 1) * USD for n in range(days)}
    path = tmp_path / "spend.svg"
    draw(report({"draft": costs, "voice": {0: 500_000}}, days=days), path)
    # Text is drawn as paths; what each was stands beside it.
    said = re.findall(r"<!-- (.*?) -->", path.read_text())
    assert "Spend by day and use case, in US dollars" in said
    amount = f"{sum(costs.values()) / 1e9:,.{0 if days > 44 else 2}f}"
    assert f"draft  ${amount}" in said
    assert "voice  $0.000500" in said
    assert any(text.startswith("a$b$ ") and "50 %" in text for text in said)
    assert "$0" in said or "$0.00" in said
    assert any("2026" in text for text in said)


def test_a_picture_is_the_same_each_time(tmp_path: Path) -> None:
    found = report({"draft": {3: USD}})
    for name in ("one.svg", "two.svg", "one.png"):
        draw(found, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_can_be_drawn(tmp_path: Path) -> None:
    draw(report({}), tmp_path / "spend.svg")
    assert "nothing was spent" in (tmp_path / "spend.svg").read_text()


def test_where_it_cannot_go(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"spend.pdf must end in .png or .svg"):
        check_plot(Path("spend.pdf"))
    with pytest.raises(InvalidJob, match="there is no folder nowhere"):
        check_plot(Path("nowhere/spend.png"))
    check_plot(Path("spend.PNG"))
    (tmp_path / "spend.png").mkdir()
    with pytest.raises(InvalidJob, match="cannot be written: Is a directory"):
        draw(report({"draft": {0: USD}}), tmp_path / "spend.png")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(spend_plot, "find_spec", lambda _name: None)
    with pytest.raises(NoPlot, match=r"pip install 'sluicegate\[plot\]'"):
        check_plot(Path("spend.png"))

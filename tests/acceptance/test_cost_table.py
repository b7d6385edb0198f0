"""What the README says that the shipped jobs cost is what they cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.cost import cells, measure

README = Path(__file__).resolve().parents[2] / "README.md"

pytestmark = pytest.mark.timeout(300)


def test_the_readme_has_the_measured_costs() -> None:
    section = (
        README.read_text().partition("<!-- cost:begin -->")[2].partition("<!-- cost:end -->")[0]
    )
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    said = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table]
    assert said == [cells(line) for line in measure()]

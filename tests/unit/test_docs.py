"""The documentation keeps what it promises: links lead somewhere, tables say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sluicegate.shared.jobs import TRANSITIONS, AttemptState, State
from sluicegate.shared.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"(?m)^#+ (.+)$")
_FENCE = re.compile(r"(?ms)^```(\w*)\n(.*?)^```$")
_ROW = re.compile(r"(?m)^\| (?!from )([a-z]+) \| ([a-z]+) \| [^|]+\|$")
_EDGE = re.compile(r"(?m)^    ([a-z]+) --> ([a-z]+)$")
_SETTING = re.compile(r"\bSLUICE_[A-Z0-9_]+\b")

#: Variables that are no settings of the fleet.
_OTHERS = {"SLUICE_TEST_DATABASE_URL", "SLUICE_TEST_REDIS_URL", "SLUICE_DEBUG"}


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if anchor:
            headings = _HEADING.findall(target.read_text())
            anchors = {
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
            }
            assert anchor in anchors, link


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_settings_that_are_named_exist(page: Path) -> None:
    known = {f"SLUICE_{name.upper()}" for name in Settings.model_fields} | _OTHERS
    assert set(_SETTING.findall(page.read_text())) <= known


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_python_on_the_page_compiles(page: Path) -> None:
    for number, (language, code) in enumerate(_FENCE.findall(page.read_text())):
        if language == "python":
            compile(code, f"{page.name}, block {number}", "exec")


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md" or not page.exists():
            continue
        reached.add(page)
        waiting += [
            (page.parent / link.partition("#")[0]).resolve()
            for link in _LINK.findall(page.read_text())
            if "://" not in link
        ]
    assert [_name(page) for page in PAGES if page not in reached] == []


def test_the_states_of_jobs_are_those_of_the_code() -> None:
    jobs, attempts = (ROOT / "docs" / "states.md").read_text().split("\n## Attempts\n")
    edges = {(old.value, new.value) for old, reachable in TRANSITIONS.items() for new in reachable}
    rows = _ROW.findall(jobs)
    assert set(rows) == edges
    assert len(rows) == len(edges)
    assert set(_EDGE.findall(jobs)) == edges
    assert {state for edge in edges for state in edge} == set(State)
    described = re.findall(r"(?m)^\| ([a-z]+) \|", attempts)
    assert set(described) - {"state"} == {state.value for state in AttemptState}


def test_the_readme_has_a_place_for_measured_numbers() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.index("<!-- bench:begin -->") < readme.index("<!-- bench:end -->")

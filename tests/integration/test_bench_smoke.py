"""The benchmarks run: what they measure is measured elsewhere, by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"


def _run(*cases: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [
            *(sys.executable, str(RUN), "--case", *cases),
            *("--rounds", "1", "--seconds", "0.5", "--tiny", "--json-only"),
        ],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_tiny_round_prints_a_json_line_for_each_case() -> None:
    plain, fleet = _run("plain_asyncio", "fleet_chunk_25")
    assert [plain["case"], fleet["case"]] == ["plain_asyncio", "fleet_chunk_25"]
    assert plain["ratio"] == 1
    for line in (plain, fleet):
        assert line.keys() == {"case", "jobs_per_s", "cpu_ms_per_job", "rss_mib", "ratio"}
        assert all(line[name] > 0 for name in line.keys() - {"case"})


def test_what_the_gates_cost_and_let_through_is_measured() -> None:
    gated, ungated, admission, gates, added = _run(
        "fleet_chunk_25", "fleet_chunk_25_ungated", "admission", "gates"
    )
    assert [ungated["case"], admission["case"], gates["case"], added["case"]] == [
        "fleet_chunk_25_ungated",
        "admission",
        "gates",
        "gates_added",
    ]
    difference = gated["cpu_ms_per_job"] - ungated["cpu_ms_per_job"]
    assert added["cpu_ms_per_job"] == pytest.approx(difference, abs=0.002)
    assert admission["cpu_ms_per_job"] > 0
    assert admission["redis_cpu_ms_per_job"] > 0
    assert gates["limit_used"] > 0
    assert gates["throttled"] == 0
    assert gates["voice_wait_p95_ms"] > 0

"""The benchmarks run: what they measure is measured elsewhere, by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"


def test_a_tiny_round_prints_a_json_line_for_each_case() -> None:
    cases = ["plain_asyncio", "fleet_chunk_25", "fleet_chunk_25_ungated", "admission", "gates"]
    done = subprocess.run(
        [
            *(sys.executable, str(RUN), "--case", *cases),
            *("--rounds", "1", "--seconds", "0.5", "--tiny", "--json-only"),
        ],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.pop("case") for line in lines] == [*cases, "gates_added"]
    plain, gated, ungated, admission, gates, added = lines
    assert plain["ratio"] == 1
    for line in (plain, gated, ungated):
        assert line.keys() == {"jobs_per_s", "cpu_ms_per_job", "rss_mib", "ratio"}
        assert all(value > 0 for value in line.values())
    # What the gates cost: alone, and on the whole path.
    assert admission.keys() == {"cpu_ms_per_job", "redis_cpu_ms_per_job"}
    assert all(value > 0 for value in admission.values())
    difference = gated["cpu_ms_per_job"] - ungated["cpu_ms_per_job"]
    assert added == {"cpu_ms_per_job": pytest.approx(difference, abs=0.002)}
    # What they let through; how much of a limit only a minute can tell.
    assert gates.keys() == {"limit_used", "throttled", "voice_wait_p95_ms"}
    assert gates["throttled"] == 0
    assert gates["limit_used"] > 0
    assert gates["voice_wait_p95_ms"] > 0

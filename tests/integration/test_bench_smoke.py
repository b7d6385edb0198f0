"""The benchmarks run: what they measure is measured elsewhere, by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"


def test_a_tiny_round_prints_a_json_line_for_each_case() -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(RUN), "--case", "plain_asyncio", "fleet_chunk_25"),
            *("--rounds", "1", "--seconds", "0.5", "--tiny", "--json-only"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    plain, fleet = map(json.loads, done.stdout.splitlines())
    assert [plain["case"], fleet["case"]] == ["plain_asyncio", "fleet_chunk_25"]
    assert plain["ratio"] == 1
    for line in (plain, fleet):
        assert line.keys() == {"case", "jobs_per_s", "cpu_ms_per_job", "rss_mib", "ratio"}
        assert all(line[name] > 0 for name in line.keys() - {"case"})

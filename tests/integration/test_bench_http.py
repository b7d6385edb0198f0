"""The benchmark of the HTTP door runs: what it measures is measured elsewhere, by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RUN = Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"


def test_a_tiny_round_of_the_http_door_prints_a_json_line_for_each_case() -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(RUN), "--http"),
            *("--rounds", "1", "--seconds", "1", "--tiny", "--json-only"),
        ],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    found = {line.pop("case"): line for line in lines}
    assert set(found) == {
        "http_200_clients",
        "http_50_per_s",
        "http_first_token",
        "http_idle_readers",
    }
    whole = found["http_200_clients"]
    assert whole["cpu_ms"] > whole["http_ms"] > 0
    assert whole["worker_ms"] > 0
    assert found["http_50_per_s"]["p50_ms"] <= found["http_50_per_s"]["p99_ms"]

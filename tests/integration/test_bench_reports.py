"""The benchmark of reports runs: how long they take is measured by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"


def test_each_question_gets_a_line() -> None:
    done = subprocess.run(
        [sys.executable, str(RUN), "--reports", "--tiny", "--rounds", "1", "--json-only"],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    rows = {line["question"]: line["rows"] for line in lines}
    assert rows == {
        "the month by provider": 5,
        "the month by model": 4,
        "the month by use_case": 6,
        "the month by account": 5,
        "the month by day": 31,
        "the month by use_case, for a plot": 6,
        "an account's month by model": 4,
        "a day by model": 4,
    }
    assert all(0 < line["median_ms"] <= line["slowest_ms"] for line in lines)

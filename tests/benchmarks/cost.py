"""What the shipped CRM jobs cost, by use case, and on the baseline model: `./dev bench --cost`.

The demo runs its 60 jobs through the whole fleet, against the sandbox provider, which counts tokens
of prompts as four characters each and answers in 40 to 120 tokens. What was billed for them is the
list price of the models that the jobs were routed to; the baseline is the list price of the same
tokens on `gpt-4o`. Nothing here depends on chance, so the figures are the same on any machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.measuring import BenchError

_DEVELOPERS_OWN = ("SLUICE_", "OPENAI_", "ANTHROPIC_")
_TIMEOUT_S = 300.0


def measure() -> list[dict[str, Any]]:
    """Run the jobs; return a line for each use case, and one for all."""
    clean = {name: value for name, value in os.environ.items() if not _is_developers(name)}
    done = subprocess.run(
        [sys.executable, "-m", "sluicegate.cli", "demo", "--json"],
        env=clean,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"the demo failed with exit code {done.returncode}\n{done.stderr[-2000:]}")
    return lines(json.loads(done.stdout.splitlines()[-1])["by_use_case"])


def lines(by_use_case: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the same, of what the demo has said of each use case."""
    whole = {name: sum(one[name] for one in by_use_case.values()) for name in _ADDED}
    return [
        *(_line(name, one) for name, one in by_use_case.items()),
        _line("all", whole | {"models": []}),
    ]


_ADDED = ("jobs", "input_tokens", "output_tokens", "cost_nano_usd", "baseline_nano_usd")


def _is_developers(name: str) -> bool:
    return name.startswith(_DEVELOPERS_OWN)


def _line(use_case: str, told: Mapping[str, Any]) -> dict[str, Any]:
    saving = 1 - told["cost_nano_usd"] / told["baseline_nano_usd"]
    return {
        "use_case": use_case,
        "models": told["models"],
        **{name: told[name] for name in _ADDED},
        "saving_percent": round(100 * saving, 1),
    }


def cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a table shows of a line; the README has the same cells."""
    return (
        line["use_case"],
        ", ".join(line["models"]),
        str(line["jobs"]),
        f"{line['input_tokens']:,}",
        f"{line['output_tokens']:,}",
        f"${line['cost_nano_usd'] / 1e9:.6f}",
        f"${line['baseline_nano_usd'] / 1e9:.6f}",
        f"{line['saving_percent']:.1f} %",
    )


def main(console: Console) -> None:
    """Print a JSON line for each use case on stdout, and a table for people."""
    table = Table(title="What the shipped CRM jobs cost", show_footer=False)
    table.add_column("use case", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for heading in ("jobs", "tokens in", "tokens out", "cost", "on the baseline model", "saving"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in measure():
        sys.stdout.write(f"{json.dumps(line)}\n")
        table.add_row(*cells(line))
    console.print(table)

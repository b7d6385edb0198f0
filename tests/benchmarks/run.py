"""The benchmarks: `./dev bench`, or `python tests/benchmarks/run.py --case fleet_chunk_25`.

One JSON line a case on stdout, each value the median of the rounds; progress and a table on
stderr. The rounds go over all cases in turn, so that the noise of a shared machine hits all alike.
Ratios hold; a rate holds for the machine it was measured on.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

# Run by its path, also where the project is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sluicegate.shared.errors import SluiceError
from tests.benchmarks import cost, http_cases, reports
from tests.benchmarks.cases import CASES, GATED, UNGATED, Case
from tests.benchmarks.gate_cases import GATE_CASES, Figures, GateCase
from tests.benchmarks.measuring import BenchError, Cores, Measured, Summary, summarise
from tests.benchmarks.rounds import measure
from tests.benchmarks.stage import Stage

REFERENCE = "plain_asyncio"
#: What the gates add to the whole path.
ADDED = "gates_added"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks and return an exit code."""
    options = _options(arguments)
    width = None if sys.stderr.isatty() else 160
    console = Console(stderr=True, quiet=options.json_only, width=width)
    if options.cost or options.reports or options.http:
        return _alone(options, console)
    cases = [case for case in CASES if not options.case or case.name in options.case]
    gate_cases = [case for case in GATE_CASES if not options.case or case.name in options.case]
    if options.tiny:
        cases = [replace(case, in_flight=case.in_flight // 10, warm_up_s=0.2) for case in cases]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
            Path(folder).chmod(0o711)  # the servers' own user walks through it
            plan = Plan(cases, gate_cases, options.rounds, options.seconds, tiny=options.tiny)
            found, figures = run(Path(folder), plan, console)
    except (BenchError, SluiceError) as problem:
        sys.stderr.write(f"bench: {problem}\n")
        return 1
    reference = found.get(REFERENCE, [])
    summaries = [summarise(name, rounds, reference) for name, rounds in found.items()]
    for summary in summaries:
        sys.stdout.write(f"{json.dumps(as_line(summary))}\n")
    if summaries:
        console.print(table(summaries, options.rounds, options.seconds))
    if GATED in found and UNGATED in found:
        added = [
            gated.cpu_ms_per_job - ungated.cpu_ms_per_job
            for gated, ungated in zip(found[GATED], found[UNGATED], strict=True)
        ]
        figures[ADDED] = [{"cpu_ms_per_job": one} for one in added]
    for name, rounds in figures.items():
        line = {"case": name} | {key: round(value, 4) for key, value in medians(rounds).items()}
        sys.stdout.write(f"{json.dumps(line)}\n")
    if figures:
        console.print(figure_table(figures))
    return 0


def _alone(options: argparse.Namespace, console: Console) -> int:
    """Measure what jobs cost, how long reports take, or the HTTP door."""
    try:
        if options.cost:
            cost.main(console)
        elif options.http:
            http_cases.main(
                console,
                rounds=options.rounds,
                seconds=options.seconds,
                tiny=options.tiny,
                only=options.case or (),
            )
        else:
            entries = reports.TINY if options.tiny else reports.ENTRIES
            reports.main(console, entries=entries, rounds=options.rounds)
    except (BenchError, SluiceError) as problem:
        sys.stderr.write(f"bench: {problem}\n")
        return 1
    return 0


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    cases: Sequence[Case]
    gate_cases: Sequence[GateCase]
    rounds: int
    seconds: float
    tiny: bool


def run(
    folder: Path, plan: Plan, console: Console
) -> tuple[dict[str, list[Measured]], dict[str, list[Figures]]]:
    """Measure every case in every round; return the rounds by case, and those of the gates."""
    found: dict[str, list[Measured]] = defaultdict(list)
    figures: dict[str, list[Figures]] = defaultdict(list)
    cores = Cores.choose()
    if cores.measured == cores.others:
        console.print("There is one core only: the servers share it, so the rates are too low.")
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress, Stage(folder, cores) as stage:
        task = progress.add_task("", total=plan.rounds * len(plan.cases))
        for number in range(1, plan.rounds + 1):
            for case in plan.cases:
                progress.update(task, description=f"{case.name:<24}")
                measured = measure(stage, case, plan.seconds)
                found[case.name].append(measured)
                progress.advance(task)
                console.print(
                    f"round {number}  {case.name:<24} {measured.jobs_per_s:7.1f} jobs/s"
                    f"  {measured.cpu_ms_per_job:5.2f} ms CPU a job  {measured.rss_mib:6.0f} MiB"
                    f"  {measured.busy:4.0%} busy",
                    highlight=False,
                    soft_wrap=True,
                )
            for gate_case in plan.gate_cases:
                if number > (gate_case.rounds or plan.rounds):
                    continue
                progress.update(task, description=f"{gate_case.name:<24}")
                one = gate_case.measure(stage, plan.seconds, tiny=plan.tiny)
                figures[gate_case.name].append(one)
                console.print(
                    f"round {number}  {gate_case.name:<24} {shown(one)}",
                    highlight=False,
                    soft_wrap=True,
                )
    return found, figures


def medians(rounds: Sequence[Figures]) -> Figures:
    """Take the median of each figure."""
    return {name: median(one[name] for one in rounds) for name in rounds[0]}


def shown(figures: Figures) -> str:
    """Return figures for one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


def figure_table(figures: dict[str, list[Figures]]) -> Table:
    """Make the table of the gates for people."""
    what = {case.name: case.what for case in GATE_CASES}
    what[ADDED] = f"{GATED} less {UNGATED}, round by round"
    table = Table(title="The gates: medians")
    table.add_column("case", no_wrap=True)
    table.add_column("what")
    table.add_column("figures")
    for name, rounds in figures.items():
        table.add_row(name, what[name], "\n".join(shown(medians(rounds)).split("  ")))
    return table


def as_line(summary: Summary) -> dict[str, object]:
    """Return what is printed of a case, rounded to what the measurement is worth."""
    line: dict[str, object] = {
        "case": summary.case,
        "jobs_per_s": round(summary.jobs_per_s, 1),
        "cpu_ms_per_job": round(summary.cpu_ms_per_job, 3),
        "rss_mib": round(summary.rss_mib, 1),
        "ratio": None if summary.ratio is None else round(summary.ratio, 3),
    }
    if summary.case == "fleet_in_flight_2000":
        line["peak_in_flight"] = summary.peak_in_flight
    return line


def table(summaries: Sequence[Summary], rounds: int, seconds: float) -> Table:
    """Make the table for people."""
    what = {case.name: case.what for case in CASES}
    shown = Table(
        title=f"Medians of {rounds} interleaved rounds of {seconds:g} s, one core",
        caption="slowest-fastest: the rounds' jobs/s; busy: the measured core",
    )
    shown.add_column("case", no_wrap=True)
    shown.add_column("what")
    columns = ("jobs/s", "slowest-fastest", "ratio", "CPU ms/job", "MiB", "in flight", "busy")
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    for summary in summaries:
        shown.add_row(
            summary.case,
            what[summary.case],
            f"{summary.jobs_per_s:.0f}",
            f"{summary.slowest_per_s:.0f}-{summary.fastest_per_s:.0f}",
            "" if summary.ratio is None else f"{summary.ratio:.2f}",
            f"{summary.cpu_ms_per_job:.2f}",
            f"{summary.rss_mib:.0f}",
            str(summary.peak_in_flight),
            f"{summary.busy:.0%}",
        )
    return shown


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="Measures speed, as ratios.")
    names = [case.name for case in CASES] + [case.name for case in GATE_CASES]
    names += http_cases.CASES
    parser.add_argument(
        "--case", nargs="+", choices=names, metavar="NAME", help=f"only these of {', '.join(names)}"
    )
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument(
        "--cost", action="store_true", help="only what the shipped CRM jobs cost, by use case"
    )
    alone.add_argument(
        "--reports",
        action="store_true",
        help=f"only how long reports over {reports.ENTRIES:,} cost entries take",
    )
    alone.add_argument(
        "--http", action="store_true", help="only what requests over HTTP cost and wait"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6, help="length of each window")
    parser.add_argument(
        "--tiny", action="store_true", help="a tenth in flight, no warm-up: to see that all runs"
    )
    parser.add_argument("--json-only", action="store_true", help="no progress, no table")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not 0 < options.seconds <= 600:
        parser.error("--seconds must be above 0 and at most 600")
    named = set(options.case or ())
    over_http = named & http_cases.CASES.keys()
    if named and (options.cost or options.reports):
        parser.error("--cost and --reports have no cases: leave --case out")
    if (over_http or options.http) and (others := named - over_http):
        parser.error(f"cases over HTTP are measured alone: leave out {', '.join(sorted(others))}")
    options.http = options.http or bool(over_http)
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

"""What a case takes: a rate between two instants, and the measured processes' CPU and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import psutil

MIB = 1024 * 1024


class BenchError(Exception):
    """A measurement that cannot be made, or would mean nothing; one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One round of one case."""

    jobs_per_s: float
    cpu_ms_per_job: float
    #: The most that was seen.
    rss_mib: float
    #: The most calls that the provider had at the same time.
    peak_in_flight: int
    #: How busy the measured core was with the measured processes, 0 to 1.
    busy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The medians of a case's rounds."""

    case: str
    jobs_per_s: float
    cpu_ms_per_job: float
    rss_mib: float
    #: Of jobs/s against `plain_asyncio`, round by round; None if that was not run.
    ratio: float | None
    peak_in_flight: int
    slowest_per_s: float
    fastest_per_s: float
    busy: float


class Processes:
    """A process and all its children: their CPU and memory, from the kernel's own books."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)

    def cpu_s(self) -> float:
        """User and system time so far, in seconds."""
        return sum(
            times.user + times.system for times in map(psutil.Process.cpu_times, self._all())
        )

    def rss_mib(self) -> float:
        """Resident memory, in MiB; pages that a fork shares count in each process."""
        return sum(process.memory_info().rss for process in self._all()) / MIB

    def _all(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]


@dataclass(frozen=True, slots=True)
class Cores:
    """The core of the measured process, and that of everything else."""

    measured: int
    others: int

    @classmethod
    def choose(cls) -> Cores:
        """Take the last and the first core that we may use; the same one if it is the only one."""
        allowed = sorted(os.sched_getaffinity(0))
        return cls(measured=allowed[-1], others=allowed[0])

    @contextmanager
    def on_measured(self) -> Iterator[None]:
        """Start processes on the measured core: they inherit where this thread may run."""
        os.sched_setaffinity(0, {self.measured})
        try:
            yield
        finally:
            os.sched_setaffinity(0, {self.others})


def summarise(case: str, rounds: Sequence[Measured], reference: Sequence[Measured]) -> Summary:
    """Take the medians; `reference` are the rounds of `plain_asyncio`, or nothing."""
    rates = [measured.jobs_per_s for measured in rounds]
    ratios = [
        rate / plain.jobs_per_s for rate, plain in zip(rates, reference, strict=bool(reference))
    ]
    return Summary(
        case=case,
        jobs_per_s=median(rates),
        cpu_ms_per_job=median(measured.cpu_ms_per_job for measured in rounds),
        rss_mib=median(measured.rss_mib for measured in rounds),
        ratio=median(ratios) if ratios else None,
        peak_in_flight=round(median(measured.peak_in_flight for measured in rounds)),
        slowest_per_s=min(rates),
        fastest_per_s=max(rates),
        busy=median(measured.busy for measured in rounds),
    )

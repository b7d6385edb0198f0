"""The demo: all its jobs succeed, its books are right, and it leaves nothing behind."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from sluicegate.demo import load_jobs
from sluicegate.shared.celery_app import USE_CASES
from sluicegate.workers.local.processes import end
from tests.benchmarks.cost import cells, lines
from tests.polling import eventually

README = Path(__file__).resolve().parents[2] / "README.md"

_MARKER = "SLUICE_TEST_DEMO_ID"
_START_S = 120.0
_STOP_S = 40.0


@dataclass(frozen=True)
class Demo:
    """A running demo; everything it starts lives under `folder` or bears `marker`."""

    process: subprocess.Popen[bytes]
    folder: Path
    marker: str

    @property
    def said(self) -> str:
        """What it wrote to stderr, or to both when it was started without --json."""
        return (self.folder / "err").read_text()

    def processes(self) -> list[psutil.Process]:
        """All its processes that live: by the environment, or by where a server works."""
        return [
            process
            for process in psutil.process_iter()
            if process.pid != os.getpid() and self._is_ours(process)
        ]

    def _is_ours(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            if process.environ().get(_MARKER) == self.marker:
                return True
            return process.cwd().startswith(str(self.folder))
        return False

    def is_gone(self) -> bool:
        """Whether none of its processes lives."""
        left = self.processes()
        assert not left, left
        return True

    def wait_for_jobs(self) -> None:
        """Wait until it has submitted its jobs."""

        def stored() -> bool:
            assert self.process.poll() is None, self.said
            return "jobs are stored" in self.said

        eventually(stored, _START_S)


@pytest.fixture
def start_demo(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    """Return a function that starts the demo with options."""
    started: list[Demo] = []

    def start(*options: str) -> Demo:
        folder = tmp_path / f"demo-{len(started)}"
        folder.mkdir()
        marker = uuid4().hex
        with (folder / "err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "sluicegate.cli", "demo", *options],
                cwd=folder,
                env={**os.environ, "TMPDIR": str(folder), _MARKER: marker},
                stdout=subprocess.PIPE,
                stderr=err,
            )
        started.append(Demo(process, folder, marker))
        return started[-1]

    yield start
    for demo in started:
        end(demo.process, (signal.SIGTERM, _STOP_S))
        if demo.process.stdout is not None:
            demo.process.stdout.close()


def test_all_jobs_succeed_and_nothing_is_left(start_demo: Callable[..., Demo]) -> None:
    demo = start_demo("--json")
    out, _ = demo.process.communicate(timeout=170)
    assert demo.process.returncode == 0, demo.said
    told = json.loads(out.decode().strip().split("\n")[-1])
    assert set(told) == {
        "jobs",
        "succeeded",
        "failed",
        "cost_nano_usd",
        "baseline_nano_usd",
        "by_use_case",
        "elapsed_s",
    }
    assert (told["jobs"], told["succeeded"], told["failed"]) == (60, 60, 0)
    assert set(told["by_use_case"]) == set(USE_CASES)
    for name in ("jobs", "succeeded", "cost_nano_usd", "baseline_nano_usd"):
        assert told[name] == sum(one[name] for one in told["by_use_case"].values())
    assert 0 < told["cost_nano_usd"] < told["baseline_nano_usd"]
    assert 0 < told["elapsed_s"] < 170
    billed = re.search(r"sandbox's own bill, to the nano-dollar: ([\d,]+) nano-dollars", demo.said)
    assert billed is not None, demo.said
    assert int(billed[1].replace(",", "")) == told["cost_nano_usd"]
    assert "no process is left" in demo.said
    assert demo.is_gone()
    assert not list(demo.folder.glob("sluice-demo-*"))
    # The README says what these jobs cost, as `./dev bench --cost` prints it.
    section = (
        README.read_text().partition("<!-- cost:begin -->")[2].partition("<!-- cost:end -->")[0]
    )
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    said = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table]
    assert said == [cells(line) for line in lines(told["by_use_case"])]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_a_signal_ends_it_and_all_it_started(
    start_demo: Callable[..., Demo], number: signal.Signals
) -> None:
    demo = start_demo("--json")
    demo.wait_for_jobs()
    demo.process.send_signal(number)
    out, _ = demo.process.communicate(timeout=_STOP_S)
    assert demo.process.returncode == 128 + number, demo.said
    assert out == b""
    assert demo.said.strip().split("\n")[-1] == f"sluice: the demo was stopped by {number.name}"
    assert "Traceback" not in demo.said
    assert demo.is_gone()
    assert not list(demo.folder.glob("sluice-demo-*"))


def test_the_launchers_death_ends_all_it_started(start_demo: Callable[..., Demo]) -> None:
    demo = start_demo("--json")
    demo.wait_for_jobs()
    assert len(demo.processes()) > 5
    demo.process.kill()
    demo.process.wait(10)
    if sys.platform == "linux":  # only Linux tells children of their parent's death
        eventually(demo.is_gone, _STOP_S)


@pytest.mark.parametrize("sign", ["postgres", "valkey", "logs", "sandbox.port"])
def test_a_signal_while_it_starts(start_demo: Callable[..., Demo], sign: str) -> None:
    demo = start_demo()
    eventually(lambda: list(demo.folder.glob(f"sluice-demo-*/{sign}")), _START_S)
    demo.process.send_signal(signal.SIGTERM)
    demo.process.communicate(timeout=_STOP_S)
    assert demo.process.returncode == 128 + signal.SIGTERM, demo.said
    assert demo.said.strip() == "sluice: the demo was stopped by SIGTERM"
    assert demo.is_gone()
    assert not list(demo.folder.glob("sluice-demo-*"))


def test_real_providers_need_their_keys(start_demo: Callable[..., Demo]) -> None:
    demo = start_demo("--real")
    demo.process.communicate(timeout=60)
    assert demo.process.returncode == 2
    assert demo.said.startswith("sluice: --real needs OPENAI_API_KEY and ANTHROPIC_API_KEY:")
    assert demo.said.count("\n") == 1


def test_the_data_set_is_what_it_says() -> None:
    jobs = load_jobs()
    assert len(jobs) == 60
    assert set(Counter(job["use_case"] for job in jobs)) == set(USE_CASES)
    assert 0 < sum(job.get("lane") == "bulk" for job in jobs) < 30
    assert sum(job.get("stream", False) for job in jobs) == 1
    assert all(len(job["prompt"].split()) > 200 for job in jobs if job["use_case"] == "summary")
    for job in jobs:
        if job["use_case"] == "complex":
            assert len(job["prompt"]) >= 3
        if job["use_case"] == "vision":
            image = base64.b64decode(job["prompt"][0]["content"][0]["data"])
            assert image.startswith(b"\x89PNG")
            assert len(image) < 2048

"""Failpoints: named places where a test has a worker die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

_PROGRAM = """
from sluicegate.workers.failpoints import NAMES, failpoint
for name in ("claimed", "dispatched", "answered", "settled"):
    assert name in NAMES
    failpoint(name)
    print(name, flush=True)
"""


def _run(failpoints: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env=os.environ | {"SLUICE_FAILPOINTS": failpoints},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_unarmed_places_are_passed() -> None:
    done = _run("")
    assert (done.returncode, done.stdout.split()) == (
        0,
        ["claimed", "dispatched", "answered", "settled"],
    )


def test_a_process_dies_at_its_place() -> None:
    done = _run("answered=kill")
    assert (done.returncode, done.stdout.split()) == (-signal.SIGKILL, ["claimed", "dispatched"])


@pytest.mark.parametrize("wrong", ["nowhere=kill", "claimed", "claimed=explode"])
def test_a_slip_of_the_pen_is_refused(wrong: str) -> None:
    done = _run(wrong)
    assert done.returncode == 1
    assert done.stderr.startswith(f"SLUICE_FAILPOINTS: '{wrong}' is not <place>=<kill or stop>")
    assert "Traceback" not in done.stderr

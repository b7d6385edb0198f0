"""Clients in forked processes: each on connections of its own, none in another's way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sluicegate.shared.settings import Settings
from tests.answering import Answering

_APP = Path(__file__).with_name("fork_app.py")


@pytest.mark.parametrize("mode", ["threads", "loop"])
def test_a_parent_and_its_children_share_nothing(
    mode: str, settings: Settings, environment: Callable[[Settings], dict[str, str]]
) -> None:
    # One connection of a kind: so what a process spoke on last is all it has.
    narrow = settings.model_copy(update={"database_pool_size": 1})
    with Answering(settings):
        run = subprocess.run(
            [sys.executable, str(_APP), mode],
            env=environment(narrow),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert (run.returncode, run.stderr) == (0, "")
    said = [json.loads(line) for line in run.stdout.splitlines()]
    (parent,) = [one for one in said if one["kind"] == "parent"]
    children = [one["ids"] for one in said if one["kind"] == "child"]
    assert len(children) == 8
    for everybody in zip(parent["before"], *children, strict=True):
        assert len(set(everybody)) == 9
    # Postgres' connection is the only one of its pool: it lived through nine processes.
    assert parent["after"][0] == parent["before"][0]

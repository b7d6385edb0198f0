"""The gate against its model, on fakeredis."""

from __future__ import annotations

import pytest

from sluicegate.shared.settings import Settings
from tests.gate_machine import ROWS, run_machine
from tests.gate_row import Server
from tests.harness import FULL


@pytest.mark.timeout(1800 if FULL else 120)
@pytest.mark.parametrize("kind", ROWS)
def test_gate_does_as_its_model(gate_server: Server, gate_settings: Settings, kind: str) -> None:
    run_machine(gate_server, gate_settings, kind)

"""A rig for each module: its tests share workers, each has jobs of its own."""

from __future__ import annotations

import pytest

from sluicegate.workers.local.sandbox_control import SandboxControl
from tests.harness import Rig


@pytest.fixture
def rig(module_rig: Rig, sandbox: SandboxControl) -> Rig:
    """Return the module's rig: the sandbox's books empty, its pace as usual, all gates open."""
    assert module_rig.sandbox is sandbox
    # What a test did to a provider would otherwise hold back the next one's jobs.
    for key in module_rig.redis.scan_iter(match=f"{module_rig.settings.redis_prefix}gate:*"):
        module_rig.redis.delete(key)
    return module_rig

"""A rig for each module: its tests share workers, each has jobs of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sluicegate.workers.local.sandbox_control import SandboxControl

pytest.register_assert_rewrite("tests.harness")

from tests.harness import Rig, open_rig  # noqa: E402 - once its assertions say what they saw


@pytest.fixture(scope="module")
def module_rig(
    postgres: Any,
    valkey: str,
    _sandbox_process: SandboxControl,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Rig]:
    """Return the module's rig, without processes: a fixture of the module starts those."""
    folder = tmp_path_factory.mktemp("rig")
    with (
        postgres.database(template=postgres.template) as url,
        open_rig(
            database_url=url, redis_url=valkey, sandbox=_sandbox_process, folder=folder
        ) as rig,
    ):
        yield rig


@pytest.fixture
def rig(module_rig: Rig, sandbox: SandboxControl) -> Rig:
    """Return the module's rig: the sandbox's books empty, its pace as usual, all gates open."""
    assert module_rig.sandbox is sandbox
    # What a test did to a provider would otherwise hold back the next one's jobs.
    for key in module_rig.redis.scan_iter(match=f"{module_rig.settings.redis_prefix}gate:*"):
        module_rig.redis.delete(key)
    return module_rig

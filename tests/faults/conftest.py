"""What tests of faults share: servers that may be stopped, and an audit of the books."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sluicegate.shared import migrations
from sluicegate.shared.settings import Settings
from sluicegate.workers.local.servers import LocalServers
from tests.audit import Audit
from tests.harness import Rig


@pytest.fixture(scope="module")
def servers(server_folder: Path, request: pytest.FixtureRequest) -> Iterator[LocalServers]:
    """Return servers that may be stopped: the other modules' go on."""
    with LocalServers(server_folder / request.path.stem, fsync=False) as servers:
        given = Settings(_env_file=None, database_url=servers.database_url)
        migrations.upgrade(given)
        yield servers


@pytest.fixture
def audit(rig: Rig) -> Iterator[Audit]:
    """Return an audit of the books that the module's rig keeps."""
    with Audit(rig.settings) as audit:
        yield audit

"""Fixtures for pytest, found by it as soon as the package is installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sluicegate.testing.async_client import AsyncFakeSluice
    from sluicegate.testing.client import FakeSluice

# Imported at use: this module is loaded in every test run of whoever has installed us.
# ruff: noqa: PLC0415


@pytest.fixture
def fake_sluice() -> Iterator[FakeSluice]:
    """Return a fake `Sluice`; unscripted jobs are answered with their prompt."""
    from sluicegate.testing.client import FakeSluice

    with FakeSluice() as fake:
        yield fake


@pytest.fixture
def async_fake_sluice(fake_sluice: FakeSluice) -> AsyncFakeSluice:
    """Return a fake `AsyncSluice`, with the jobs and rules of `fake_sluice`."""
    from sluicegate.testing.async_client import AsyncFakeSluice

    return AsyncFakeSluice(beside=fake_sluice)

"""For a back end's own tests: fakes of the clients that need no servers.

    def test_follow_up(fake_sluice):
        fake_sluice.on("draft").answers("Dear Ada, ...")
        assert write_follow_up(fake_sluice, "Ada") == "Dear Ada, ..."

The fixtures `fake_sluice` and `async_fake_sluice` come with the package. What is here is imported
when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sluicegate.testing.async_client import AsyncFakeJobHandle as AsyncFakeJobHandle
    from sluicegate.testing.async_client import AsyncFakeSluice as AsyncFakeSluice
    from sluicegate.testing.client import FakeJobHandle as FakeJobHandle
    from sluicegate.testing.client import FakeSluice as FakeSluice
    from sluicegate.testing.job import FakeJob as FakeJob
    from sluicegate.testing.script import Rule as Rule
    from sluicegate.testing.script import ScriptError as ScriptError

_MODULE_OF = {
    "AsyncFakeJobHandle": "async_client",
    "AsyncFakeSluice": "async_client",
    "FakeJob": "job",
    "FakeJobHandle": "client",
    "FakeSluice": "client",
    "Rule": "script",
    "ScriptError": "script",
}

__all__ = [*_MODULE_OF]  # noqa: PLE0604 - all keys are strings


def __getattr__(name: str) -> Any:
    """Import what is asked for: pytest loads this package in every run."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])

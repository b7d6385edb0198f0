"""The HTTP producer beside the fleet: where it listens, and how it is run."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self

from sluicegate.shared.addresses import Address, bind, is_loopback, read_address
from sluicegate.shared.errors import SettingsError
from sluicegate.workers.local.supervisor import Child

_OPTION: Final = "--http"
_CONNECT_TIMEOUT_S: Final = 1.0
#: It calls no provider. Another value, not an empty one, which would give way to what is in `.env`.
_KEYS: Final = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpDoor:
    """A `sluice http` that is to listen there; in a sandbox this machine needs no key for it."""

    address: Address
    is_sandbox: bool

    @classmethod
    def at(cls, text: str, *, is_sandbox: bool) -> Self:
        """Read `PORT` or `HOST:PORT`; port 0 picks a free one.

        Raises `SettingsError` for what is no address, for one that is taken, and for one that
        others reach if nobody is asked for a key.
        """
        address = read_address(_OPTION, text, usual=3002)
        if is_sandbox and not is_loopback(address.host):
            raise SettingsError(
                f"{_OPTION}: with --sandbox everybody is let in without a key, and others reach "
                f"{address.host}; use 127.0.0.1"
            )
        with bind(address, f"{_OPTION}:") as line:
            port = line.getsockname()[1]
        return cls(address=Address(address.host, port), is_sandbox=is_sandbox)

    @property
    def url(self) -> str:
        """Where to call it."""
        return self.address.url

    def child(self, environment: Mapping[str, str], *, stage: int) -> Child:
        """Return the process to run, in this interpreter."""
        return Child(
            name="http",
            argv=[
                *(sys.executable, "-m", "sluicegate.cli", "http"),
                *("--host", self.address.host, "--port", str(self.address.port)),
                *(["--sandbox"] if self.is_sandbox else []),
            ],
            env={**environment, **dict.fromkeys(_KEYS, "none")},
            ready=self._answers,
            stage=stage,
        )

    def _answers(self) -> bool:
        with suppress(OSError):
            live = urllib.request.urlopen(  # noqa: S310 - our own address
                f"{self.url}/health/live", timeout=_CONNECT_TIMEOUT_S
            )
            with live:
                return True
        return False

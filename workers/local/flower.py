"""Flower beside the fleet: where it listens, who may open it, and how it is run."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from pydantic_settings import BaseSettings, SettingsConfigDict

from sluicegate.shared.addresses import LOOPBACK, bind, is_loopback, read_address
from sluicegate.shared.errors import SettingsError
from sluicegate.shared.secrets import Secret
from sluicegate.workers.local.supervisor import Child

#: The variable in which Flower itself looks for user and password.
_AUTH = "FLOWER_BASIC_AUTH"
_CONNECT_TIMEOUT_S = 1.0
#: It only looks on, nothing is lost: a stop does not wait for what it has begun.
_GRACE_S = 2.0
#: Flower is given another value, not an empty one, which would give way to what is in `.env`.
_KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "SLUICE_ENCRYPTION_KEYS")


class _Authentication(BaseSettings):
    """Flower's own variable, from the environment or `.env`, as our settings are read."""

    model_config = SettingsConfigDict(env_prefix="FLOWER_", env_file=".env", extra="ignore")

    basic_auth: Secret | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Flower:
    """A Flower that is to listen on `host` and `port`, open to whom `authentication` names.

    authentication: `user:password`, several with commas between; None lets everybody in who
    reaches it, so it is for this machine's own addresses only.
    """

    host: str
    port: int
    authentication: Secret | None = None

    @classmethod
    def at(cls, address: str) -> Flower:
        """Read `PORT` or `HOST:PORT`, and who may open it; port 0 picks a free one.

        Raises SettingsError for what is no address, for a port that is taken, for an address that
        others reach when nobody is asked for a password, and for a password that is none.
        """
        wanted = read_address("--flower", address, usual=5555)
        authentication = _Authentication().basic_auth
        _check_authentication(wanted.host, authentication)
        with bind(wanted, "--flower: Flower") as line:
            port = line.getsockname()[1]
        return cls(host=wanted.host, port=port, authentication=authentication)

    @property
    def url(self) -> str:
        """Where to open it."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def child(self, environment: Mapping[str, str], *, stage: int) -> Child:
        """Return the process to run: Celery's `flower` command, in this interpreter.

        environment: the fleet's; it is passed on without keys, as Flower calls no provider.
        """
        program, access = self._program()
        return Child(
            name="flower",
            argv=[
                *(sys.executable, "-m", program, "--quiet", "-A", "sluicegate.workers.app"),
                *("flower", f"--address={self.host}", f"--port={self.port}"),
                "--logging=warning",
            ],
            env={**environment, **dict.fromkeys(_KEYS, "none"), **access},
            ready=self._listens,
            stage=stage,
            grace_s=_GRACE_S,
            vital=False,
        )

    def _program(self) -> tuple[str, dict[str, str]]:
        if self.authentication is None:
            # Its buttons use its API, which it otherwise offers to nobody without a password.
            return "sluicegate.workers.local.flower_guard", {"FLOWER_UNAUTHENTICATED_API": "true"}
        return "celery", {_AUTH: self.authentication.get_secret_value()}

    def _listens(self) -> bool:
        with (
            suppress(OSError),
            socket.create_connection((self.host, self.port), _CONNECT_TIMEOUT_S),
        ):
            return True
        return False


def _check_authentication(host: str, authentication: Secret | None) -> None:
    if authentication is None:
        if not is_loopback(host):
            raise SettingsError(
                f"--flower: others reach {host}, and Flower can stop workers and cancel jobs; set "
                f"{_AUTH}=user:password, or use {LOOPBACK}"
            )
        return
    for one in authentication.get_secret_value().split(","):
        user, _, password = one.partition(":")
        if not user or not password:
            raise SettingsError(
                f"{_AUTH}: must look like user:password, several with commas between"
            )

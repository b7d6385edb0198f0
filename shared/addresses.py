"""Addresses that a process of ours listens on: read, checked and taken."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from typing import Final, NamedTuple

from sluicegate.shared.errors import SettingsError

LOOPBACK: Final = "127.0.0.1"
_MOST: Final = 65_535


class Address(NamedTuple):
    """Where to listen; port 0 picks a free one."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """How a program on this machine reaches it."""
        host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.host, self.host)  # noqa: S104 - compared
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def read_address(option: str, text: str, *, usual: int) -> Address:
    """Read `PORT` or `HOST:PORT`; raise `SettingsError` that names the option.

    usual: the port that the sentence gives as an example.
    """
    host, _, number = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or LOOPBACK
    if not number.isascii() or not number.isdigit() or int(number) > _MOST:
        raise SettingsError(
            f"{option}: {text!r} is not PORT or HOST:PORT, such as {usual} or {LOOPBACK}:{usual}"
        )
    return Address(host, int(number))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches this address or name."""
    with suppress(ValueError):  # a name
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def bind(address: Address, what: str) -> socket.socket:
    """Return a socket that is bound there; raise `SettingsError` that says why it cannot be.

    what: how that sentence begins, such as `--port:`.
    """
    line: socket.socket | None = None
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        line = socket.socket(family, kind, protocol)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        line.bind(where)
        # Linux tells only now whether somebody listens there.
        line.listen()
    except (OSError, UnicodeError) as problem:  # the latter for what cannot be a host's name
        if line is not None:
            line.close()
        reason = getattr(problem, "strerror", None) or problem
        raise SettingsError(
            f"{what} cannot listen on port {address.port} of {address.host} ({reason}); choose "
            "another, or 0 for a free one"
        ) from None
    return line

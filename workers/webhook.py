"""Posting to URLs that somebody else has chosen, from inside the network.

The library does TLS and HTTP; ours is only who it may connect to. It asks our network backend for a
connection to a host. That looks the name up, refuses unless every address it got may be talked to,
and connects to those very addresses: a name that means something else a moment later gains nothing.
Nothing is read from the environment but which authorities to trust (SSL_CERT_FILE): no proxy.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from ipaddress import ip_address
from typing import Final

import httpcore2

from sluicegate.shared.errors import SettingsError
from sluicegate.shared.webhooks import ALLOWED_BY, check_url, is_public

#: Looks up the addresses of a host; raises OSError. It may block.
Lookup = Callable[[str, int], Sequence[str]]

#: Addresses of a host that are tried.
_MAX_ADDRESSES: Final = 4
#: Of an answer, whose body nobody reads: after this much the connection is closed.
_MAX_DISCARDED_BYTES: Final = 65_536
_MAX_PROBLEM_CHARS: Final = 300

_HTTP_ERRORS: Final = (
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.UnsupportedProtocol,
    ssl.SSLError,
    OSError,
)


class PostFailed(Exception):
    """The URL did not take what was posted; the message says why, and holds no path of it."""


class _AddressRefused(Exception):
    pass


def look_up(host: str, port: int) -> list[str]:
    """Ask the system for a host's addresses."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class WebhookClient:
    """Posts with a deadline. Answers of 2xx are successes, and only those; no redirect is followed.

    deadline_s: for one post, from looking up the name to the answer's end. private_urls: whether
    addresses that are not public may be talked to. size: posts that run at the same time.
    """

    def __init__(
        self, *, deadline_s: float, private_urls: bool, size: int, lookup: Lookup = look_up
    ) -> None:
        self._deadline_s = deadline_s
        self._private_urls = private_urls
        # Of its own: a look-up cannot be cancelled, and the loop's threads have other work.
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="look-up")
        self._network = _CheckedNetwork(lookup, self._threads, private_urls=private_urls)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> None:
        """Post once; raises PostFailed."""
        try:
            async with asyncio.timeout(self._deadline_s):
                status = await self._status(
                    check_url(url, private=self._private_urls), headers, body
                )
        except SettingsError as error:
            raise PostFailed(str(error)) from None
        except _AddressRefused as error:
            raise PostFailed(str(error)) from None
        except (TimeoutError, httpcore2.TimeoutException):
            raise PostFailed(f"no answer within {self._deadline_s:g} s") from None
        except _HTTP_ERRORS as error:
            problem = str(error) or type(error).__name__
            raise PostFailed(f"no answer: {problem}"[:_MAX_PROBLEM_CHARS]) from None
        if 300 <= status < 400:
            raise PostFailed(f"answered {status}, and redirects are not followed")
        if not 200 <= status < 300:
            raise PostFailed(f"answered {status}")

    async def _status(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        target = httpcore2.URL(url)
        connection = httpcore2.AsyncHTTPConnection(
            target.origin, ssl_context=self._trusted, network_backend=self._network
        )
        every = dict.fromkeys(("connect", "read", "write"), self._deadline_s)
        async with (
            connection,
            connection.stream(
                "POST",
                target,
                headers=[("Host", _host_header(target)), *headers.items()],
                content=body,
                extensions={"timeout": every},
            ) as response,
        ):
            read = 0
            async for part in response.aiter_stream():
                read += len(part)
                if read > _MAX_DISCARDED_BYTES:
                    break
            return int(response.status)

    @cached_property
    def _trusted(self) -> ssl.SSLContext:
        return httpcore2.default_ssl_context()

    def close(self) -> None:
        """Begin no more look-ups."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _host_header(url: httpcore2.URL) -> str:
    host = url.host.decode()
    name = f"[{host}]" if ":" in host else host
    return name if url.port in (None, 443) else f"{name}:{url.port}"


class _CheckedNetwork(httpcore2.AsyncNetworkBackend):
    """Connects to hosts all of whose addresses may be talked to."""

    def __init__(self, lookup: Lookup, threads: ThreadPoolExecutor, *, private_urls: bool) -> None:
        self._lookup = lookup
        self._threads = threads
        self._private_urls = private_urls
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the library's own interface
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Look the host up, check, and connect; raises _AddressRefused."""
        problem: Exception = OSError("it has no address")
        for address in (await self._addresses(host, port))[:_MAX_ADDRESSES]:
            try:
                return await self._inner.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                problem = error
        raise problem

    async def _addresses(self, host: str, port: int) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        try:
            addresses = await loop.run_in_executor(self._threads, self._lookup, host, port)
        except UnicodeError as error:
            raise OSError(f"{host} is no name of a host") from error
        for address in addresses:
            if not self._private_urls and not is_public(ip_address(address)):
                raise _AddressRefused(
                    f"{host} is at {address}, which is no public address{ALLOWED_BY}"
                )
        return addresses

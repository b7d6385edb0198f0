"""The public keys that tokens are signed with: a JWKS, from a file or a URL, read now and then."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

import orjson
from jwt import PyJWK
from jwt.exceptions import PyJWTError

log = logging.getLogger(__name__)

#: The kinds of key that each algorithm is verified with; anything else in the set is passed over.
_KEY_TYPES: Final = {"RS256": "RSA", "ES256": "EC"}
_MIN_RSA_BITS: Final = 2048
_MAX_BYTES: Final = 1 << 20
_MAX_KEYS: Final = 100
_SOCKET_TIMEOUT_S: Final = 5.0
_TIMEOUT_S: Final = 10.0
#: Between two readings for keys that are not known, or because the last one failed.
_NOT_SOONER_S: Final = 30.0


class KeysUnavailable(Exception):
    """The keys of tokens could not be read, and none were read before."""


class KeySet:
    """The keys at a place, which is a path or a URL; it is read at first use.

    What was read stays in use while it cannot be read again.
    """

    def __init__(
        self, place: str, *, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._place = place
        self._ttl_s = ttl_s
        self._clock = clock
        self._keys: Sequence[PyJWK] = ()
        self._read_at: float | None = None
        self._tried_at: float | None = None
        self._reading = asyncio.Lock()

    async def find(self, algorithm: str, key_id: str | None) -> Sequence[PyJWK]:
        """Return the keys that a token with this header may be signed with; maybe none.

        key_id: None: any key of the kind. Raises `KeysUnavailable`.
        """
        if self._read_at is None:
            await self._read(_NOT_SOONER_S)
            if self._read_at is None:
                raise KeysUnavailable
        elif self._clock() - self._read_at > self._ttl_s and not self._reading.locked():
            # One waits for it; the others go on with what there is.
            await self._read(_NOT_SOONER_S)
        found = self._fitting(algorithm, key_id)
        if not found:
            # It may be new. Whoever sends such tokens cannot have the set read all the time.
            await self._read(_NOT_SOONER_S)
            found = self._fitting(algorithm, key_id)
        return found

    def _fitting(self, algorithm: str, key_id: str | None) -> Sequence[PyJWK]:
        return [
            key
            for key in self._keys
            if key.algorithm_name == algorithm and key_id in (None, key.key_id)
        ]

    async def _read(self, not_sooner_s: float) -> None:
        async with self._reading:
            now = self._clock()
            if self._tried_at is not None and now - self._tried_at < not_sooner_s:
                return
            self._tried_at = now
            try:
                content = await asyncio.wait_for(
                    asyncio.to_thread(_fetch, self._place), timeout=_TIMEOUT_S
                )
                self._keys = read_keys(content)
            except (OSError, HTTPException, ValueError) as error:
                # Neither the place nor what stands there: both may hold what is nobody's business.
                log.warning("the keys of tokens cannot be read: %s", _reason(error))
                return
            self._read_at = now


def read_keys(content: bytes) -> Sequence[PyJWK]:
    """Return the keys of a JWKS that sign tokens of ours; raises ValueError if there is none."""
    try:
        listed = orjson.loads(content)["keys"]
        entries = [one for one in listed[:_MAX_KEYS] if isinstance(one, dict)]
    except (KeyError, TypeError, orjson.JSONDecodeError):
        raise ValueError("this is no JWKS: an object with `keys`") from None
    found = [key for one in entries if (key := _key(one)) is not None]
    if not found:
        raise ValueError("there is no key for RS256 or ES256 in it")
    return found


def _key(entry: dict[str, Any]) -> PyJWK | None:
    if entry.get("use", "sig") != "sig":
        return None
    try:
        key = PyJWK(entry)
    except (PyJWTError, ValueError):
        return None
    # A secret in a set is none: whoever can read the set could sign with it.
    if _KEY_TYPES.get(key.algorithm_name) != key.key_type:
        return None
    if key.key_type == "RSA" and key.key.key_size < _MIN_RSA_BITS:
        return None
    return key


class _NoRedirects(HTTPRedirectHandler):
    """Follows none: they could lead to where nobody has verified who answers."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _fetch(place: str) -> bytes:
    if "://" not in place:
        with Path(place).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    else:
        request = Request(place, headers={"Accept": "application/json"})  # noqa: S310 - https, see settings
        try:
            with build_opener(_NoRedirects).open(request, timeout=_SOCKET_TIMEOUT_S) as response:
                content = response.read(_MAX_BYTES + 1)
        except HTTPError as error:
            error.close()  # it holds the connection
            raise
    if len(content) > _MAX_BYTES:
        raise ValueError("it is longer than a megabyte")
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"status {error.code}"
    if isinstance(error, ValueError):
        return str(error)
    reason = getattr(error, "strerror", None) or getattr(error, "reason", None)
    return f"{type(error).__name__} ({reason})" if reason else type(error).__name__

"""The body of a request: read within limits of length, time, memory and what it holds."""

from __future__ import annotations

import asyncio
import re
from typing import Final

from starlette.requests import ClientDisconnect, Request

from sluicegate.producers.http.problems import Problem, wrong
from sluicegate.shared.settings import Settings

#: Whoever sends too much or too slowly is not read any further.
_CLOSE: Final = {"Connection": "close"}
_FULL_RETRY_AFTER_S: Final = 2

#: How many values a body may hold. Each costs something to check, and more to refuse; the longest
#: conversation with the most tools that is accepted has fewer.
VALUES_MAX: Final = 25_000
#: A string of JSON, or what is left of the text after a quotation mark. Possessive, so that no text
#: is gone through twice.
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_MARKS: Final = (b",", b"[", b"{")


class Bodies:
    """All bodies that this process reads at the same time, which take limited memory together."""

    def __init__(self, settings: Settings) -> None:
        self._longest = settings.http_max_body_bytes
        self._timeout_s = settings.http_body_timeout_s
        self._most = max(settings.http_bodies_bytes, self._longest)
        self._held = 0

    async def read(self, request: Request) -> bytes:
        """Read the body of a request.

        Raises `Problem` for one that is too long (413), too slow (408) or not whole (400), and
        while too many are read (503). What is counted has come: whoever only says that he will send
        much takes nothing from others.
        """
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                self._check(int(request.headers.get("content-length", 0)), self._held)
                async for piece in request.stream():
                    size += len(piece)
                    self._held += len(piece)
                    self._check(size, self._held - size)
                    pieces.append(piece)
            return b"".join(pieces)
        except ClientDisconnect:
            raise Problem(400, "disconnected", "the body did not come whole") from None
        except TimeoutError:
            raise Problem(
                408,
                "body_too_slow",
                f"the body did not come within {self._timeout_s:g} s",
                headers=_CLOSE,
            ) from None
        finally:
            self._held -= size

    def _check(self, size: int, others: int) -> None:
        if size > self._longest:
            message = f"the body is longer than {self._longest:,} bytes"
            raise Problem(413, "body_too_large", message, headers=_CLOSE)
        if size and size + others > self._most:
            raise Problem(
                503,
                "too_many_bodies",
                "this server reads as much as it can hold already; try again later",
                retry_after_s=_FULL_RETRY_AFTER_S,
            )


def check_values(content: bytes, most: int = VALUES_MAX) -> None:
    """Raise `Problem` for JSON with more values than anybody needs, before it is parsed.

    What is in strings does not count.
    """
    if _marks(content) <= most:
        return
    # A value has two strings at most, its name and itself, so more of them need not be looked at.
    outside, strings = _STRING.subn(b"", content, count=2 * most + 1)
    if strings > 2 * most or _marks(outside) > most:
        raise wrong("body", f"holds more than {most:,} values; send fewer")


def _marks(content: bytes) -> int:
    return sum(map(content.count, _MARKS))

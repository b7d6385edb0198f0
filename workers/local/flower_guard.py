"""Flower without a password, guarded against the pages of others.

With its API open to everybody, Flower answers the scripts of any page in a browser on this machine:
each could stop workers and cancel jobs. This refuses what a browser says another page asks for, and
what is meant for another host, as the requests of a page are that has made its own name ours.

`python -m sluicegate.workers.local.flower_guard` takes the place of `python -m celery`.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import flower.command  # type: ignore[import-untyped]
from celery.__main__ import main
from tornado.httputil import HTTPServerRequest
from tornado.web import ErrorHandler

from sluicegate.shared.addresses import is_loopback

_FORBIDDEN = 403


class GuardedFlower(flower.command.Flower):  # type: ignore[misc]  # Flower has no types
    """Flower for its own pages, and for programs that are no browsers."""

    def find_handler(self, request: HTTPServerRequest, **options: Any) -> Any:
        """Find who answers a request."""
        if is_own(request.host, request.headers.get("Origin")):
            return super().find_handler(request, **options)
        return self.get_handler_delegate(request, ErrorHandler, {"status_code": _FORBIDDEN})


def is_own(host: str, origin: str | None) -> bool:
    """Whether a request comes from a page of the host itself, and the host is this machine."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return is_loopback(name) and (origin is None or urlsplit(origin).netloc == host)
    except ValueError:  # no host's name, or no URL
        return False


if __name__ == "__main__":
    flower.command.Flower = GuardedFlower
    main()

"""What every request passes first: it gets its id, and in the end its line in the log."""

from __future__ import annotations

import logging
import re
import time
import traceback
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sluicegate.shared.ids import new_id

#: One line a request. It has no path, query, header or address that a client has sent: those may
#: hold what nobody is to read.
access = logging.getLogger("sluicegate.http.access")

log = logging.getLogger(__name__)

REQUEST_ID: Final = "X-Request-Id"
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}")


class Gate:
    """Middleware around the whole application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else str(new_id())
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            access.info(
                "%s %s %d %.0f ms %s",
                scope["method"] if scope["method"] in _METHODS else "-",
                state.get("route", "-"),
                status,
                (time.perf_counter() - began) * 1000,
                request_id,
            )


def log_defect(error: Exception, request_id: str) -> None:
    """Log what nobody foresaw: its kind and where it happened.

    Not what it says: that may be a piece of a request or of an answer.
    """
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("a defect of ours, %s (request id: %s)\n%s", type(error).__name__, request_id, where)


_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

"""The HTTP application, called in this process: real servers behind it, no socket before it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from sqlalchemy import Engine

from sluicegate.producers.http.app import make_app
from sluicegate.producers.http.identity import Identity
from sluicegate.producers.http.routes import Route
from sluicegate.shared.api_keys import ApiKey, RoleName, create_key
from sluicegate.shared.settings import Settings


@asynccontextmanager
async def calling(
    settings: Settings,
    *,
    is_sandbox: bool = False,
    address: str = "127.0.0.1",
    routes: Sequence[Route] | None = None,
    base_url: str = "http://localhost",
) -> AsyncIterator[httpx2.AsyncClient]:
    """Have the application for the length of a `with`; yield what calls it, from this address."""
    async with Identity(settings, is_sandbox=is_sandbox) as identity:
        some: dict[str, Any] = {} if routes is None else {"routes": routes}
        app = make_app(settings, identify=identity, **some)
        async with app.router.lifespan_context(app):
            transport = httpx2.ASGITransport(app=app, client=(address, 50_000))
            async with httpx2.AsyncClient(transport=transport, base_url=base_url) as client:
                yield client


def new_key(
    engine: Engine, *, role: RoleName = "user", account: str | None = "default", **more: Any
) -> tuple[ApiKey, str]:
    """Make a key; return it, and what opens."""
    with engine.connect() as connection:
        made, token = create_key(
            connection, "of a test", role=role, account=account, created_by="test", **more
        )
    return made, token.get_secret_value()


def bearing(token: str, **more: str) -> dict[str, str]:
    """Return the headers of a request with these credentials; `account=` names another one."""
    named = {"X-Sluice-Account": more["account"]} if "account" in more else {}
    return {"Authorization": f"Bearer {token}", **named}

"""What the OpenAPI document says of administrators' routes, with an administrator's key.

Providers are paused, changed and taken out of use here, in a database of its own. What is there is
put into most of what is sent, so that changes are made and not only asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from sluicegate.producers.http import admin, client_budgets, usage
from sluicegate.shared.accounts import add_account
from sluicegate.shared.api_keys import create_key
from sluicegate.shared.connecting import connection, transaction
from sluicegate.shared.provider_changes import list_providers
from sluicegate.shared.secrets import new_key
from tests.documented import cases, fill, often, send
from tests.harness import FULL, Rig
from tests.http_servers import HttpServer, make_key, start_http

pytestmark = pytest.mark.timeout(1800 if FULL else 180)

EXAMPLES = 100 if FULL else 8
NAMES = [
    f"{route.method} {route.path}"
    for route in (*admin.ROUTES, *client_budgets.ROUTES, *usage.ROUTES)
]
USE_CASES = ["draft", "summary", "voice"]
#: That are known, of each pool.
MODELS = {"openai": "gpt-4o-mini", "anthropic": "claude-haiku-5-5"}
#: By the step of the path that says of what kind a name is.
There = dict[str, Sequence[str]]


@pytest.fixture(scope="module")
def rig_settings() -> dict[str, Any]:
    return {"encryption_keys": new_key()}


@pytest.fixture(scope="module")
def server(module_rig: Rig) -> HttpServer:
    limits: dict[str, Any] = {"http_rate_per_s": 100_000.0, "http_rate_burst": 100_000}
    # Of the default account, which nothing here changes: it would lock itself out.
    return start_http(module_rig, api_key=make_key(module_rig.settings, "admin"), **limits)


@pytest.fixture(scope="module")
def there(module_rig: Rig) -> There:
    with transaction(module_rig.settings) as line:
        made = [add_account(line, name) for name in ("acme", "umbra")]
        keys = [
            create_key(line, name, role="user", account="acme", created_by="test")[0]
            for name in ("crm", "web")
        ]
    for account in ("default", "acme", "umbra"):
        for use_case in (None, *USE_CASES):
            module_rig.client.set_budget(account, use_case=use_case, daily=25)
    with connection(module_rig.settings) as line:
        providers = [entry.provider.name for entry in list_providers(line)]
    return {
        "accounts": [str(account.id) for account in made],
        "keys": [str(key.id) for key in keys],
        "providers": providers,
        "breakers": providers,
        "provider": providers,
        "account": [str(account.id) for account in made],
        "use_case": USE_CASES,
    }


def _filling(there: There) -> Callable[[Any, st.DataObject], None]:
    def fill_in(case: Any, data: st.DataObject) -> None:
        if not often(data):
            return
        kind = case.operation.path.split("/")[2]
        for name in case.path_parameters or {}:
            case.path_parameters[name] = data.draw(st.sampled_from(there[kind]))
        for given in (case.query, case.body):
            if isinstance(given, dict):
                fill(given, _values(kind, there), data)
                if "budget" in kind and case.method == "PUT":
                    given.setdefault("monthly", "500")
                if given.get("kind") in there:
                    given["name"] = data.draw(st.sampled_from(there[given["kind"]]))
                if given.get("pool") in MODELS:
                    given["name"] = data.draw(st.from_regex(r"\Anew-[a-z]{1,9}\Z"))
                    given["model"] = MODELS[given["pool"]]

    return fill_in


def _values(kind: str, there: There) -> dict[str, Sequence[object]]:
    """Return what fields may be set to; nobody has a provider of his own."""
    accounts = [None] if kind in ("providers", "breakers") else [None, *there["account"]]
    return {
        "account": accounts,
        "suspended": [None, *there["account"]],
        "successor": [None, *there["provider"]],
        "use_case": [None, *USE_CASES],
        "useCase": [None, *USE_CASES],
        "useCases": [USE_CASES[:1], USE_CASES],
        "failover": [[], USE_CASES[:1]],
        "timeZone": ["Europe/Berlin", "America/New_York"],
        "baseUrl": [None, "https://llm.example.com/v1"],
        "key": [None, "sk-of-nobody"],
        "expiresAt": [None, "2099-12-31T00:00:00Z"],
        "contextTokens": [100_000],
        "maxTokens": [1000],
        "isDefault": [False, True],
        "daily": ["25.50", None],
        "monthly": ["500"],
        "from": ["2026-11-01"],
        "to": ["2026-11-30"],
    }


@pytest.mark.parametrize(("name", "mode"), cases(NAMES))
def test_whatever_an_administrator_sends(
    server: HttpServer, rig: Rig, there: There, name: str, mode: GenerationMode
) -> None:
    send(
        name,
        mode,
        url=server.url,
        headers=server.headers,
        examples=EXAMPLES,
        known=_filling(there),
    )

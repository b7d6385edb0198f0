"""Nothing of a job, and nobody's name or key, is where it does not belong.

Jobs go through every door with words that occur nowhere else. Then all that was logged, sent to the
broker and shown by Flower is searched for them, and so is what the provider was sent.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import anthropic
import httpx2
import openai
import pytest

from sluicegate import JobFailed, JobHandle, Sluice
from sluicegate.shared.accounts import add_account
from sluicegate.shared.connecting import transaction
from sluicegate.workers.local.flower import Flower
from tests.harness import Rig, Service, environment_of
from tests.http_servers import HttpServer, make_key, start_http
from tests.polling import eventually
from tests.recording import Proxy, commands, recording

PROMPT, ANSWER, SYSTEM = "canaryprompt", "canaryanswer", "canarysystem"
ACCOUNT, USER, METADATA = "canaryaccount", "canaryuser", "canarymetadata"
KEY, REQUEST = "canarykey", "canaryidempotency"
ASK = f"{PROMPT}: say it again.\nECHO: {ANSWER}"

#: What nobody but the caller, his job's row and its reply channel may hold.
PRIVATE = (PROMPT, ANSWER, SYSTEM, ACCOUNT, USER, METADATA, KEY, REQUEST)
#: What is none of the provider's business.
NOT_THE_PROVIDERS = (ACCOUNT, USER, METADATA, KEY, REQUEST)


@dataclass(frozen=True)
class Fleet:
    """All that runs, and what was overheard."""

    server: HttpServer
    flower_url: str
    to_providers: Proxy
    to_redis: list[str]
    services: list[Service]


@pytest.fixture(scope="module")
def fleet(module_rig: Rig) -> Iterator[Fleet]:
    rig = module_rig
    provider = urlsplit(rig.sandbox.openai_base_url)
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(recording(str(provider.hostname), provider.port or 80))
        to_redis = stack.enter_context(commands(rig.settings.redis_dsn))
        changed = {
            name: _through(getattr(rig.settings, name), proxy)
            for name in ("openai_base_url", "anthropic_base_url")
        }
        rig.settings = rig.settings.model_copy(update=changed)
        with transaction(rig.settings) as line:
            add_account(line, ACCOUNT)
        workers = [
            rig.begin_worker("anthropic", ["draft"]),
            rig.begin_worker("openai", ["general"]),
        ]
        rig.start_sweep()
        api_key = make_key(rig.settings, "owner", ACCOUNT)
        server = start_http(rig, api_key=api_key)
        for worker in workers:
            rig.await_worker(worker)
        service, url = _start_flower(rig)
        stack.callback(service.end)
        yield Fleet(server, url, proxy, to_redis, [*rig.services, service])


def _through(url: str | None, proxy: Proxy) -> str:
    parts = urlsplit(str(url))
    return parts._replace(netloc=f"127.0.0.1:{proxy.port}").geturl()


def _start_flower(rig: Rig) -> tuple[Service, str]:
    flower = Flower.at("0")
    child = flower.child(environment_of(rig.settings), stage=0)
    service = Service("flower", list(child.argv), dict(child.env or {}), rig.folder / "flower.log")

    def ready() -> bool:
        assert service.ended() is None, service.log
        return child.ready is not None and child.ready()

    eventually(ready, 60)
    return service, flower.url


def _native(fleet: Fleet) -> None:
    body: dict[str, Any] = {
        "prompt": ASK,
        "system": SYSTEM,
        "useCase": "draft",
        "metadata": {METADATA: METADATA},
    }
    url, headers = fleet.server.url, fleet.server.headers
    with httpx2.Client(base_url=url, headers=headers, timeout=60) as client:
        named = {"Idempotency-Key": REQUEST}
        whole = client.post("/api/llm", json=body, headers=named).raise_for_status().json()
        assert whole["text"] == ANSWER
        plain = client.post("/api/llm", json={**body, "stream": True})
        assert plain.text == ANSWER
        events = client.post(
            "/api/llm", json={**body, "stream": True}, headers={"Accept": "text/event-stream"}
        )
        assert ANSWER in events.text
        assert ANSWER in client.get(f"/api/llm/jobs/{whole['id']}").text
        # What is refused, or not there, is not written down either.
        refused = client.post("/api/llm", json={**body, "model": PROMPT, PROMPT: PROMPT})
        assert refused.status_code == 400
        assert client.post("/api/llm", json={**body, "useCase": PROMPT}).status_code == 400
        assert client.get(f"/api/llm/jobs/{PROMPT}?{PROMPT}={METADATA}").is_client_error
        assert client.get(f"/{PROMPT}").status_code == 404
        other = {"Authorization": f"Bearer sk-sluice-{KEY}{'x' * 40}"}
        assert client.post("/api/llm", json=body, headers=other).status_code == 401
        token = base64.urlsafe_b64encode(json.dumps({"alg": "HS256"}).encode()).decode()
        bad = {"Authorization": f"Bearer {token}.{KEY}.{KEY}"}
        assert client.post("/api/llm", json=body, headers=bad).status_code == 401


def _openai(fleet: Fleet) -> None:
    base_url = f"{fleet.server.url}/v1"
    with openai.OpenAI(base_url=base_url, api_key=fleet.server.api_key, max_retries=0) as client:
        messages: Any = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": ASK},
        ]
        asked: dict[str, Any] = {
            "model": "sluice/draft",
            "messages": messages,
            "user": USER,
            "metadata": {METADATA: METADATA},
        }
        answer = client.chat.completions.create(**asked)
        assert answer.choices[0].message.content == ANSWER
        stream = client.chat.completions.create(**asked, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == ANSWER


def _anthropic(fleet: Fleet) -> None:
    with anthropic.Anthropic(
        base_url=fleet.server.url, api_key=fleet.server.api_key, max_retries=0
    ) as client:
        answer = client.messages.create(
            model="sluice/general",
            max_tokens=200,
            system=SYSTEM,
            messages=[{"role": "user", "content": ASK}],
            metadata={"user_id": USER},
        )
        assert [part.text for part in answer.content if part.type == "text"] == [ANSWER]


def _python(fleet: Fleet, rig: Rig) -> JobHandle:
    with Sluice(fleet.server.url, api_key=fleet.server.api_key) as client:
        options: Any = {"system": SYSTEM, "metadata": {METADATA: METADATA}}
        job = client.submit("draft", ASK, idempotency_key=f"{REQUEST}-2", stream=True, **options)
        assert job.result(60).text == ANSWER
        assert client.get(job.id).metadata == {METADATA: METADATA}
        assert list(job.events())[-1].type == "completed"
    direct = rig.client.submit(
        "general", ASK, system=SYSTEM, account=ACCOUNT, submitted_by=USER, metadata={USER: METADATA}
    )
    assert direct.result(60).text == ANSWER
    # Providers repeat what they were sent when they refuse it, or break.
    for fault, word in (("http_400", "REFUSED"), ("http_500", "BROKEN")):
        rig.sandbox.add_fault(fault, prompt_contains=word, message=f"cannot do {ASK}")
        failing = rig.client.submit(
            "draft", f"{word} {ASK}", account=ACCOUNT, max_attempts=2, deadline=20
        )
        with pytest.raises(JobFailed):
            failing.result(60)
    return direct


def test_nothing_private_is_where_it_does_not_belong(
    fleet: Fleet, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "sluicegate")
    eventually(lambda: _is_watched(fleet, rig), 60)
    _native(fleet)
    _openai(fleet)
    _anthropic(fleet)
    job = _python(fleet, rig)
    eventually(lambda: str(job.id) in _flower(fleet, "/api/tasks"), 30)
    overheard = {
        **{f"the log of {one.name}": one.log for one in fleet.services},
        "our own log": "\n".join(
            f"{record.name} {record.getMessage()} {record.exc_text}" for record in caplog.records
        ),
        # A job's reply channel is where its answer belongs.
        "the broker": "\n".join(one for one in fleet.to_redis if "reply:" not in one),
        **{
            f"Flower's {page}": _flower(fleet, page)
            for page in ("/api/tasks", "/api/workers?refresh=1", "/metrics", "/tasks", "/workers")
        },
    }
    # They were listened to: both tell of jobs by their ids.
    job_id = str(job.id)
    assert job_id in overheard["the broker"]
    assert job_id in overheard["Flower's /api/tasks"]
    found = [
        (place, canary, text[max(0, text.find(canary) - 200) : text.find(canary) + 100])
        for place, text in overheard.items()
        for canary in (*PRIVATE, fleet.server.api_key.removeprefix("sk-sluice-"))
        if canary in text
    ]
    assert found == []


def test_the_provider_learns_nothing_about_whose_job_it_is(fleet: Fleet, rig: Rig) -> None:
    _native_once(fleet, rig)
    with fleet.to_providers.lock:
        sent = bytes(fleet.to_providers.sent).decode(errors="replace")
    assert PROMPT in sent
    assert SYSTEM in sent
    (row,) = rig.rows("SELECT id FROM accounts WHERE name = %(name)s", name=ACCOUNT)
    for canary in (*NOT_THE_PROVIDERS, str(row.id), fleet.server.api_key):
        assert canary not in sent, canary


def _native_once(fleet: Fleet, rig: Rig) -> None:
    """Send what the doors take about a person, whichever test runs first."""
    _openai(fleet)
    _anthropic(fleet)
    job = rig.client.submit(
        "general",
        ASK,
        system=SYSTEM,
        account=ACCOUNT,
        submitted_by=USER,
        metadata={METADATA: METADATA},
        idempotency_key=None,
        request_id=REQUEST,
    )
    assert job.result(60).text == ANSWER


def _is_watched(fleet: Fleet, rig: Rig) -> bool:
    """Whether Flower hears of new tasks: it has workers tell of them a little later."""
    rig.client.submit("draft", "hi").result(60)
    return len(_flower(fleet, "/api/tasks?limit=1")) > len("{}")


def _flower(fleet: Fleet, path: str) -> str:
    return httpx2.get(fleet.flower_url + path, timeout=30).text

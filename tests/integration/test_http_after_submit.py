"""What goes wrong once there is a job is told with the job, and never so that it is asked twice."""

from __future__ import annotations

import asyncio
import gc

import pytest

from sluicegate.producers.http import app, compatible
from sluicegate.producers.http.chat_shapes import ChatRequest
from sluicegate.producers.http.messages_shapes import MessagesRequest
from sluicegate.producers.http.shapes import Ask
from sluicegate.shared.settings import Settings
from tests.http_calling import calling
from tests.polling import eventually_async

CHAT = {"model": "sluice/draft", "messages": [{"role": "user", "content": "Hello."}]}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/llm", {"prompt": "Hello."}, 504),
        ("/v1/chat/completions", CHAT, 406),
        ("/v1/messages", CHAT, 406),
    ],
)
async def test_the_time_limit_names_the_job(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, object],
    status: int,
) -> None:
    """Nobody works here."""
    monkeypatch.setattr(app, "_MARGIN_S", 1.0 - settings.http_max_wait_s)
    async with calling(settings, is_sandbox=True) as client:
        answer = await client.post(path, json=body)
        job_id, url = answer.headers["X-Sluice-Job-Id"], answer.headers["Location"]
        assert answer.status_code == status
        assert "still_running" in answer.text
        assert f'"jobId":"{job_id}"' in answer.text
        assert url == f"/api/llm/jobs/{job_id}"
        assert url in answer.text
        assert "Retry-After" not in answer.headers
        assert (await client.get(url)).json()["state"] == "queued"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_stream_whose_job_does_not_end_names_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(compatible, "_SWEPT_S", 0.3 - settings.interactive_deadline_s)
    async with calling(settings, is_sandbox=True) as client:
        answer = await client.post(path, json=CHAT | {"stream": True})
    assert answer.status_code == 406
    assert "still_running" in answer.text
    assert f"/api/llm/jobs/{answer.headers['X-Sluice-Job-Id']}" in answer.text


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/api/llm", {"prompt": "Hello."}, Ask),
        ("/api/llm", {"prompt": "Hello.", "stream": True}, Ask),
        ("/v1/chat/completions", CHAT, ChatRequest),
        ("/v1/messages", CHAT, MessagesRequest),
    ],
)
async def test_what_was_asked_is_not_held_while_it_waits(
    settings: Settings, path: str, body: dict[str, object], kind: type
) -> None:
    """Nobody works here, so it waits for as long as it may."""

    def held() -> int:
        return sum(type(one) is kind for one in gc.get_objects())

    async with calling(settings, is_sandbox=True) as client:

        async def is_stored() -> bool:
            return bool((await client.get("/api/jobs")).json()["jobs"])

        async def is_let_go() -> bool:
            return held() <= before

        before = held()
        waiting = asyncio.create_task(client.post(path, json=body))
        try:
            await eventually_async(is_stored)
            await eventually_async(is_let_go, timeout_s=10)
            assert not waiting.done()
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)


async def test_pages_may_call_by_every_method_and_read_every_id(settings: Settings) -> None:
    origin = {"Origin": "https://crm.example.com"}
    with_pages = settings.model_copy(update={"http_cors_origins": origin["Origin"]})
    async with calling(with_pages) as client:
        for method in {route.method for route in app.ROUTES}:
            asked = origin | {"Access-Control-Request-Method": method}
            assert (await client.options("/api/llm", headers=asked)).status_code == 200, method
        answer = await client.get("/health/live", headers=origin)
    exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"request-id", "X-Request-Id", "X-Sluice-Job-Id"} <= set(exposed)

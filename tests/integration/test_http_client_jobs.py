"""Lists of jobs from the Python client: counted, bounded, and no burden to other requests."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import orjson
import pytest
from sqlalchemy import Engine

from sluicegate.producers.submission import MAX_JOBS
from sluicegate.shared.settings import Settings
from tests.http_calling import calling
from tests.integration.test_http_backlog import PNG, fill
from tests.polling import eventually_async

MANY = "/api/jobs/many"
IMAGE = {"type": "image", "data": PNG.rpartition(",")[2], "media_type": "image/png"}


def listed(*jobs: dict[str, Any]) -> dict[str, Any]:
    return {"jobs": [{"use_case": "draft", "prompt": "a", **job} for job in jobs]}


@pytest.mark.parametrize(
    ("job", "problem"),
    [
        (b"{}", f"jobs: are more than {MAX_JOBS:,}; submit them in parts"),
        # Refused before it is parsed.
        (b"{}," * 10 + b"{}", f"body: holds more than {10 * MAX_JOBS:,} values; send fewer"),
    ],
)
async def test_a_list_that_is_too_long_is_refused(
    settings: Settings, job: bytes, problem: str
) -> None:
    body = b'{"jobs": [%b]}' % b",".join([job] * (MAX_JOBS + 1))
    async with calling(settings, is_sandbox=True) as client:
        answer = await client.post(MANY, content=body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, problem)


async def test_the_process_goes_on_while_a_long_list_is_read(settings: Settings) -> None:
    # The last one is refused, so that nothing is stored.
    job = orjson.dumps({"use_case": "draft", "prompt": "a", "idempotency_key": "k"})
    body = b'{"jobs": [%b, {"nothing": 1}]}' % b",".join([job] * (MAX_JOBS - 1))
    loop = asyncio.get_running_loop()
    async with calling(settings, is_sandbox=True) as client:
        asked = asyncio.create_task(client.post(MANY, content=body))
        began, longest, turns = loop.time(), 0.0, 0
        while not asked.done():
            before = loop.time()
            await asyncio.sleep(0.001)
            longest, turns = max(longest, loop.time() - before), turns + 1
        assert (await asked).status_code == 400
    # Parsing it is one step; checking each job is not.
    assert turns > 1
    assert longest < 0.6 * (loop.time() - began)


async def test_a_list_counts_as_many_requests_as_it_has_jobs(settings: Settings) -> None:
    few = settings.model_copy(update={"http_rate_per_s": 0.01, "http_rate_burst": 20})
    async with calling(few, is_sandbox=True) as client:
        answer = await client.post(MANY, json=listed(*[{}] * 15))
        assert answer.status_code == 202
        assert len(answer.json()["ids"]) == 15
        statuses = [(await client.get("/api/jobs")).status_code for _ in range(6)]
        assert statuses == [200] * 5 + [429]


async def test_what_a_list_owes_is_a_burst_at_most(settings: Settings) -> None:
    few = settings.model_copy(update={"http_rate_per_s": 1.0, "http_rate_burst": 5})
    async with calling(few, is_sandbox=True) as client:
        assert (await client.post(MANY, json=listed(*[{}] * 60))).status_code == 202
        refused = await client.get("/api/jobs")
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) <= 5


@pytest.mark.parametrize("path", ["/api/jobs", MANY])
async def test_jobs_that_would_wait_too_long_are_refused(
    settings: Settings, engine: Engine, path: str
) -> None:
    fill(engine, "vision", 1)
    few = settings.model_copy(update={"http_queue_age_s": 60.0})
    seen = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What is it?"}]}]
    async with calling(few, is_sandbox=True) as client:

        async def ask(**job: Any) -> httpx2.Response:
            given = {"prompt": "a", **job}
            return await client.post(path, json={"jobs": [given]} if path == MANY else given)

        async def refused() -> httpx2.Response | None:
            answer = await ask(prompt=seen)
            return answer if answer.status_code == 429 else None

        answer = await eventually_async(refused)
        assert answer is not None
        assert answer.json()["error"]["code"] == "queue_too_old"
        assert (await ask(use_case="vision", prompt=seen)).status_code == 429
        assert (await ask(prompt=seen, lane="bulk")).status_code == 202
        assert (await ask()).status_code == 202

"""Work that waits too long for workers: more of it is refused, and finding that out is cheap."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from sqlalchemy import Engine

from sluicegate.producers.http.backlog import QUERY, SETTINGS
from sluicegate.shared.queues import POOLS
from sluicegate.shared.settings import Settings
from tests.http_calling import calling
from tests.polling import eventually_async

PNG = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"

_FILL = """
INSERT INTO jobs (id, account_id, use_case, lane, queue, state, max_attempts, run_at,
                  published_at, created_at, deadline_at, request_hash)
SELECT gen_random_uuid(), a.id, %(use_case)s, %(lane)s, %(queue)s, 'queued', 4, at, at, at,
       at + interval '1 day', ''
FROM accounts a, generate_series(1, %(jobs)s) AS n,
     LATERAL (SELECT now() - interval '1 hour' + n * interval '1 millisecond' AS at) AS t
WHERE a.name = 'default'
"""


def fill(engine: Engine, use_case: str, jobs: int, lane: str = "interactive") -> None:
    queue = f"{use_case}.anthropic{'.bulk' if lane == 'bulk' else ''}"
    given = {"use_case": use_case, "queue": queue, "jobs": jobs, "lane": lane}
    with engine.connect() as connection:
        connection.exec_driver_sql(_FILL, given)


def rows_read(plan: dict[str, Any]) -> float:
    """Return how many rows of `jobs` a plan has read."""
    below = sum(map(rows_read, plan.get("Plans", ())))
    if plan.get("Relation Name") != "jobs":
        return below
    read = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)
    return below + float(read * plan["Actual Loops"])


@pytest.mark.parametrize("analyzed", ["never", "while nothing waits", "now"])
def test_a_long_backlog_is_not_read(engine: Engine, analyzed: str) -> None:
    if analyzed == "while nothing waits":
        fill(engine, "draft", 100)
        with engine.connect() as connection:
            connection.exec_driver_sql("UPDATE jobs SET state = 'succeeded', finished_at = now()")
            connection.exec_driver_sql("ANALYZE jobs")
    fill(engine, "draft", 5_000)
    fill(engine, "summary", 5_000, "bulk")
    if analyzed == "now":
        with engine.connect() as connection:
            connection.exec_driver_sql("ANALYZE jobs")
    asked = {"pools": list(POOLS)}
    with engine.execution_options(isolation_level="READ COMMITTED").begin() as connection:
        connection.exec_driver_sql(SETTINGS)
        ((age,),) = connection.exec_driver_sql(
            f"SELECT round(age_s / 60) FROM ({QUERY}) AS q WHERE use_case = 'draft'", asked
        )
        found = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {QUERY}", asked)
        explained = found.scalar_one()
    assert age == 60
    (told,) = explained if isinstance(explained, list) else json.loads(explained)
    # Written with two digits, as a mean of all use cases and pools.
    assert 0 < rows_read(told["Plan"]) < 10


async def test_what_names_no_use_case_waits_with_what_it_is_taken_for(
    settings: Settings, engine: Engine
) -> None:
    fill(engine, "vision", 1)
    few = settings.model_copy(update={"http_queue_age_s": 60.0})
    async with calling(few, is_sandbox=True) as client:

        async def ask(**body: Any) -> httpx2.Response:
            return await client.post("/api/llm", json={"prompt": "a", "wait": 0, **body})

        async def refused() -> httpx2.Response | None:
            answer = await ask(images=[PNG])
            return answer if answer.status_code == 429 else None

        answer = await eventually_async(refused)
        assert answer is not None
        assert answer.json()["error"]["code"] == "queue_too_old"
        assert "vision" in answer.json()["error"]["message"]
        assert (await ask()).status_code == 202
        chat = {
            "model": "sluice/auto",
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG}}]}
            ],
        }
        assert (await client.post("/v1/chat/completions", json=chat)).status_code == 429

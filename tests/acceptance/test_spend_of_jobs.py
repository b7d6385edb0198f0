"""What real jobs cost, as a report says it, is what the sandbox billed for them."""

from __future__ import annotations

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from sluicegate.producers.spend import spend_report
from sluicegate.shared.pricing import baseline_nano_usd
from tests.harness import Rig


def test_a_report_adds_up_what_jobs_cost(module_rig: Rig) -> None:
    rig = module_rig
    rig.start_worker("anthropic", ["draft", "summary"])
    drafts = rig.submit("draft", 4, text="CACHED: 10\nWrite a follow-up to Ilka about the import.")
    summaries = rig.submit("summary", 2, stream=True)
    results = [rig.client.handle(job).result(timeout=60) for job in (*drafts, *summaries)]

    engine = create_engine(rig.settings.database_dsn, poolclass=NullPool)
    with engine.connect() as connection:
        report = spend_report(connection, by="use_case")
    by_key = {row.key: row for row in report.rows}
    assert {name: row.requests for name, row in by_key.items()} == {"draft": 4, "summary": 2}
    total = report.total
    calls = rig.calls([*drafts, *summaries])
    assert total.cost_nano_usd == sum(call["billed_nano_usd"] for (call,) in calls.values())
    baselines = [baseline_nano_usd(one.usage, rig.settings.baseline_model) for one in results]
    assert total.baseline_nano_usd == sum(baselines) > total.cost_nano_usd > 0
    assert total.output_tokens == sum(one.usage.output for one in results)
    assert by_key["draft"].cache_read_tokens == 4 * 10
    assert (total.failures, total.estimates) == (0, 0)
    # Of all, and of those that were streamed.
    assert total.duration is not None
    assert by_key["draft"].duration is not None
    assert by_key["summary"].first_token is not None

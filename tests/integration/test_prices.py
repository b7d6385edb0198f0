"""`sluice prices diff|update`: one list for the whole fleet, and what is booked stays booked."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import Engine, event

from sluicegate.shared.catalogue import VERSION_KEY, AsyncCatalogueCache, read
from sluicegate.shared.database import make_async_engine
from sluicegate.shared.errors import SluiceError
from sluicegate.shared.messages import Usage
from sluicegate.shared.price_lists import InvalidPriceList, bundled, in_use, use
from sluicegate.shared.pricing import price_card, price_version
from sluicegate.shared.redis_client import make_async_redis
from sluicegate.shared.settings import Settings
from sluicegate.workers.local.sandbox_control import SandboxControl
from tests.command_line import Command
from tests.harness import Rig, with_sandbox
from tests.offered_prices import model_of, with_prices, without, written
from tests.polling import eventually

ADOPTED = re.compile(r"list \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
THOUSAND = Usage(input=1000)


@pytest.fixture
def sluice(settings: Settings, command_line: Callable[[Settings], Command]) -> Command:
    return command_line(settings)


def dearer() -> str:
    """Offer a list on which gpt-4o-mini costs four times as much."""
    return written(with_prices("openai", "gpt-4o-mini", input_mtok="0.6"))


def rows(engine: Engine, statement: str) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.exec_driver_sql(statement).all())


def age(engine: Engine) -> None:
    """Let what was adopted be from an hour ago."""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE price_lists SET version = 'list 2026-01-01T00:00:00Z',"
            " adopted_at = now() - interval '1 hour'"
        )


# Diff


def test_todays_prices_stand_beside_the_offered_ones(sluice: Command, engine: Engine) -> None:
    told = sluice("prices", "diff", "--file", dearer(), "--json").json
    assert (told["in_use"], told["offered"]) == (bundled().version, "prices.json")
    models = {row["model"] for row in told["models"]}
    catalogue = rows(engine, "SELECT DISTINCT model FROM llm_providers")
    assert models == {row.model for row in catalogue}
    (changed,) = (row for row in told["models"] if row["changed"])
    assert changed == {
        "pool": "openai",
        "model": "gpt-4o-mini",
        "providers": ["openai-gpt4o-mini"],
        "is_baseline": False,
        "processing": "standard",
        "above_tokens": 0,
        "changed": True,
        "now": {
            "input_usd_per_million": 0.15,
            "cache_read_usd_per_million": 0.075,
            "cache_write_5m_usd_per_million": 0.15,
            "cache_write_1h_usd_per_million": 0.15,
            "output_usd_per_million": 0.6,
        },
        "new": {
            "input_usd_per_million": 0.6,
            "cache_read_usd_per_million": 0.075,
            "cache_write_5m_usd_per_million": 0.6,
            "cache_write_1h_usd_per_million": 0.6,
            "output_usd_per_million": 0.6,
        },
    }
    assert rows(engine, "SELECT version FROM price_lists") == []


def test_the_difference_as_a_table(sluice: Command) -> None:
    told = sluice("prices", "diff", "--file", dearer())
    head, *lines = (line.split("\t") for line in told.out.splitlines())
    assert head == [
        *("model", "calls", "above"),
        *("in", "out", "cached", "write 5m", "write 1h"),
    ]
    shown = {(model, calls, above): prices for model, calls, above, *prices in lines}
    assert shown["gpt-4o-mini", "standard", ""] == [
        *("0.15 → 0.6", "0.6", "0.075", "0.15 → 0.6", "0.15 → 0.6"),
    ]
    assert shown["claude-haiku-5-5", "batch", "100,000"] == [
        *("0.25", "1.25", "0.025", "0.3125", "0.5"),
    ]
    assert "1 of 8 models change" in told.err
    assert f"now: {bundled().version}; new: prices.json" in told.err


def test_a_price_that_comes_or_goes_is_shown(sluice: Command) -> None:
    sluice("prices", "update", "--file", written(without("openai", "gpt-6.2-sol")))
    file = written(without("openai", "gpt-4o-mini"))
    told = sluice("prices", "diff", "--file", file, "--json").json["models"]
    mini = [one for one in told if one["model"] == "gpt-4o-mini"]
    assert [(one["processing"], one["changed"], one["new"]) for one in mini] == [
        ("standard", True, None),
        ("batch", True, None),
    ]
    line = next(
        line
        for line in sluice("prices", "diff", "--file", file).out.splitlines()
        if line.startswith("gpt-4o-mini\tstandard")
    )
    assert line.split("\t")[4] == "0.6 → none"


def test_rows_with_a_price_of_their_own_are_left_out(sluice: Command, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            'UPDATE llm_providers SET price_override = \'{"input": 1, "output": 2}\''
            " WHERE model = 'gpt-4o-mini'"
        )
    file = written(without("openai", "gpt-4o-mini"))
    told = sluice("prices", "diff", "--file", file, "--json").json
    assert "gpt-4o-mini" not in {row["model"] for row in told["models"]}
    # So no list need know the model.
    assert sluice("prices", "update", "--file", file, "--json").json["changed"]


def test_the_baseline_is_compared_even_if_no_row_has_it(
    settings: Settings, command_line: Callable[[Settings], Command]
) -> None:
    sluice = command_line(settings.model_copy(update={"baseline_model": "gpt-4.1"}))
    told = sluice("prices", "diff", "--bundled", "--json").json["models"]
    (baseline,) = {(row["model"], *row["providers"]) for row in told if row["is_baseline"]}
    assert baseline == ("gpt-4.1",)


# Update


def test_the_fleet_books_by_the_list_that_was_adopted(
    sluice: Command, engine: Engine, redis_client: redis.Redis, settings: Settings
) -> None:
    before = redis_client.get(settings.redis_prefix + VERSION_KEY)
    told = sluice("prices", "update", "--file", dearer(), "--json").json
    assert told["changed"]
    assert ADOPTED.fullmatch(told["version"])
    assert [row["model"] for row in told["models"] if row["changed"]] == ["gpt-4o-mini"]
    assert redis_client.get(settings.redis_prefix + VERSION_KEY) != before
    assert rows(engine, "SELECT version FROM price_lists") == [(told["version"],)]
    with engine.connect() as connection:
        read(connection)
    assert price_version() == told["version"]
    assert price_card("openai", "gpt-4o-mini").cost_nano_usd(THOUSAND) == 600_000


def test_the_same_list_is_not_adopted_twice(sluice: Command, engine: Engine) -> None:
    file = dearer()
    first = sluice("prices", "update", "--file", file)
    assert "the fleet books by list" in first.err
    again = sluice("prices", "update", "--file", file, "--json").json
    assert again["changed"] is False
    assert rows(engine, "SELECT version FROM price_lists") == [(again["version"],)]
    assert "by this list already" in sluice("prices", "update", "--file", file).err


def test_the_installed_list_can_be_adopted_like_any_other(sluice: Command, engine: Engine) -> None:
    sluice("prices", "update", "--file", dearer())
    age(engine)
    told = sluice("prices", "update", "--bundled", "--json").json
    assert told["changed"]
    assert [row["model"] for row in told["models"] if row["changed"]] == ["gpt-4o-mini"]
    with engine.connect() as connection:
        read(connection)
    assert price_version() == told["version"] != bundled().version
    assert price_card("openai", "gpt-4o-mini").cost_nano_usd(THOUSAND) == 150_000
    assert rows(engine, "SELECT count(*) FROM price_lists") == [(2,)]


@pytest.mark.parametrize("model", ["gpt-6-luna", "gpt-4o"])
def test_a_list_without_a_price_that_is_needed_is_refused(
    sluice: Command, engine: Engine, model: str
) -> None:
    refused = sluice("prices", "update", "--file", written(without("openai", model)))
    assert refused.code == 1
    assert f"the new list has no price for openai {model}" in refused.err
    assert rows(engine, "SELECT version FROM price_lists") == []


def test_what_is_no_list_is_refused_in_one_sentence(sluice: Command, engine: Engine) -> None:
    Path("prices.json").write_text("{}")
    for command in ("diff", "update"):
        refused = sluice("prices", command, "--file", "prices.json")
        assert refused.code == 1
        assert refused.err.startswith("sluice: this is not a price list that genai-prices")
        assert len(refused.err.splitlines()) == 1
    assert sluice("prices", "diff", "--file", "no-such-file").code == 1
    assert sluice("prices", "diff", "--url", "http://127.0.0.1/").code == 2
    assert sluice("prices", "diff", "--bundled", "--file", "prices.json").code == 2
    assert rows(engine, "SELECT version FROM price_lists") == []


# Reading it


def test_the_list_is_read_only_when_it_is_another(sluice: Command, engine: Engine) -> None:
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    sluice("prices", "update", "--file", dearer())
    use(None)
    event.listen(engine, "before_cursor_execute", note)
    with engine.connect() as connection:
        for _ in range(3):
            read(connection)
        first = in_use()
        read(connection)
        assert in_use() is first
    assert len([one for one in statements if "price_lists.data" in one]) == 1


def test_a_process_goes_back_where_no_list_was_adopted(sluice: Command, engine: Engine) -> None:
    sluice("prices", "update", "--file", dearer())
    with engine.begin() as connection:
        read(connection)
        assert in_use() is not bundled()
        connection.exec_driver_sql("DELETE FROM price_lists")
        read(connection)
    assert in_use() is bundled()


def test_a_list_that_cannot_be_read_here_is_told(sluice: Command, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO price_lists (version, data) VALUES ('list of a newer version', '{}')"
        )
    told = sluice("provider", "list")
    assert told.code == 1
    assert "the fleet books by the price list of a newer version, which cannot be" in told.err
    with engine.connect() as connection, pytest.raises(SluiceError):
        read(connection)


def test_a_running_process_sees_it_within_a_second(settings: Settings, sluice: Command) -> None:
    async def follow() -> None:
        engine, client = make_async_engine(settings), make_async_redis(settings)
        cache = AsyncCatalogueCache(prefix=settings.redis_prefix, ttl_s=3600)
        try:
            await cache.get(engine, client)
            assert in_use() is bundled()
            told = await asyncio.to_thread(sluice, "prices", "update", "--file", dearer(), "--json")
            use(None)  # the command ran in this very process
            async with asyncio.timeout(10):
                while price_version() != told.json["version"]:
                    await asyncio.sleep(0.05)
                    await cache.get(engine, client)
        finally:
            await client.aclose()
            await engine.dispose()

    asyncio.run(follow())


def test_a_running_process_goes_on_with_the_list_it_has(
    settings: Settings, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    async def follow() -> None:
        async_engine, client = make_async_engine(settings), make_async_redis(settings)
        running, begins = (
            AsyncCatalogueCache(prefix=settings.redis_prefix, ttl_s=0.0) for _ in range(2)
        )
        try:
            await running.get(async_engine, client)
            with engine.begin() as connection:
                connection.exec_driver_sql(
                    "INSERT INTO price_lists (version, data) VALUES ('list of tomorrow', '{}')"
                )
            async with asyncio.timeout(10):
                while "going on with genai-prices" not in caplog.text:
                    await asyncio.sleep(0.05)
                    await running.get(async_engine, client)
            assert in_use() is bundled()
            # One that starts says what is wrong, and does not.
            with pytest.raises(InvalidPriceList, match="list of tomorrow, which cannot be read"):
                await begins.get(async_engine, client)
        finally:
            await client.aclose()
            await async_engine.dispose()

    asyncio.run(follow())


# The fleet


@pytest.fixture
def rig(settings: Settings, sandbox: SandboxControl, tmp_path: Path) -> Iterator[Rig]:
    given = with_sandbox(settings, sandbox, catalogue="original")
    with Rig(settings=given, sandbox=sandbox, folder=tmp_path) as rig:
        yield rig


def test_workers_book_by_it_and_what_is_booked_stays(
    rig: Rig, command_line: Callable[[Settings], Command]
) -> None:
    workers = [rig.begin_worker("openai", ["general"]) for _ in range(2)]
    for worker in workers:
        rig.await_worker(worker)
    (first,) = rig.submit("general", 1)
    rig.await_over([first])
    (booked,) = _entries(rig)
    assert booked.price_version == bundled().version

    raw = with_prices("openai", "gpt-4o-mini", input_mtok="1.5")
    model_of(raw, "openai", "gpt-4o-mini")["prices"]["output_mtok"] = "6"
    update = command_line(rig.settings)("prices", "update", "--file", written(raw), "--json")
    version = update.json["version"]

    def new_entries() -> set[str]:
        rig.await_over(rig.submit("general", 10))
        found = {row.worker for row in _entries(rig) if row.price_version == version}
        assert len(found) == len(workers)
        return found

    eventually(new_entries, 60)
    # At ten times the price the same tokens cost ten times as much; what was booked is as it was.
    old, *entries = _entries(rig)
    assert old == booked
    for row in entries:
        times = 10 if row.price_version == version else 1
        tokens = row.input_tokens * 150 + row.output_tokens * 600
        assert row.amount_nano_usd == tokens * times


def _entries(rig: Rig) -> list[Any]:
    return rig.rows(
        "SELECT c.attempt_id, c.price_version, c.amount_nano_usd, c.input_tokens, c.output_tokens,"
        " a.worker_id AS worker FROM cost_entries c JOIN attempts a ON a.id = c.attempt_id"
        " ORDER BY c.created_at, c.attempt_id"
    )

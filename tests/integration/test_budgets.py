"""Budgets as account owners see them: the command, the clients, and what is refused at once."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import psycopg
import pytest
import redis
from pydantic import SecretStr
from sqlalchemy import Engine

from sluicegate import (
    AsyncSluice,
    Budget,
    BudgetExceeded,
    IdempotencyConflict,
    InvalidJob,
    NotFound,
    Sluice,
)
from sluicegate.shared.accounts import add_account
from sluicegate.shared.admission.keys import budgets_key
from sluicegate.shared.budgets import BUDGET_CHANNEL, typical_costs
from sluicegate.shared.gate_changes import GATE_CHANNEL
from sluicegate.shared.settings import Settings
from tests.books import Books
from tests.command_line import Command
from tests.polling import eventually

DOLLAR = 1_000_000_000


@pytest.fixture
def sluice(settings: Settings, command_line: Callable[[Settings], Command]) -> Command:
    return command_line(settings)


@pytest.fixture
def account(engine: Engine) -> UUID:
    with engine.connect() as line:
        return add_account(line, "acme", "Asia/Kolkata").id


@pytest.fixture
async def books(settings: Settings) -> AsyncIterator[Books]:
    async with Books(settings) as books:
        yield books


async def spend(books: Books, account: UUID, amount: int, use_case: str = "general") -> None:
    """Pay for a job, and have the copies in Redis know it."""
    attempts = await books.wish(account, [amount], use_case)
    assert await books.open(attempts) == [True]
    await books.settle(attempts, amount)
    await books.copying.finish(10)


def plain(settings: Settings) -> str:
    return settings.database_dsn.replace("postgresql+psycopg", "postgresql")


# The command


@pytest.mark.usefixtures("account")
def test_a_budget_is_set_shown_changed_and_cleared(sluice: Command) -> None:
    said = sluice("budget", "set", "acme", "--daily", "25.5", "--monthly", "$500")
    assert (said.code, said.err) == (0, "")
    head, day, month = (line.split("\t") for line in said.out.splitlines())
    assert head[:5] == ["account", "use case", "window", "limit", "percent"]
    assert day[:8] == [
        *("acme", "all", "day", "$25.50", "0.0%", "$0.000000", "$0.000000", "$25.500000"),
    ]
    assert month[2:4] == ["month", "$500.00"]
    tomorrow = datetime.now(ZoneInfo("Asia/Kolkata")) + timedelta(days=1)
    assert day[8].startswith(f"{tomorrow:%Y-%m-%d} 00:00 Asia/Kolkata (in ")
    assert day[9] == "no job yet"

    sluice("budget", "set", "acme", "--monthly", "600", "--thresholds", "50, 90%")
    assert sluice("budget", "set", "acme", "--use-case", "draft", "--daily", "0").code == 0
    whole, draft = sluice("budget", "show", "acme", "--json").json["budgets"]
    assert (whole["account"], whole["use_case"], draft["use_case"]) == ("acme", None, "draft")
    assert whole["day"]["limit_nano_usd"] == 25_500_000_000
    assert whole["month"]["limit_usd"] == "600.000000000"
    assert (whole["thresholds"], draft["thresholds"]) == ([50, 90], [80, 100])
    assert (draft["day"]["percent"], draft["month"]["limit_usd"]) == (100.0, None)
    assert draft["day"]["jobs_left"] == {"draft": None}

    (changed,) = sluice("budget", "set", "acme", "--no-daily", "--json").json["budgets"]
    assert (changed["day"]["limit_nano_usd"], changed["day"]["left_usd"]) == (None, None)
    assert changed["month"]["left_usd"] == "600.000000000"
    rows = sluice("budget", "show").out.splitlines()[1:]
    assert [row.split("\t")[1:3] for row in rows] == [["all", "month"], ["draft", "day"]]

    cleared = sluice("budget", "clear", "acme", "--use-case", "draft")
    assert (cleared.code, cleared.out) == (0, "")
    assert cleared.err == "sluice: acme has no budget for draft any more\n"
    sluice("budget", "clear", "acme")
    shown = sluice("budget", "show", "acme")
    assert (shown.code, shown.out, shown.err) == (0, "", "sluice: acme has no budget\n")
    assert sluice("budget", "show", "--json").json == {"budgets": []}


TOO_MUCH = "must be from $0 to $9,007,199.254740992"
NO_LIMIT = "limit: a budget needs a daily or a monthly limit; clear it otherwise"
USE_CASES = "complex, draft, general, summary, vision, voice"

#: What is typed, the exit code, and what is said.
REFUSALS = {
    "set nobody --daily 1": (1, "there is no account 'nobody'"),
    "show nobody": (1, "there is no account 'nobody'"),
    "clear nobody": (1, "there is no account 'nobody'"),
    "set acme --use-case nope --daily 1": (
        1,
        f"there is no use case 'nope'; there are {USE_CASES}",
    ),
    "set acme": (2, "limit: give a daily or a monthly limit, or thresholds"),
    "set acme --thresholds 80": (2, NO_LIMIT),
    "set acme --no-daily": (2, NO_LIMIT),
    "set acme --daily 1 --no-daily": (
        2,
        "--daily: is either an amount or, with --no-daily, none",
    ),
    "set acme --daily -5": (2, f"--daily: {TOO_MUCH}"),
    "set acme --monthly 1e12": (2, f"--monthly: {TOO_MUCH}"),
    "set acme --daily NaN": (2, f"--daily: {TOO_MUCH}"),
    "set acme --daily 1e999999": (
        2,
        "--daily: '1e999999' is not an amount of dollars such as 25.50",
    ),
    "set acme --daily ten": (2, "--daily: 'ten' is not an amount of dollars such as 25.50"),
    "set acme --daily 0.0000000001": (2, "--daily: has more than nine decimals"),
    "set acme --daily 1 --thresholds 80,often": (
        2,
        "--thresholds: '80,often' is not a list of percents such as 80,100",
    ),
    "set acme --daily 1 --thresholds 0": (
        2,
        "--thresholds: must be up to ten whole percents from 1 to 1000",
    ),
    "clear acme": (1, "account acme has no budget"),
    "clear acme --use-case draft": (1, "account acme has no budget for draft"),
}


@pytest.mark.usefixtures("account")
def test_what_cannot_be_is_one_sentence(sluice: Command) -> None:
    said = {words: sluice("budget", *words.split()) for words in REFUSALS}
    assert said == {
        words: (code, "", f"sluice: {why}\n") for words, (code, why) in REFUSALS.items()
    }
    assert sluice("budget", "show", "--json").json == {"budgets": []}


async def test_it_shows_what_is_spent_held_and_left_and_for_how_many_jobs(
    books: Books, account: UUID, sluice: Command, settings: Settings
) -> None:
    books.set_budget("acme", day=100 * DOLLAR)
    books.set_budget("acme", use_case="draft", month=50 * DOLLAR)
    for cost in (30, 50):
        await spend(books, account, cost * DOLLAR)
    await spend(books, account, 2 * DOLLAR, "draft")
    await books.open(await books.wish(account, [5 * DOLLAR + 1]))
    whole, draft = sluice("budget", "show", "acme", "--json").json["budgets"]
    day = whole["day"]
    assert (day["spent_nano_usd"], day["held_nano_usd"]) == (82 * DOLLAR, 5 * DOLLAR + 1)
    assert (day["spent_usd"], day["left_usd"]) == ("82.000000000", "12.999999999")
    assert day["percent"] == 82.0
    # 12.99 dollars of 40 a job in general, and of 2 a draft.
    assert day["jobs_left"] == {"draft": 6, "general": 0}
    assert draft["month"]["jobs_left"] == {"draft": 24}
    with books.engine.connect() as line:
        assert typical_costs(line, account) == {"draft": 2 * DOLLAR, "general": 40 * DOLLAR}

    piped = sluice("budget", "show").out
    assert "\x1b" not in piped
    assert "\t82.0%\t$82.000000\t$5.000000\t$13.000000\t" in piped
    assert "6 draft, 0 general" in piped
    books.set_budget("acme", day=200 * DOLLAR)
    books.set_budget("acme", use_case="general", day=100 * DOLLAR)
    books.set_budget("acme", use_case="draft", month=2 * DOLLAR)
    seen = in_a_terminal(settings, "budget", "show")
    for colour, percent in (("32", "41.0%"), ("33", "80.0%"), ("31", "100.0%")):
        assert f"\x1b[{colour}m{percent}" in seen


def in_a_terminal(settings: Settings, *arguments: str) -> str:
    """Run `sluice` as somebody at a terminal does; return what they see."""
    leader, follower = pty.openpty()
    variables = {
        "SLUICE_DATABASE_URL": settings.database_dsn,
        "SLUICE_REDIS_URL": settings.redis_dsn,
        "TERM": "xterm-256color",
        "COLUMNS": "200",
    }
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    argv = [sys.executable, "-m", "sluicegate.cli", *arguments]
    with subprocess.Popen(argv, env=environment | variables, stdout=follower) as process:
        os.close(follower)
        seen = b""
        try:
            while part := os.read(leader, 65_536):
                seen += part
        except OSError:  # how Linux tells that the other end is closed
            pass
        finally:
            os.close(leader)
        assert process.wait(60) == 0
    return seen.decode()


@pytest.mark.usefixtures("account")
def test_a_change_wakes_the_sweep_and_is_recorded(sluice: Command, settings: Settings) -> None:
    with psycopg.connect(plain(settings), autocommit=True) as listener:
        for channel in (GATE_CHANNEL, BUDGET_CHANNEL):
            listener.execute(f"LISTEN {channel}")
        sluice("budget", "set", "acme", "--daily", "5")
        sluice("budget", "clear", "acme")
        told = [notice.channel for notice in listener.notifies(timeout=10, stop_after=4)]
        trail = listener.execute("SELECT kind, before, after FROM gate_changes ORDER BY number")
        assert trail.fetchall() == [
            ("budget", "none", "$5.00 a day"),
            ("budget", "$5.00 a day", "none"),
        ]
    # Of the jobs that wait for room, and of the copies in Redis.
    assert sorted(told) == sorted([GATE_CHANNEL, BUDGET_CHANNEL] * 2)


@pytest.mark.usefixtures("account")
def test_a_ledger_that_is_busy_for_long_is_one_sentence(
    sluice: Command, settings: Settings
) -> None:
    with psycopg.connect(plain(settings)) as worker:
        worker.execute("LOCK TABLE attempts IN ROW EXCLUSIVE MODE")
        outcome = sluice("budget", "set", "acme", "--daily", "5")
        said = "sluice: the ledger is busy, so nothing was changed; try again\n"
        assert (outcome.code, outcome.err) == (1, said)
    assert sluice("budget", "show", "--json").json == {"budgets": []}
    assert sluice("budget", "set", "acme", "--daily", "5").code == 0


# The clients


class Client:
    """Either client behind one face, so that each test holds for both."""

    def __init__(self, settings: Settings, runner: asyncio.Runner | None) -> None:
        self._runner = runner
        self.sluice: Any = (AsyncSluice if runner else Sluice)(settings)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.sluice, name)

        def call(*args: Any, **options: Any) -> Any:
            if self._runner is None:
                return method(*args, **options)

            async def awaited() -> Any:
                return await method(*args, **options)

            return self._runner.run(awaited())

        return call


@pytest.fixture(params=["threads", "loop"])
def open_client(request: pytest.FixtureRequest) -> Iterator[Callable[[Settings], Client]]:
    opened: list[Client] = []
    with asyncio.Runner() as runner:

        def once(settings: Settings) -> Client:
            opened.append(Client(settings, runner if request.param == "loop" else None))
            return opened[-1]

        yield once
        for client in opened:
            client.close()


@pytest.fixture
def client(open_client: Callable[[Settings], Client], settings: Settings) -> Client:
    return open_client(settings)


def test_a_client_sets_reads_and_clears(client: Client, account: UUID) -> None:
    budget = client.set_budget("acme", daily=Decimal("25.50"), monthly=500)
    assert isinstance(budget, Budget)
    assert (budget.account, budget.account_id, budget.use_case) == ("acme", account, None)
    assert (budget.day.limit_nano_usd, budget.day.limit) == (25_500_000_000, Decimal("25.5"))
    day = budget.day
    assert (day.spent, day.held, day.left) == (Decimal(0), Decimal(0), Decimal("25.5"))
    assert (budget.left, budget.left_nano_usd) == (Decimal("25.5"), 25_500_000_000)
    assert (budget.time_zone, budget.thresholds) == ("Asia/Kolkata", (80, 100))
    changed = client.set_budget(account, daily=None, thresholds=[50])
    assert (changed.id, changed.thresholds) == (budget.id, (50,))
    assert (changed.day.limit, changed.day.left, changed.month.limit) == (None, None, 500)
    draft = client.set_budget("acme", use_case="draft", daily="0.000000001")
    assert draft.day.left_nano_usd == 1
    assert client.budgets("acme") == client.budgets() == [changed, draft]
    assert client.budgets("default") == []
    client.clear_budget("acme")
    assert client.budgets(account) == [draft]
    client.clear_budget("acme", "draft")
    assert client.budgets() == []


@pytest.mark.usefixtures("account")
def test_a_client_says_what_cannot_be(client: Client) -> None:
    refusals: dict[str, dict[str, Any]] = {
        "daily": {"daily": "a lot"},
        "monthly": {"daily": 5, "monthly": Decimal("-0.01")},
        "thresholds": {"daily": 5, "thresholds": ["80"]},
        "limit": {},
    }
    for field, options in refusals.items():
        with pytest.raises(InvalidJob) as refused:
            client.set_budget("acme", **options)
        assert refused.value.field == field
    with pytest.raises(NotFound, match="there is no account 'nobody'"):
        client.set_budget("nobody", daily=1)
    with pytest.raises(NotFound, match="there is no use case 'nope'"):
        client.set_budget("acme", use_case="nope", daily=1)
    with pytest.raises(NotFound, match="there is no account"):
        client.budgets("nobody")
    with pytest.raises(NotFound, match="has no budget for draft"):
        client.clear_budget("acme", "draft")


# What is refused at once


@pytest.fixture
def run(settings: Settings) -> Iterator[Callable[..., Any]]:
    """Return a function that does something with the books, beside the client's own loop."""
    with asyncio.Runner() as runner:

        def once(work: Callable[[Books], Any]) -> Any:
            async def within() -> Any:
                async with Books(settings) as books:
                    return await work(books)

            return runner.run(within())

        yield once


Run = Callable[..., Any]


@pytest.fixture
def full(run: Run, account: UUID, client: Client) -> None:
    """Have an account spend its daily budget to the last nano-dollar, and no job of its own."""
    client.set_budget("acme", daily=1)

    async def work(books: Books) -> None:
        await spend(books, account, DOLLAR)
        await books.rows("UPDATE jobs SET state = 'succeeded'")

    run(work)


def jobs(run: Run) -> int:
    """Return how many jobs wait."""

    async def count(books: Books) -> int:
        (row,) = await books.rows("SELECT count(*) AS n FROM jobs WHERE state <> 'succeeded'")
        return int(row.n)

    found: int = run(count)
    return found


def refused(client: Client, **options: Any) -> BudgetExceeded:
    """Submit until that is refused: a client looks anew after a moment."""

    def once() -> BudgetExceeded | None:
        try:
            client.submit("draft", "hi", **options)
        except BudgetExceeded as error:
            return error
        return None

    error = eventually(once)
    assert error is not None
    return error


@pytest.mark.usefixtures("full")
def test_an_account_that_has_spent_its_budget_is_told_at_once(
    client: Client, run: Run, redis_client: redis.Redis, settings: Settings, account: UUID
) -> None:
    with pytest.raises(BudgetExceeded) as refused:
        client.submit("draft", "hi", account="acme")
    error = refused.value
    tomorrow = datetime.now(ZoneInfo("Asia/Kolkata")).date() + timedelta(days=1)
    assert str(error) == (
        "the daily budget of account acme, $1.00, is full: $1.00 is spent; "
        f"it resets at {tomorrow} 00:00 (Asia/Kolkata)"
    )
    assert (error.account, error.use_case, error.window) == ("acme", None, "day")
    assert (error.limit, error.spent) == (Decimal(1), Decimal(1))
    assert error.resets_at == datetime.combine(
        tomorrow, datetime.min.time(), ZoneInfo("Asia/Kolkata")
    )
    with pytest.raises(BudgetExceeded):
        client.submit("draft", "hi", account=str(account))
    assert jobs(run) == 0
    assert not redis_client.exists(settings.redis_prefix + "draft.anthropic")
    client.submit("draft", "hi")  # another account
    client.set_budget("acme", daily="1.000000001")
    # The copy is old; what Postgres says holds.
    client.submit("draft", "hi", account="acme")
    assert jobs(run) == 2


@pytest.mark.usefixtures("full")
def test_what_is_not_refused_at_once(client: Client, run: Run, settings: Settings) -> None:
    client.submit("draft", "hi", account="acme", lane="bulk")
    client.submit_many("draft", ["hi", {"prompt": "hi", "lane": "bulk"}], account="acme")
    assert jobs(run) == 3
    if isinstance(client.sluice, Sluice):
        with psycopg.connect(plain(settings)) as caller:
            client.submit("draft", "hi", account="acme", connection=caller)
        assert jobs(run) == 4


@pytest.mark.usefixtures("account")
def test_a_key_that_has_a_job_gives_that_job(client: Client, run: Run, account: UUID) -> None:
    job = client.submit("draft", "hi", account="acme", idempotency_key="k")
    client.set_budget("acme", daily=1)
    run(lambda books: spend(books, account, DOLLAR))
    refused(client, account="acme")
    assert client.submit("draft", "hi", account="acme", idempotency_key="k").id == job.id
    with pytest.raises(IdempotencyConflict):
        client.submit("draft", "something else", account="acme", idempotency_key="k")


def test_a_use_case_is_refused_by_its_own_budget(client: Client, run: Run, account: UUID) -> None:
    client.set_budget("acme", use_case="draft", monthly=1)
    client.set_budget("acme", daily=3)
    run(lambda books: spend(books, account, 2 * DOLLAR - 1))
    client.submit("draft", "hi", account="acme")
    run(lambda books: spend(books, account, DOLLAR, "draft"))
    error = refused(client, account="acme")
    assert str(error).startswith("the monthly budget for draft of account acme, $1.00, is full")
    assert (error.use_case, error.window) == ("draft", "month")
    # One nano-dollar is left for all others.
    client.submit("summary", "hi", account="acme")


@pytest.mark.usefixtures("account")
def test_a_budget_of_nothing_leaves_what_is_free(
    client: Client,
    run: Run,
    sluice: Command,
    open_client: Callable[[Settings], Client],
    settings: Settings,
) -> None:
    client.set_budget("acme", daily=0)
    run(lambda books: books.reconcile())
    with pytest.raises(BudgetExceeded, match=r"\$0.00, is full: \$0.00 is spent"):
        client.submit("draft", "hi", account="acme")
    added = sluice(
        *("provider", "add", "ours", "--pool", "openai", "--model", "ours"),
        *("--base-url", "http://127.0.0.1:1/v1", "--use-case", "draft", "--input-price", "0"),
        *("--output-price", "0", "--max-tokens", "100", "--context-tokens", "1000"),
    )
    assert added.code == 0, added
    open_client(settings).submit("draft", "hi", account="acme")


@pytest.mark.usefixtures("full")
def test_without_redis_nothing_is_refused_at_once(
    *,
    open_client: Callable[[Settings], Client],
    client: Client,
    settings: Settings,
    redis_client: redis.Redis,
    account: UUID,
    run: Run,
) -> None:
    away = settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1/0")})
    open_client(away).submit("draft", "hi", account="acme")
    redis_client.delete(budgets_key(settings.redis_prefix, account))
    client.submit("draft", "hi", account="acme")
    assert jobs(run) == 2


@pytest.mark.usefixtures("full")
def test_a_window_that_has_turned_refuses_nothing(client: Client, run: Run) -> None:
    # The copy still says what was.
    run(lambda books: books.age(timedelta(days=1)))
    client.submit("draft", "hi", account="acme")
    assert jobs(run) == 1


@pytest.mark.usefixtures("account")
def test_a_submit_asks_redis_once_and_bulk_never(client: Client, redis_client: redis.Redis) -> None:
    def asked() -> int:
        found: Any = redis_client.info("commandstats")
        return int(found.get("cmdstat_hvals", {}).get("calls", 0))

    before = asked()
    client.submit("draft", "hi", account="acme")
    assert asked() - before == 1
    client.submit("draft", "hi", account="acme", lane="bulk")
    client.submit_many("draft", ["hi"] * 3, account="acme")
    assert asked() - before == 1


def test_a_new_day_begins_with_nothing_spent(client: Client, run: Run, account: UUID) -> None:
    budget = client.set_budget("acme", daily=1)
    assert budget.day.started_at < datetime.now(UTC) < budget.day.resets_at
    run(lambda books: spend(books, account, DOLLAR // 2))
    run(lambda books: books.age(timedelta(days=1)))
    (turned,) = client.budgets("acme")
    assert (turned.day.spent, turned.day.started_at) == (0, budget.day.started_at)

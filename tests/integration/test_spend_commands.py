"""`sluice spend report`, as somebody at a terminal, a script or a spreadsheet sees it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine

from sluicegate.shared.settings import Settings
from tests.command_line import Command
from tests.cost_books import Books, Entry

USD = 1_000_000_000
#: The last half hour of October in UTC; in Berlin November has begun.
NIGHT = datetime(2026, 10, 31, 23, 30, tzinfo=UTC)
OCTOBER = ("--from", "2026-10-01", "--to", "2026-10-31")
NOVEMBER = ("--from", "2026-11-01", "--to", "2026-11-30")


@pytest.fixture
def command(
    command_line: Callable[[Settings], Command], settings: Settings, engine: Engine
) -> Command:
    """`sluice`, with some books."""
    with engine.connect() as connection:
        books = Books(connection)
        books.account("acme", "Europe/Berlin")
        books.account("birch")
        draft = Entry("acme", "draft", "haiku", "claude-haiku-5-5", NIGHT)
        draft = replace(draft, cost=USD, baseline=4 * USD, tokens=(60, 30, 10, 0, 200, 50))
        books.enter(replace(draft, duration_ms=1500, first_token_ms=250))
        voice = Entry("birch", "voice", "luna", "gpt-6-luna", NIGHT - timedelta(days=1))
        books.enter(replace(voice, cost=3 * USD, baseline=2 * USD, kind="estimate"))
        books.attempt(voice, "unknown", "lost")
    return command_line(settings)


def test_a_pipe_gets_lines_with_tabs(command: Command) -> None:
    done = command("spend", "report", *OCTOBER)
    assert done.code == 0
    head, *lines = [line.split("\t") for line in done.out.splitlines()]
    shown = [dict(zip(head, line, strict=True)) for line in lines]
    assert [row["use case"] for row in shown] == ["voice", "draft", "all"]
    assert [row["requests"] for row in shown] == ["1", "1", "2"]
    assert [row["failures"] for row in shown] == ["1", "0", "1"]
    assert [row["saved"] for row in shown] == ["-50.0%", "75.0%", "33.3%"]
    assert shown[1]["duration s"].split("/")[0] in ("1.48", "1.49", "1.50", "1.51", "1.52")
    assert shown[1]["cached"] == "30.0%"
    assert shown[0]["estimated"] == "$3.000000"
    assert done.err == (
        "sluice: $3.000000 of the cost (75.0%) is estimated: nobody knows what 1 call cost, "
        "so the most is booked\n"
    )


def test_json(command: Command) -> None:
    told = command("spend", "report", "--by", "model", *OCTOBER, "--json").json
    assert (told["by"], told["account"], told["time_zone"]) == ("model", None, "UTC")
    assert (told["from"], told["to"], told["forecast"]) == ("2026-10-01", "2026-10-31", None)
    assert [row["key"] for row in told["rows"]] == ["gpt-6-luna", "claude-haiku-5-5"]
    luna, haiku = told["rows"]
    assert (luna["estimates"], luna["estimated_nano_usd"], luna["duration"]) == (1, 3 * USD, None)
    assert haiku["first_token"]["p99_ms"] == pytest.approx(250, rel=0.0203)
    assert (haiku["cache_read_tokens"], haiku["reasoning_tokens"]) == (30, 50)
    assert told["total"]["saving_nano_usd"] == 2 * USD


def test_csv(command: Command) -> None:
    done = command("spend", "report", "--by", "account", *OCTOBER, "--csv")
    birch, acme = csv.DictReader(io.StringIO(done.out))
    assert (birch["account"], birch["cost_usd"], birch["saving_percent"]) == (
        *("birch", "3.000000000", "-50.000"),
    )
    assert (acme["account"], acme["requests"], acme["duration_p50_ms"]) == ("acme", "1", "1480")
    assert birch["duration_p50_ms"] == ""


def test_days_are_those_of_the_account_or_of_the_zone(command: Command) -> None:
    def costs(*options: str) -> dict[str, int]:
        told = command("spend", "report", "--by", "day", *options, "--json").json
        return {row["key"]: row["cost_nano_usd"] for row in told["rows"]}

    assert costs(*OCTOBER) == {"2026-10-30": 3 * USD, "2026-10-31": USD}
    assert costs("--account", "acme", *OCTOBER) == {}
    assert costs("--account", "acme", *NOVEMBER) == {"2026-11-01": USD}
    berlin = ("--time-zone", "Europe/Berlin", "--from", "2026-10-31", "--to", "2026-11-01")
    assert costs(*berlin) == {"2026-10-31": 3 * USD, "2026-11-01": USD}


def test_nothing_is_said_to_be_nothing(command: Command) -> None:
    done = command("spend", "report", "--account", "birch", *NOVEMBER)
    assert done == (
        *(0, ""),
        "sluice: nothing was spent from 2026-11-01 to 2026-11-30 by birch (UTC)\n",
    )
    told = command("spend", "report", *NOVEMBER, "--json").json
    assert (told["rows"], told["total"]["requests"]) == ([], 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--from", "1.11.2026"), "--from: '1.11.2026' is not a day such as 2026-11-23"),
        (("--to", "2026-02-30"), "--to: '2026-02-30' is not a day such as 2026-11-23"),
        (
            ("--from", "2026-11-02", "--to", "2026-11-01"),
            "--from: 2026-11-02 is after the last day, 2026-11-01",
        ),
        (
            ("--from", "1999-01-01", "--to", "2026-11-01"),
            "--from: 1999-01-01 to 2026-11-01 are more than 3660 days",
        ),
        (("--to", "9999-12-31"), "--to: must be a day from 1970-01-01 to 9998-12-31"),
        (("--account", "nobody"), "--account: there is no account 'nobody'"),
        (("--time-zone", "Mars"), "--time-zone: 'Mars' is not an IANA time zone"),
        (
            ("--account", "acme", "--time-zone", "UTC"),
            "--time-zone: the days of an account are those of its own time zone",
        ),
        (("--json", "--csv"), "--csv: is another shape than --json; leave one of the two away"),
        (("--plot", "spend.pdf"), "--plot: spend.pdf must end in .png or .svg"),
        (("--by", "colour"), "'colour' is not one of 'provider', 'model', 'use_case'"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    command: Command, options: tuple[str, ...], says: str
) -> None:
    done = command("spend", "report", *options)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert done.err.count("\n") == 1


def test_a_picture_goes_beside_the_table(command: Command) -> None:
    done = command("spend", "report", *OCTOBER, "--plot", "spend.svg")
    assert done.code == 0
    assert done.out.startswith("use case\t")
    picture = Path("spend.svg").read_text()
    assert "<!-- voice  $3.00 -->" in picture
    assert "<!-- draft  $1.00 -->" in picture
    assert command("spend", "report", *NOVEMBER, "--plot", "nothing.png").code == 0
    assert Path("nothing.png").stat().st_size > 1000

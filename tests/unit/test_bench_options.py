"""What `./dev bench` makes of its arguments."""

from __future__ import annotations

import pytest

from tests.benchmarks.run import _options, main


@pytest.mark.parametrize("more", [[], ["--http"]])
def test_a_case_over_http_is_measured_as_one(more: list[str]) -> None:
    options = _options([*more, "--case", "http_50_per_s", "http_first_token"])
    assert options.http
    assert options.case == ["http_50_per_s", "http_first_token"]


def test_other_cases_are_not() -> None:
    assert not _options(["--case", "plain_asyncio"]).http
    assert not _options([]).http


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--case", "http_50_per_s", "plain_asyncio"],
            "cases over HTTP are measured alone: leave out plain_asyncio",
        ),
        (
            ["--http", "--case", "plain_asyncio"],
            "cases over HTTP are measured alone: leave out plain_asyncio",
        ),
        (
            ["--cost", "--case", "http_50_per_s"],
            "--cost and --reports have no cases: leave --case out",
        ),
        (
            ["--reports", "--case", "plain_asyncio"],
            "--cost and --reports have no cases: leave --case out",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"bench: error: {said}"

"""Statements through an outage: repeated while the server is away, and for nothing else."""

from __future__ import annotations

import psycopg
import psycopg.errors
import pytest

from sluicegate.shared.statements import through_disconnects


class _Failing:
    """Raises these errors, one a call, then returns; counts calls and what is told of them."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.calls = 0
        self.told = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self._errors:
            raise self._errors.pop(0)
        return "done"

    async def tell(self) -> None:
        self.told += 1


@pytest.mark.parametrize("failures", [0, 1, 2])
async def test_a_server_that_is_away_is_asked_again(failures: int) -> None:
    run = _Failing(*[psycopg.OperationalError() for _ in range(failures)])
    found = await through_disconnects(run, give_up_after_s=None, on_disconnect=run.tell)
    assert (found, run.calls, run.told) == ("done", failures + 1, failures)


@pytest.mark.parametrize("before", [0, 1])
async def test_what_the_server_refuses_is_raised_at_once(before: int) -> None:
    refused = psycopg.errors.UniqueViolation()
    run = _Failing(*[psycopg.OperationalError() for _ in range(before)], refused)
    with pytest.raises(psycopg.errors.UniqueViolation) as caught:
        await through_disconnects(run, give_up_after_s=None, on_disconnect=run.tell)
    assert caught.value is refused
    assert (run.calls, run.told) == (before + 1, before)


async def test_it_gives_up_when_its_time_is_over() -> None:
    last = psycopg.OperationalError("the first and last")
    run = _Failing(last, psycopg.OperationalError())
    with pytest.raises(psycopg.OperationalError) as caught:
        await through_disconnects(run, give_up_after_s=0, on_disconnect=run.tell)
    assert caught.value is last
    assert run.calls == 1

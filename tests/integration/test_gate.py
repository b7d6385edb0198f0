"""The gate on the real server: the same lives as in the unit tests, and what only it can show."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest
import redis
import redis.asyncio
from redis.exceptions import RedisError

from sluicegate.shared.admission import keys
from sluicegate.shared.admission.gate import Ask, Gate, Outcome, Reason, Report, Verdict
from sluicegate.shared.admission.states import read_states
from sluicegate.shared.catalogue import Provider
from sluicegate.shared.jobs import Lane
from sluicegate.shared.settings import Settings
from tests.gate_machine import ROWS, run_machine
from tests.gate_row import ACCOUNT, ROW_ID, GateRow, Server, provider
from tests.harness import FULL


@pytest.mark.timeout(1800 if FULL else 120)
@pytest.mark.parametrize("kind", ROWS)
def test_gate_does_as_its_model(gate_server: Server, settings: Settings, kind: str) -> None:
    run_machine(gate_server, settings, kind)


def _ask(row: Provider, **values: Any) -> Ask:
    given: dict[str, Any] = {
        "account_id": ACCOUNT,
        "lane": Lane.INTERACTIVE,
        "input_tokens": 9,
        "output_tokens": 1,
    }
    return Ask(attempt_id=uuid4(), provider=row, **(given | values))


def _report(ask: Ask, verdict: Verdict, outcome: Outcome) -> Report:
    return Report(
        attempt_id=ask.attempt_id,
        provider=ask.provider,
        account_id=ask.account_id,
        lane=ask.lane,
        generation=verdict.generation,
        is_probe=verdict.is_probe,
        outcome=outcome,
        reserved_input_tokens=ask.input_tokens,
        reserved_output_tokens=ask.output_tokens,
    )


async def test_time_is_the_servers_and_can_be_moved(
    async_redis: redis.asyncio.Redis, settings: Settings
) -> None:
    gate = Gate(async_redis, settings)
    row = provider()
    asks = [_ask(row) for _ in range(5)]
    verdicts = await gate.admit(asks)
    await gate.report([_report(*one, Outcome.FAILED) for one in zip(asks, verdicts, strict=True)])
    (refused,) = await gate.admit([_ask(row)])
    assert refused.reason is Reason.BREAKER
    assert 2 < refused.wait_s <= 6
    gate.clock_offset_us = 6_000_000
    (probe,) = await gate.admit([_ask(row)])
    assert probe.is_probe
    # It never goes back: for one whose offset is smaller it is as late as for the others.
    (other,) = await Gate(async_redis, settings).admit([_ask(row)])
    assert other.is_probe


async def test_many_processes_share_one_gate(
    async_redis: redis.asyncio.Redis, settings: Settings
) -> None:
    gates = [Gate(async_redis, settings) for _ in range(4)]
    # Each process has read the catalogue for itself.
    rows = [provider(max_concurrent=20, requests_per_minute=6_000) for _ in gates]
    answers = await asyncio.gather(
        *(
            gate.admit([_ask(row) for _ in range(5)])
            for gate, row in zip(gates, rows, strict=True)
            for _ in range(3)
        )
    )
    reasons = [verdict.reason for verdicts in answers for verdict in verdicts]
    assert reasons.count(None) == 20
    assert reasons.count(Reason.CONCURRENCY) == 40


async def test_one_bad_row_leaves_the_others_asked(
    async_redis: redis.asyncio.Redis, settings: Settings
) -> None:
    broken = provider(id=uuid4())
    await async_redis.set(keys.row_key(settings.redis_prefix, broken.id), "not a hash")
    gate = Gate(async_redis, settings)
    ask = _ask(provider(max_concurrent=1))
    with pytest.raises(RedisError, match="WRONGTYPE"):
        await gate.admit([_ask(broken), ask])
    # Asked again by itself it gets the answer that went down with the other's.
    (verdict,) = await gate.admit([ask])
    assert verdict.reason is None
    (other,) = await gate.admit([_ask(ask.provider)])
    assert other.reason is Reason.CONCURRENCY


async def test_a_restarted_server_is_told_the_scripts_again(
    async_redis: redis.asyncio.Redis, settings: Settings
) -> None:
    gate = Gate(async_redis, settings)
    row = provider(max_concurrent=2)
    asks = [_ask(row) for _ in range(3)]
    await async_redis.script_flush()
    verdicts = await gate.admit(asks)
    assert [verdict.reason for verdict in verdicts] == [None, None, Reason.CONCURRENCY]
    await async_redis.script_flush()
    await gate.renew({ROW_ID: [ask.attempt_id for ask in asks]})
    await async_redis.script_flush()
    await gate.report([_report(asks[0], verdicts[0], Outcome.SUCCEEDED)])
    assert (await gate.admit([asks[2]]))[0].reason is None


async def test_a_flushed_server_loses_nothing_but_state(
    async_redis: redis.asyncio.Redis, settings: Settings
) -> None:
    gate = Gate(async_redis, settings)
    row = provider(max_concurrent=2, tokens_per_minute=1000)
    asks = [_ask(row) for _ in range(2)]
    verdicts = await gate.admit(asks)
    names = [name async for name in async_redis.scan_iter(f"{settings.redis_prefix}*")]
    await async_redis.delete(*names)
    await gate.renew({ROW_ID: [ask.attempt_id for ask in asks]})
    await gate.report([_report(*one, Outcome.REFUSED) for one in zip(asks, verdicts, strict=True)])
    assert not [name async for name in async_redis.scan_iter(f"{settings.redis_prefix}*")]
    assert (await gate.admit([_ask(row)]))[0].reason is None


def test_nothing_of_a_row_stays_for_ever(
    gate_server: Server, settings: Settings, redis_client: redis.Redis
) -> None:
    row = GateRow(gate_server, settings, requests_per_minute=600)
    row.make(Outcome.FAILED, 5)
    row.wait(5)
    row.call()
    row.call(Lane.BULK, account_id=uuid4())
    row.wait(16)
    row.ask(line_up=True)
    row.wait(30)
    row.end(row.call(), Outcome.REFUSED)
    row.end(row.call(Lane.BULK, account_id=uuid4()), Outcome.REFUSED)
    row.call(account_id=uuid4())
    row.call(Lane.BULK, account_id=uuid4())
    names = set(redis_client.scan_iter(f"{settings.redis_prefix}*"))
    changes = keys.changes_key(settings.redis_prefix).encode()
    assert names == {*(name.encode() for name in (row.key, *row.sets)), changes}
    for name in names - {changes}:
        assert 86_400 < redis_client.ttl(name) <= 86_400 + 3_600, name


def test_states_of_rows_nobody_called(redis_client: redis.Redis, settings: Settings) -> None:
    ids = [uuid4(), uuid4()]
    states = read_states(redis_client, settings.redis_prefix, ids)
    assert [(state.provider_id, state.state) for state in states] == [
        (one, "closed") for one in ids
    ]
    assert read_states(redis_client, settings.redis_prefix, []) == []

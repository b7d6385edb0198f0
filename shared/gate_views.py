"""The gates of provider rows as they are shown: what operators ordered, and what Redis knows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import redis
from sqlalchemy import Connection

from sluicegate.shared.accounts import list_accounts
from sluicegate.shared.admission.states import BreakerState, GateState, read_states
from sluicegate.shared.gate_changes import last_changes, list_pauses
from sluicegate.shared.provider_changes import ProviderEntry, list_providers


@dataclass(frozen=True, slots=True, kw_only=True)
class GateView:
    """The gate of one provider row: what an operator ordered, and what Redis knows."""

    entry: ProviderEntry
    gate: GateState
    #: Since when it is paused; None: it is not.
    paused_at: datetime | None
    #: Since when its breaker is in the state that it is in; None: not known, or always.
    since: datetime | None
    #: Seconds that are left, by the name of the account.
    suspended: dict[str, float]

    @property
    def state(self) -> BreakerState | Literal["paused", "forced_open", "disabled"]:
        """What decides whether calls leave."""
        if self.paused_at is not None:
            return "paused"
        lever = self.entry.provider.breaker
        return self.gate.state if lever == "auto" else lever


def read_gates(connection: Connection, client: redis.Redis, prefix: str) -> list[GateView]:
    """Read the gates of all active rows; raises what Postgres and Redis raise."""
    listed = [entry for entry in list_providers(connection) if entry.is_active]
    paused = {
        (one.name, one.account): one.since
        for one in list_pauses(connection)
        if one.kind == "provider"
    }
    levers = last_changes(connection, "lever")
    breakers = last_changes(connection, "breaker")
    names = {account.id: account.name for account in list_accounts(connection)}
    found = []
    gates = read_states(client, prefix, [entry.provider.id for entry in listed])
    for entry, gate in zip(listed, gates, strict=True):
        row = entry.provider
        state: str
        state, changes = (gate.state, breakers) if row.breaker == "auto" else (row.breaker, levers)
        # Redis may have forgotten what the trail knows, and the trail may be a second late.
        changed_to, changed_at = changes.get(row.id, (None, None))
        paused_at = paused.get((row.name, entry.account))
        found.append(
            GateView(
                entry=entry,
                gate=gate,
                paused_at=paused_at,
                since=paused_at or (changed_at if changed_to == state else None),
                suspended={
                    names.get(account_id, str(account_id)): left_s
                    for account_id, left_s in gate.suspensions.items()
                },
            )
        )
    return found


def describe(view: GateView) -> dict[str, Any]:
    """Return all of a gate, by name."""
    row, gate = view.entry.provider, view.gate
    return {
        "id": str(row.id),
        "name": row.name,
        "account": view.entry.account,
        "state": view.state,
        "since": view.since,
        "breaker": gate.state,
        "lever": row.breaker,
        "paused": view.paused_at is not None,
        "generation": gate.generation,
        "half_open_in_s": gate.half_open_in_s,
        "probes": gate.probes,
        "calls": gate.calls,
        "failures": gate.failures,
        "streak": gate.streak,
        "cooldown_left_s": gate.cooldown_left_s,
        "in_flight": gate.in_flight,
        "in_flight_bulk": gate.in_flight_bulk,
        "concurrency_cap": gate.concurrency_cap,
        "requests_per_minute": row.requests_per_minute,
        "tokens_per_minute": row.tokens_per_minute,
        "input_tokens_per_minute": row.input_tokens_per_minute,
        "output_tokens_per_minute": row.output_tokens_per_minute,
        "max_concurrent": row.max_concurrent,
        "suspended": [
            {"account": name, "left_s": left_s} for name, left_s in view.suspended.items()
        ],
    }

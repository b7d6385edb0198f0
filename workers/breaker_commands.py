"""Commands for the gates of providers: `sluice breaker list|force-open|disable|reset|log`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from sluicegate.shared.connecting import catalogue_change, connection
from sluicegate.shared.settings import get_settings
from sluicegate.shared.terminal import AsJson, moment, note, print_json, print_table

if TYPE_CHECKING:
    import redis

    from sluicegate.shared.gate_changes import Lever

app = typer.Typer(pretty_exceptions_enable=False)
breaker = typer.Typer(
    no_args_is_help=True, help="Gates of providers: breakers, limits, suspended accounts."
)
app.add_typer(breaker, name="breaker")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The provider's name in the catalogue.")]
Of = Annotated[
    str | None, typer.Option(metavar="ACCOUNT", help="The row that is this account's own.")
]


@breaker.command("list", epilog="Example: sluice breaker list --json")
def list_all(*, as_json: AsJson = False) -> None:
    """List the gates of all active providers: who may be called now, and what keeps calls away."""
    from sluicegate.shared.gate_views import read_gates
    from sluicegate.workers.breaker_display import COLUMNS, as_json_object, cells

    with connection() as line, _redis() as client:
        gates = read_gates(line, client, get_settings().redis_prefix)
    if as_json:
        print_json({"breakers": [as_json_object(gate) for gate in gates]})
        return
    print_table(COLUMNS, [cells(gate) for gate in gates])


@breaker.command("force-open", epilog="Example: sluice breaker force-open openai-gpt-6-luna")
def force_open(name: Name, *, of: Of = None, as_json: AsJson = False) -> None:
    """Send no call to a provider until its breaker is reset, whatever it answers."""
    _pull(name, of, "forced_open", as_json=as_json)


@breaker.command("disable", epilog="Example: sluice breaker disable openai-gpt-6-luna")
def disable(name: Name, *, of: Of = None, as_json: AsJson = False) -> None:
    """Have a breaker never open, however many calls fail, until it is reset."""
    _pull(name, of, "disabled", as_json=as_json)


@breaker.command("reset", epilog="Example: sluice breaker reset openai-gpt-6-luna")
def reset(
    name: Name,
    *,
    of: Of = None,
    account: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Only let this account, which is suspended, use it again."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Close a breaker and leave it to itself, end its rest, let suspended accounts use it again."""
    from sluicegate.shared.accounts import account_id_of
    from sluicegate.shared.admission import states
    from sluicegate.shared.gate_changes import end_suspensions, pull_lever
    from sluicegate.shared.provider_changes import find_provider

    prefix = get_settings().redis_prefix
    with catalogue_change() as line:
        row = find_provider(line, name, of)
        account_id = account_id_of(line, account)
        changed = account_id is None and pull_lever(line, row, "auto")
        end_suspensions(line, row.id, account_id)
    # The lever is back by now. Without Redis there is nothing more to reset but what it keeps over
    # its absence: the error says so, and all may be done again.
    with _redis() as client:
        if account_id is None:
            states.reset(client, prefix, row.id, reason="reset by command")
        lifted = states.lift_suspension(
            client, prefix, row.id, account_id, reason="lifted by command"
        )
    if as_json:
        print_json({"name": name, "account": of, "changed": changed, "lifted": lifted})
        return
    done = "reset" if account is None else f"{account} may use it"
    print_table(None, [(name, done, f"{lifted} suspended accounts let in again")])


def _pull(name: str, of: str | None, lever: Lever, *, as_json: bool) -> None:
    from sluicegate.shared.gate_changes import pull_lever
    from sluicegate.shared.provider_changes import find_provider

    with catalogue_change() as line:
        row = find_provider(line, name, of)
        changed = pull_lever(line, row, lever)
    word = lever.replace("_", " ")
    if as_json:
        print_json({"name": name, "account": of, "lever": lever, "changed": changed})
    else:
        print_table(None, [(name, word)])
    if not changed:
        note(f"{name} was {word} already")
    note(f"`sluice breaker reset {name}` leaves it to itself again")


@breaker.command("log", epilog="Example: sluice breaker log openai-gpt-6-luna --limit 20")
def log(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Of this provider; without it, of all.")
    ] = None,
    *,
    of: Of = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The newest so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List what has happened at the gates, newest first: breakers, suspensions, levers, pauses."""
    from sluicegate.shared.gate_changes import trail
    from sluicegate.shared.provider_changes import find_provider

    with connection() as line:
        provider_id = None if name is None else find_provider(line, name, of).id
        found = trail(line, provider_id=provider_id, limit=limit)
    if as_json:
        print_json(
            {
                "changes": [
                    {
                        "number": one.number,
                        "at": moment(one.at),
                        "kind": one.kind,
                        "provider": one.provider,
                        "account": one.account,
                        "use_case": one.use_case,
                        "before": one.before,
                        "after": one.after,
                        "reason": one.reason,
                    }
                    for one in found
                ]
            }
        )
        return
    print_table(
        ("at", "kind", "provider", "account", "use case", "before", "after", "reason"),
        [
            (
                *(moment(one.at), one.kind, one.provider or "", one.account or ""),
                *(one.use_case or "", one.before, one.after, one.reason),
            )
            for one in found
        ],
    )


@contextmanager
def _redis() -> Iterator[redis.Redis]:
    """Connect to Redis; raises QueueUnavailable if it does not answer."""
    import redis

    from sluicegate.shared.errors import QueueUnavailable
    from sluicegate.shared.redis_client import make_redis

    try:
        with make_redis(get_settings()) as client:
            yield client
    except (redis.RedisError, OSError) as error:
        raise QueueUnavailable(
            f"Redis did not answer: {error}; try again, and check SLUICE_REDIS_URL"
        ) from error

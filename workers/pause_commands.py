"""Commands that stop new calls for a while: `sluice pause`, and `sluice resume`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sluicegate.shared.connecting import catalogue_change, connection
from sluicegate.shared.errors import SettingsError
from sluicegate.shared.terminal import AsJson, age, moment, note, print_json, print_table

if TYPE_CHECKING:
    from sluicegate.shared.gate_changes import PauseKind

app = typer.Typer(pretty_exceptions_enable=False)

_Provider = Annotated[
    str | None, typer.Option(metavar="NAME", help="This provider, by its name in the catalogue.")
]
_Of = Annotated[
    str | None,
    typer.Option(metavar="ACCOUNT", help="With --provider: the row that is this account's own."),
]
_Account = Annotated[str | None, typer.Option(metavar="NAME", help="This account, by name or id.")]
_UseCase = Annotated[str | None, typer.Option(metavar="NAME", help="This use case.")]


@app.command(epilog="Example: sluice pause --provider openai-gpt-6-luna")
def pause(
    *,
    provider: _Provider = None,
    of: _Of = None,
    account: _Account = None,
    use_case: _UseCase = None,
    as_json: AsJson = False,
) -> None:
    """Stop new calls to a provider, or of an account or a use case, within 2 s.

    Calls under way go on. Jobs wait, or another provider takes them. Without an option, list what
    is paused.
    """
    _switch(provider, of, account, use_case, paused=True, as_json=as_json)


@app.command(epilog="Example: sluice resume --provider openai-gpt-6-luna")
def resume(
    *,
    provider: _Provider = None,
    of: _Of = None,
    account: _Account = None,
    use_case: _UseCase = None,
    as_json: AsJson = False,
) -> None:
    """Let go on what was paused, and the jobs that waited for it.

    Without an option, list what is paused.
    """
    _switch(provider, of, account, use_case, paused=False, as_json=as_json)


def _switch(
    provider: str | None,
    of: str | None,
    account: str | None,
    use_case: str | None,
    *,
    paused: bool,
    as_json: bool,
) -> None:
    from sluicegate.shared.gate_changes import set_pause
    from sluicegate.shared.pausing import own_rows, pause_subject

    given: dict[PauseKind, str | None] = {
        "provider": provider,
        "account": account,
        "use_case": use_case,
    }
    named = [(kind, name) for kind, name in given.items() if name is not None]
    if of is not None and provider is None:
        raise SettingsError("of: stands with --provider alone")
    if not named:
        _list(as_json=as_json)
        return
    if len(named) > 1:
        raise SettingsError("name one of --provider, --account and --use-case at a time")
    ((kind, called),) = named
    with catalogue_change() as line:
        subject, name = pause_subject(line, kind, called, of)
        changed = set_pause(line, kind, subject, paused=paused)
        others = own_rows(line, called) if kind == "provider" and paused and not of else []
    state = "paused" if paused else "running"
    if as_json:
        print_json({"kind": kind, "name": name, "account": of, "state": state, "changed": changed})
    else:
        print_table(None, [(kind.replace("_", " "), _whose(name, of), state)])
    if not changed:
        note(f"{kind.replace('_', ' ')} {_whose(name, of)} was {state} already")
    for owner in others:
        note(f"account {owner} has a row {name} of its own, not paused by this: --of {owner}")


def _whose(name: str, account: str | None) -> str:
    return name if account is None else f"{name} (of {account})"


def _list(*, as_json: bool) -> None:
    from sluicegate.shared.gate_changes import list_pauses

    with connection() as line:
        found = list_pauses(line)
    if as_json:
        print_json(
            {
                "paused": [
                    {
                        "kind": one.kind,
                        "name": one.name,
                        "account": one.account,
                        "since": moment(one.since),
                    }
                    for one in found
                ]
            }
        )
        return
    print_table(
        ("kind", "name", "paused for"),
        [
            (one.kind.replace("_", " "), _whose(one.name, one.account), age(one.since))
            for one in found
        ],
    )

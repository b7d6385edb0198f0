"""Commands for use cases: `sluice usecase list|show|add|set|disable|enable`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sluicegate.shared.connecting import catalogue_change, connection
from sluicegate.shared.errors import InvalidJob, NotFound, NothingToChange, UnknownPrice
from sluicegate.shared.settings import get_settings
from sluicegate.shared.terminal import AsJson, note, print_json, print_table, split

if TYPE_CHECKING:
    from sluicegate.shared.catalogue import Catalogue, Provider, UseCase

app = typer.Typer(pretty_exceptions_enable=False)
usecase = typer.Typer(no_args_is_help=True, help="Use cases: the kinds of work that jobs are.")
app.add_typer(usecase, name="usecase")

Name = Annotated[str, typer.Argument(metavar="NAME", help="What jobs call it.")]
Description = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What it is for, on one line.")
]
Prefer = Annotated[
    Literal["priority", "cheapest", "fastest"] | None,
    typer.Option(help="Which of the providers that serve it comes first."),
]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer when a job names none.")]
UnknownPolicy = Annotated[
    Literal["retry_once", "fail"] | None,
    typer.Option(help="What becomes of a job whose paid call has an unknown outcome."),
]
Force = Annotated[bool, typer.Option("--force", help="Even if jobs have nowhere to go then.")]


@usecase.command("list", epilog="Example: sluice usecase list --json")
def list_all(*, as_json: AsJson = False) -> None:
    """List all use cases, and which providers their jobs try, in order."""
    catalogue = _catalogue()
    rows = [catalogue.use_cases[name] for name in sorted(catalogue.use_cases)]
    if as_json:
        print_json({"use_cases": [_as_json(catalogue, row) for row in rows]})
        return
    print_table(
        ("name", "description", "prefer", "max tokens", "unknown", "active", "providers"),
        [
            (
                *(row.name, row.description, row.prefer, str(row.max_tokens), row.unknown_policy),
                *("yes" if row.is_active else "no", _providers(catalogue, row)),
            )
            for row in rows
        ],
    )


@usecase.command("show", epilog="Example: sluice usecase show draft")
def show(name: Name, *, as_json: AsJson = False) -> None:
    """Show one use case, and what its jobs go to."""
    catalogue = _catalogue()
    row = _find(catalogue, name)
    if as_json:
        print_json(_as_json(catalogue, row))
        return
    print_table(
        None,
        [
            ("name", row.name),
            ("description", row.description),
            ("prefer", row.prefer),
            ("max tokens", str(row.max_tokens)),
            ("unknown policy", row.unknown_policy),
            ("active", "yes" if row.is_active else "no"),
            ("providers", _providers(catalogue, row)),
        ],
    )


@usecase.command(
    "add", epilog="Example: sluice usecase add classify --max-tokens 256 --prefer cheapest"
)
def add(
    context: typer.Context,
    name: Name,
    *,
    description: Description = None,
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Who serves it, with commas between; without it, the default ones.",
        ),
    ] = None,
    prefer: Prefer = None,
    max_tokens: MaxTokens = None,
    unknown_policy: UnknownPolicy = None,
    as_json: AsJson = False,
) -> None:
    """Add a use case. Workers that run serve it a few seconds later."""
    from sluicegate.shared.use_case_changes import UseCaseChange, add_use_case

    change = UseCaseChange.of(**_given(context))
    providers = None if provider is None else split(provider)
    with catalogue_change() as line:
        add_use_case(line, name, change, providers=providers)
    _tell(name, as_json=as_json)


@usecase.command("set", epilog="Example: sluice usecase set voice --prefer fastest")
def set_some(
    context: typer.Context,
    name: Name,
    *,
    description: Description = None,
    provider: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Who serves it from now on, with commas between."),
    ] = None,
    prefer: Prefer = None,
    max_tokens: MaxTokens = None,
    unknown_policy: UnknownPolicy = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Change a use case: what is given, and nothing else."""
    from sluicegate.shared.use_case_changes import UseCaseChange, set_use_case

    change = UseCaseChange.of(**_given(context))
    providers = None if provider is None else split(provider)
    if providers is None and not change.model_fields_set:
        raise NothingToChange
    mode = get_settings().catalogue
    with catalogue_change() as line:
        set_use_case(line, name, change, mode=mode, providers=providers, force=force)
    _tell(name, as_json=as_json)


@usecase.command("disable", epilog="Example: sluice usecase disable voice")
def disable(name: Name, *, as_json: AsJson = False) -> None:
    """Refuse new jobs of a use case; those that are accepted are done."""
    waiting = _switch(name, active=False)
    if waiting:
        note(f"{waiting} of its jobs wait, and will be done")
    _tell(name, as_json=as_json)


@usecase.command("enable", epilog="Example: sluice usecase enable voice")
def enable(name: Name, *, as_json: AsJson = False) -> None:
    """Take jobs of a use case again."""
    _switch(name, active=True)
    _tell(name, as_json=as_json)


def _switch(name: str, *, active: bool) -> int:
    from sluicegate.shared.use_case_changes import switch_use_case

    with catalogue_change() as line:
        return switch_use_case(line, name, active=active)


def _given(context: typer.Context) -> dict[str, Any]:
    from sluicegate.shared.use_case_changes import UseCaseChange

    return {
        field: context.params[field]
        for field in UseCaseChange.model_fields
        if context.params[field] is not None
    }


def _catalogue() -> Catalogue:
    from sluicegate.shared.catalogue import read

    with connection() as line:
        return read(line)


def _find(catalogue: Catalogue, name: str) -> UseCase:
    row = catalogue.use_cases.get(name)
    if row is None:
        known = ", ".join(sorted(catalogue.use_cases))
        raise NotFound(f"there is no use case {name!r}; there are {known}")
    return row


def _tell(name: str, *, as_json: bool) -> None:
    """Show what a change has made of a use case, and whether jobs of it can be done."""
    catalogue = _catalogue()
    row = _find(catalogue, name)
    if as_json:
        print_json(_as_json(catalogue, row))
    else:
        state = "active" if row.is_active else "disabled"
        typer.echo(f"{name}\t{state}\t{_providers(catalogue, row)}")
    if not _candidates(catalogue, row):
        note(f"no provider serves it; `sluice provider set NAME --use-case {name}` lets one do so")


def _candidates(catalogue: Catalogue, row: UseCase) -> tuple[Provider, ...]:
    """Return what a small job of it tries, in order, for an account without rows of its own."""
    from sluicegate.shared.catalogue_changes import NOBODY, serving

    try:
        return serving(catalogue, row.name, account_id=NOBODY, mode=get_settings().catalogue)
    except (InvalidJob, UnknownPrice):
        return ()


def _providers(catalogue: Catalogue, row: UseCase) -> str:
    return ", ".join(provider.name for provider in _candidates(catalogue, row))


def _as_json(catalogue: Catalogue, row: UseCase) -> dict[str, Any]:
    return {
        "name": row.name,
        "description": row.description,
        "prefer": row.prefer,
        "max_tokens": row.max_tokens,
        "unknown_policy": row.unknown_policy,
        "is_active": row.is_active,
        "providers": [
            {"name": one.name, "pool": one.provider, "model": one.model}
            for one in _candidates(catalogue, row)
        ],
    }

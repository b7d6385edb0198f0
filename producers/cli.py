"""The command `submit`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.jobs import Lane
from sluicegate.shared.terminal import AsJson

if TYPE_CHECKING:
    from sluicegate.producers.client import JobHandle
    from sluicegate.shared.jobs import Result

app = typer.Typer(pretty_exceptions_enable=False)

#: More than any request may have: what is longer is refused, not read.
_STDIN_BYTES = 40_000_000


@app.command(epilog="Example: sluice submit draft 'Write a follow-up about the meeting.' --stream")
def submit(
    use_case: Annotated[str, typer.Argument(help="Such as draft, summary or general.")],
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from stdin.")],
    *,
    account: Annotated[str | None, typer.Option(help="Name or id.")] = None,
    system: Annotated[str | None, typer.Option(help="Standing instructions.")] = None,
    model: Annotated[str | None, typer.Option(help="A model, instead of the best choice.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.")] = None,
    lane: Annotated[Lane, typer.Option(help="Bulk is cheap and steady.")] = Lane.INTERACTIVE,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds after which the job is not worth doing.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key and request give the same job.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit one job, wait, and print the answer."""
    from sluicegate.producers.client import Sluice

    given = {
        "account": account,
        "system": system,
        "model": model,
        "max_tokens": max_tokens,
        "deadline": deadline,
        "idempotency_key": idempotency_key,
    }
    options: Any = {name: value for name, value in given.items() if value is not None}
    text = _stdin() if prompt == "-" else prompt
    with Sluice() as sluice:
        handle = sluice.submit(use_case, text, lane=lane, stream=stream, **options)
        try:
            if as_json:
                typer.echo(handle.result().model_dump_json())
            elif stream:
                _print_stream(handle)
            else:
                _print_answer(handle.result())
        except KeyboardInterrupt:
            typer.echo(
                f"sluice: job {handle.id} goes on; see `sluice job show {handle.id}`", err=True
            )
            raise


def _stdin() -> str:
    data = sys.stdin.buffer.read(_STDIN_BYTES)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidJob("prompt", "what stdin holds is not UTF-8 text") from None


def _print_stream(handle: JobHandle) -> None:
    """Print deltas as they come, and the whole answer again if some of them were lost."""
    from sluicegate.producers.outcomes import result_of
    from sluicegate.shared.events import Delta, Reset

    shown: list[str] = []
    for event in handle.events():
        match event.payload:
            case Delta(text=text):
                shown.append(text)
                typer.echo(text, nl=False)
            case Reset(model=model):
                _end_line(shown)
                typer.echo(f"sluice: starting again at {model}", err=True)
                shown.clear()
            case _ if event.terminal:
                _end_line(shown)
                result = result_of(event)
                if "".join(shown) != result.text:
                    if shown:
                        typer.echo("sluice: parts were lost, here is the whole answer", err=True)
                    _print_answer(result)


def _end_line(shown: Sequence[str]) -> None:
    if shown and not shown[-1].endswith("\n"):
        typer.echo()


def _print_answer(result: Result) -> None:
    if result.text:
        typer.echo(result.text)
    for call in result.tool_calls:
        typer.echo(json.dumps({"tool_call": {"name": call.name, "arguments": call.arguments}}))

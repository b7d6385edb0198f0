"""The command `submit`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.jobs import Lane
from sluicegate.shared.terminal import AsJson, console, money

if TYPE_CHECKING:
    from sluicegate.producers.handles import JobHandle
    from sluicegate.shared.jobs import Result

app = typer.Typer(pretty_exceptions_enable=False)

#: More than any request may have: what is longer is refused, not read.
_PROMPT_BYTES = 40_000_000


@app.command(epilog="Example: sluice submit draft 'Write a follow-up about the meeting.' --stream")
def submit(
    use_case: Annotated[
        str | None,
        typer.Argument(help="Such as draft; left out, it is chosen by what is asked."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; - or nothing reads it from stdin.")
    ] = None,
    *,
    file: Annotated[
        Path | None, typer.Option(help="Read the prompt from a file.", show_default=False)
    ] = None,
    account: Annotated[str | None, typer.Option(help="Name or id.")] = None,
    system: Annotated[str | None, typer.Option(help="Standing instructions.")] = None,
    model: Annotated[str | None, typer.Option(help="A model, instead of the best choice.")] = None,
    schema: Annotated[
        Path | None, typer.Option(help="A file with the JSON schema that the answer is to fit.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.")] = None,
    lane: Annotated[Lane, typer.Option(help="Bulk is cheap and steady.")] = Lane.INTERACTIVE,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds after which the job is not worth doing.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key and request give the same job.")
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Kept with the job; may be given again."),
    ] = None,
    reply_to: Annotated[
        str | None, typer.Option(help="A shared reply channel that gets the result too.")
    ] = None,
    request_id: Annotated[str | None, typer.Option(help="Your own id, kept with the job.")] = None,
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
        "metadata": _metadata(metadata) if metadata else None,
        "reply_to": reply_to,
        "request_id": request_id,
        "response_format": _schema(schema) if schema is not None else None,
    }
    options: Any = {name: value for name, value in given.items() if value is not None}
    if prompt is None and use_case is not None and len(use_case.split()) > 1:
        use_case, prompt = None, use_case  # a use case is one word, and few prompts are
    text = _prompt(prompt, file)
    with Sluice() as sluice:
        handle = sluice.submit(use_case, text, lane=lane, stream=stream, **options)
        try:
            if as_json:
                typer.echo(handle.result().model_dump_json())
            elif stream:
                _print_stream(handle)
            else:
                result = handle.result()
                _print_answer(result)
                _print_figures(result)
        except KeyboardInterrupt:
            typer.echo(
                f"sluice: job {handle.id} goes on; see `sluice job show {handle.id}`", err=True
            )
            raise


def _prompt(prompt: str | None, file: Path | None) -> str:
    """Take the prompt from where it is given: once."""
    if file is not None:
        if prompt is not None:
            raise InvalidJob("prompt", "is given twice: as an argument and by --file")
        return _read(file, "--file")
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise InvalidJob("prompt", "is missing: give it as an argument, by --file, or on stdin")
    return _decode(sys.stdin.buffer.read(_PROMPT_BYTES), "prompt", "what stdin holds")


def _metadata(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise InvalidJob("--metadata", f"must be KEY=VALUE, not {pair!r}")
        found[key] = value
    return found


def _schema(file: Path) -> dict[str, object]:
    try:
        return {"json_schema": json.loads(_read(file, "--schema"))}
    except ValueError as error:
        raise InvalidJob("--schema", f"{file} is not JSON: {error}") from None


def _read(file: Path, option: str) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(_PROMPT_BYTES)
    except OSError as error:
        raise InvalidJob(option, f"{file} cannot be read: {error.strerror}") from None
    return _decode(data, option, str(file))


def _decode(data: bytes, field: str, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidJob(field, f"{what} is not UTF-8 text") from None


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


def _print_figures(result: Result) -> None:
    """Tell somebody at a terminal which job that was, and what it took."""
    if not sys.stderr.isatty():
        return
    figures = [f"job {result.job_id}", result.model or "", money(result.cost_nano_usd)]
    if result.created_at and result.finished_at:
        figures.append(f"{(result.finished_at - result.created_at).total_seconds():.1f} s")
    line = ", ".join(filter(None, figures))
    for said in (*result.warnings, line):
        console(stderr=True).print(said, style="dim", highlight=False, markup=False, soft_wrap=True)

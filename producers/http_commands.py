"""The command `http`."""

# What takes long to import is imported by the command that needs it.
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(pretty_exceptions_enable=False)


@app.command(epilog="Example: sluice http --sandbox --port 3002")
def http(
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 picks a free one.")] = 3002,
    *,
    sandbox: Annotated[
        bool,
        typer.Option(
            "--sandbox", help="Programs on this machine need no key; for trying things out."
        ),
    ] = False,
) -> None:
    """Serve HTTP: /api/llm, and what OpenAI's and Anthropic's own clients speak.

    Jobs go through the queue, so a worker has to run beside it; see `sluice up --http`. Several of
    these may run at once. SIGTERM ends it: what is asked just now is answered or told where to look
    again, and no job is lost. Everything that it takes is described at /docs.
    """
    from sluicegate.producers.http.server import run
    from sluicegate.shared.addresses import Address
    from sluicegate.shared.settings import get_settings

    run(get_settings(), Address(host, port), is_sandbox=sandbox)

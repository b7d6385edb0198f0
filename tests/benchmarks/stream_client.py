"""Reads streams as they come: submits a streamed job, reads its events, submits the next."""

from __future__ import annotations

import argparse
import asyncio
from itertools import count

import uvloop

from sluicegate.producers.async_client import AsyncSluice
from sluicegate.shared.events import Completed, Delta
from tests.benchmarks.prompts import STREAMED_TOKENS, prompt


async def read_streams(sluice: AsyncSluice, numbers: count[int]) -> None:
    """Read one stream after the other for ever; raise if the deltas are not the answer."""
    while True:
        job = await sluice.submit("general", prompt(next(numbers), STREAMED_TOKENS), stream=True)
        text = ""
        async for event in job.events():
            match event.payload:
                case Delta(text=more):
                    text += more
                case Completed(result=result):
                    # What had not been sent by then the terminal event brings.
                    assert text, "a stream without deltas"
                    assert result.text.startswith(text), (text, result.text)


async def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, required=True, help="read at the same time")
    streams = parser.parse_args().streams
    numbers = count()
    async with AsyncSluice() as sluice, asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(read_streams(sluice, numbers))


if __name__ == "__main__":
    uvloop.run(main())

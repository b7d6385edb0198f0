"""What one writes without a fleet: tasks around `AsyncOpenAI`. Nothing is queued, kept or counted.

With `--ceiling` it uses the SDK's aiohttp client on uvloop: about what Python can do at all.
"""

from __future__ import annotations

import argparse
import asyncio

import uvloop
from openai import AsyncOpenAI, DefaultAioHttpClient

from tests.benchmarks.prompts import prompt


async def run(client: AsyncOpenAI, *, model: str, jobs: int, in_flight: int) -> list[str]:
    """Ask for `jobs` answers, `in_flight` at a time, and return them."""
    slots = asyncio.Semaphore(in_flight)

    async def ask(n: int) -> str:
        async with slots:
            completion = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt(n)}],
                max_completion_tokens=1024,
            )
        return completion.choices[0].message.content or ""

    async with client:
        return await asyncio.gather(*map(ask, range(jobs)))


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--ceiling", action="store_true")
    options = parser.parse_args()

    async def ask_all() -> None:
        # The SDK's own retries would hide errors from the comparison.
        http_client = DefaultAioHttpClient() if options.ceiling else None
        client = AsyncOpenAI(max_retries=0, http_client=http_client)
        await run(client, model=options.model, jobs=options.jobs, in_flight=options.in_flight)

    if options.ceiling:
        uvloop.run(ask_all())
    else:
        asyncio.run(ask_all())


if __name__ == "__main__":
    main()

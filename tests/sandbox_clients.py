"""The sandbox provider as a process for tests, and both SDKs as its clients."""

from __future__ import annotations

import http.client
import json
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx2
import openai

from sluicegate.workers.local.sandbox_control import SandboxControl

PROMPT = "TOKENS: 20"
OPENAI_MODEL = "gpt-6-luna"
ANTHROPIC_MODEL = "claude-haiku-5-5"
FAST = ("--latency-ms", "5", "--first-token-ms", "5", "--tokens-per-s", "2000")
#: What the SDKs wait where nothing will come.
IMPATIENT_S = 0.5
DEADLINE_S = 20


@contextmanager
def running(*options: str) -> Iterator[tuple[SandboxControl, subprocess.Popen[bytes]]]:
    """Run a sandbox with these options."""
    command = [sys.executable, "-m", "sluicegate.workers.local.sandbox", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            readable, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
            assert readable, "the sandbox did not say its port in time"
            port = json.loads(process.stdout.readline())["port"]
            yield SandboxControl(f"http://127.0.0.1:{port}"), process
        finally:
            process.terminate()
            process.wait(DEADLINE_S)


@contextmanager
def serving() -> Iterator[SandboxControl]:
    """Run a fast sandbox for a test module, and see that it ends without a complaint."""
    with running(*FAST) as (control, process):
        yield control
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert errors == b""  # nothing that clients or faults did was an error of ours
    assert process.returncode == 0


def cleaned(sandbox: SandboxControl) -> SandboxControl:
    """Forget what an earlier test did to it."""
    sandbox.reset()
    sandbox.settings(latency_ms=5, latency_jitter_ms=0, first_token_ms=5, tokens_per_s=2000)
    sandbox.settings(headers={})
    return sandbox


@dataclass
class Seen:
    """What an application saw of one call."""

    text: str = ""
    stop: str | None = None
    usage: tuple[int, int] | None = None
    last_event: str | None = None
    body: object = None
    error: Exception | None = None


async def ask_gpt(client: Any, prompt: str, *, stream: bool, model: str = OPENAI_MODEL) -> Seen:
    seen = Seen()
    request: dict[str, Any] = {"model": model, "max_completion_tokens": 500}
    request["messages"] = [{"role": "user", "content": prompt}]
    try:
        if not stream:
            seen.body = whole = await client.chat.completions.create(**request)
            if getattr(whole, "choices", None):
                seen.text = whole.choices[0].message.content
                seen.stop = whole.choices[0].finish_reason
            if getattr(whole, "usage", None):
                seen.usage = (whole.usage.prompt_tokens, whole.usage.completion_tokens)
            return seen
        request |= {"stream": True, "stream_options": {"include_usage": True}}
        async for chunk in await client.chat.completions.create(**request):
            if chunk.usage:
                seen.usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
            for choice in chunk.choices:
                seen.text += choice.delta.content or ""
                seen.stop = choice.finish_reason or seen.stop
    except (openai.OpenAIError, httpx2.HTTPError, ValueError) as error:
        seen.error = error
    return seen


async def ask_claude(
    client: Any, prompt: str, *, stream: bool, model: str = ANTHROPIC_MODEL
) -> Seen:
    seen = Seen()
    request: dict[str, Any] = {"model": model, "max_tokens": 500}
    request["messages"] = [{"role": "user", "content": prompt}]
    try:
        if not stream:
            seen.body = whole = await client.messages.create(**request)
            if getattr(whole, "content", None):
                seen.text = whole.content[0].text
                seen.stop = whole.stop_reason
            if getattr(whole, "usage", None):
                seen.usage = (whole.usage.input_tokens, whole.usage.output_tokens)
            return seen
        prompt_tokens = None
        async for event in await client.messages.create(**request, stream=True):
            seen.last_event = event.type
            if event.type == "message_start" and event.message.usage:
                prompt_tokens = event.message.usage.input_tokens
            elif event.type == "content_block_delta":
                seen.text += event.delta.text
            elif event.type == "message_delta":
                seen.stop = event.delta.stop_reason
                if prompt_tokens is not None and event.usage:
                    seen.usage = (prompt_tokens, event.usage.output_tokens)
    except (anthropic.AnthropicError, httpx2.HTTPError, ValueError) as error:
        seen.error = error
    return seen


@dataclass(frozen=True)
class Clients:
    """Both SDKs. Typed loosely: their parameter types want literals that tests make at run time."""

    gpt: Any
    claude: Any

    async def ask(self, wire: str, *, stream: bool, timeout_s: float = DEADLINE_S) -> Seen:
        if wire == "openai":
            return await ask_gpt(self.gpt.with_options(timeout=timeout_s), PROMPT, stream=stream)
        return await ask_claude(self.claude.with_options(timeout=timeout_s), PROMPT, stream=stream)


@asynccontextmanager
async def clients_of(sandbox: SandboxControl) -> AsyncIterator[Clients]:
    """Make both SDK clients."""
    common: Any = {"api_key": "any", "max_retries": 0, "timeout": DEADLINE_S}
    # Without certificates, which take most of the time that making a client takes.
    async with (
        openai.AsyncOpenAI(
            base_url=sandbox.openai_base_url,
            http_client=openai.DefaultAsyncHttpxClient(verify=False),
            **common,
        ) as gpt,
        anthropic.AsyncAnthropic(
            base_url=sandbox.anthropic_base_url,
            http_client=anthropic.DefaultAsyncHttpxClient(verify=False),
            **common,
        ) as claude,
    ):
        yield Clients(gpt, claude)


def only_call(sandbox: SandboxControl) -> dict[str, Any]:
    """Return the one call that was made, once it has finished."""
    sandbox.wait_for_calls(1, DEADLINE_S, finished=True)
    (call,) = sandbox.calls()
    return call


def post(sandbox: SandboxControl, path: str, body: object) -> bytes:
    """Post without an SDK and return the body as it came."""
    url = httpx2.URL(sandbox.anthropic_base_url)
    connection = http.client.HTTPConnection(url.host, url.port or 80, timeout=DEADLINE_S)
    try:
        connection.request("POST", path, json.dumps(body).encode())
        return connection.getresponse().read()
    finally:
        connection.close()


@contextmanager
def connected(sandbox: SandboxControl) -> Iterator[socket.socket]:
    """Open a plain connection."""
    url = httpx2.URL(sandbox.anthropic_base_url)
    with socket.create_connection((url.host, url.port or 80), timeout=DEADLINE_S) as connection:
        yield connection


def raw_request(prompt: str, **more: object) -> bytes:
    """Write an OpenAI request as bytes."""
    body = {"model": OPENAI_MODEL, "messages": [{"role": "user", "content": prompt}]} | more
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data
